//! TCP connections that are read while they live, and made again without a packet (TCP_REPAIR, tcp(7) does not
//! describe it: net/ipv4/tcp.c).

use std::os::fd::AsFd;

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{incoming, options, outgoing, raw, send};
use crate::error::{Error, Result, check};
use crate::fd;

const TCP: i32 = libc::SOL_TCP;
const TCP_MAXSEG: i32 = 2;
const TCP_INFO: i32 = 11;
const TCP_REPAIR: i32 = 19;
const TCP_REPAIR_QUEUE: i32 = 20;
const TCP_QUEUE_SEQ: i32 = 21;
const TCP_REPAIR_OPTIONS: i32 = 22;
const TCP_TIMESTAMP: i32 = 24;
const TCP_REPAIR_WINDOW: i32 = 29;

/// In which half of a connection repair reads and writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Queue {
    Receive = 1,
    Send = 2,
}

/// The state of a connection (include/net/tcp_states.h).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub enum Phase {
    Established,
    FinWait1,
    FinWait2,
    CloseWait,
    LastAck,
    Closing,
    Listen,
    Close,
    /// Being made.
    Opening,
}

impl Phase {
    /// From the number that TCP_INFO and sock_diag(7) show; `None` for what no program has a socket of.
    pub fn of(number: u8) -> Option<Phase> {
        Some(match number {
            1 => Phase::Established,
            2 | 3 | 12 => Phase::Opening,
            4 => Phase::FinWait1,
            5 => Phase::FinWait2,
            7 => Phase::Close,
            8 => Phase::CloseWait,
            9 => Phase::LastAck,
            10 => Phase::Listen,
            11 => Phase::Closing,
            _ => return None,
        })
    }

    /// A connection with something in it that is worth keeping.
    pub fn is_connected(self) -> bool {
        !matches!(self, Phase::Listen | Phase::Close | Phase::Opening)
    }

    /// The program has sent its end of data.
    pub fn sent_end(self) -> bool {
        matches!(
            self,
            Phase::FinWait1 | Phase::FinWait2 | Phase::LastAck | Phase::Closing
        )
    }

    /// The end of the peer's data has arrived.
    pub fn got_end(self) -> bool {
        matches!(self, Phase::CloseWait | Phase::LastAck | Phase::Closing)
    }
}

/// What of TCP_INFO (struct tcp_info) is asked for.
#[derive(Debug, Clone, Copy)]
pub struct Info {
    /// `None`: a state that this program does not know.
    pub phase: Option<Phase>,
    /// Of a listening socket: how many wait to be accepted.
    pub waiting: u32,
    /// Of a listening socket: how many may wait.
    pub backlog: u32,
    options: u8,
    scales: u8,
}

/// Reads TCP_INFO.
pub fn info(socket: &impl AsFd) -> Result<Info> {
    let mut room = [0; 32];
    options::get(socket, TCP, TCP_INFO, &mut room)?;
    let word = |at: usize| u32::from_ne_bytes([room[at], room[at + 1], room[at + 2], room[at + 3]]);
    Ok(Info {
        phase: Phase::of(room[0]),
        waiting: word(24),
        backlog: word(28),
        options: room[5],
        scales: room[6],
    })
}

/// What both sides agreed on when the connection was made.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Agreed {
    /// The largest segment that the peer takes, in bytes.
    pub mss: u32,
    /// Shifts of the windows: the peer's and our own.
    pub scales: Option<(u8, u8)>,
    /// Selective acknowledgements.
    pub sack: bool,
    /// The clock that our segments show, with which PAWS tells old from new.
    pub timestamp: Option<u32>,
}

/// A connection as it is at one moment.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Snapshot {
    /// Number of TCP_INFO.
    pub phase: u8,
    /// Sequence number after the last byte in the send queue, an end of data included.
    pub written: u32,
    /// The same of what was received.
    pub received: u32,
    /// Of the send queue: how much is not acknowledged, an end of data included.
    pub unacknowledged: u32,
    /// And how much has not even been sent.
    pub unsent: u32,
    /// How much can be read.
    pub unread: u32,
    /// What was agreed on.
    pub agreed: Agreed,
    /// struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
    pub window: [u32; 5],
    /// Unacknowledged and unsent bytes.
    #[serde(skip)]
    pub outgoing: Vec<u8>,
    /// Unread bytes.
    #[serde(skip)]
    pub incoming: Vec<u8>,
}

