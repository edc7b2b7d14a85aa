//! The sockets of a network namespace (sock_diag(7): UNIX_DIAG, INET_DIAG).

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
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
    list(&unix_request(), "UNIX_DIAG", unix_entry)
}

/// One TCP socket of the kernel, whoever has it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TcpSocket {
    /// Its own address.
    pub local: SocketAddr,
    /// The address of its peer; unspecified without one.
    pub peer: SocketAddr,
    /// State by number (include/net/tcp_states.h).
    pub state: u8,
    /// Bytes that wait to be read; of a listening socket, connections that wait to be accepted.
    pub unread: u32,
    /// Its inode number; 0 when no program has it: not any more, or not yet accepted.
    pub ino: u64,
}

/// Lists the TCP sockets of the network namespace of the calling thread.
pub fn tcp_sockets() -> Result<Vec<TcpSocket>> {
    let mut all = list(&tcp_request(libc::AF_INET), "INET_DIAG", tcp_entry)?;
    match list(&tcp_request(libc::AF_INET6), "INET_DIAG", tcp_entry) {
        Ok(v6) => all.extend(v6),
        // A kernel without IPv6.
        Err(e) if e.errno() == Some(nix::errno::Errno::ENOENT) => {}
        Err(e) => return Err(e),
    }
    Ok(all)
}

type Entry<T> = fn(&[u8]) -> Option<T>;

fn list<T>(request: &[u8], name: &'static str, entry: Entry<T>) -> Result<Vec<T>> {
    const NETLINK_SOCK_DIAG: i32 = 4;
    let netlink = socket::create(libc::AF_NETLINK, libc::SOCK_RAW, NETLINK_SOCK_DIAG)?;
    // A dump that was disturbed by sockets coming and going says so; a busy host may do that a few times.
    for _ in 0..16 {
        if let Some(all) = dump(&netlink, request, name, entry)? {
            return Ok(all);
        }
    }
    Err(bad(name, "the list changes all the time"))
}

fn bad(name: &str, text: &str) -> Error {
    Error::Parse {
        file: name.into(),
        text: text.into(),
    }
}

/// A struct nlmsghdr and a request.
fn message(body: &[u8]) -> Vec<u8> {
    const SOCK_DIAG_BY_FAMILY: u16 = 20;
    let mut all = ((HEADER + body.len()) as u32).to_ne_bytes().to_vec();
    all.extend(SOCK_DIAG_BY_FAMILY.to_ne_bytes());
    all.extend(((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
    all.extend([0; 8]);
    all.extend(body);
    all
}

/// A struct unix_diag_req.
fn unix_request() -> Vec<u8> {
    const SHOW_PEER: u32 = 4;
    const SHOW_ICONS: u32 = 8;
    const SHOW_RQLEN: u32 = 16;
    let mut body = vec![libc::AF_UNIX as u8, 0, 0, 0];
    for word in [u32::MAX, 0, SHOW_PEER | SHOW_ICONS | SHOW_RQLEN, u32::MAX, u32::MAX] {
        body.extend(word.to_ne_bytes());
    }
    message(&body)
}

/// A struct inet_diag_req_v2: family, protocol, extensions, states, and an empty struct inet_diag_sockid.
fn tcp_request(family: i32) -> Vec<u8> {
    let mut body = vec![family as u8, libc::IPPROTO_TCP as u8, 0, 0];
    body.extend(u32::MAX.to_ne_bytes());
    body.extend([0; 48]);
    message(&body)
}

fn dump<T>(netlink: &impl AsFd, request: &[u8], name: &'static str, entry: Entry<T>) -> Result<Option<Vec<T>>> {
    socket::send(netlink, request, None)?;
    let mut all = Vec::new();
    let mut undisturbed = true;
    let mut room = vec![0u8; 64 * 1024];
    loop {
        let fd = netlink.as_fd().as_raw_fd();
        // SAFETY: room and its length.
        let len = unsafe { libc::recv(fd, room.as_mut_ptr().cast(), room.len(), 0) };
        let len = check(len as i64, "recv", name)? as usize;
        match parse(&room[..len], &mut all, entry).ok_or_else(|| bad(name, "a message is too short"))? {
            Part::More { disturbed } => undisturbed &= !disturbed,
            Part::End { disturbed } => return Ok((undisturbed && !disturbed).then_some(all)),
            Part::Error(code) => {
                let errno = nix::errno::Errno::from_raw(-code);
                return Err(Error::Call {
                    call: "sock_diag",
                    object: name.into(),
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
fn parse<T>(mut bytes: &[u8], all: &mut Vec<T>, entry: Entry<T>) -> Option<Part> {
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
fn unix_entry(body: &[u8]) -> Option<UnixSocket> {
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

/// A struct inet_diag_msg.
fn tcp_entry(body: &[u8]) -> Option<TcpSocket> {
    let family = i32::from(*body.first()?);
    let port = |at: usize| Some(u16::from_be_bytes(*body.get(at..)?.first_chunk()?));
    let address = |at: usize| -> Option<IpAddr> {
        Some(if family == libc::AF_INET {
            Ipv4Addr::from(*body.get(at..)?.first_chunk::<4>()?).into()
        } else {
            Ipv6Addr::from(*body.get(at..)?.first_chunk::<16>()?).into()
        })
    };
    Some(TcpSocket {
        local: SocketAddr::new(address(8)?, port(4)?),
        peer: SocketAddr::new(address(24)?, port(6)?),
        state: *body.get(1)?,
        unread: u32_at(body, 56)?,
        ino: u32_at(body, 68)?.into(),
    })
}
