//! IPv4 and IPv6 sockets: TCP ones without a connection, UDP ones.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use torpor_sys::socket::options::{self, Values};
use torpor_sys::socket::{self, Address};
use torpor_sys::{Pid, fd, namespace, proc};

use crate::error::{About, Error, Result};

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
    /// How many may wait for accept, when it listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u32>,
    /// 1: receives no more, 2: sends no more.
    #[serde(default)]
    pub shutdown: u8,
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
        let local = self.local.as_ref().map(|l| l.address.to_string()).unwrap_or_default();
        self.mptcp.then(|| format!("socket {local}: MPTCP is not carried yet, it comes back as plain TCP"))
    }

    fn family(&self) -> i32 {
        if self.v6 { libc::AF_INET6 } else { libc::AF_INET }
    }
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
/// Refused: every family and protocol but TCP and UDP, connections and attempts at one, listening sockets with
/// connections that nobody accepted, data that waits in either direction, packet filters, TLS, source-filtered
/// multicast, other network namespaces.
pub fn collect(pid: Pid, fd_no: i32, fd: &OwnedFd) -> Result<State> {
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
        backlog: None,
        shutdown: 0,
        groups: Vec::new(),
        owner: (id.mode, id.uid, id.gid),
        options: Values::new(),
    };
    let subject = Subject { pid, fd, object: format!("{} {}", object(), title(&state)) };
    subject.check_surroundings()?;
    match protocol {
        Protocol::Tcp => subject.tcp(&mut state)?,
        Protocol::Udp => subject.udp(&mut state)?,
    }
    let new = || socket::create(state.family(), protocol.kind(), 0);
    let new = namespace::within(pid, &["net"], new).about(pid, &subject.object)?;
    state.options = options::differing(fd, &new).about(pid, &subject.object)?;
    if protocol == Protocol::Tcp && state.shutdown != 0 {
        // What its last connection left there, not what the program wished.
        for name in ["TCP_MAXSEG", "TCP_WINDOW_CLAMP", "TCP_QUICKACK"] {
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
    let Some(Address::Inet(address)) = address else { return Ok(None) };
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

    fn check_surroundings(&self) -> Result<()> {
        let own = socket::net_namespace(self.fd).about(self.pid, &self.object)?;
        if own != proc::namespace(self.pid, "net").about(self.pid, &self.object)? {
            return self.refuse("it belongs to another network namespace", "close it before the checkpoint");
        }
        if options::has_filter(self.fd) {
            return self.refuse("a packet filter (SO_ATTACH_FILTER) is not carried yet", "");
        }
        if socket::poll(self.fd) & libc::POLLERR != 0 {
            return self.refuse("an error waits to be noticed", "try again when the program has read from it");
        }
        Ok(())
    }

    fn tcp(&self, state: &mut State) -> Result<()> {
        const TCP_INFO: i32 = 11;
        const TCP_ULP: i32 = 31;
        const CLOSE: u8 = 7;
        const LISTEN: u8 = 10;
        let mut ulp = [0; 16];
        if options::get(self.fd, libc::SOL_TCP, TCP_ULP, &mut ulp).is_ok_and(|len| len > 0) {
            return self.refuse("an upper layer such as TLS (TCP_ULP) is not carried yet", "");
        }
        // struct tcp_info: the state comes first; of a listening socket tcpi_unacked (at 24) is how many wait and
        // tcpi_sacked (at 28) how many may.
        let mut info = [0; 32];
        options::get(self.fd, libc::SOL_TCP, TCP_INFO, &mut info).about(self.pid, &self.object)?;
        let word = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
        match info[0] {
            LISTEN if word(24) > 0 => {
                let why = format!("{} connections wait to be accepted, which is not carried yet", word(24));
                self.refuse(why, "try again when they have been")
            }
            LISTEN => {
                state.backlog = Some(word(28));
                Ok(())
            }
            CLOSE if socket::incoming(self.fd).about(self.pid, &self.object)? > 0 => {
                self.refuse("data of a connection that has ended waits to be read, which is not carried yet", "")
            }
            CLOSE => {
                let is_over = socket::poll(self.fd) & libc::POLLRDHUP != 0;
                state.shutdown = if is_over { 3 } else { 0 };
                Ok(())
            }
            number => {
                let why = match number {
                    1 => "an established TCP connection is not carried yet",
                    2 | 3 => "a TCP connection that is being made is not carried yet",
                    _ => "a TCP connection that is being closed is not carried yet",
                };
                self.refuse(why, "close it before the checkpoint")
            }
        }
    }

    fn udp(&self, state: &mut State) -> Result<()> {
        let events = socket::poll(self.fd);
        let no_more = events & libc::POLLRDHUP != 0;
        let waits = (events & libc::POLLIN != 0 && !no_more) || socket::incoming(self.fd).about(self.pid, &self.object)? > 0;
        if waits {
            let remedy = "try again when they have been received";
            return self.refuse("datagrams wait to be received, which is not carried yet", remedy);
        }
        // What is on its way to the network goes by itself; what UDP_CORK or MSG_MORE holds back stays.
        let held = || socket::outgoing(self.fd).about(self.pid, &self.object);
        for _ in 0..20 {
            if held()? == 0 {
                break;
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        if held()? > 0 {
            return self.refuse("part of a datagram waits for the rest (UDP_CORK), which is not carried yet", "");
        }
        state.shutdown = match (no_more, events & libc::POLLHUP != 0) {
            (_, true) => 3,
            (true, false) => 1,
            (false, false) => 0,
        };
        state.groups = self.groups()?;
        Ok(())
    }

    /// The multicast groups of the socket: the kernel answers only for a given one, so those of the whole network
    /// namespace are asked about.
    fn groups(&self) -> Result<Vec<Group>> {
        let read = |name| std::fs::read_to_string(format!("/proc/{}/net/{name}", self.pid)).unwrap_or_default();
        let mut groups = Vec::new();
        for (index, address) in parse_igmp(&read("igmp")).into_iter().chain(parse_igmp6(&read("igmp6"))) {
            match socket::is_member(self.fd, index, address).about(self.pid, &self.object)? {
                None => {}
                Some(true) => {
                    let device = socket::device_name(self.fd, index).about(self.pid, &self.object)?;
                    groups.push(Group { device, address });
                }
                Some(false) => {
                    let why = format!("multicast group {address} from some sources only is not carried yet");
                    return self.refuse(why, "");
                }
            }
        }
        Ok(groups)
    }
}

/// Device numbers and groups of /proc/net/igmp: a line for each device, then an indented one for each group.
fn parse_igmp(text: &str) -> Vec<(u32, IpAddr)> {
    let mut index = None;
    let mut all = Vec::new();
    for line in text.lines().skip(1) {
        let first = line.split_ascii_whitespace().next().unwrap_or_default();
        if !line.starts_with(char::is_whitespace) {
            index = first.parse().ok();
        } else if let (Some(index), Ok(word)) = (index, u32::from_str_radix(first, 16)) {
            all.push((index, Ipv4Addr::from(word.to_ne_bytes()).into()));
        }
    }
    all
}

/// The same of /proc/net/igmp6: a line for each group.
fn parse_igmp6(text: &str) -> Vec<(u32, IpAddr)> {
    let line = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let index = fields.next()?.parse().ok()?;
        let address = u128::from_str_radix(fields.nth(1)?, 16).ok()?;
        Some((index, Ipv6Addr::from(address).into()))
    };
    text.lines().filter_map(line).collect()
}

/// Makes the sockets in the network namespace of `init`, in the order of `states`. No packet is sent.
pub fn rebuild(init: Pid, states: &[&State]) -> Result<Vec<OwnedFd>> {
    let all = || {
        let made = states.iter().map(|s| s.create()).collect::<torpor_sys::Result<Vec<_>>>()?;
        // A port that one listens on takes no other, so all are bound before.
        states.iter().zip(&made).try_for_each(|(s, fd)| s.start(fd))?;
        states.iter().zip(&made).try_for_each(|(s, fd)| s.finish(fd))?;
        Ok(made)
    };
    namespace::within(init, &["net"], all).about(init, "network sockets")
}

impl State {
    /// With its options, and bound.
    fn create(&self) -> torpor_sys::Result<OwnedFd> {
        let socket = socket::create(self.family(), self.protocol.kind(), 0)?;
        options::apply(&socket, &self.options)?;
        if self.protocol == Protocol::Tcp {
            // What is left of old connections must not keep the port.
            options::set_int(&socket, libc::SO_REUSEADDR, 1, "SO_REUSEADDR")?;
        }
        if let Some(local) = &self.local {
            socket::bind(&socket, &local.here(&socket)?)?;
        }
        Ok(socket)
    }

    fn start(&self, socket: &OwnedFd) -> torpor_sys::Result<()> {
        if let (Some(peer), Protocol::Udp) = (&self.peer, self.protocol) {
            socket::connect(socket, Some(&peer.here(socket)?))?;
        }
        for group in &self.groups {
            socket::join(socket, socket::device_index(socket, &group.device)?, group.address)?;
        }
        self.backlog.map_or(Ok(()), |backlog| socket::listen(socket, backlog))
    }

    fn finish(&self, socket: &OwnedFd) -> torpor_sys::Result<()> {
        if self.protocol == Protocol::Tcp && !self.options.contains_key("SO_REUSEADDR") {
            options::set_int(socket, libc::SO_REUSEADDR, 0, "SO_REUSEADDR")?;
        }
        socket::shutdown(socket, self.shutdown)?;
        let id = fd::stat(socket)?;
        let (mode, uid, gid) = self.owner;
        if (id.mode, id.uid, id.gid) != self.owner { fd::set_owner(socket, mode, uid, gid) } else { Ok(()) }
    }
}

impl Endpoint {
    fn here(&self, socket: &OwnedFd) -> torpor_sys::Result<Address> {
        let mut address = self.address;
        if let SocketAddr::V6(v6) = &mut address
            && !self.device.is_empty()
        {
            v6.set_scope_id(socket::device_index(socket, &self.device)?);
        }
        Ok(Address::Inet(address))
    }
}
