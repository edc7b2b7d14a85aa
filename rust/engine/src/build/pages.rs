//! Sets of pages as sorted runs that do not overlap: which address is found where in the image.

use torpor_image::PageRun;
use torpor_sys::PAGE_SIZE;

/// Start and end of ranges of addresses, sorted.
pub type Ranges = Vec<(u64, u64)>;

/// The part of a run from `start` to `end`, which lie in it.
pub fn part(run: &PageRun, start: u64, end: u64) -> PageRun {
    let offset = if run.is_zero() {
        0
    } else {
        run.offset + (start - run.start)
    };
    PageRun {
        start,
        offset,
        pages: (end - start) / PAGE_SIZE,
        ..*run
    }
}

/// Where runs lie.
pub fn ranges(runs: &[PageRun]) -> Ranges {
    let mut all = Ranges::new();
    for run in runs {
        match all.last_mut() {
            Some(last) if last.1 == run.start => last.1 = run.end(),
            _ => all.push((run.start, run.end())),
        }
    }
    all
}

/// What of `runs` lies in `within`.
pub fn clip(runs: &[PageRun], within: &[(u64, u64)]) -> Vec<PageRun> {
    let mut found = Vec::new();
    for run in runs {
        let first = within.partition_point(|r| r.1 <= run.start);
        let touched = within[first..].iter().take_while(|r| r.0 < run.end());
        found.extend(touched.map(|r| part(run, run.start.max(r.0), run.end().min(r.1))));
    }
    found
}

/// What of `runs` lies outside of `taken`.
pub fn without(runs: &[PageRun], taken: &[(u64, u64)]) -> Vec<PageRun> {
    clip(runs, &gaps(taken))
}

/// The ranges between ranges.
fn gaps(taken: &[(u64, u64)]) -> Ranges {
    let mut all = Ranges::new();
    let mut from = 0;
    for &(start, end) in taken {
        if start > from {
            all.push((from, start));
        }
        from = from.max(end);
    }
    all.push((from, u64::MAX));
    all
}

/// The pages that both have, from the same place in the image.
pub fn equal(one: &[PageRun], other: &[PageRun]) -> Vec<PageRun> {
    let mut found = Vec::new();
    let mut at = 0;
    for run in one {
        while at < other.len() && other[at].end() <= run.start {
            at += 1;
        }
        for its in other[at..].iter().take_while(|its| its.start < run.end()) {
            let (start, end) = (run.start.max(its.start), run.end().min(its.end()));
            let ours = part(run, start, end);
            let theirs = part(its, start, end);
            if (ours.offset, ours.flags) == (theirs.offset, theirs.flags) {
                found.push(ours);
            }
        }
    }
    found
}

/// Both sets, which have no address in common.
pub fn join(mut one: Vec<PageRun>, other: Vec<PageRun>) -> Vec<PageRun> {
    one.extend(other);
    one.sort_unstable_by_key(|run| run.start);
    one
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, offset: u64, pages: u64) -> PageRun {
        PageRun::data(0, start << 12, offset << 12, pages)
    }

    #[test]
    fn the_same_pages_are_found_whatever_the_runs() {
        let one = [run(1, 100, 4), run(8, 200, 2)];
        let other = [run(0, 99, 3), run(3, 50, 1), run(4, 103, 5), run(9, 201, 1)];
        assert_eq!(equal(&one, &other), [run(1, 100, 2), run(4, 103, 1), run(9, 201, 1)]);
        assert_eq!(equal(&other, &one), [run(1, 100, 2), run(4, 103, 1), run(9, 201, 1)]);
    }

    #[test]
    fn runs_are_cut_to_ranges_and_around_them() {
        let runs = [run(1, 100, 4), run(8, 200, 2)];
        let within = [(0x2000, 0x3000), (0x4000, 0x9000)];
        assert_eq!(clip(&runs, &within), [run(2, 101, 1), run(4, 103, 1), run(8, 200, 1)]);
        assert_eq!(
            without(&runs, &within),
            [run(1, 100, 1), run(3, 102, 1), run(9, 201, 1)]
        );
        assert_eq!(without(&runs, &[]), runs);
        assert_eq!(ranges(&[run(1, 100, 4), run(5, 7, 1)]), [(0x1000, 0x6000)]);
        assert_eq!(join(vec![runs[1]], vec![runs[0]]), runs);
    }
}
