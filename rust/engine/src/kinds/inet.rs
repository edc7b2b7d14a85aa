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
        self.mptcp
            .then(|| format!("socket {local}: MPTCP is not carried yet, it comes back as plain TCP"))
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
    let subject = Subject {
        pid,
        fd,
        object: format!("{} {}", object(), title(&state)),
    };
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
        for name in ["TCP_MAXSEG", "TCP_WINDOW_CLAMP", "TCP_QUICKACK", "SO_INCOMING_CPU"] {
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

    fn check_surroundings(&self) -> Result<()> {
        let own = socket::net_namespace(self.fd).about(self.pid, &self.object)?;
        if own != proc::namespace(self.pid, "net").about(self.pid, &self.object)? {
            return self.refuse(
                "it belongs to another network namespace",
                "close it before the checkpoint",
            );
        }
        if options::has_filter(self.fd) {
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

    fn tcp(&self, state: &mut State) -> Result<()> {
        const TCP_INFO: i32 = 11;
        const TCP_ULP: i32 = 31;
        const CLOSE: u8 = 7;
        const LISTEN: u8 = 10;
        let mut ulp = [0; 16];
        if !state.mptcp && options::get(self.fd, libc::SOL_TCP, TCP_ULP, &mut ulp).is_ok_and(|len| len > 0) {
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
            CLOSE if socket::incoming(self.fd).about(self.pid, &self.object)? > 0 => self.refuse(
                "data of a connection that has ended waits to be read, which is not carried yet",
                "",
            ),
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
        let waits =
            (events & libc::POLLIN != 0 && !no_more) || socket::incoming(self.fd).about(self.pid, &self.object)? > 0;
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
            return self.refuse(
                "part of a datagram waits for the rest (UDP_CORK), which is not carried yet",
                "",
            );
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
        let made = states
            .iter()
            .map(|s| s.create())
            .collect::<torpor_sys::Result<Vec<_>>>()?;
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
        if (id.mode, id.uid, id.gid) != self.owner {
            fd::set_owner(socket, mode, uid, gid)
        } else {
            Ok(())
        }
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

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::{Read, Write};
    use std::net::{TcpListener, TcpStream, UdpSocket};
    use std::os::fd::{AsFd, AsRawFd};
    use std::process::{Child, Command, Stdio};

    use super::*;

    /// A process with a network namespace of its own, with lo and a link between two devices.
    struct Container(Child);

    impl Container {
        fn new() -> Container {
            let script = "ip link set lo up && ip link add eth0 type veth peer name eth1 && ip link set eth0 up && \
                ip link set eth1 up && ip addr add 10.7.7.1/24 dev eth0 && ip -6 addr add fe80::7/64 dev eth0 nodad && \
                echo ready && exec sleep 600";
            let mut command = Command::new("unshare");
            let mut child = command
                .args(["-n", "sh", "-c", script])
                .stdout(Stdio::piped())
                .spawn()
                .unwrap();
            let mut ready = [0; 6];
            child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
            Container(child)
        }

        fn pid(&self) -> Pid {
            self.0.id() as Pid
        }

        fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
            namespace::within(self.pid(), &["net"], || Ok(work())).unwrap()
        }

        fn save(&self, fd: &OwnedFd) -> Result<State> {
            let before = all_options(fd);
            let flags = fd::fcntl(fd, libc::F_GETFL, 0).unwrap();
            let state = collect(self.pid(), fd.as_raw_fd(), fd)?;
            same(before, all_options(fd));
            assert_eq!(flags, fd::fcntl(fd, libc::F_GETFL, 0).unwrap());
            Ok(serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap())
        }

        fn refusal(&self, fd: &impl AsFd) -> String {
            let fd = fd.as_fd().try_clone_to_owned().unwrap();
            let error = self.save(&fd).unwrap_err();
            assert_eq!(error.code(), "unsupported");
            error.to_string()
        }
    }

    impl Drop for Container {
        fn drop(&mut self) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }

    /// Saves the sockets of one container and rebuilds them in another: same options, would be saved the same again.
    fn cycle<const N: usize>(from: &Container, to: &Container, fds: [&OwnedFd; N]) -> [OwnedFd; N] {
        let states = fds.map(|fd| from.save(fd).unwrap());
        let made: [OwnedFd; N] = rebuild(to.pid(), &states.each_ref()).unwrap().try_into().unwrap();
        for ((fd, state), made) in fds.iter().zip(&states).zip(&made) {
            same(all_options(fd), all_options(made));
            assert_eq!(format!("{state:?}"), format!("{:?}", to.save(made).unwrap()));
            assert_eq!(socket::poll(fd), socket::poll(made));
        }
        made
    }

    type Options = Vec<(i32, i32, Vec<u8>)>;

    /// Every option that can be read, but those that tell sockets, CPUs or times apart or that reading changes.
    fn all_options(fd: &impl AsFd) -> Options {
        let skipped = |level, number| match level {
            // ERROR PEERCRED INCOMING_CPU MEMINFO INCOMING_NAPI_ID COOKIE NETNS_COOKIE PEERPIDFD
            libc::SOL_SOCKET => [4, 17, 49, 55, 56, 57, 71, 77].contains(&number),
            // INFO TIMESTAMP CC_INFO FASTOPEN_KEY ZEROCOPY_RECEIVE
            libc::SOL_TCP => [11, 24, 26, 33, 35].contains(&number),
            _ => false,
        };
        let mut all = Vec::new();
        for level in [
            libc::SOL_SOCKET,
            libc::SOL_IP,
            libc::SOL_IPV6,
            libc::SOL_TCP,
            libc::SOL_UDP,
        ] {
            for number in (1..120).filter(|n| !skipped(level, *n)) {
                let mut room = [0; 256];
                if let Ok(len) = options::get(fd, level, number, &mut room) {
                    all.push((level, number, room[..len.min(256)].to_vec()));
                }
            }
        }
        all
    }

    fn same(a: Options, b: Options) {
        let only = |a: &Options, b: &Options| a.iter().filter(|o| !b.contains(o)).cloned().collect::<Vec<_>>();
        assert_eq!(only(&a, &b), only(&b, &a));
    }

    fn set(fd: &impl AsFd, level: i32, number: i32, value: i32) {
        options::set(fd, level, number, &value.to_ne_bytes(), "test")
            .unwrap_or_else(|e| panic!("{level} {number}: {e}"));
    }

    /// Changes every option that this kernel lets us change on such a socket; the number of them.
    fn change_all(fd: &OwnedFd) -> usize {
        const STRANGE: [(i32, i32); 12] = [
            // What attaches, repairs or needs a peer, an address or a key.
            (1, 26),
            (1, 27),
            (1, 50),
            (1, 51),
            (1, 52),
            (1, 68),
            (6, 14),
            (6, 19),
            (6, 33),
            (41, 1),
            (41, 20),
            (6, 31),
        ];
        let mut changed = 0;
        for (level, number, value) in all_options(fd) {
            let Ok(now) = <[u8; 4]>::try_from(value).map(i32::from_ne_bytes) else {
                continue;
            };
            if STRANGE.contains(&(level, number)) {
                continue;
            }
            for value in [1, 0, 2, 30, 600, now + 1] {
                let done = value != now && options::set(fd, level, number, &value.to_ne_bytes(), "").is_ok();
                let mut room = [0; 4];
                if done && options::get(fd, level, number, &mut room).is_ok() && i32::from_ne_bytes(room) != now {
                    changed += 1;
                    break;
                }
            }
        }
        changed
    }

    #[test]
    fn listening_sockets_accept_again() {
        let (here, there) = (Container::new(), Container::new());
        for (address, client) in [
            ("127.0.0.1:80", "127.0.0.1:80"),
            ("0.0.0.0:81", "10.7.7.1:81"),
            ("[::1]:82", "[::1]:82"),
            ("[::]:83", "127.0.0.1:83"),
            ("[::ffff:127.0.0.1]:84", "127.0.0.1:84"),
            ("[fe80::7%eth0]:85", "[fe80::7%eth0]:85"),
        ] {
            let of = |c: &Container, a: &str| -> SocketAddr {
                a.replace("%eth0", &format!("%{}", index_of(c, "eth0")))
                    .parse()
                    .unwrap()
            };
            let listener: OwnedFd = here.run(|| TcpListener::bind(of(&here, address)).unwrap()).into();
            socket::listen(&listener, 33).unwrap();
            let [made] = cycle(&here, &there, [&listener]);
            assert_eq!(here.save(&listener).unwrap().backlog, Some(33));
            for (container, fd) in [(&here, listener), (&there, made)] {
                let listener = TcpListener::from(fd);
                let target = of(container, client);
                let mut stream = container.run(|| TcpStream::connect(target).unwrap());
                stream.write_all(b"hello").unwrap();
                let mut room = [0; 5];
                listener.accept().unwrap().0.read_exact(&mut room).unwrap();
                assert_eq!(&room, b"hello");
            }
        }
    }

    fn index_of(container: &Container, device: &str) -> u32 {
        container
            .run(|| socket::device_index(socket::create(libc::AF_INET, libc::SOCK_DGRAM, 0).unwrap(), device).unwrap())
    }

    #[test]
    fn every_option_that_can_be_set_is_carried() {
        let (here, there) = (Container::new(), Container::new());
        for (family, kind) in [
            (libc::AF_INET, libc::SOCK_STREAM),
            (libc::AF_INET6, libc::SOCK_STREAM),
            (libc::AF_INET, libc::SOCK_DGRAM),
            (libc::AF_INET6, libc::SOCK_DGRAM),
        ] {
            let fd = here.run(|| socket::create(family, kind, 0).unwrap());
            let changed = change_all(&fd);
            assert!(changed > 40, "{changed}");
            set(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 1 << 24);
            options::set(&fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"eth0", "").unwrap();
            options::set(&fd, libc::SOL_SOCKET, libc::SO_LINGER, &[1, 0, 0, 0, 5, 0, 0, 0], "").unwrap();
            if kind == libc::SOCK_STREAM {
                options::set(&fd, libc::SOL_TCP, libc::TCP_CONGESTION, b"reno", "").unwrap();
                set(&fd, libc::SOL_SOCKET, libc::SO_INCOMING_CPU, 1);
                cycle(&here, &there, [&fd]);
                socket::listen(&fd, 5).unwrap();
            }
            fd::set_owner(&fd, 0o600, 11, 12).unwrap();
            cycle(&here, &there, [&fd]);
        }
    }

    // Each round has containers of its own: a child that another test starts meanwhile holds a copy of our sockets until it
    // executes its program, and a port that is held cannot be bound again.
    #[test]
    fn sockets_that_share_a_port() {
        let make = |here: &Container, option| {
            let fd = here.run(|| socket::create(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap());
            set(&fd, libc::SOL_SOCKET, option, 1);
            socket::bind(&fd, &Address::Inet("0.0.0.0:90".parse().unwrap())).unwrap();
            fd
        };
        let (here, there) = (Container::new(), Container::new());
        let group = [(); 3].map(|()| make(&here, libc::SO_REUSEPORT));
        group.iter().for_each(|fd| socket::listen(fd, 5).unwrap());
        cycle(&here, &there, group.each_ref());
        let here = Container::new();
        let (a, b) = (make(&here, libc::SO_REUSEADDR), make(&here, libc::SO_REUSEADDR));
        socket::listen(&a, 5).unwrap();
        set(&a, libc::SOL_SOCKET, libc::SO_REUSEADDR, 0);
        cycle(&here, &Container::new(), [&a, &b]);
        cycle(&here, &Container::new(), [&b, &a]);
    }

    #[test]
    fn udp_sockets_send_and_receive_again() {
        let (here, there) = (Container::new(), Container::new());
        for (a, b) in [("127.0.0.1:7001", "127.0.0.1:7002"), ("[::1]:7001", "[::1]:7002")] {
            let (a, b) = here.run(|| (UdpSocket::bind(a).unwrap(), UdpSocket::bind(b).unwrap()));
            a.connect(b.local_addr().unwrap()).unwrap();
            let (a, b): (OwnedFd, OwnedFd) = (a.into(), b.into());
            let made = cycle(&here, &there, [&a, &b]);
            for [a, b] in [[a, b], made].map(|pair| pair.map(UdpSocket::from)) {
                a.send(b"hello").unwrap();
                let mut room = [0; 8];
                let (len, from) = b.recv_from(&mut room).unwrap();
                assert_eq!((&room[..len], from), (&b"hello"[..], a.local_addr().unwrap()));
                a.send(b"").unwrap();
                assert!(here.refusal_of(&there, &b).contains("datagrams wait"));
            }
        }
    }

    impl Container {
        /// The refusal of whichever container the socket belongs to.
        fn refusal_of(&self, other: &Container, fd: &impl AsFd) -> String {
            let own = socket::net_namespace(fd).unwrap() == proc::namespace(self.pid(), "net").unwrap();
            if own { self.refusal(fd) } else { other.refusal(fd) }
        }
    }

    #[test]
    fn multicast_groups() {
        let (here, there) = (Container::new(), Container::new());
        let (v4, v6) = here.run(|| {
            (
                UdpSocket::bind("0.0.0.0:5353").unwrap(),
                UdpSocket::bind("[::]:5354").unwrap(),
            )
        });
        v4.join_multicast_v4(&"224.0.0.251".parse().unwrap(), &"10.7.7.1".parse().unwrap())
            .unwrap();
        v6.join_multicast_v6(&"ff02::fb".parse().unwrap(), index_of(&here, "eth0"))
            .unwrap();
        let bystander = here.run(|| UdpSocket::bind("0.0.0.0:5355").unwrap());
        let fds: [OwnedFd; 3] = [v4.into(), v6.into(), bystander.into()];
        let made = cycle(&here, &there, fds.each_ref());
        let groups = |fd: &OwnedFd| {
            there
                .save(fd)
                .unwrap()
                .groups
                .iter()
                .map(|g| g.address.to_string())
                .collect::<Vec<_>>()
        };
        assert_eq!(
            made.each_ref().map(groups),
            [vec!["224.0.0.251"], vec!["ff02::fb"], vec![]]
        );
        // IP_ADD_SOURCE_MEMBERSHIP (39): group, device, source.
        options::set(&fds[2], libc::SOL_IP, 39, &[224, 0, 0, 9, 10, 7, 7, 1, 10, 7, 7, 2], "").unwrap();
        assert!(here.refusal(&fds[2]).contains("from some sources"));
    }

    #[test]
    fn a_connection_that_is_over() {
        let (here, there) = (Container::new(), Container::new());
        for address in ["127.0.0.1:95", "[::1]:95"] {
            let listener = here.run(|| TcpListener::bind(address).unwrap());
            let client = here.run(|| TcpStream::connect(address).unwrap());
            assert!(here.refusal(&listener).contains("1 connections wait"));
            let server = listener.accept().unwrap().0;
            assert!(here.refusal(&client).contains("established"));
            options::set(
                &client,
                libc::SOL_SOCKET,
                libc::SO_LINGER,
                &[1, 0, 0, 0, 0, 0, 0, 0],
                "",
            )
            .unwrap();
            drop(client);
            // The reset leaves with the last copy of the client, which a child of another test may hold for a moment.
            while socket::poll(&server) & libc::POLLERR == 0 {
                std::thread::sleep(std::time::Duration::from_millis(1));
            }
            assert!(here.refusal(&server).contains("an error waits"));
            assert!((&server).read(&mut [0; 8]).is_err());
            let server: OwnedFd = server.into();
            let state = here.save(&server).unwrap();
            let made = rebuild(there.pid(), &[&state]).unwrap().remove(0);
            assert_eq!(format!("{state:?}"), format!("{:?}", there.save(&made).unwrap()));
            for mut stream in [server, made].map(TcpStream::from) {
                assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
                assert_eq!(stream.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
            }
        }
    }

    #[test]
    fn mptcp_comes_back_as_tcp() {
        let (here, there) = (Container::new(), Container::new());
        let Ok(fd) = here.run(|| socket::create(libc::AF_INET, libc::SOCK_STREAM, IPPROTO_MPTCP)) else {
            return;
        };
        set(&fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
        socket::bind(&fd, &Address::Inet("127.0.0.1:96".parse().unwrap())).unwrap();
        socket::listen(&fd, 44).unwrap();
        let state = here.save(&fd).unwrap();
        assert!(state.warning().unwrap().contains("127.0.0.1:96"));
        let made = rebuild(there.pid(), &[&state]).unwrap().remove(0);
        let again = there.save(&made).unwrap();
        assert_eq!((again.backlog, again.warning()), (Some(44), None));
        assert_eq!((&again.options, &again.local), (&state.options, &state.local));
        let _client = there.run(|| TcpStream::connect("127.0.0.1:96").unwrap());
        TcpListener::from(made).accept().unwrap();
    }

    #[test]
    fn what_is_refused() {
        let here = Container::new();
        let make = |family, kind, protocol| here.run(|| socket::create(family, kind, protocol).unwrap());
        assert!(
            here.refusal(&make(libc::AF_NETLINK, libc::SOCK_RAW, 0))
                .contains("netlink")
        );
        assert!(
            here.refusal(&make(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_TCP))
                .contains("raw IP")
        );
        assert!(
            here.refusal(&make(libc::AF_PACKET, libc::SOCK_RAW, 0))
                .contains("packet")
        );
        assert!(
            here.refusal(&UdpSocket::bind("127.0.0.1:0").unwrap())
                .contains("network namespace")
        );
        let corked = here.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
        corked.connect("127.0.0.1:9").unwrap();
        set(&corked, libc::SOL_UDP, 1, 1);
        corked.send(b"half").unwrap();
        assert!(here.refusal(&corked).contains("UDP_CORK"));
        let refused = here.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
        refused.connect("127.0.0.1:9").unwrap();
        refused.send(b"nobody there").unwrap();
        assert!(here.refusal(&refused).contains("an error waits"));
    }

    #[test]
    fn groups_as_the_kernel_lists_them() {
        let v4 = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
            1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
            2\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n";
        assert_eq!(
            parse_igmp(v4),
            [(1, "224.0.0.1".parse().unwrap()), (2, "224.0.0.251".parse().unwrap())]
        );
        let v6 = "2    eth0            ff0200000000000000000000000000fb     1 00000004 0\n";
        assert_eq!(parse_igmp6(v6), [(2, "ff02::fb".parse().unwrap())]);
        assert!(parse_igmp("x\n\tzz\n1 y\n\t").is_empty() && parse_igmp6("a b\n").is_empty());
    }
}
