//! Descriptors that tell of something: timerfd(2), signalfd(2), inotify(7).

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::error::{Error, Result, check};
use crate::fd;

/// `_IOW('T', 0, u64)`: linux/timerfd.h.
const TFD_IOC_SET_TICKS: u64 = 0x4008_5400;
/// `_IOW('I', 0, s32)`: linux/inotify.h.
const INOTIFY_IOC_SETNEXTWD: u64 = 0x4004_4900;

/// Nanoseconds as the kernel takes them.
fn timespec(nanoseconds: u64) -> libc::timespec {
    libc::timespec {
        tv_sec: (nanoseconds / 1_000_000_000) as i64,
        tv_nsec: (nanoseconds % 1_000_000_000) as i64,
    }
}

fn nanoseconds(time: libc::timespec) -> u64 {
    (time.tv_sec.max(0) as u64).saturating_mul(1_000_000_000) + time.tv_nsec.max(0) as u64
}

/// What a clock says now, in nanoseconds.
pub fn now(clock: i32) -> Result<u64> {
    let mut time = timespec(0);
    // SAFETY: time is room for the result.
    let ret = unsafe { libc::clock_gettime(clock, &raw mut time) };
    check(ret.into(), "clock_gettime", clock)?;
    Ok(nanoseconds(time))
}

/// timerfd_create(2).
pub fn timer(clock: i32) -> Result<OwnedFd> {
    // SAFETY: plain numbers.
    let fd = unsafe { libc::timerfd_create(clock, libc::TFD_CLOEXEC) };
    check(fd.into(), "timerfd_create", clock)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The time that is left and the interval of a timerfd, in nanoseconds (timerfd_gettime(2)).
pub fn timer_left(fd: impl AsFd) -> Result<(u64, u64)> {
    let fd = fd.as_fd().as_raw_fd();
    let mut value = libc::itimerspec {
        it_interval: timespec(0),
        it_value: timespec(0),
    };
    // SAFETY: value is room for the result.
    let ret = unsafe { libc::timerfd_gettime(fd, &raw mut value) };
    check(ret.into(), "timerfd_gettime", fd)?;
    Ok((nanoseconds(value.it_value), nanoseconds(value.it_interval)))
}

/// Arms a timerfd (timerfd_settime(2)), times in nanoseconds.
pub fn set_timer(fd: impl AsFd, flags: i32, value: u64, interval: u64) -> Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    let new = libc::itimerspec {
        it_interval: timespec(interval),
        it_value: timespec(value),
    };
    // SAFETY: new is a valid itimerspec, and nobody asks for the old one.
    let ret = unsafe { libc::timerfd_settime(fd, flags, &raw const new, std::ptr::null_mut()) };
    check(ret.into(), "timerfd_settime", fd).map(drop)
}

/// Sets how many expirations the next read(2) of a timerfd tells.
pub fn set_timer_ticks(fd: impl AsFd, ticks: u64) -> Result<()> {
    fd::ioctl_set(fd, TFD_IOC_SET_TICKS, &ticks.to_le_bytes())
}

/// signalfd4(2) for the signals of a mask.
pub fn signals(mask: u64) -> Result<OwnedFd> {
    // SAFETY: mask is the eight bytes that the kernel is told of.
    let fd = unsafe { libc::syscall(libc::SYS_signalfd4, -1, &raw const mask, 8, libc::SFD_CLOEXEC) };
    let fd = check(fd, "signalfd4", format!("{mask:#x}"))?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Watches the file behind `file`, a descriptor of any kind, in an inotify instance. The watch gets the number
/// `wd` if it is the lowest free one from there on; returned is the one that it got.
pub fn watch(inotify: impl AsFd, wd: i32, file: impl AsFd, mask: u32) -> Result<i32> {
    // SAFETY: this request takes a number, not a pointer.
    let ret = unsafe { libc::ioctl(inotify.as_fd().as_raw_fd(), INOTIFY_IOC_SETNEXTWD, i64::from(wd)) };
    check(ret.into(), "ioctl INOTIFY_IOC_SETNEXTWD", wd)?;
    let path = format!("/proc/self/fd/{}\0", file.as_fd().as_raw_fd());
    // SAFETY: path ends in NUL.
    let got = unsafe { libc::inotify_add_watch(inotify.as_fd().as_raw_fd(), path.as_ptr().cast(), mask) };
    check(got.into(), "inotify_add_watch", wd).map(|v| v as i32)
}

/// The file of a handle (open_by_handle_at(2)) on the mount of a directory, which may be open as O_PATH: so that
/// looking for a file is no event of its own. Done from a thread with a working directory of its own.
pub fn open_handle(directory: impl AsFd, kind: i32, bytes: &[u8]) -> Result<OwnedFd> {
    let mut handle = (bytes.len() as u32).to_le_bytes().to_vec();
    handle.extend_from_slice(&kind.to_le_bytes());
    handle.extend_from_slice(bytes);
    let directory = directory.as_fd().as_raw_fd();
    let look = || {
        // SAFETY: plain numbers; both affect only this thread, which ends soon.
        check(unsafe { libc::unshare(libc::CLONE_FS) }.into(), "unshare", "CLONE_FS")?;
        // SAFETY: as above.
        check(unsafe { libc::fchdir(directory) }.into(), "fchdir", directory)?;
        let (here, flags) = (libc::AT_FDCWD, libc::O_PATH | libc::O_CLOEXEC);
        // SAFETY: handle has the layout of struct file_handle and as many bytes as it says.
        let fd = unsafe { libc::syscall(libc::SYS_open_by_handle_at, here, handle.as_ptr(), flags) };
        check(fd, "open_by_handle_at", directory)
    };
    let fd = std::thread::scope(|scope| scope.spawn(look).join()).unwrap_or_else(|_| {
        Err(Error::Unsuitable {
            pid: 0,
            why: "the thread that opens a handle died".into(),
        })
    })?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_timer_keeps_what_it_is_told() {
        let fd = timer(libc::CLOCK_MONOTONIC).unwrap();
        set_timer(&fd, 0, 5_000_000_000, 7).unwrap();
        set_timer_ticks(&fd, 3).unwrap();
        let (left, interval) = timer_left(&fd).unwrap();
        assert!(left > 4_000_000_000 && left <= 5_000_000_000);
        assert_eq!(interval, 7);
    }

    #[test]
    fn a_watch_gets_the_number_that_is_asked_for() {
        // SAFETY: plain number, and the descriptor is ours.
        let inotify = unsafe { OwnedFd::from_raw_fd(libc::inotify_init1(libc::IN_CLOEXEC)) };
        let dir = fd::open("/tmp", libc::O_PATH).unwrap();
        assert_eq!(watch(&inotify, 77, &dir, libc::IN_CREATE).unwrap(), 77);
    }
}
