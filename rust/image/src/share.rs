//! Pages that several spaces have in common: stored once, named by a run of each.

use std::collections::BTreeMap;

use crate::layout::{PAGE, PageRun};

/// Pages from `start` to `end` that the space `to` has in common with the space `from`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Share {
    /// The space whose pages are in the image.
    pub from: u32,
    /// The space that gets them too.
    pub to: u32,
    /// First address, the same in both spaces.
    pub start: u64,
    /// First address after them.
    pub end: u64,
}

impl Share {
    /// What of a run that it touches is shared.
    fn part(&self, run: &PageRun) -> PageRun {
        let start = run.start.max(self.start);
        let offset = if run.is_zero() {
            0
        } else {
            run.offset + (start - run.start)
        };
        PageRun {
            space: self.to,
            start,
            pages: (run.end().min(self.end) - start) / PAGE,
            offset,
            flags: run.flags,
        }
    }
}

/// The runs that `shares` add to those that are there.
pub(crate) fn runs(there: &[PageRun], shares: &[Share]) -> Vec<PageRun> {
    let mut known: BTreeMap<u32, Vec<PageRun>> = shares.iter().map(|share| (share.from, Vec::new())).collect();
    for run in there {
        if let Some(runs) = known.get_mut(&run.space) {
            runs.push(*run);
        }
    }
    for runs in known.values_mut() {
        runs.sort_unstable();
    }
    let mut all = Vec::new();
    for group in shares.chunk_by(|a, b| a.to == b.to) {
        let mut new = Vec::new();
        for share in group {
            let of = known.get(&share.from).map_or(&[][..], Vec::as_slice);
            let first = of.partition_point(|run| run.end() <= share.start);
            let touched = of[first..].iter().take_while(|run| run.start < share.end);
            new.extend(touched.map(|run| share.part(run)));
        }
        if let Some(runs) = known.get_mut(&group[0].to) {
            runs.extend_from_slice(&new);
            runs.sort_unstable();
        }
        all.append(&mut new);
    }
    all
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_grandchild_gets_what_its_parent_got() {
        let there = [
            PageRun::data(0, 0x3000, 0x9000, 2),
            PageRun::data(0, 0x1000, 0x5000, 1),
            PageRun::zero(0, 0x8000, 4),
            PageRun::data(1, 0x2000, 0x7000, 1),
        ];
        let share = |from, to, start, end| Share { from, to, start, end };
        let shares = [
            share(0, 1, 0x1000, 0x2000),
            share(0, 1, 0x4000, 0xa000),
            share(1, 2, 0x1000, 0x5000),
        ];
        let expected = [
            PageRun::data(1, 0x1000, 0x5000, 1),
            PageRun::data(1, 0x4000, 0xa000, 1),
            PageRun::zero(1, 0x8000, 2),
            PageRun::data(2, 0x1000, 0x5000, 1),
            PageRun::data(2, 0x2000, 0x7000, 1),
            PageRun::data(2, 0x4000, 0xa000, 1),
        ];
        assert_eq!(runs(&there, &shares), expected);
    }
}
