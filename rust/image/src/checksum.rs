//! Checksums over bytes that stream by, and over the data area block by block.

use std::fmt;

use xxhash_rust::xxh3::{Xxh3, xxh3_64};

use crate::layout::BLOCK_SIZE;

/// XXH3-64 of a whole slice.
pub(crate) fn of(data: &[u8]) -> u64 {
    xxh3_64(data)
}

/// XXH3 over pieces.
#[derive(Clone)]
pub(crate) struct Rolling(Box<Xxh3>);

impl Rolling {
    pub(crate) fn new() -> Rolling {
        Rolling(Box::new(Xxh3::new()))
    }

    pub(crate) fn update(&mut self, data: &[u8]) {
        self.0.update(data);
    }

    pub(crate) fn digest(&self) -> u64 {
        self.0.digest()
    }

    pub(crate) fn digest128(&self) -> u128 {
        self.0.digest128()
    }
}

impl fmt::Debug for Rolling {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        out.write_str("Rolling")
    }
}

/// One checksum per block of the data area, computed while the bytes pass.
#[derive(Debug)]
pub(crate) struct BlockTable {
    current: Rolling,
    filled: usize,
    sums: Vec<u64>,
}

impl BlockTable {
    pub(crate) fn new() -> BlockTable {
        BlockTable {
            current: Rolling::new(),
            filled: 0,
            sums: Vec::new(),
        }
    }

    /// Bytes until the current block is full.
    pub(crate) fn room(&self) -> usize {
        BLOCK_SIZE - self.filled
    }

    /// Takes the next bytes of the data area; they may span blocks.
    pub(crate) fn update(&mut self, mut data: &[u8]) {
        while !data.is_empty() {
            let (piece, rest) = data.split_at(data.len().min(self.room()));
            if piece.len() == BLOCK_SIZE {
                self.sums.push(of(piece));
            } else {
                self.current.update(piece);
                self.filled += piece.len();
                if self.filled == BLOCK_SIZE {
                    self.close();
                }
            }
            data = rest;
        }
    }

    fn close(&mut self) {
        self.sums.push(self.current.digest());
        self.current.0.reset();
        self.filled = 0;
    }

    /// The sums of all blocks, the last one short.
    pub(crate) fn finish(mut self) -> Vec<u64> {
        if self.filled > 0 {
            self.close();
        }
        self.sums
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sums_do_not_depend_on_how_the_bytes_arrive() {
        let data: Vec<u8> = (0..3 * BLOCK_SIZE + 777).map(|n| ((n * 31) >> 3) as u8).collect();
        let expected: Vec<u64> = data.chunks(BLOCK_SIZE).map(of).collect();
        for step in [4096, 40_000, BLOCK_SIZE - 1, BLOCK_SIZE, BLOCK_SIZE + 1, data.len()] {
            let mut table = BlockTable::new();
            data.chunks(step).for_each(|piece| table.update(piece));
            assert_eq!(table.finish(), expected, "step {step}");
        }
        assert!(BlockTable::new().finish().is_empty());
    }

    #[test]
    fn the_known_value_of_nothing_and_of_a_text() {
        // From the reference implementation: the file format depends on these never changing.
        assert_eq!(of(b""), 0x2d06_8005_38d3_94c2);
        let mut rolling = Rolling::new();
        rolling.update(b"tor");
        rolling.update(b"por");
        assert_eq!(rolling.digest(), of(b"torpor"));
    }
}
