//! The unix sockets of a network namespace (sock_diag(7), UNIX_DIAG).

use std::os::fd::{AsFd, AsRawFd};

use crate::error::{Error, Result, check};
use crate::socket;

/// One unix socket.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct UnixSocket {
    /// Its inode number.
    pub ino: u64,
    /// SOCK_STREAM, SOCK_DGRAM or SOCK_SEQPACKET.
    pub kind: i32,
    /// It waits for connections.
    pub is_listening: bool,
    /// The socket at its other end; 0 when that has been closed or not been accepted yet.
    pub peer: Option<u64>,
    /// The sockets that wait to be accepted.
    pub waiting: Vec<u64>,
    /// Of a listening socket: how many may wait. Of another: memory of what it sent and nobody has read.
    pub out: u32,
    /// 1: receives no more, 2: sends no more.
    pub shutdown: u8,
}

const HEADER: usize = 16;

/// Lists the unix sockets of the network namespace of the calling thread.
pub fn unix_sockets() -> Result<Vec<UnixSocket>> {
    const NETLINK_SOCK_DIAG: i32 = 4;
    let netlink = socket::create(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)?;
    // A dump that was disturbed by sockets coming and going says so; a busy host may do that a few times.
    for _ in 0..16 {
        if let Some(all) = dump(&netlink)? {
            return Ok(all);
        }
    }
    Err(bad("the list changes all the time"))
}

fn bad(text: &str) -> Error {
    Error::Parse {
        file: "UNIX_DIAG".into(),
        text: text.into(),
    }
}

/// The request: a struct nlmsghdr and a struct unix_diag_req.
fn request() -> Vec<u8> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    const SHOW_PEER: u32 = 4;
    const SHOW_ICONS: u32 = 8;
    const SHOW_RQLEN: u32 = 16;
    let mut body = vec![libc::AF_UNIX as u8, 0, 0, 0];
    for word in [u32::MAX, 0, SHOW_PEER | SHOW_ICONS | SHOW_RQLEN, u32::MAX, u32::MAX] {
        body.extend(word.to_ne_bytes());
    }
    let mut all = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    all.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    all.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    all.extend([0; 8]);
    all.extend(body);
    all
}

fn dump(netlink: &impl AsFd) -> Result<Option<Vec<UnixSocket>>> {
    socket::send(netlink, &request(), None)?;
    let mut all = Vec::new();
    let mut undisturbed = true;
    let mut room = vec![0u8; 64 * 1024];
    loop {
        let fd = netlink.as_fd().as_raw_fd();
        // SAFETY: room and its length.
        let len = unsafe { libc::recv(fd, room.as_mut_ptr().cast(), room.len(), 0) };
        let len = check(len as i64, "recv", "UNIX_DIAG")? as usize;
        match parse(&room[..len], &mut all).ok_or_else(|| bad("a message is too short"))? {
            Part::More { disturbed } => undisturbed &= !disturbed,
            Part::End { disturbed } => return Ok((undisturbed && !disturbed).then_some(all)),
            Part::Error(code) => {
                let errno = nix::errno::Errno::from_raw(-code);
                return Err(Error::Call {
                    call: "sock_diag",
                    object: "unix sockets".into(),
                    errno,
                });
            }
        }
    }
}

enum Part {
    More { disturbed: bool },
    End { disturbed: bool },
    Error(i32),
}

fn u16_at(bytes: &[u8], at: usize) -> Option<u16> {
    Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    Some(u32::from_ne_bytes(*bytes.get(at..)?.first_chunk()?))
}

/// The messages of one datagram. `None` when they do not fit it.
fn parse(mut bytes: &[u8], all: &mut Vec<UnixSocket>) -> Option<Part> {
    let mut disturbed = false;
    while !bytes.is_empty() {
        let len = u32_at(bytes, 0)? as usize;
        disturbed |= i32::from(u16_at(bytes, 6)?) & libc::NLM_F_DUMP_INTR != 0;
        let body = bytes.get(HEADER..len)?;
        match i32::from(u16_at(bytes, 4)?) {
            libc::NLMSG_DONE => return Some(Part::End { disturbed }),
            libc::NLMSG_ERROR => return Some(Part::Error(u32_at(body, 0)? as i32)),
            _ => all.push(entry(body)?),
        }
        bytes = bytes.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(Part::More { disturbed })
}

/// A struct unix_diag_msg and its attributes.
fn entry(body: &[u8]) -> Option<UnixSocket> {
    const PEER: u16 = 2;
    const ICONS: u16 = 3;
    const RQLEN: u16 = 4;
    const SHUTDOWN: u16 = 6;
    const TCP_LISTEN: u8 = 10;
    let mut socket = UnixSocket {
        kind: (*body.get(1)?).into(),
        is_listening: *body.get(2)? == TCP_LISTEN,
        ino: u32_at(body, 4)?.into(),
        ..UnixSocket::default()
    };
    let mut rest = body.get(16..)?;
    while rest.len() >= 4 {
        let len = u16_at(rest, 0)? as usize;
        let value = rest.get(4..len)?;
        match u16_at(rest, 2)? {
            PEER => socket.peer = Some(u32_at(value, 0)?.into()),
            ICONS => {
                socket.waiting = (0..value.len() / 4)
                    .filter_map(|i| Some(u32_at(value, i * 4)?.into()))
                    .collect()
            }
            RQLEN => socket.out = u32_at(value, 4)?,
            SHUTDOWN => socket.shutdown = *value.first()?,
            _ => {}
        }
        rest = rest.get(len.next_multiple_of(4)..).unwrap_or_default();
    }
    Some(socket)
}
