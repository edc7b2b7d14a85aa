//! Locks of open file descriptions, and who is told by a signal that one is ready.

use std::os::fd::{AsFd, AsRawFd};

use crate::Pid;
use crate::error::{Result, check};

/// Takes a flock(2) without waiting.
pub fn flock(fd: impl AsFd, exclusive: bool) -> Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    let how = if exclusive { libc::LOCK_EX } else { libc::LOCK_SH };
    // SAFETY: plain numbers.
    check(unsafe { libc::flock(fd, how | libc::LOCK_NB) }.into(), "flock", fd).map(drop)
}

/// Takes a lock on a range that belongs to the description (fcntl(2), F_OFD_SETLK). A length of 0 reaches to the
/// end of the file, however it grows.
pub fn range(fd: impl AsFd, exclusive: bool, start: i64, len: i64) -> Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    let kind = if exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
    let lock = libc::flock {
        l_type: kind as i16,
        l_whence: libc::SEEK_SET as i16,
        l_start: start,
        l_len: len,
        l_pid: 0,
    };
    // SAFETY: lock is a valid struct flock.
    let ret = unsafe { libc::fcntl(fd, libc::F_OFD_SETLK, &raw const lock) };
    check(ret.into(), "fcntl F_OFD_SETLK", fd).map(drop)
}

/// Who gets the signals of a description (fcntl(2), F_GETOWN_EX): (F_OWNER_* kind, id as our pid namespace numbers
/// it; 0 when there is none).
pub fn owner(fd: impl AsFd) -> Result<(i32, Pid)> {
    const F_GETOWN_EX: i32 = 16;
    let fd = fd.as_fd().as_raw_fd();
    let mut owner = [0i32; 2];
    // SAFETY: owner is room for a struct f_owner_ex.
    let ret = unsafe { libc::fcntl(fd, F_GETOWN_EX, owner.as_mut_ptr()) };
    check(ret.into(), "fcntl F_GETOWN_EX", fd)?;
    Ok((owner[0], owner[1]))
}

/// Real and effective user id of whoever set the owner (F_GETOWNER_UIDS), as our user namespace has them.
pub fn owner_uids(fd: impl AsFd) -> Result<(u32, u32)> {
    const F_GETOWNER_UIDS: i32 = 17;
    let fd = fd.as_fd().as_raw_fd();
    let mut uids = [0u32; 2];
    // SAFETY: uids is room for two uid_t.
    let ret = unsafe { libc::fcntl(fd, F_GETOWNER_UIDS, uids.as_mut_ptr()) };
    check(ret.into(), "fcntl F_GETOWNER_UIDS", fd)?;
    Ok((uids[0], uids[1]))
}

/// Process, user and group that connecting to this listening socket shows (SO_PEERCRED), as our namespaces number
/// them.
pub fn listener(fd: impl AsFd) -> Result<(Pid, u32, u32)> {
    let fd = fd.as_fd().as_raw_fd();
    let mut who = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len = size_of_val(&who) as libc::socklen_t;
    // SAFETY: who and len are room for the result.
    let ret = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_PEERCRED,
            (&raw mut who).cast(),
            &raw mut len,
        )
    };
    check(ret.into(), "getsockopt SO_PEERCRED", fd)?;
    Ok((who.pid, who.uid, who.gid))
}
