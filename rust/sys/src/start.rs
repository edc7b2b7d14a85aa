//! What a process sets up before it executes the program of a container.

use std::ffi::CStr;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};

use nix::errno::Errno;
use nix::sys::signal::SigSet;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socket};

use crate::error::{Result, check};
use crate::fd::ioctl_set;

/// Takes over a descriptor that our caller left open for us, and keeps it from every program we execute.
pub fn adopt(fd: RawFd) -> Result<OwnedFd> {
    // SAFETY: a plain number and flag; the kernel answers EBADF for what is not open.
    let ret = unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) };
    check(ret.into(), "fcntl", fd)?;
    // SAFETY: the descriptor is open, was handed to us by number, and nothing else here owns it.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// Whether a descriptor that a caller named is open.
pub fn is_open(fd: RawFd) -> bool {
    // SAFETY: a plain number; the kernel answers EBADF for what is not open.
    unsafe { libc::fcntl(fd, libc::F_GETFD) >= 0 }
}

/// The kernel's `struct sigaction`, all zero: the default action.
const DEFAULT_ACTION: [u64; 4] = [0; 4];

/// Gives the process the signal state of a fresh one: Rust ignores SIGPIPE, posix_spawn of glibc leaves its internal
/// signals ignored, and whoever called us may ignore or block others.
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
pub fn join_session_keyring(name: &CStr) -> Result<()> {
    // SAFETY: the name is a C string that outlives the call; the kernel only reads it.
    let id = unsafe {
        libc::syscall(
            libc::SYS_keyctl,
            libc::KEYCTL_JOIN_SESSION_KEYRING as libc::c_ulong,
            name.as_ptr(),
        )
    };
    if id < 0 && matches!(Errno::last(), Errno::ENOSYS | Errno::EPERM) {
        return Ok(());
    }
    check(id, "keyctl", name.to_string_lossy())?;
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

/// `struct ifreq` of netdevice(7): a name of 16 bytes, then here the flags.
const IFREQ: usize = 40;
const IFREQ_FLAGS: usize = 16;

/// Brings up the loopback of a network namespace that is new, whose device has no flags yet that could be lost. While it
/// is down, not even 127.0.0.1 can be bound.
pub fn bring_up_loopback() -> Result<()> {
    let socket = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None).map_err(|errno| {
        crate::Error::Call {
            call: "socket",
            object: "AF_INET".into(),
            errno,
        }
    })?;
    let mut request = [0; IFREQ];
    request[..2].copy_from_slice(b"lo");
    request[IFREQ_FLAGS..IFREQ_FLAGS + 2].copy_from_slice(&(libc::IFF_UP as i16).to_ne_bytes());
    ioctl_set(&socket, libc::SIOCSIFFLAGS, &request)
}