/// Whatever is known of a socket that is in repair and must not stay there.
#[derive(Debug, Clone, Copy)]
pub struct Before {
    reuse: i32,
}

impl Before {
    /// Looks at a socket before it goes into repair.
    pub fn of(socket: &impl AsFd) -> Result<Before> {
        let reuse = options::int(socket, libc::SO_REUSEADDR)?;
        Ok(Before { reuse })
    }

    /// Puts a socket back that may have been left in repair. Nothing is sent.
    pub fn undo(self, socket: &impl AsFd) -> Result<()> {
        leave(socket, false)?;
        options::set_int(socket, libc::SO_REUSEADDR, self.reuse, "SO_REUSEADDR")
    }
}

fn set(socket: &impl AsFd, number: i32, value: i32, name: &str) -> Result<()> {
    options::set(socket, TCP, number, &value.to_ne_bytes(), name)
}

fn word(socket: &impl AsFd, number: i32) -> Result<u32> {
    let mut room = [0; 4];
    options::get(socket, TCP, number, &mut room)?;
    Ok(u32::from_ne_bytes(room))
}

/// From now on nothing is sent and calls read and change the state itself.
pub fn enter(socket: &impl AsFd) -> Result<()> {
    set(socket, TCP_REPAIR, 1, "TCP_REPAIR")
}

/// The connection goes on. With `probe` the peer is asked for its window.
pub fn leave(socket: &impl AsFd, probe: bool) -> Result<()> {
    // The choice outlives repair, and a program could read its sequence numbers. EPERM: it is in none.
    match set(socket, TCP_REPAIR_QUEUE, 0, "TCP_REPAIR_QUEUE") {
        Err(e) if e.errno() != Some(Errno::EPERM) => return Err(e),
        _ => {}
    }
    set(socket, TCP_REPAIR, if probe { 0 } else { -1 }, "TCP_REPAIR")
}

/// Which half the calls to come are about.
pub fn choose(socket: &impl AsFd, queue: Queue) -> Result<()> {
    set(socket, TCP_REPAIR_QUEUE, queue as i32, "TCP_REPAIR_QUEUE")
}

/// Sets the sequence number of the chosen half; before connect(2) only.
pub fn set_sequence(socket: &impl AsFd, number: u32) -> Result<()> {
    set(socket, TCP_QUEUE_SEQ, number as i32, "TCP_QUEUE_SEQ")
}

/// Sets what was agreed on; after connect(2).
pub fn agree(socket: &impl AsFd, agreed: &Agreed) -> Result<()> {
    let mut all = vec![[2, agreed.mss]];
    if let Some((send, receive)) = agreed.scales {
        all.push([3, u32::from(send) | u32::from(receive) << 16]);
    }
    if agreed.sack {
        all.push([4, 0]);
    }
    if agreed.timestamp.is_some() {
        all.push([8, 0]);
    }
    let bytes: Vec<u8> = all.iter().flatten().flat_map(|w| w.to_ne_bytes()).collect();
    options::set(socket, TCP, TCP_REPAIR_OPTIONS, &bytes, "TCP_REPAIR_OPTIONS")?;
    reckon_segments(socket)?;
    match agreed.timestamp {
        Some(now) => set(socket, TCP_TIMESTAMP, now as i32, "TCP_TIMESTAMP"),
        None => Ok(()),
    }
}

/// The kernel has reckoned the size of segments before it knew what the peer takes, and does so again only when the
/// path changes, or the options in the header do: IP_OPTIONS, of IPv6 sockets too (do_ip_setsockopt).
fn reckon_segments(socket: &impl AsFd) -> Result<()> {
    let mut same = [0; 64];
    let len = options::get(socket, libc::SOL_IP, libc::IP_OPTIONS, &mut same)?.min(same.len());
    options::set(socket, libc::SOL_IP, libc::IP_OPTIONS, &same[..len], "IP_OPTIONS")
}

/// Sets the windows, when everything received is there.
pub fn set_window(socket: &impl AsFd, window: &[u32; 5]) -> Result<()> {
    let bytes: Vec<u8> = window.iter().flat_map(|w| w.to_ne_bytes()).collect();
    options::set(socket, TCP, TCP_REPAIR_WINDOW, &bytes, "TCP_REPAIR_WINDOW")
}

