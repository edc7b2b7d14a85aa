//! Which pages of a process change: write protection by userfaultfd(2) that the kernel itself takes away at the first
//! write to a page (UFFD_FEATURE_WP_ASYNC, kernel 6.7), so that no write ever waits for anybody.
//!
//! [`crate::pagemap::Pagemap`] protects pages and tells which are still protected. Protection lasts as long as a
//! descriptor of the watch is open somewhere, here or in another process; when the last is closed, it is gone and every
//! page counts as written.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use nix::errno::Errno;

use crate::RemoteAddr;
use crate::error::{Error, Result, check};

const API: u64 = 0xaa;
const WP_ASYNC: u64 = 1 << 15;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const MODE_WP: u64 = 2;

/// What a process has to call userfaultfd(2) with. UFFD_USER_MODE_ONLY makes it a call that needs no capability, and
/// changes nothing here: no fault is ever handed to us.
pub const FLAGS: i32 = libc::O_CLOEXEC | libc::O_NONBLOCK | 1;

/// Whether a mapping is watched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Registered {
    /// It is.
    Yes,
    /// It cannot be: somebody else watches it (EBUSY), or it is of a kind that cannot be watched (EINVAL, EPERM).
    No,
    /// The address space is gone: its process has ended or runs another program by now.
    Gone,
}

/// A watch over the writes to one address space.
#[derive(Debug)]
pub struct Watch {
    fd: OwnedFd,
}

impl Watch {
    /// Makes a watch of a descriptor that userfaultfd(2) has just returned in the process to be watched.
    ///
    /// # Errors
    /// EINVAL on a kernel without UFFD_FEATURE_WP_ASYNC.
    pub fn enable(fd: OwnedFd) -> Result<Watch> {
        let mut api = [API, WP_ASYNC, 0];
        // SAFETY: api has the layout of struct uffdio_api.
        let ret = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
        check(ret.into(), "UFFDIO_API", "UFFD_FEATURE_WP_ASYNC")?;
        Ok(Watch { fd })
    }

    /// Takes over a watch that another process holds.
    pub fn adopt(fd: OwnedFd) -> Watch {
        Watch { fd }
    }

    /// Watches one mapping. Watching it twice is watching it.
    pub fn register(&self, start: RemoteAddr, len: u64) -> Result<Registered> {
        let mut arg = [start, len, MODE_WP, 0];
        // SAFETY: arg has the layout of struct uffdio_register.
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, arg.as_mut_ptr()) };
        if ret == 0 {
            return Ok(Registered::Yes);
        }
        match Errno::last() {
            Errno::EBUSY | Errno::EINVAL | Errno::EPERM => Ok(Registered::No),
            Errno::ENOMEM | Errno::ESRCH => Ok(Registered::Gone),
            errno => Err(Error::Call {
                call: "UFFDIO_REGISTER",
                object: format!("{start:x}+{len:x}"),
                errno,
            }),
        }
    }
}

