//! Which pages of a process hold data: PAGEMAP_SCAN (kernel 6.7), else /proc/PID/pagemap.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result, check};
use crate::{PAGE_SIZE, Pid};

const WPALLOWED: u64 = 1 << 0;
const WRITTEN: u64 = 1 << 1;
const FILE: u64 = 1 << 2;
const PRESENT: u64 = 1 << 3;
const SWAPPED: u64 = 1 << 4;
const PFNZERO: u64 = 1 << 5;
const HUGE: u64 = 1 << 6;
const GUARD: u64 = 1 << 8;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::c_ulong = 0xc060_6610;

/// Which pages are meant: of none of the categories `none` and of one of `any`.
struct Wanted {
    none: u64,
    any: u64,
    flags: u64,
}

/// Pages with data of the process's own.
const DATA: Wanted = Wanted {
    none: FILE | PFNZERO,
    any: PRESENT | SWAPPED,
    flags: 0,
};
/// Pages in huge pages that belong to no file.
const IN_HUGE: Wanted = Wanted { any: HUGE, ..DATA };
/// Guard pages.
const GUARDS: Wanted = Wanted {
    none: 0,
    any: GUARD,
    flags: 0,
};
/// The same, and what was written to is protected at once: PM_SCAN_WP_MATCHING | PM_SCAN_CHECK_WPASYNC.
const TO_PROTECT: Wanted = Wanted { flags: 3, ..DATA };

#[repr(C)]
#[derive(Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

#[repr(C)]
#[derive(Default, Clone, Copy)]
struct Region {
    start: u64,
    end: u64,
    categories: u64,
}

/// Ranges (start, end) with data, sorted.
#[derive(Debug, Default)]
pub struct Written {
    /// Nobody has written to them since they were protected.
    pub unchanged: Vec<(u64, u64)>,
    /// All others.
    pub changed: Vec<(u64, u64)>,
    /// Those of both that are in huge pages, as [`Pagemap::huge`] tells.
    pub huge: Vec<(u64, u64)>,
    /// Guards, which hold nothing, as [`Pagemap::guards`] tells.
    pub guards: Vec<(u64, u64)>,
}

/// The page map of one process.
#[derive(Debug)]
pub struct Pagemap {
    pid: Pid,
    file: File,
    can_scan: bool,
    tells_guards: bool,
    anonymous: bool,
}

impl Pagemap {
    /// Opens it.
    pub fn open(pid: Pid) -> Result<Pagemap> {
        let path = format!("/proc/{pid}/pagemap");
        let file = File::open(&path).map_err(|e| Error::io("open", &path, &e))?;
        let mut map = Pagemap {
            pid,
            file,
            can_scan: true,
            tells_guards: false,
            anonymous: false,
        };
        map.can_scan = map.scan(&DATA, 0, PAGE_SIZE, &mut Vec::new()).is_ok();
        map.tells_guards = map.can_scan && map.scan(&GUARDS, 0, PAGE_SIZE, &mut Vec::new()).is_ok();
        Ok(map)
    }

    /// From now on only asked of mappings of no file: that is much faster.
    pub fn only_anonymous(&mut self, yes: bool) {
        self.anonymous = yes;
    }

    /// Whether the kernel has PAGEMAP_SCAN.
    pub fn can_scan(&self) -> bool {
        self.can_scan
    }

    /// The ranges of [start, end) whose pages belong to the process alone and hold data: present or swapped
    /// out, not the zero page, not a page of a file. Adjacent ranges come as one. `out` is appended to.
    pub fn private_data(&self, start: u64, end: u64, out: &mut Vec<(u64, u64)>) -> Result<()> {
        if self.can_scan {
            self.scan(&DATA, start, end, out)
        } else {
            self.walk(start, end, out)
        }
    }

    /// The ranges of [start, end) that are in huge pages and belong to no file (PAGE_IS_HUGE of PAGEMAP_SCAN). None on a
    /// kernel that cannot tell. `out` is appended to.
    pub fn huge(&self, start: u64, end: u64, out: &mut Vec<(u64, u64)>) -> Result<()> {
        if self.can_scan {
            self.scan(&IN_HUGE, start, end, out)
        } else {
            Ok(())
        }
    }

    /// The ranges of [start, end) that are guards (MADV_GUARD_INSTALL of madvise(2); PAGE_IS_GUARD of PAGEMAP_SCAN). None on
    /// a kernel that cannot tell (before 6.16). `out` is appended to.
    pub fn guards(&self, start: u64, end: u64, out: &mut Vec<(u64, u64)>) -> Result<()> {
        if self.tells_guards {
            self.scan(&GUARDS, start, end, out)
        } else {
            Ok(())
        }
    }

