//! TCP connections: what both ends have sent, received, acknowledged and agreed on.
//!
//! Two ends in one container are cut at one moment: what one end has received the other need not send again, so
//! nothing is lost or doubled, whatever was on its way. An end whose peer is elsewhere keeps its sequence numbers.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::socket::diag::{self, TcpSocket};
use torpor_sys::socket::tcp::{self, Agreed, Phase, Queue, Snapshot};
use torpor_sys::socket::{self, Address, options};
use torpor_sys::{Pid, namespace};

use super::hold::Hold;
use super::look;
use crate::error::{About, Error, Result};

/// Where the other end is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mate {
    /// In a process of the container.
    Inside,
    /// A process of the container has not accepted it yet.
    Waiting,
    /// It was in this network namespace and has been closed.
    Gone,
    /// Elsewhere.
    Outside,
}

/// One direction of a connection, as one end sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Stream {
    /// Sequence number of the first byte.
    pub sequence: u32,
    /// The bytes: not acknowledged, or not read.
    pub data: BlobRef,
    /// The stream ends after them.
    #[serde(default)]
    pub ends: bool,
}

/// An end of a connection.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Where the other end is.
    pub mate: Mate,
    /// What was agreed on when it was made.
    pub agreed: Agreed,
    /// What the peer has not acknowledged.
    pub send: Stream,
    /// How much of that has not been sent yet.
    pub unsent: u32,
    /// What the program has not read.
    pub receive: Stream,
    /// struct tcp_repair_window: snd_wl1, snd_wnd, max_window, rcv_wnd, rcv_wup.
    pub window: [u32; 5],
    /// Sizes of both buffers as getsockopt(2) shows them: the kernel lets them grow.
    pub buffers: (i32, i32),
}

/// A TCP socket of a program.
#[derive(Debug, Clone, Copy)]
pub struct Candidate<'a> {
    /// Who has it.
    pub pid: Pid,
    /// Where.
    pub number: i32,
    /// Its inode number.
    pub ino: u64,
    /// Ours of it.
    pub fd: &'a OwnedFd,
}

/// Both addresses of a connection.
type Pair = (SocketAddr, SocketAddr);

struct End<'a> {
    of: Candidate<'a>,
    pair: Pair,
    mate: Mate,
}

/// A connection as it was found.
#[derive(Debug)]
pub struct Found {
    mate: Mate,
    snapshot: Snapshot,
    /// How many of the outgoing bytes the other end has received.
    arrived: usize,
}

/// What becomes of connections to the outside.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Policy {
    /// They are kept (`--tcp-established`); else they are closed in the image.
    pub keep: bool,
    /// The program ends: until then nothing may reach a connection that is saved.
    pub ends: bool,
    /// Connections that nobody accepted are left out (`--tcp-skip-in-flight`).
    pub skip_waiting: bool,
}

/// All connections, at one moment.
#[derive(Debug, Default)]
pub struct Survey {
    found: BTreeMap<u64, Found>,
    waiting: BTreeMap<u64, usize>,
    hold: Option<Hold>,
    policy: Policy,
}

/// Addresses as they are on the wire: an IPv6 socket may have IPv4 ones.
fn plain(address: SocketAddr) -> SocketAddr {
    SocketAddr::new(address.ip().to_canonical(), address.port())
}

fn pair_of(socket: &OwnedFd) -> torpor_sys::Result<Option<Pair>> {
    let (Address::Inet(local), Some(Address::Inet(peer))) = (
        socket::local(socket)?,
        match socket::peer(socket)? {
            // A connection that is being closed has lost its name.
            None => None,
            some => some,
        },
    ) else {
        return Ok(None);
    };
    Ok(Some((plain(local), plain(peer))))
}