impl AsFd for Watch {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Whether this kernel can do it.
pub fn is_available() -> bool {
    // SAFETY: a plain number.
    let raw = unsafe { libc::syscall(libc::SYS_userfaultfd, FLAGS) };
    if raw < 0 {
        return false;
    }
    // SAFETY: the kernel has just opened this descriptor for us.
    let fd = unsafe { <OwnedFd as std::os::fd::FromRawFd>::from_raw_fd(raw as i32) };
    Watch::enable(fd).is_ok()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::os::fd::FromRawFd;
    use std::ptr;

    use super::*;
    use crate::pagemap::{Pagemap, Written};
    use crate::{PAGE_SIZE, Pid};

    const PAGE: usize = PAGE_SIZE as usize;

    /// A mapping of our own.
    struct Map {
        at: *mut u8,
        pages: usize,
    }

    impl Map {
        fn new(pages: usize, flags: i32, fd: i32) -> Map {
            Map::at(ptr::null_mut(), pages, flags, fd)
        }

        fn at(at: *mut u8, pages: usize, flags: i32, fd: i32) -> Map {
            let prot = libc::PROT_READ | libc::PROT_WRITE;
            // SAFETY: a fresh mapping, or one in the place of another of ours that is not used any more.
            let at = unsafe { libc::mmap(at.cast(), pages * PAGE, prot, flags, fd, 0) };
            assert_ne!(at, libc::MAP_FAILED);
            let map = Map { at: at.cast(), pages };
            // Small pages, so that each counts by itself.
            // SAFETY: the range just mapped.
            unsafe { libc::madvise(map.at.cast(), pages * PAGE, libc::MADV_NOHUGEPAGE) };
            map
        }

        fn private(pages: usize) -> Map {
            Map::new(pages, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS, -1)
        }

        fn write(&self, page: usize, byte: u8) {
            assert!(page < self.pages);
            // SAFETY: inside the mapping.
            unsafe { self.at.add(page * PAGE).write_volatile(byte) };
        }

        fn read(&self, page: usize) -> u8 {
            // SAFETY: inside the mapping.
            unsafe { self.at.add(page * PAGE).read_volatile() }
        }

        fn give_up(&self, page: usize, count: usize) {
            // SAFETY: inside the mapping.
            let ret = unsafe { libc::madvise(self.at.add(page * PAGE).cast(), count * PAGE, libc::MADV_DONTNEED) };
            assert_eq!(ret, 0);
        }

        fn start(&self) -> u64 {
            self.at as u64
        }

        fn end(&self) -> u64 {
            self.start() + (self.pages * PAGE) as u64
        }

        /// The pages that nothing has changed, by number.
        fn unchanged(&self) -> Vec<u64> {
            self.written()
                .unchanged
                .iter()
                .flat_map(|r| (r.0..r.1).step_by(PAGE))
                .map(|a| (a - self.start()) / PAGE_SIZE)
                .collect()
        }

        fn written(&self) -> Written {
            let mut out = Written::default();
            let map = Pagemap::open(std::process::id() as Pid).unwrap();
            map.written(self.start(), self.end(), &mut out).unwrap();
            out
        }

        fn protect(&self, watch: &Watch) {
            assert_eq!(
                watch.register(self.start(), self.end() - self.start()).unwrap(),
                Registered::Yes
            );
            let map = Pagemap::open(std::process::id() as Pid).unwrap();
            map.protect(self.start(), self.end(), &mut Written::default()).unwrap();
        }
    }

    fn watch() -> Option<Watch> {
        if !is_available() {
            eprintln!("skipped: this kernel has no UFFD_FEATURE_WP_ASYNC");
            return None;
        }
        // SAFETY: a plain number; the descriptor is ours.
        let fd = unsafe { OwnedFd::from_raw_fd(libc::syscall(libc::SYS_userfaultfd, FLAGS) as i32) };
        Some(Watch::enable(fd).unwrap())
    }

    /// Eight pages, all but the last with data, protected.
    fn watched(watch: &Watch) -> Map {
        let map = Map::private(8);
        (0..7).for_each(|p| map.write(p, 1));
        map.protect(watch);
        assert_eq!(map.unchanged(), [0, 1, 2, 3, 4, 5, 6]);
        map
    }

    #[test]
    fn what_is_written_is_seen_and_what_is_read_is_not() {
        let Some(watch) = watch() else { return };
        let map = watched(&watch);
        map.write(2, 9);
        map.read(3);
        map.read(7);
        map.write(7, 1);
        assert_eq!(map.unchanged(), [0, 1, 3, 4, 5, 6]);
        let changed = map.written().changed;
        let page = |p: u64| map.start() + p * PAGE_SIZE;
        assert_eq!(changed, [(page(2), page(3)), (page(7), page(8))]);
        map.protect(&watch);
        assert_eq!(map.unchanged(), [0, 1, 2, 3, 4, 5, 6, 7]);
        assert_eq!((map.read(2), map.read(3)), (9, 1));
    }

    #[test]
    fn the_kernel_writes_for_the_program() {
        let Some(watch) = watch() else { return };
        let map = watched(&watch);
        let zero = std::fs::File::open("/dev/zero").unwrap();
        // SAFETY: one page of the mapping.
        let got = unsafe { libc::read(zero.as_raw_fd(), map.at.add(4 * PAGE).cast(), PAGE) };
        assert_eq!(got, PAGE as isize);
        assert_eq!(map.unchanged(), [0, 1, 2, 3, 5, 6]);
    }

    #[test]
    fn what_was_given_up_counts_as_changed() {
        let Some(watch) = watch() else { return };
        let map = watched(&watch);
        map.give_up(1, 2);
        map.read(1);
        assert_eq!(map.unchanged(), [0, 3, 4, 5, 6]);
        // A whole table of page entries at once, which the kernel may free.
        let large = Map::private(2048);
        (0..2048).for_each(|p| large.write(p, 1));
        large.protect(&watch);
        large.give_up(0, 2048);
        assert!(large.unchanged().is_empty());
    }

    #[test]
    fn a_private_page_of_a_file_that_was_given_up_counts_as_changed() {
        let Some(watch) = watch() else { return };
        let mut path = std::env::temp_dir();
        path.push(format!("torpor-track-{}", std::process::id()));
        std::fs::write(&path, vec![7u8; 4 * PAGE]).unwrap();
        let file = std::fs::File::open(&path).unwrap();
        std::fs::remove_file(&path).unwrap();
        let map = Map::new(4, libc::MAP_PRIVATE, file.as_raw_fd());
        (0..3).for_each(|p| map.write(p, 1));
        map.read(3);
        map.protect(&watch);
        assert_eq!(map.unchanged(), [0, 1, 2]);
        map.give_up(1, 1);
        // The kernel leaves a mark that the page was protected: it holds nothing of ours.
        assert_eq!(map.unchanged(), [0, 2]);
        let mut data = Vec::new();
        let pages = Pagemap::open(std::process::id() as Pid).unwrap();
        pages.private_data(map.start(), map.end(), &mut data).unwrap();
        assert_eq!(data.iter().map(|r| (r.1 - r.0) / PAGE_SIZE).sum::<u64>(), 2);
        assert_eq!(map.read(1), 7);
        assert_eq!(map.unchanged(), [0, 2]);
    }

    #[test]
    fn what_was_mapped_again_or_moved_counts_as_changed() {
        let Some(watch) = watch() else { return };
        let map = watched(&watch);
        let again = Map::at(map.at, 8, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED, -1);
        (0..8).for_each(|p| again.write(p, 2));
        assert!(again.unchanged().is_empty());
        let map = watched(&watch);
        let place = Map::private(8);
        // SAFETY: both are mappings of ours; the second gives way to the first.
        let moved = unsafe {
            let flags = libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED;
            libc::mremap(map.at.cast(), 8 * PAGE, 8 * PAGE, flags, place.at)
        };
        assert_eq!(moved, place.at.cast());
        assert!(place.unchanged().is_empty());
        assert_eq!(place.read(2), 1);
    }

    #[test]
    fn a_child_is_not_watched_and_its_parent_still_is() {
        let Some(watch) = watch() else { return };
        let map = watched(&watch);
        let child = crate::fork::fork(|| i32::from(!map.unchanged().is_empty())).unwrap();
        assert_eq!(crate::fork::wait_child(child).unwrap(), 0);
        map.write(0, 2);
        assert_eq!(map.unchanged(), [1, 2, 3, 4, 5, 6]);
    }

    #[test]
    fn what_somebody_else_watches_is_left_to_them() {
        let Some(watch) = watch() else { return };
        let other = super::tests::watch().unwrap();
        let map = Map::private(4);
        assert_eq!(other.register(map.start(), 4 * PAGE_SIZE).unwrap(), Registered::Yes);
        assert_eq!(other.register(map.start(), 4 * PAGE_SIZE).unwrap(), Registered::Yes);
        assert_eq!(watch.register(map.start(), 4 * PAGE_SIZE).unwrap(), Registered::No);
    }

    #[test]
    fn a_watch_that_is_closed_has_seen_everything_change() {
        let Some(watch) = watch() else { return };
        let map = watched(&watch);
        drop(watch);
        assert!(map.unchanged().is_empty());
        map.write(0, 3);
        assert_eq!(map.read(0), 3);
    }

    #[test]
    fn a_reservation_costs_no_page_tables() {
        let Some(watch) = watch() else { return };
        let len = 1u64 << 40;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_NORESERVE;
        // SAFETY: a fresh mapping that nobody touches but for one page.
        let at = unsafe {
            libc::mmap(
                ptr::null_mut(),
                len as usize,
                libc::PROT_READ | libc::PROT_WRITE,
                flags,
                -1,
                0,
            )
        };
        assert_ne!(at, libc::MAP_FAILED);
        let (start, page) = (at as u64, 0x1234_5000u64);
        // SAFETY: inside the mapping.
        unsafe { at.cast::<u8>().add(page as usize).write_volatile(1) };
        assert_eq!(watch.register(start, len).unwrap(), Registered::Yes);
        let map = Pagemap::open(std::process::id() as Pid).unwrap();
        map.protect(start, start + len, &mut Written::default()).unwrap();
        let mut out = Written::default();
        map.written(start, start + len, &mut out).unwrap();
        assert!(out.unchanged.iter().any(|r| r.0 <= start + page && start + page < r.1));
        let status = std::fs::read_to_string("/proc/self/status").unwrap();
        let tables = status.lines().find_map(|l| l.strip_prefix("VmPTE:")).unwrap();
        let kib: u64 = tables.trim().trim_end_matches(" kB").trim().parse().unwrap();
        assert!(kib < 64 * 1024, "{kib} KiB of page tables");
        // SAFETY: the mapping made above.
        unsafe { libc::munmap(at, len as usize) };
    }
}
