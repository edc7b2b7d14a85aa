//! The few system calls that need `unsafe` here, each as a safe function.

use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::fcntl::{FcntlArg, FdFlag, fcntl};
use nix::sys::signal::SigSet;

use crate::error::Error;

/// Takes over a descriptor the caller left open for us, and keeps it from every program we execute.
pub fn adopt(fd: RawFd) -> Result<OwnedFd, Error> {
    if fd <= libc::STDERR_FILENO {
        return Err(Error::Usage(format!("descriptor {fd} is the container's own")));
    }
    fcntl(fd, FcntlArg::F_SETFD(FdFlag::FD_CLOEXEC))
        .map_err(|_| Error::Usage(format!("descriptor {fd} is not open")))?;
    // SAFETY: the descriptor is open, came from the command line, and nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

pub fn is_open(fd: RawFd) -> bool {
    fcntl(fd, FcntlArg::F_GETFD).is_ok()
}

/// Gives the container's program the signal state of a fresh process: Rust ignores SIGPIPE, and whoever called us may
/// ignore or block others.
pub fn reset_signals() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: setting a default action installs no handler. SIGKILL, SIGSTOP and those glibc keeps answer EINVAL.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    let _ = SigSet::empty().thread_set_mask();
}
