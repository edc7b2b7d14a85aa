//! Where the parts of an address space are now that came from the image: programs move and give up memory.

/// A part of an address space that came from the image: where it is now, and where it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Segment {
    pub start: u64,
    pub end: u64,
    pub was: u64,
}

/// Takes a range out.
pub fn cut(segments: &mut Vec<Segment>, start: u64, end: u64) {
    let mut rest = Vec::with_capacity(segments.len() + 1);
    for s in segments.drain(..) {
        if s.start < start.min(s.end) {
            rest.push(Segment {
                end: s.end.min(start),
                ..s
            });
        }
        if s.end > end.max(s.start) {
            let from = s.start.max(end);
            rest.push(Segment {
                start: from,
                was: s.was + (from - s.start),
                ..s
            });
        }
    }
    *segments = rest;
}

/// Moves a range.
pub fn remap(segments: &mut Vec<Segment>, from: u64, to: u64, len: u64) {
    let moved: Vec<Segment> = segments
        .iter()
        .filter(|s| s.start < from + len && s.end > from)
        .map(|s| {
            let (start, end) = (s.start.max(from), s.end.min(from + len));
            Segment {
                start: start - from + to,
                end: end - from + to,
                was: s.was + (start - s.start),
            }
        })
        .collect();
    cut(segments, from, from + len);
    cut(segments, to, to + len);
    segments.extend(moved);
    segments.sort_unstable_by_key(|s| s.start);
}

/// Where a page was that is at this address now.
pub fn locate(segments: &[Segment], address: u64) -> Option<u64> {
    let at = segments.partition_point(|s| s.end <= address);
    segments
        .get(at)
        .filter(|s| s.start <= address)
        .map(|s| s.was + (address - s.start))
}

/// Where data that was at `was` is now, and how much of `len` bytes is in one piece; no place when it was given up.
pub fn place_of(segments: &[Segment], was: u64, len: u64) -> Option<(Option<u64>, u64)> {
    let holds = |s: &&Segment| s.was <= was && was < s.was + (s.end - s.start);
    if let Some(s) = segments.iter().find(holds) {
        return Some((Some(s.start + (was - s.was)), len.min(s.was + (s.end - s.start) - was)));
    }
    let next = segments
        .iter()
        .map(|s| s.was)
        .filter(|w| *w > was)
        .min()
        .unwrap_or(u64::MAX);
    Some((None, len.min(next - was)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(start: u64, end: u64, was: u64) -> Segment {
        Segment { start, end, was }
    }

    #[test]
    fn a_range_that_is_given_up_leaves_what_is_around_it() {
        let mut s = vec![segment(0x1000, 0x9000, 0x1000)];
        cut(&mut s, 0x3000, 0x5000);
        assert_eq!(s, [segment(0x1000, 0x3000, 0x1000), segment(0x5000, 0x9000, 0x5000)]);
        assert_eq!(locate(&s, 0x4000), None);
        assert_eq!(locate(&s, 0x5000), Some(0x5000));
        cut(&mut s, 0, 0x10000);
        assert!(s.is_empty());
    }

    #[test]
    fn what_is_moved_is_found_at_its_new_place() {
        let mut s = vec![segment(0x1000, 0x9000, 0x1000)];
        remap(&mut s, 0x2000, 0x20000, 0x2000);
        assert_eq!(locate(&s, 0x21000), Some(0x3000));
        assert_eq!(locate(&s, 0x2000), None);
        assert_eq!(place_of(&s, 0x3000, 0x4000), Some((Some(0x21000), 0x1000)));
        assert_eq!(place_of(&s, 0x1000, 0x4000), Some((Some(0x1000), 0x1000)));
        cut(&mut s, 0x20000, 0x21000);
        assert_eq!(place_of(&s, 0x2000, 0x4000), Some((None, 0x1000)));
    }
}