    /// Tells the ranges of [start, end) that hold data as above apart: those that nobody has written to since
    /// [`Pagemap::protect`] (not the program, not the kernel on its behalf, not another process) and all others. Memory
    /// that is not watched any more (it was mapped again, moved, or inherited by fork(2) or lost by execve(2)) counts as
    /// written, and so does memory that was given up (madvise(2)), which holds nothing.
    ///
    /// Only for private memory: what others write to a shared object is not seen.
    pub fn written(&self, start: u64, end: u64, out: &mut Written) -> Result<()> {
        self.scan_written(&DATA, start, end, out)
    }

    /// The same, and protects what was written to in the same moment, so that the next write to each page is seen. All of
    /// the range must be registered (see [`crate::track`]). Pages that hold nothing need no protection: with data they
    /// will count as written. So a large reservation costs no page tables.
    ///
    /// # Errors
    /// EPERM when a part of the range is not registered.
    pub fn protect(&self, start: u64, end: u64, out: &mut Written) -> Result<()> {
        self.scan_written(&TO_PROTECT, start, end, out)
    }

    fn scan_written(&self, wanted: &Wanted, start: u64, end: u64, out: &mut Written) -> Result<()> {
        let guard = if self.tells_guards { GUARD } else { 0 };
        let wanted = &Wanted {
            any: wanted.any | guard,
            ..*wanted
        };
        self.scan_each(wanted, WPALLOWED | WRITTEN | HUGE, start, end, |region| {
            if region.categories & guard != 0 {
                append(&mut out.guards, region.start, region.end);
                return Ok(());
            }
            if region.categories & HUGE != 0 {
                append(&mut out.huge, region.start, region.end);
            }
            let is_unchanged = region.categories & (WPALLOWED | WRITTEN) == WPALLOWED;
            let out = if is_unchanged {
                &mut out.unchanged
            } else {
                &mut out.changed
            };
            self.add(region, out)
        })
    }

    /// Which pages of `ranges` (start, end; sorted) are the very pages that `other` has at the same addresses:
    /// private to processes, shared by them since a fork. `out` is appended to. False when the kernel hides the
    /// numbers of page frames (no CAP_SYS_ADMIN in the first user namespace), and then `out` is not complete.
    ///
    /// A frame may be migrated or swapped out while we look, and its number be given to another page. So what
    /// `other` has is read before and after: where both agree, it had that frame when ours was read.
    pub fn same_pages(&self, other: &Pagemap, ranges: &[(u64, u64)], out: &mut Vec<(u64, u64)>) -> Result<bool> {
        let mut rest = ranges.to_vec();
        rest.reverse();
        while let Some((start, end)) = rest.pop() {
            // One window takes in the ranges near by: a call costs more than a few thousand entries of nothing.
            let stop = start + BLOCK * PAGE_SIZE;
            let mut window = vec![(start, end.min(stop))];
            if end > stop {
                rest.push((stop, end));
            }
            while let Some(next) = rest.last().copied().filter(|r| r.1 <= stop) {
                window.push(next);
                rest.pop();
            }
            let last = window.last().map_or(end, |r| r.1);
            let before = other.entries(start, last)?;
            let own = self.entries(start, last)?;
            let after = other.entries(start, last)?;
            for (from, to) in window {
                for page in (from..to).step_by(PAGE_SIZE as usize) {
                    let at = ((page - start) / PAGE_SIZE) as usize;
                    let Some(frame) = frame(own[at]) else { continue };
                    if frame
                        == (Frame {
                            is_swap: false,
                            number: 0,
                        })
                    {
                        return Ok(false);
                    }
                    if [before[at], after[at]].map(self::frame) == [Some(frame); 2] {
                        append(out, page, page + PAGE_SIZE);
                    }
                }
            }
        }
        Ok(true)
    }

    fn entries(&self, start: u64, end: u64) -> Result<Vec<u64>> {
        let mut bytes = vec![0u8; ((end - start) / PAGE_SIZE * 8) as usize];
        self.file
            .read_exact_at(&mut bytes, start / PAGE_SIZE * 8)
            .map_err(|e| Error::io("read", format!("/proc/{}/pagemap", self.pid), &e))?;
        Ok(words(&bytes).collect())
    }

    fn scan(&self, wanted: &Wanted, start: u64, end: u64, out: &mut Vec<(u64, u64)>) -> Result<()> {
        self.scan_each(wanted, 0, start, end, |region| self.add(region, out))
    }

    fn add(&self, region: &Region, out: &mut Vec<(u64, u64)>) -> Result<()> {
        if region.categories & SWAPPED != 0 {
            // Markers without data are called swapped too: the page map itself tells them apart.
            return self.walk(region.start, region.end, out);
        }
        append(out, region.start, region.end);
        Ok(())
    }

