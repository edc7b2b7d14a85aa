//! The image seen by block: what is read and checked as one, and whose pages are in it.

use std::collections::BTreeMap;

use torpor_image::{PageRun, Reader};
use torpor_sys::PAGE_SIZE;

use crate::error::Result;

const BLOCK: u64 = torpor_image::BLOCK_SIZE as u64;
/// Where the data of an image begins: after its header page.
const DATA_START: u64 = PAGE_SIZE;

/// A part of an address space that lies in one block.
#[derive(Debug, Clone, Copy)]
pub struct Part {
    /// Its address when it was saved.
    pub was: u64,
    /// Where it is in the file.
    pub offset: u64,
    /// Its length in bytes.
    pub len: u64,
}

/// One block that holds something of an address space.
#[derive(Debug)]
pub struct Block {
    /// An offset in it.
    pub offset: u64,
    /// What of the address space is in it.
    pub parts: Vec<Part>,
}

/// The blocks of one address space, by offset.
#[derive(Debug, Default)]
pub struct Blocks(pub Vec<Block>);

impl Blocks {
    /// Of the runs of one address space.
    pub fn of(runs: &[PageRun]) -> Blocks {
        let mut blocks: BTreeMap<u64, Vec<Part>> = BTreeMap::new();
        for run in runs.iter().filter(|r| !r.is_zero()) {
            let mut at = run.offset;
            let end = run.offset + run.bytes();
            while at < end {
                let block = block_of(at);
                let next = start_of(block + 1).min(end);
                blocks.entry(block).or_default().push(Part {
                    was: run.start + (at - run.offset),
                    offset: at,
                    len: next - at,
                });
                at = next;
            }
        }
        let all = blocks.into_iter().map(|(block, parts)| Block {
            offset: start_of(block),
            parts,
        });
        Blocks(all.collect())
    }

    /// The number of the block that an offset is in.
    pub fn find(&self, offset: u64) -> Option<usize> {
        self.0
            .binary_search_by_key(&start_of(block_of(offset)), |b| b.offset)
            .ok()
    }
}

/// Where in the file the page is that was at this address; `None` when it held nothing.
pub fn stored_at(runs: &[PageRun], was: u64) -> Option<u64> {
    let at = runs.partition_point(|r| r.end() <= was);
    let run = runs.get(at).filter(|r| r.start <= was && !r.is_zero())?;
    Some(run.offset + (was - run.start))
}

/// Reads and checks every block up to an offset: what a restore needs before memory is filled.
pub fn verify_until(image: &Reader, offset: u64) -> Result<()> {
    let mut buffer = Vec::new();
    for block in 0..offset.saturating_sub(DATA_START).div_ceil(BLOCK) {
        image.read_block(start_of(block), &mut buffer)?;
    }
    Ok(())
}

fn block_of(offset: u64) -> u64 {
    offset.saturating_sub(DATA_START) / BLOCK
}

fn start_of(block: u64) -> u64 {
    DATA_START + block * BLOCK
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_cut_where_blocks_begin_and_pages_may_be_shared() {
        let pages = BLOCK / PAGE_SIZE;
        let runs = [
            PageRun::data(0, 0x1000, DATA_START + BLOCK - PAGE_SIZE, 2),
            PageRun::data(0, 0x9000, DATA_START + BLOCK, 1),
        ];
        let blocks = Blocks::of(&runs);
        let seen: Vec<_> = blocks.0.iter().map(|b| (b.offset, b.parts.len())).collect();
        assert_eq!(seen, [(DATA_START, 1), (DATA_START + BLOCK, 2)]);
        assert_eq!(blocks.0[1].parts[0].was, 0x2000);
        assert_eq!(blocks.find(DATA_START + BLOCK + 5 * PAGE_SIZE), Some(1));
        assert_eq!(blocks.find(DATA_START + 2 * pages * PAGE_SIZE), None);
        assert_eq!(stored_at(&runs, 0x2000), Some(DATA_START + BLOCK));
        assert_eq!(stored_at(&runs, 0x3000), None);
    }
}
