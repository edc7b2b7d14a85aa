//! The few system calls that need `unsafe` here, each as a safe function.

use std::ffi::CStr;
use std::io;
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

/// The kernel's `struct sigaction`, all zero: the default action.
const DEFAULT_ACTION: [u64; 4] = [0; 4];

/// Gives the container's program the signal state of a fresh process: Rust ignores SIGPIPE, posix_spawn of glibc leaves
/// its internal signals ignored, and whoever called us may ignore or block others.
pub fn reset_signals() {
    for signal in 1..=64 {
        // Not through libc, which hides the signals it uses itself. SIGKILL and SIGSTOP answer EINVAL.
        // SAFETY: the action is as large as the kernel reads, and a default action installs no handler.
        unsafe {
            libc::syscall(
                libc::SYS_rt_sigaction,
                signal,
                DEFAULT_ACTION.as_ptr(),
                std::ptr::null::<u64>(),
                size_of::<u64>(),
            )
        };
    }
    let _ = SigSet::empty().thread_set_mask();
}

/// Lets whoever has the keyring look for keys in it, besides what its owner may: else `exec` could not join it.
const USER_SEARCH: libc::c_ulong = 0x0008_0000;
const SETPERM_POSSESSOR_ALL: libc::c_ulong = 0x3f00_0000;

/// Joins the session keyring of that name, made if there is none. A kernel without keyrings, or one whose filter forbids
/// them, has none to hide.
pub fn join_session_keyring(name: &CStr) -> io::Result<()> {
    // SAFETY: the name is a C string that outlives the call; the kernel only reads it.
    let id = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_JOIN_SESSION_KEYRING as libc::c_ulong,
            name.as_ptr(),
        )
    };
    if id < 0 {
        let error = io::Error::last_os_error();
        return match error.raw_os_error() {
            Some(libc::ENOSYS | libc::EPERM) => Ok(()),
            _ => Err(error),
        };
    }
    // SAFETY: plain numbers. It fails for a keyring that was there before and is another user's; joining was enough.
    unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_SETPERM as libc::c_ulong,
            id,
            SETPERM_POSSESSOR_ALL | USER_SEARCH,
        )
    };
    Ok(())
}
