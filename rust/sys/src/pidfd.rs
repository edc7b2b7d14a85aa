//! Process descriptors: a task that cannot be mistaken for another, and its open files.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::Pid;
use crate::error::{Result, check};

/// Opens a descriptor of a process.
pub fn open(pid: Pid) -> Result<OwnedFd> {
    // SAFETY: plain numbers; the result is a descriptor that we own.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_open, pid, 0) };
    let fd = check(ret, "pidfd_open", pid)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Opens a descriptor of a thread (PIDFD_THREAD, since 6.9).
pub fn open_thread(tid: Pid) -> Result<OwnedFd> {
    // SAFETY: plain numbers; the result is a descriptor that we own.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_open, tid, libc::O_EXCL) };
    let fd = check(ret, "pidfd_open", tid)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// A descriptor of ours for an open file of another process (pidfd_getfd(2)).
pub fn get_fd(pidfd: impl AsFd, fd: i32) -> Result<OwnedFd> {
    // SAFETY: plain numbers; the result is a descriptor that we own.
    let ret = unsafe { libc::syscall(libc::SYS_pidfd_getfd, pidfd.as_fd().as_raw_fd(), fd, 0) };
    let fd = check(ret, "pidfd_getfd", fd)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Sends a signal to exactly that process.
pub fn send_signal(pidfd: impl AsFd, signal: i32) -> Result<()> {
    let fd = pidfd.as_fd().as_raw_fd();
    // SAFETY: a null siginfo asks for the default one.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            fd,
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    check(ret, "pidfd_send_signal", signal).map(drop)
}

/// Waits until the process has ended, at most `ms` milliseconds. False when the time ran out.
pub fn wait_end(pidfd: impl AsFd, ms: i32) -> bool {
    let mut poll = libc::pollfd {
        fd: pidfd.as_fd().as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, ms) > 0 }
}
