//! IPv4 and IPv6 sockets.

pub mod connection;
mod hold;
mod look;
mod rebuild;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;
mod udp;

use std::net::{IpAddr, SocketAddr};
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::socket::options::{self, Values};
use torpor_sys::socket::tcp::{self, Phase};
use torpor_sys::socket::{self, Address};
use torpor_sys::{Pid, fd, namespace, proc};

use crate::error::{About, Error, Result};

pub use hold::Hold;
pub use rebuild::rebuild;

const IPPROTO_MPTCP: i32 = 262;

/// The protocol.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Protocol {
    Tcp,
    Udp,
}

impl Protocol {
    fn kind(self) -> i32 {
        match self {
            Protocol::Tcp => libc::SOCK_STREAM,
            Protocol::Udp => libc::SOCK_DGRAM,
        }
    }
}

/// An address and a port.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Endpoint {
    /// Both.
    pub address: SocketAddr,
    /// The device of a link-local address, whose number may be another in another namespace.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub device: String,
}

/// A datagram that waits to be read.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Datagram {
    /// Its bytes.
    pub data: BlobRef,
    /// Who sent it.
    pub from: SocketAddr,
    /// To which of our addresses.
    pub to: IpAddr,
}

/// A multicast group that a socket receives.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)]
pub struct Group {
    pub device: String,
    pub address: IpAddr,
}

/// One socket.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// IPv6 or IPv4.
    pub v6: bool,
    /// Its protocol.
    pub protocol: Protocol,
    /// It was MPTCP and comes back as TCP, which its peers fall back to.
    #[serde(default)]
    pub mptcp: bool,
    /// What it is bound to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub local: Option<Endpoint>,
    /// What it is connected to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub peer: Option<Endpoint>,
    /// Its connection, when it has one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub connection: Option<Box<connection::State>>,
    /// Its connection is being made: it is asked for once more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub connecting: bool,
    /// Its connection led out of the container and was not kept: the program reads ECONNRESET.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub reset: bool,
    /// How many may wait for accept, when it listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u32>,
    /// 1: receives no more, 2: sends no more.
    #[serde(default)]
    pub shutdown: u8,
    /// Datagrams that wait to be read, the first one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queue: Vec<Datagram>,
    /// Multicast groups.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub groups: Vec<Group>,
    /// Mode, uid, gid as fstat(2) shows them.
    pub owner: (u32, u32, u32),
    /// Options that are not as in a new socket.
    #[serde(default, skip_serializing_if = "Values::is_empty")]
    pub options: Values,
}

impl State {
    /// What the program may notice after a restore, in words for the report.
    pub fn warning(&self) -> Option<String> {
        let (local, peer) = self.ends();
        if self.mptcp {
            return Some(format!(
                "socket {local}: MPTCP is not carried yet, it comes back as plain TCP"
            ));
        }
        if self.queue.iter().any(|d| d.data.len == 0) {
            return Some(format!(
                "socket {local}: an empty datagram waits, which the kernel shows only once: a further checkpoint of this container will not have it"
            ));
        }
        self.reset.then(|| {
            format!("socket {local}: its connection to {peer} is closed in the image, the program will read ECONNRESET; --tcp-established keeps it")
        })
    }

    /// It is not simply a socket with an address: there is, was or will be a connection.
    pub fn has_met(&self) -> bool {
        self.connection.is_some() || self.connecting || self.reset
    }

    /// Closes a connection that leads out of the container (`--tcp-close`). What the program will notice, in words for
    /// the report, when it was one.
    pub fn close_outside(&mut self) -> Option<String> {
        self.connection
            .take_if(|c| c.mate == connection::Mate::Outside)
            .map(|_| {
                self.reset = true;
                let (local, peer) = self.ends();
                format!(
                    "socket {local}: its connection to {peer} is closed (--tcp-close), the program will read ECONNRESET"
                )
            })
    }

    /// Both addresses, for people.
    fn ends(&self) -> (String, String) {
        let show = |e: &Option<Endpoint>| e.as_ref().map(|e| e.address.to_string()).unwrap_or_default();
        (show(&self.local), show(&self.peer))
    }