    /// Hands over each region of pages that are alike in what `wanted` asks for and in the categories `apart`.
    fn scan_each(
        &self,
        wanted: &Wanted,
        apart: u64,
        start: u64,
        end: u64,
        mut each: impl FnMut(&Region) -> Result<()>,
    ) -> Result<()> {
        let mut regions = [Region::default(); 512];
        let mut at = start;
        while at < end {
            // Whether a page is a file's costs a look at the page itself, 50 ms for 1 GiB.
            let none = wanted.none & !if self.anonymous { FILE } else { 0 };
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                flags: wanted.flags,
                start: at,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                category_inverted: none,
                category_mask: none,
                category_anyof_mask: wanted.any,
                return_mask: wanted.any | apart,
                ..ScanArg::default()
            };
            // SAFETY: arg and regions are valid for the kernel to fill.
            let ret = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            let count = check(ret.into(), "PAGEMAP_SCAN", self.pid)? as usize;
            regions[..count].iter().try_for_each(&mut each)?;
            at = arg.walk_end;
        }
        Ok(())
    }

    fn walk(&self, start: u64, end: u64, out: &mut Vec<(u64, u64)>) -> Result<()> {
        let mut at = start;
        while at < end {
            let count = BLOCK.min((end - at) / PAGE_SIZE);
            for (i, entry) in self.entries(at, at + count * PAGE_SIZE)?.into_iter().enumerate() {
                if is_private_data(entry) {
                    let page = at + i as u64 * PAGE_SIZE;
                    append(out, page, page + PAGE_SIZE);
                }
            }
            at += count * PAGE_SIZE;
        }
        Ok(())
    }
}

/// How many entries are read at once.
const BLOCK: u64 = 4096;

fn words(bytes: &[u8]) -> impl Iterator<Item = u64> {
    let word = |e: &[u8]| u64::from_le_bytes([e[0], e[1], e[2], e[3], e[4], e[5], e[6], e[7]]);
    bytes.chunks_exact(8).map(word)
}

/// Where a page is: in a frame of memory, or in a slot of swap space.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Frame {
    is_swap: bool,
    number: u64,
}

/// Bits 0 to 54 of an entry of private data.
fn frame(entry: u64) -> Option<Frame> {
    is_private_data(entry).then_some(Frame {
        is_swap: entry >> 62 & 1 == 1,
        number: entry & ((1 << 55) - 1),
    })
}

/// Bits of a pagemap entry (Documentation/admin-guide/mm/pagemap.rst): 63 present, 62 swapped, 61 file or
/// shared. Swap entries of type 31 are markers without data (userfaultfd-wp, guard), not pages.
fn is_private_data(entry: u64) -> bool {
    let present = entry >> 63 & 1 == 1;
    let swapped = entry >> 62 & 1 == 1 && entry & 0x1f != 31;
    (present || swapped) && entry >> 61 & 1 == 0
}

fn append(out: &mut Vec<(u64, u64)>, start: u64, end: u64) {
    match out.last_mut() {
        Some(last) if last.1 == start => last.1 = end,
        _ => out.push((start, end)),
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_told_apart_from_markers_files_and_hidden_numbers() {
        let present = 1 << 63;
        assert_eq!(frame(present | 77 | 1 << 55 | 1 << 56), frame(present | 77));
        assert_ne!(frame(present | 77), frame(present | 78));
        assert_ne!(frame(present | 77), frame(1 << 62 | 77), "a slot of swap is no frame");
        assert_eq!(frame(present | 1 << 61 | 77), None, "a page of a file");
        assert_eq!(frame(1 << 62 | 31), None, "a marker");
    }

    #[test]
    fn both_ways_find_the_same_pages() {
        let len = 64 * PAGE_SIZE as usize;
        let layout = std::alloc::Layout::from_size_align(len, 4096).unwrap();
        // SAFETY: fresh zeroed memory of our own, freed below; two pages of it are written.
        let base = unsafe { std::alloc::alloc_zeroed(layout) };
        for page in [3usize, 4, 40] {
            // SAFETY: inside the allocation.
            unsafe { base.add(page * 4096).write_volatile(7) };
        }
        let start = base as u64;
        let map = Pagemap::open(std::process::id() as Pid).unwrap();
        let mut walked = Vec::new();
        map.walk(start, start + len as u64, &mut walked).unwrap();
        for page in [3u64, 4, 40] {
            let a = start + page * PAGE_SIZE;
            assert!(walked.iter().any(|r| r.0 <= a && a < r.1));
        }
        if map.can_scan {
            let mut scanned = Vec::new();
            map.private_data(start, start + len as u64, &mut scanned).unwrap();
            assert_eq!(scanned, walked);
        }
        // SAFETY: the same layout as above.
        unsafe { std::alloc::dealloc(base, layout) };
    }
}