/// Puts bytes into the chosen half.
pub fn put(socket: &impl AsFd, mut data: &[u8]) -> Result<()> {
    // One packet is made of each call: it must not ask for much memory in one piece.
    let mut most = 64 * 1024;
    while !data.is_empty() {
        match send(socket, &data[..data.len().min(most)], None) {
            Ok(sent) => data = &data[sent..],
            Err(e) if e.errno() == Some(Errno::ENOMEM) && most > 4096 => most /= 2,
            Err(e) => return Err(e),
        }
    }
    Ok(())
}

/// Reads a connection. It is in repair for a few microseconds, in which no call on it works: whoever has it must be
/// stopped, and this process must not be the one that stops it ([`Before`] is for when this one is killed).
pub fn snapshot(socket: &impl AsFd, before: Before) -> Result<Snapshot> {
    let unread = peek_unread(socket)?;
    enter(socket)?;
    let seen = in_repair(socket, unread);
    before.undo(socket)?;
    seen
}

fn in_repair(socket: &impl AsFd, incoming: Vec<u8>) -> Result<Snapshot> {
    const SIOCOUTQNSD: u64 = 0x894b;
    let info = info(socket)?;
    let phase = info.phase.ok_or_else(|| odd("a state without a name"))?;
    choose(socket, Queue::Receive)?;
    let received = word(socket, TCP_QUEUE_SEQ)?;
    // What arrived since is told from what was peeked at by its length.
    let unread = super::incoming(socket)? as u32;
    choose(socket, Queue::Send)?;
    let written = word(socket, TCP_QUEUE_SEQ)?;
    let unacknowledged = outgoing(socket)? as u32;
    let unsent = fd::ioctl_int(socket, SIOCOUTQNSD)? as u32;
    let mut window = [0; 20];
    options::get(socket, TCP, TCP_REPAIR_WINDOW, &mut window)?;
    let word_at = |at: usize| u32::from_ne_bytes([window[at], window[at + 1], window[at + 2], window[at + 3]]);
    let agreed = Agreed {
        mss: word(socket, TCP_MAXSEG)?,
        scales: (info.options & 4 != 0).then_some((info.scales & 15, info.scales >> 4)),
        sack: info.options & 2 != 0,
        timestamp: if info.options & 1 != 0 {
            Some(word(socket, TCP_TIMESTAMP)?)
        } else {
            None
        },
    };
    Ok(Snapshot {
        phase: number_of(phase),
        written,
        received,
        unacknowledged,
        unsent,
        unread,
        agreed,
        window: [0, 4, 8, 12, 16].map(word_at),
        outgoing: peek(socket, unacknowledged as usize)?,
        incoming,
    })
}

fn number_of(phase: Phase) -> u8 {
    (1..=12).find(|n| Phase::of(*n) == Some(phase)).unwrap_or(7)
}

fn odd(text: &str) -> Error {
    Error::Parse {
        file: "TCP connection".into(),
        text: text.into(),
    }
}

/// Everything that can be read, in order, and stays there.
fn peek_unread(socket: &impl AsFd) -> Result<Vec<u8>> {
    let len = incoming(socket)?;
    // Linux 6.10 and later let a program peek from an offset on, which each look moves.
    match options::int(socket, libc::SO_PEEK_OFF).unwrap_or(-1) {
        ..0 => peek(socket, len),
        offset => {
            options::set_int(socket, libc::SO_PEEK_OFF, 0, "SO_PEEK_OFF")?;
            let seen = peek(socket, len);
            options::set_int(socket, libc::SO_PEEK_OFF, offset, "SO_PEEK_OFF")?;
            seen
        }
    }
}

fn peek(socket: &impl AsFd, len: usize) -> Result<Vec<u8>> {
    let mut room = vec![0u8; len];
    if len == 0 {
        return Ok(room);
    }
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT;
    // SAFETY: room and its length.
    let got = unsafe { libc::recv(raw(socket), room.as_mut_ptr().cast(), len, flags) };
    match check(got as i64, "recv", "MSG_PEEK") {
        Err(e) if e.errno() == Some(Errno::EAGAIN) => room.clear(),
        got => room.truncate(got? as usize),
    }
    Ok(room)
}