/// Looks at all TCP sockets of a container.
///
/// # Errors
/// Refused: data that nobody accepted, urgent data, connections whose state cannot be told.
pub fn survey(init: Pid, all: &[Candidate<'_>], policy: Policy) -> Result<Survey> {
    let mut survey = Survey {
        policy,
        ..Survey::default()
    };
    let mut ends = Vec::new();
    let mut listening = Vec::new();
    for candidate in all {
        let object = || format!("fd {}: socket", candidate.number);
        let info = tcp::info(candidate.fd).about(candidate.pid, object())?;
        match info.phase {
            Some(Phase::Listen) if info.waiting > 0 => listening.push((*candidate, info.waiting)),
            Some(phase) if phase.is_connected() => {
                let pair = pair_of(candidate.fd).about(candidate.pid, object())?;
                let of = *candidate;
                ends.extend(pair.map(|pair| End {
                    of,
                    pair,
                    mate: Mate::Outside,
                }));
            }
            _ => {}
        }
    }
    if ends.is_empty() && listening.is_empty() {
        return Ok(survey);
    }
    let known = namespace::within(init, &["net"], diag::tcp_sockets).about(init, "TCP sockets")?;
    place(&mut ends, &known, all);
    survey.count_waiting(&listening, &ends, &known)?;
    let ends: Vec<End<'_>> = ends
        .into_iter()
        .filter(|e| e.mate != Mate::Outside || policy.keep)
        .collect();
    ends.iter().try_for_each(check)?;
    if policy.keep && policy.ends {
        let outside = ends.iter().filter(|e| e.mate == Mate::Outside);
        survey.hold = Hold::take(init, outside.map(|e| e.of.fd))?;
    }
    survey.found = snapshots(init, &ends)?;
    Ok(survey)
}

/// Says of each end where the other one is.
fn place(ends: &mut [End<'_>], known: &[TcpSocket], all: &[Candidate<'_>]) {
    let by_pair: BTreeMap<Pair, usize> = ends.iter().enumerate().map(|(i, e)| (e.pair, i)).collect();
    let in_kernel: BTreeMap<Pair, &TcpSocket> = known.iter().map(|s| ((plain(s.local), plain(s.peer)), s)).collect();
    let is_inside = |ino: u64| all.iter().any(|c| c.ino == ino);
    for end in ends.iter_mut() {
        let mirror = (end.pair.1, end.pair.0);
        let other = in_kernel.get(&mirror);
        let state = other.and_then(|o| Phase::of(o.state));
        let is_near = end.pair.1.ip().is_loopback() || end.pair.1.ip() == end.pair.0.ip();
        let listens = || known.iter().any(|s| listens_at(s, mirror.0) && is_inside(s.ino));
        end.mate = match (by_pair.contains_key(&mirror), other) {
            (true, _) => Mate::Inside,
            (_, Some(o)) if o.ino != 0 => Mate::Outside,
            (_, Some(_)) if matches!(state, Some(Phase::Established | Phase::CloseWait)) && listens() => Mate::Waiting,
            _ if is_near => Mate::Gone,
            _ => Mate::Outside,
        };
    }
}

fn listens_at(socket: &TcpSocket, address: SocketAddr) -> bool {
    let local = plain(socket.local);
    Phase::of(socket.state) == Some(Phase::Listen)
        && local.port() == address.port()
        && (local.ip().is_unspecified() || local.ip() == address.ip())
}

fn check(end: &End<'_>) -> Result<()> {
    let refuse = |why: &str, remedy: &str| {
        let object = format!("fd {}: socket TCP {} to {}", end.of.number, end.pair.0, end.pair.1);
        Err(Error::unsupported(end.of.pid, object, why, remedy))
    };
    if options::has_filter(end.of.fd) {
        return refuse("a packet filter (SO_ATTACH_FILTER) is not carried yet", "");
    }
    if socket::poll(end.of.fd) & libc::POLLPRI != 0 {
        return refuse("urgent data is not carried yet", "try again when it has been received");
    }
    if options::int(end.of.fd, libc::SO_PROTOCOL).is_ok_and(|p| p != libc::IPPROTO_TCP) {
        return refuse(
            "an MPTCP connection is not carried yet",
            "close it before the checkpoint",
        );
    }
    Ok(())
}

/// Reads all ends, until what they say of each other fits: what was on its way from one to the other has arrived in
/// both views or in none. The programs stand still, so that it soon does.
fn snapshots(init: Pid, ends: &[End<'_>]) -> Result<BTreeMap<u64, Found>> {
    if ends.is_empty() {
        return Ok(BTreeMap::new());
    }
    let sockets: Vec<&OwnedFd> = ends.iter().map(|e| e.of.fd).collect();
    let by_pair: BTreeMap<Pair, usize> = ends.iter().enumerate().map(|(i, e)| (e.pair, i)).collect();
    for _ in 0..100 {
        let seen = look::look(init, &sockets)?;
        let arrived: Option<Vec<usize>> = ends
            .iter()
            .zip(&seen)
            .map(|(end, own)| {
                let other = by_pair.get(&(end.pair.1, end.pair.0)).and_then(|i| seen.get(*i));
                arrived(own, other)
            })
            .collect();
        if let Some(arrived) = arrived {
            let found = ends.iter().zip(seen).zip(arrived);
            return Ok(found
                .map(|((end, snapshot), arrived)| {
                    let mate = end.mate;
                    (
                        end.of.ino,
                        Found {
                            mate,
                            snapshot,
                            arrived,
                        },
                    )
                })
                .collect());
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    let why = "their data does not come to rest";
    Err(Error::unsupported(init, "TCP connections", why, "try again"))
}

/// How many bytes of the send queue of `own` have arrived at `other`; `None` when the two do not fit.
fn arrived(own: &Snapshot, other: Option<&Snapshot>) -> Option<usize> {
    if own.unread as usize != own.incoming.len() {
        return None;
    }
    let Some(other) = other else { return Some(0) };
    let first = own.written.wrapping_sub(own.unacknowledged);
    let arrived = other.received.wrapping_sub(first);
    (arrived <= own.unacknowledged).then_some((arrived as usize).min(own.outgoing.len()))
}

impl Survey {
    /// A connection by its inode number.
    pub fn get(&self, ino: u64) -> Option<&Found> {
        self.found.get(&ino)
    }

    /// How many of those that wait at a listening socket will wait there again.
    pub fn waiting(&self, ino: u64) -> usize {
        self.waiting.get(&ino).copied().unwrap_or(0)
    }

    /// What keeps the peers of saved connections waiting.
    pub fn into_hold(self) -> Option<Hold> {
        self.hold
    }

    /// # Errors
    /// Refused: connections that nobody accepted, unless they come from inside and nothing waits in them, so that
    /// calling once more makes the same.
    fn count_waiting(
        &mut self,
        listening: &[(Candidate<'_>, u32)],
        ends: &[End<'_>],
        known: &[TcpSocket],
    ) -> Result<()> {
        for (listener, count) in listening {
            let Address::Inet(local) = socket::local(listener.fd).about(listener.pid, "socket")? else {
                continue;
            };
            let is_its = |s: &&TcpSocket| {
                let own = plain(s.local);
                let at = plain(local);
                s.ino == 0
                    && Phase::of(s.state).is_some_and(Phase::is_connected)
                    && own.port() == at.port()
                    && (at.ip().is_unspecified() || at.ip() == own.ip())
            };
            let children: Vec<&TcpSocket> = known.iter().filter(is_its).collect();
            let is_ours = |s: &&&TcpSocket| {
                let mirror = (plain(s.peer), plain(s.local));
                ends.iter().any(|e| e.pair == mirror && e.mate == Mate::Waiting)
            };
            let again = children.iter().filter(is_ours).filter(|s| s.unread == 0).count();
            let object = format!("fd {}: socket TCP {local}", listener.number);
            let remedy = "try again when they have been accepted, or allow to drop them with --tcp-skip-in-flight";
            if again < *count as usize && !self.policy.skip_waiting {
                let unread = children.iter().any(|s| s.unread > 0);
                let what = if unread {
                    "connections with data"
                } else {
                    "connections from outside"
                };
                let why = format!("{what} wait to be accepted: nobody but the program can take them");
                return Err(Error::unsupported(listener.pid, object, why, remedy));
            }
            self.waiting.insert(listener.ino, again);
        }
        Ok(())
    }
}

impl Found {
    /// What goes into the image.
    pub fn state(&self, fd: &OwnedFd, blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>) -> Result<State> {
        let seen = &self.snapshot;
        let phase = Phase::of(seen.phase).unwrap_or(Phase::Close);
        let data = &seen.outgoing[self.arrived..];
        let unsent_end = u32::from(phase.sent_end() && seen.unsent > 0);
        let first = seen.written.wrapping_sub(seen.unacknowledged);
        // An end of data that was acknowledged is sent once more: its number is the one before.
        let acknowledged_end = u32::from(phase == Phase::FinWait2);
        let end = u32::from(phase.got_end());
        let buffer = |number| options::int(fd, number).about(0, "socket buffer");
        Ok(State {
            mate: self.mate,
            agreed: seen.agreed,
            unsent: if self.mate == Mate::Inside {
                data.len() as u32
            } else {
                seen.unsent - unsent_end
            },
            send: Stream {
                sequence: first.wrapping_add(self.arrived as u32).wrapping_sub(acknowledged_end),
                data: blob(data)?,
                ends: phase.sent_end(),
            },
            receive: Stream {
                sequence: seen.received.wrapping_sub(end).wrapping_sub(seen.incoming.len() as u32),
                data: blob(&seen.incoming)?,
                ends: phase.got_end(),
            },
            window: seen.window,
            buffers: (buffer(libc::SO_SNDBUF)?, buffer(libc::SO_RCVBUF)?),
        })
    }
}

/// The bytes of a connection that is made again.
#[derive(Debug)]
pub(super) struct Bytes {
    /// To be sent.
    pub send: Vec<u8>,
    /// To be read.
    pub receive: Vec<u8>,
}

type Made<T> = torpor_sys::Result<T>;

/// Room beside the bytes for what the kernel keeps with them.
fn room(bytes: &[u8], size: i32) -> i32 {
    size.max(
        bytes
            .len()
            .saturating_mul(4)
            .saturating_add(1 << 20)
            .try_into()
            .unwrap_or(i32::MAX / 2),
    )
}

impl State {
    /// Makes an end of a connection between the two addresses. It stays in repair: nothing is sent.
    pub(super) fn open(&self, socket: &OwnedFd, local: &Address, peer: &Address, bytes: &Bytes) -> Made<()> {
        let (send, receive) = self.buffers;
        options::force_buffers(socket, (room(&bytes.send, send), room(&bytes.receive, receive)))?;
        tcp::enter(socket)?;
        tcp::choose(socket, Queue::Receive)?;
        tcp::set_sequence(socket, self.receive.sequence)?;
        tcp::choose(socket, Queue::Send)?;
        tcp::set_sequence(socket, self.send.sequence)?;
        socket::bind(socket, local)?;
        socket::connect(socket, Some(peer))?;
        tcp::agree(socket, &self.agreed)?;
        tcp::choose(socket, Queue::Receive)?;
        tcp::put(socket, &bytes.receive)?;
        tcp::choose(socket, Queue::Send)?;
        tcp::put(socket, &bytes.send[..self.sent(bytes)])?;
        self.set_window(socket, bytes)
    }

    fn sent(&self, bytes: &Bytes) -> usize {
        bytes.send.len().saturating_sub(self.unsent as usize)
    }

    /// The windows speak of an end of data that has not come again yet.
    fn set_window(&self, socket: &OwnedFd, bytes: &Bytes) -> Made<()> {
        let received = self.receive.sequence.wrapping_add(bytes.receive.len() as u32);
        let not_after = |number: u32| {
            if (received.wrapping_sub(number) as i32) < 0 {
                received
            } else {
                number
            }
        };
        let mut window = self.window;
        window[0] = not_after(window[0]);
        window[4] = not_after(window[4]);
        tcp::set_window(socket, &window)
    }

    /// Lets the connection go on, when every other end is there.
    pub(super) fn start(&self, socket: &OwnedFd) -> Made<()> {
        tcp::leave(socket, self.mate == Mate::Outside)
    }

    /// Sends what was not sent, and the end of data.
    pub(super) fn go_on(&self, socket: &OwnedFd, bytes: &Bytes, locks: i32) -> Made<()> {
        let rest = &bytes.send[self.sent(bytes)..];
        tcp::put(socket, rest)?;
        if self.send.ends {
            socket::shutdown(socket, 2)?;
        }
        options::force_buffers(socket, self.buffers)?;
        options::set_buffer_locks(socket, locks)
    }

    /// The other end of one whose peer was closed, as the kernel had it.
    pub(super) fn mirror(&self, bytes: &Bytes) -> (State, Bytes) {
        let mate = State {
            mate: Mate::Gone,
            send: Stream {
                sequence: self.receive.sequence.wrapping_add(bytes.receive.len() as u32),
                data: BlobRef::default(),
                ends: true,
            },
            receive: Stream {
                sequence: self.send.sequence,
                data: BlobRef::default(),
                ends: false,
            },
            agreed: Agreed {
                scales: self.agreed.scales.map(|(send, receive)| (receive, send)),
                ..self.agreed
            },
            unsent: 0,
            window: [self.send.sequence, 1 << 16, 1 << 16, 1 << 16, self.send.sequence],
            buffers: self.buffers,
        };
        let none = Bytes {
            send: Vec::new(),
            receive: Vec::new(),
        };
        (mate, none)
    }
}

/// Whether an address is one that every network namespace has.
pub(super) fn is_loopback(address: &SocketAddr) -> bool {
    match address.ip().to_canonical() {
        IpAddr::V4(v4) => v4.is_loopback(),
        IpAddr::V6(v6) => v6.is_loopback(),
    }
}
