//! Looking at things from inside the namespaces of another process, in a thread of our own.

use std::os::fd::AsRawFd;

use crate::error::{Error, Result, check};
use crate::{Pid, fd};

/// Runs `look` in a new thread that has joined the given namespaces (`kind` as in /proc/PID/ns: net, ipc, uts)
/// of the process. The calling thread stays where it is.
pub fn within<T: Send>(pid: Pid, kinds: &[&str], look: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            for kind in kinds {
                let path = format!("/proc/{pid}/ns/{kind}");
                let ns = fd::open(&path, libc::O_RDONLY)?;
                // SAFETY: plain numbers; affects only this thread, which ends soon.
                check(unsafe { libc::setns(ns.as_raw_fd(), 0) }.into(), "setns", &path)?;
            }
            look()
        });
        thread.join().unwrap_or_else(|_| {
            Err(Error::Unsuitable {
                pid,
                why: "the thread that looks into its namespaces died".into(),
            })
        })
    })
}

/// Runs `look` in a new thread in an IPC namespace that was made for it and ends with it.
pub fn in_fresh_ipc<T: Send>(look: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            // SAFETY: plain numbers; affects only this thread, which ends soon.
            check(unsafe { libc::unshare(libc::CLONE_NEWIPC) }.into(), "unshare", "ipc")?;
            look()
        });
        thread.join().unwrap_or_else(|_| {
            Err(Error::Unsuitable {
                pid: 0,
                why: "the thread in a namespace of its own died".into(),
            })
        })
    })
}
