//! Messages with what comes beside their bytes: descriptors and credentials (unix(7)), where they were sent to (ip(7)).

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{ADDRESS, Address, raw};
use crate::error::{Result, check};

/// Who sent a message (SCM_CREDENTIALS).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Credentials {
    pub pid: i32,
    pub uid: u32,
    pub gid: u32,
}

/// The most descriptors that one message holds (SCM_MAX_FD).
pub const MOST_RIGHTS: usize = 253;

/// What a look at a message shows.
#[derive(Debug)]
pub struct Seen {
    /// Its length, which may be more than there was room for.
    pub len: usize,
    /// Who sent it, by the address of that socket.
    pub sender: Option<Address>,
    /// Where it was sent to, where the socket shows that (IP_RECVORIGDSTADDR, IPV6_RECVORIGDSTADDR).
    pub destination: Option<Address>,
    /// It was put together from several (UDP_GRO).
    pub is_joined: bool,
    /// New descriptors for the open files that it brings, close-on-exec.
    pub rights: Vec<OwnedFd>,
    /// Who sent it, where the socket shows that (SO_PASSCRED). Of a message that has none the kernel shows process 0
    /// and the overflow ids.
    pub credentials: Option<Credentials>,
    /// Nothing of what comes beside was left out for want of room or of descriptors.
    pub is_whole: bool,
}

/// Room for descriptors, credentials, a pidfd, a security label and time stamps.
const CONTROL: usize = 2048;

/// Looks at the next message of a socket, or at the bytes of a stream as far as `room` goes and as they were sent
/// together, and leaves it there. `None` when there are none; but a pending error is taken away then, so look only where
/// there is data.
pub fn look(socket: impl AsFd, room: &mut [u8]) -> Result<Option<Seen>> {
    receive(&socket, room, 0)
}

/// Bytes at the beginning of a stream that were sent before those that end one byte behind `room`. The kernel copies what
/// came in one part as a whole or, where that fails, not at all: so the byte behind `room` is one that cannot be written.
pub fn parts_within(socket: impl AsFd, room: &mut [u8]) -> Result<usize> {
    match receive(&socket, room, 1) {
        Err(e) if e.errno() == Some(Errno::EFAULT) => Ok(0),
        seen => Ok(seen?.map_or(0, |seen| seen.len)),
    }
}

/// `beyond` is how many bytes there is no room for, although the kernel is told that there is.
fn receive(socket: &impl AsFd, room: &mut [u8], beyond: usize) -> Result<Option<Seen>> {
    let mut name = [0u8; ADDRESS];
    let mut control = [0u64; CONTROL / 8];
    let part = |iov_base: *mut u8, iov_len| libc::iovec {
        iov_base: iov_base.cast(),
        iov_len,
    };
    let mut parts = [part(room.as_mut_ptr(), room.len()), part(std::ptr::null_mut(), beyond)];
    // SAFETY: a struct of numbers and pointers, for which zero means none.
    let mut head: libc::msghdr = unsafe { std::mem::zeroed() };
    head.msg_name = name.as_mut_ptr().cast();
    head.msg_namelen = name.len() as u32;
    head.msg_iov = parts.as_mut_ptr();
    head.msg_iovlen = 2;
    head.msg_control = control.as_mut_ptr().cast();
    head.msg_controllen = CONTROL;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC | libc::MSG_CMSG_CLOEXEC;
    // SAFETY: name, parts, room and control outlive the call and have the lengths that are given, but for what is beyond:
    // that is at no address, and the kernel says EFAULT.
    let ret = unsafe { libc::recvmsg(raw(socket), &raw mut head, flags) };
    let len = match check(ret as i64, "recvmsg", raw(socket)) {
        Err(e) if e.errno() == Some(Errno::EAGAIN) => return Ok(None),
        len => len? as usize,
    };
    let mut seen = Seen {
        len,
        sender: name.get(..head.msg_namelen as usize).and_then(Address::from_bytes),
        destination: None,
        is_joined: false,
        rights: Vec::new(),
        credentials: None,
        is_whole: head.msg_flags & libc::MSG_CTRUNC == 0,
    };
    // SAFETY: the kernel has filled control as far as msg_controllen, which the macros respect.
    let mut next = unsafe { libc::CMSG_FIRSTHDR(&raw const head) };
    while !next.is_null() {
        // SAFETY: next points to a header within control, and its data follow it.
        let (part, data) = unsafe { (*next, libc::CMSG_DATA(next)) };
        // SAFETY: no header, no data: what a header says that it has is there.
        let bytes = unsafe { std::slice::from_raw_parts(data, part.cmsg_len.saturating_sub(16)) };
        seen.take(part.cmsg_level, part.cmsg_type, bytes);
        // SAFETY: as for the first one.
        next = unsafe { libc::CMSG_NXTHDR(&raw const head, next) };
    }
    Ok(Some(seen))
}

