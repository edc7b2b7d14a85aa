//! userfaultfd(2): being asked for the pages of another process.
//!
//! ioctl_userfaultfd(2) and Documentation/admin-guide/mm/userfaultfd.rst; numbers from include/uapi/linux/userfaultfd.h.

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::error::{Error, Result, check};
use crate::{PAGE_SIZE, RemoteAddr};

const API: u64 = 0xaa;
const UFFDIO_API: u64 = 0xc018_aa3f;
const UFFDIO_REGISTER: u64 = 0xc020_aa00;
const UFFDIO_UNREGISTER: u64 = 0x8010_aa01;
const UFFDIO_WAKE: u64 = 0x8010_aa02;
const UFFDIO_COPY: u64 = 0xc028_aa03;
const UFFDIO_ZEROPAGE: u64 = 0xc020_aa04;
const UFFDIO_POISON: u64 = 0xc020_aa08;

const EVENT_FORK: u64 = 1 << 1;
const EVENT_REMAP: u64 = 1 << 2;
const EVENT_REMOVE: u64 = 1 << 3;
const EVENT_UNMAP: u64 = 1 << 6;
const POISON: u64 = 1 << 14;

/// What a process does with memory that is watched.
#[derive(Debug)]
pub enum Event {
    /// A thread waits for this page.
    Fault(RemoteAddr),
    /// A child has the same memory; this is its descriptor.
    Fork(Uffd),
    /// Memory was moved: from, to, length.
    Remap(RemoteAddr, RemoteAddr, u64),
    /// The content of a range was given up (madvise(2)).
    Remove(RemoteAddr, RemoteAddr),
    /// A range was unmapped.
    Unmap(RemoteAddr, RemoteAddr),
}

/// What became of a page that was put into place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Put {
    /// So many bytes were put.
    Bytes(u64),
    /// Something is there already.
    Exists,
    /// The process is changing its mappings: read its events, then try again.
    Busy,
    /// The range is not watched any more.
    Gone,
    /// The process has ended.
    Ended,
}

/// The descriptor of one address space.
#[derive(Debug)]
pub struct Uffd {
    fd: OwnedFd,
}

impl Uffd {
    /// Takes over a fresh descriptor and asks for the events that a pager needs.
    ///
    /// # Errors
    /// EINVAL on a kernel without them (before 4.11).
    pub fn enable(fd: OwnedFd) -> Result<Uffd> {
        let events = EVENT_FORK | EVENT_REMAP | EVENT_REMOVE | EVENT_UNMAP;
        let mut api = [API, events | POISON, 0];
        // SAFETY: api has the layout of struct uffdio_api.
        let mut ret = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
        if ret < 0 && Errno::last() == Errno::EINVAL {
            // Before 6.6 there is no poison.
            api = [API, events, 0];
            // SAFETY: as above.
            ret = unsafe { libc::ioctl(fd.as_raw_fd(), UFFDIO_API, api.as_mut_ptr()) };
        }
        check(ret.into(), "UFFDIO_API", "")?;
        Ok(Uffd { fd })
    }