    /// Nobody else can have the port of this UDP socket.
    fn is_alone_at_its_port(&self) -> bool {
        let shares = ["SO_REUSEADDR", "SO_REUSEPORT"]
            .iter()
            .any(|name| self.options.contains_key(*name));
        let has_port = self.local.as_ref().is_some_and(|l| l.address.port() != 0);
        self.protocol == Protocol::Udp && has_port && !shares
    }

    fn family(&self) -> i32 {
        if self.v6 { libc::AF_INET6 } else { libc::AF_INET }
    }
}

/// Whether a socket is a TCP one.
pub fn is_tcp(fd: &OwnedFd) -> bool {
    let ask = |number| options::int(fd, number).unwrap_or(-1);
    ask(libc::SO_TYPE) == libc::SOCK_STREAM
        && [libc::AF_INET, libc::AF_INET6].contains(&ask(libc::SO_DOMAIN))
        && [libc::IPPROTO_TCP, IPPROTO_MPTCP].contains(&ask(libc::SO_PROTOCOL))
}

/// A socket of a program, of which nothing may be changed.
struct Subject<'a> {
    pid: Pid,
    fd: &'a OwnedFd,
    object: String,
}

/// Looks at a socket of any family but AF_UNIX. `fd` is our descriptor for the program's own description.
///
/// # Errors
/// Refused: every family and protocol but TCP and UDP, what a connection was refused for ([`connection::survey`]),
/// packet filters, TLS, source-filtered multicast, other network namespaces.
pub fn collect(
    pid: Pid,
    fd_no: i32,
    fd: &OwnedFd,
    survey: &connection::Survey,
    blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>,
) -> Result<State> {
    let object = || format!("fd {fd_no}: socket");
    let ask = |number| options::int(fd, number).about(pid, object());
    let (domain, kind, protocol) = (ask(libc::SO_DOMAIN)?, ask(libc::SO_TYPE)?, ask(libc::SO_PROTOCOL)?);
    let protocol = match (domain, kind, protocol) {
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_STREAM, libc::IPPROTO_TCP | IPPROTO_MPTCP) => Protocol::Tcp,
        (libc::AF_INET | libc::AF_INET6, libc::SOCK_DGRAM, libc::IPPROTO_UDP) => Protocol::Udp,
        _ => {
            let object = format!("{} ({})", object(), family_name(domain, kind, protocol));
            let why = "sockets of this family are not carried yet";
            return Err(Error::unsupported(pid, object, why, "close it before the checkpoint"));
        }
    };
    let local = endpoint(fd, Some(socket::local(fd).about(pid, object())?)).about(pid, object())?;
    let peer = endpoint(fd, socket::peer(fd).about(pid, object())?).about(pid, object())?;
    let id = fd::stat(fd).about(pid, object())?;
    let mut state = State {
        v6: domain == libc::AF_INET6,
        protocol,
        mptcp: ask(libc::SO_PROTOCOL)? == IPPROTO_MPTCP,
        local: local.filter(|l| l.address.port() != 0 || !l.address.ip().is_unspecified()),
        peer,
        connection: None,
        connecting: false,
        reset: false,
        backlog: None,
        shutdown: 0,
        queue: Vec::new(),
        groups: Vec::new(),
        owner: (id.mode, id.uid, id.gid),
        options: Values::new(),
    };
    let subject = Subject {
        pid,
        fd,
        object: format!("{} {}", object(), title(&state)),
    };
    let connection = survey.get(id.ino);
    subject.check_surroundings(connection.is_some())?;
    match protocol {
        Protocol::Tcp => subject.tcp(&mut state, id.ino, survey, blob)?,
        Protocol::Udp => subject.udp(&mut state, blob)?,
    }
    let new = || socket::create(state.family(), protocol.kind(), 0);
    let new = namespace::within(pid, &["net"], new).about(pid, &subject.object)?;
    state.options = options::differing(fd, &new).about(pid, &subject.object)?;
    if protocol == Protocol::Tcp && (state.shutdown != 0 || state.has_met()) {
        // What its connection left there, not what the program wished, or what matters only before one.
        for name in [
            "TCP_MAXSEG",
            "TCP_WINDOW_CLAMP",
            "TCP_QUICKACK",
            "TCP_FASTOPEN",
            "TCP_FASTOPEN_CONNECT",
            "SO_INCOMING_CPU",
        ] {
            state.options.remove(name);
        }
    }
    Ok(state)
}