impl Seen {
    fn take(&mut self, level: i32, kind: i32, bytes: &[u8]) {
        const SCM_PIDFD: i32 = 4;
        const IPV6_ORIGDSTADDR: i32 = 74;
        const UDP_GRO: i32 = 104;
        let word = |at: usize| bytes.get(at..).and_then(|b| b.first_chunk()).copied();
        let number = |at| word(at).map_or(0, i32::from_ne_bytes);
        match (level, kind) {
            (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                let fds = bytes.chunks_exact(4).filter_map(|b| b.first_chunk());
                // SAFETY: the kernel just gave us these.
                let own = |fd: &[u8; 4]| unsafe { OwnedFd::from_raw_fd(i32::from_ne_bytes(*fd)) };
                self.rights.extend(fds.map(own));
            }
            (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) => {
                self.credentials = Some(Credentials {
                    pid: number(0),
                    uid: number(4) as u32,
                    gid: number(8) as u32,
                });
            }
            (libc::SOL_SOCKET, SCM_PIDFD) if number(0) >= 0 => {
                // SAFETY: the kernel just gave it to us. It says no more than the credentials do.
                drop(unsafe { OwnedFd::from_raw_fd(number(0)) });
            }
            (libc::SOL_IP, libc::IP_ORIGDSTADDR) | (libc::SOL_IPV6, IPV6_ORIGDSTADDR) => {
                self.destination = Address::from_bytes(bytes);
            }
            (libc::SOL_UDP, UDP_GRO) => self.is_joined = true,
            _ => {}
        }
    }
}

/// One control message, padded.
fn control(kind: i32, data: &[u8]) -> Vec<u8> {
    let mut bytes = (16 + data.len()).to_ne_bytes().to_vec();
    bytes.extend(libc::SOL_SOCKET.to_ne_bytes());
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(data);
    bytes.resize(bytes.len().next_multiple_of(8), 0);
    bytes
}

/// Sends a message without waiting and without SIGPIPE; the number of bytes that went. Another's credentials need
/// CAP_SYS_ADMIN, CAP_SETUID and CAP_SETGID, and that the process is there.
pub fn send(
    socket: impl AsFd,
    data: &[u8],
    to: Option<&Address>,
    rights: &[&OwnedFd],
    credentials: Option<Credentials>,
) -> Result<usize> {
    let mut name = to.map(Address::to_bytes).unwrap_or_default();
    let mut beside = Vec::new();
    if !rights.is_empty() {
        let fds: Vec<u8> = rights.iter().flat_map(|f| f.as_raw_fd().to_ne_bytes()).collect();
        beside.extend(control(libc::SCM_RIGHTS, &fds));
    }
    if let Some(Credentials { pid, uid, gid }) = credentials {
        let words = [pid.to_ne_bytes(), uid.to_ne_bytes(), gid.to_ne_bytes()].concat();
        beside.extend(control(libc::SCM_CREDENTIALS, &words));
    }
    let mut part = libc::iovec {
        iov_base: data.as_ptr().cast_mut().cast(),
        iov_len: data.len(),
    };
    // SAFETY: a struct of numbers and pointers, for which zero means none.
    let mut head: libc::msghdr = unsafe { std::mem::zeroed() };
    if !name.is_empty() {
        head.msg_name = name.as_mut_ptr().cast();
        head.msg_namelen = name.len() as u32;
    }
    head.msg_iov = &raw mut part;
    head.msg_iovlen = 1;
    if !beside.is_empty() {
        head.msg_control = beside.as_mut_ptr().cast();
        head.msg_controllen = beside.len();
    }
    // SAFETY: name, part, data and what is beside outlive the call; the kernel only reads them.
    let ret = unsafe { libc::sendmsg(raw(&socket), &raw const head, libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL) };
    check(ret as i64, "sendmsg", format!("{} bytes", data.len())).map(|n| n as usize)
}