    /// Watches a range for missing pages.
    pub fn register(&self, start: RemoteAddr, len: u64) -> Result<()> {
        const MODE_MISSING: u64 = 1;
        let mut arg = [start, len, MODE_MISSING, 0];
        // SAFETY: arg has the layout of struct uffdio_register.
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_REGISTER, arg.as_mut_ptr()) };
        check(ret.into(), "UFFDIO_REGISTER", format!("{start:x}+{len:x}")).map(drop)
    }

    /// Ends the watch of a range; who waits in it is woken.
    pub fn unregister(&self, start: RemoteAddr, len: u64) -> Result<()> {
        let arg = [start, len];
        // SAFETY: arg has the layout of struct uffdio_range.
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_UNREGISTER, arg.as_ptr()) };
        check(ret.into(), "UFFDIO_UNREGISTER", format!("{start:x}+{len:x}")).map(drop)
    }

    /// Puts pages into place and wakes who waits for them. `data` is a multiple of the page size.
    pub fn copy(&self, to: RemoteAddr, data: &[u8]) -> Result<Put> {
        let mut arg = [to, data.as_ptr() as u64, data.len() as u64, 0, 0];
        // SAFETY: arg has the layout of struct uffdio_copy; the kernel reads data.len() bytes of data.
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_COPY, arg.as_mut_ptr()) };
        outcome(ret, arg[4] as i64, data.len() as u64, "UFFDIO_COPY")
    }

    /// Puts a page of zeroes into place.
    pub fn zero(&self, page: RemoteAddr) -> Result<Put> {
        let mut arg = [page, PAGE_SIZE, 0, 0];
        // SAFETY: arg has the layout of struct uffdio_zeropage.
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_ZEROPAGE, arg.as_mut_ptr()) };
        outcome(ret, arg[3] as i64, PAGE_SIZE, "UFFDIO_ZEROPAGE")
    }

    /// Makes every touch of these pages a SIGBUS.
    pub fn poison(&self, start: RemoteAddr, len: u64) -> Result<Put> {
        let mut arg = [start, len, 0, 0];
        // SAFETY: arg has the layout of struct uffdio_poison.
        let ret = unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_POISON, arg.as_mut_ptr()) };
        outcome(ret, arg[3] as i64, len, "UFFDIO_POISON")
    }

    /// Wakes who waits in a range, to look again.
    pub fn wake(&self, start: RemoteAddr, len: u64) {
        let arg = [start, len];
        // SAFETY: arg has the layout of struct uffdio_range. Nobody waiting is no error.
        unsafe { libc::ioctl(self.fd.as_raw_fd(), UFFDIO_WAKE, arg.as_ptr()) };
    }

    /// The next event; `None` when there is none now.
    pub fn read(&self) -> Result<Option<Event>> {
        let mut message = [0u64; 4];
        // SAFETY: message has the size of struct uffd_msg.
        let got = unsafe { libc::read(self.fd.as_raw_fd(), message.as_mut_ptr().cast(), 32) };
        if got < 0 && Errno::last() == Errno::EAGAIN {
            return Ok(None);
        }
        check(got as i64, "read", "userfaultfd")?;
        Ok(decode(message))
    }
}

fn decode(message: [u64; 4]) -> Option<Event> {
    let [kind, a, b, c] = message;
    match kind & 0xff {
        // struct pagefault begins with its flags.
        0x12 => Some(Event::Fault(b & !(PAGE_SIZE - 1))),
        0x13 => {
            // SAFETY: the kernel has just opened this descriptor for us.
            let fd = unsafe { OwnedFd::from_raw_fd(a as u32 as i32) };
            Some(Event::Fork(Uffd { fd }))
        }
        0x14 => Some(Event::Remap(a, b, c)),
        0x15 => Some(Event::Remove(a, b)),
        0x16 => Some(Event::Unmap(a, b)),
        _ => None,
    }
}

fn outcome(ret: i32, done: i64, wanted: u64, call: &'static str) -> Result<Put> {
    if ret == 0 {
        return Ok(Put::Bytes(wanted));
    }
    let errno = Errno::last();
    match errno {
        // Some pages were put before one was there already or the mappings changed.
        _ if done > 0 => Ok(Put::Bytes(done as u64)),
        Errno::EEXIST => Ok(Put::Exists),
        Errno::EAGAIN => Ok(Put::Busy),
        Errno::ENOENT | Errno::EFAULT => Ok(Put::Gone),
        Errno::ESRCH => Ok(Put::Ended),
        errno => Err(Error::Call {
            call,
            object: format!("{wanted} bytes"),
            errno,
        }),
    }
}

impl AsFd for Uffd {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Waits until something can be read from one of the descriptors or its other end is gone. Says which.
pub fn wait_any(fds: &[BorrowedFd<'_>]) -> Vec<usize> {
    let mut polls: Vec<libc::pollfd> = fds
        .iter()
        .map(|f| libc::pollfd {
            fd: f.as_raw_fd(),
            events: libc::POLLIN,
            revents: 0,
        })
        .collect();
    // SAFETY: a valid array of pollfds.
    unsafe { libc::poll(polls.as_mut_ptr(), polls.len() as libc::nfds_t, -1) };
    let ready = polls.iter().enumerate().filter(|(_, p)| p.revents != 0);
    ready.map(|(at, _)| at).collect()
}