fn title(state: &State) -> String {
    let protocol = if state.protocol == Protocol::Tcp { "TCP" } else { "UDP" };
    let show = |e: &Option<Endpoint>| e.as_ref().map(|e| e.address.to_string());
    match (show(&state.local), show(&state.peer)) {
        (local, Some(peer)) => format!("{protocol} {} to {peer}", local.unwrap_or_default()),
        (Some(local), None) => format!("{protocol} {local}"),
        (None, None) => protocol.into(),
    }
}

fn family_name(domain: i32, kind: i32, protocol: i32) -> String {
    let name = match domain {
        libc::AF_NETLINK => "netlink",
        libc::AF_PACKET => "packet",
        libc::AF_VSOCK => "vsock",
        libc::AF_ALG => "kernel crypto",
        libc::AF_XDP => "XDP",
        libc::AF_CAN => "CAN",
        libc::AF_BLUETOOTH => "bluetooth",
        libc::AF_TIPC => "TIPC",
        libc::AF_INET | libc::AF_INET6 if kind == libc::SOCK_RAW => "raw IP",
        libc::AF_INET | libc::AF_INET6 if protocol == libc::IPPROTO_SCTP => "SCTP",
        libc::AF_INET | libc::AF_INET6 if protocol == libc::IPPROTO_UDPLITE => "UDP-Lite",
        libc::AF_INET | libc::AF_INET6 if kind == libc::SOCK_DGRAM => "ICMP",
        _ => return format!("family {domain}, type {kind}, protocol {protocol}"),
    };
    name.into()
}

fn endpoint(socket: &OwnedFd, address: Option<Address>) -> torpor_sys::Result<Option<Endpoint>> {
    let Some(Address::Inet(address)) = address else {
        return Ok(None);
    };
    let device = match address {
        SocketAddr::V6(v6) if v6.scope_id() != 0 => socket::device_name(socket, v6.scope_id())?,
        _ => String::new(),
    };
    Ok(Some(Endpoint { address, device }))
}

impl Subject<'_> {
    fn refuse<T>(&self, why: impl Into<String>, remedy: &str) -> Result<T> {
        Err(Error::unsupported(self.pid, self.object.clone(), why, remedy))
    }

    /// The filter of a connection is our own.
    fn check_surroundings(&self, is_held: bool) -> Result<()> {
        let own = socket::net_namespace(self.fd).about(self.pid, &self.object)?;
        if own != proc::namespace(self.pid, "net").about(self.pid, &self.object)? {
            return self.refuse(
                "it belongs to another network namespace",
                "close it before the checkpoint",
            );
        }
        if !is_held && options::has_filter(self.fd) {
            return self.refuse("a packet filter (SO_ATTACH_FILTER) is not carried yet", "");
        }
        if socket::poll(self.fd) & libc::POLLERR != 0 {
            return self.refuse(
                "an error waits to be noticed",
                "try again when the program has read from it",
            );
        }
        Ok(())
    }

    fn tcp(
        &self,
        state: &mut State,
        ino: u64,
        survey: &connection::Survey,
        blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>,
    ) -> Result<()> {
        const TCP_ULP: i32 = 31;
        let mut ulp = [0; 16];
        if !state.mptcp && options::get(self.fd, libc::SOL_TCP, TCP_ULP, &mut ulp).is_ok_and(|len| len > 0) {
            return self.refuse("an upper layer such as TLS (TCP_ULP) is not carried yet", "");
        }
        let info = tcp::info(self.fd).about(self.pid, &self.object)?;
        match info.phase {
            Some(Phase::Listen) => state.backlog = Some(info.backlog),
            Some(Phase::Close) if socket::incoming(self.fd).about(self.pid, &self.object)? > 0 => {
                let why = "data of a connection that has ended waits to be read, which is not carried yet";
                return self.refuse(why, "");
            }
            Some(Phase::Close) => {
                let is_over = socket::poll(self.fd) & libc::POLLRDHUP != 0;
                state.shutdown = if is_over { 3 } else { 0 };
            }
            Some(Phase::Opening) => state.connecting = true,
            Some(_) => match survey.get(ino) {
                Some(found) => state.connection = Some(Box::new(found.state(self.fd, blob)?)),
                None => state.reset = true,
            },
            None => return self.refuse("it is in a state without a name", ""),
        }
        Ok(())
    }
}
