//! UDP sockets: multicast groups, and what waits in either direction.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::Duration;

use torpor_image::BlobRef;
use torpor_sys::namespace;
use torpor_sys::socket::{self, Address, message, options, segment};

use super::{Datagram, Group, State, Subject};
use crate::error::{About, Result};
use crate::kinds::ajar::{Ajar, Extra};

const RECEIVE: &str = "try again when they have been received";

impl Subject<'_> {
    pub(super) fn udp(&self, state: &mut State, blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>) -> Result<()> {
        let events = socket::poll(self.fd);
        let no_more = events & libc::POLLRDHUP != 0;
        let waits =
            (events & libc::POLLIN != 0 && !no_more) || socket::incoming(self.fd).about(self.pid, &self.object)? > 0;
        if waits {
            self.check_reachable(state)?;
            state.queue = self.datagrams(blob)?;
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

    /// # Errors
    /// Refused: a socket of which nobody can say that it is the one that datagrams to its port reach.
    fn check_reachable(&self, state: &State) -> Result<()> {
        let is_set = |number| options::int(self.fd, number).map(|value| value != 0);
        for (number, name) in [
            (libc::SO_REUSEADDR, "SO_REUSEADDR"),
            (libc::SO_REUSEPORT, "SO_REUSEPORT"),
        ] {
            if is_set(number).about(self.pid, &self.object)? {
                let why = format!("datagrams wait to be received in a socket that may share its port ({name})");
                return self.refuse(why, RECEIVE);
            }
        }
        let mut device = [0; 16];
        let bound = options::get(self.fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, &mut device);
        if bound.about(self.pid, &self.object)? > 0 {
            return self.refuse(
                "datagrams wait to be received in a socket that is bound to a device",
                RECEIVE,
            );
        }
        if state.local.as_ref().is_none_or(|l| l.address.port() == 0) {
            return self.refuse("datagrams wait to be received in a socket that has no port", RECEIVE);
        }
        Ok(())
    }

    fn datagrams(&self, blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>) -> Result<Vec<Datagram>> {
        const DESTINATION: [Extra; 2] = [
            (libc::SOL_IP, libc::IP_RECVORIGDSTADDR, "IP_RECVORIGDSTADDR"),
            (libc::SOL_IPV6, 74, "IPV6_RECVORIGDSTADDR"),
        ];
        let ajar = Ajar::open(&[self.fd], &DESTINATION).about(self.pid, &self.object)?;
        let mut all = Vec::new();
        // More than any datagram has.
        let mut room = vec![0; 1 << 16];
        while let Some(seen) = message::look(self.fd, &mut room).about(self.pid, &self.object)? {
            let (Some(Address::Inet(from)), Some(Address::Inet(to))) = (seen.sender, seen.destination) else {
                return self.refuse("datagrams wait to be received that do not say from where", RECEIVE);
            };
            if seen.is_joined || seen.len > room.len() {
                return self.refuse("datagrams wait that were put together (UDP_GRO)", RECEIVE);
            }
            let to = to.ip().to_canonical();
            if !self.is_plain(from.ip().to_canonical()) || !self.is_plain(to) || !self.is_ours(to)? {
                let why = format!("a datagram from {from} to {to} waits, which nobody could send again");
                return self.refuse(why, RECEIVE);
            }
            let data = blob(&room[..seen.len])?;
            all.push(Datagram { data, from, to });
        }
        drop(ajar);
        if all.is_empty() {
            return self.refuse(
                "empty datagrams wait, which can be looked at only once, and an earlier checkpoint did",
                RECEIVE,
            );
        }
        Ok(all)
    }

    /// Not of a group, and the same on every device.
    fn is_plain(&self, address: IpAddr) -> bool {
        let is_local = match address {
            IpAddr::V4(v4) => v4.is_link_local() || v4.is_broadcast(),
            IpAddr::V6(v6) => v6.is_unicast_link_local(),
        };
        !address.is_multicast() && !address.is_unspecified() && !is_local
    }

    /// Whether an address is one of the network namespace's own, so not a broadcast address.
    fn is_ours(&self, address: IpAddr) -> Result<bool> {
        let ours = namespace::within(self.pid, &["net"], || Ok(is_own(address)));
        ours.about(self.pid, &self.object)
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

/// Whether a socket could be bound to an address in the network namespace of the calling thread.
fn is_own(address: IpAddr) -> bool {
    let family = if address.is_ipv4() {
        libc::AF_INET
    } else {
        libc::AF_INET6
    };
    let bound = socket::create(family, libc::SOCK_DGRAM, 0);
    bound.is_ok_and(|s| socket::bind(&s, &Address::Inet(SocketAddr::new(address, 0))).is_ok())
}

/// Lets datagrams arrive once more, at a socket that has its port and no peer yet. To an address that this network
/// namespace does not have they are sent to the loopback's.
pub(super) fn arrive(socket: &OwnedFd, port: u16, queue: &[(&Datagram, Vec<u8>)]) -> torpor_sys::Result<()> {
    let sizes = (
        options::int(socket, libc::SO_SNDBUF)?,
        options::int(socket, libc::SO_RCVBUF)?,
    );
    let locks = options::buffer_locks(socket)?;
    let room: usize = queue.iter().map(|(_, data)| data.len() * 2 + 4096).sum();
    let room = i32::try_from(room).unwrap_or(i32::MAX / 4);
    options::force_buffers(socket, (sizes.0, sizes.1.saturating_add(room.saturating_mul(2))))?;
    for (datagram, data) in queue {
        let to = match datagram.to {
            own if is_own(own) => own,
            IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
            IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
        };
        let before = options::received(socket)?;
        segment::deliver(datagram.from, SocketAddr::new(to, port), data)?;
        wait_for_arrival(socket, before)?;
    }
    options::force_buffers(socket, sizes)?;
    options::set_buffer_locks(socket, locks)
}

/// What is sent to an own address arrives at once, unless the machine is busy.
fn wait_for_arrival(socket: &OwnedFd, before: u32) -> torpor_sys::Result<()> {
    for _ in 0..2000 {
        if options::received(socket)? > before {
            return Ok(());
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Err(torpor_sys::Error::Parse {
        file: "datagram".into(),
        text: "it did not arrive at the socket that it had waited in".into(),
    })
}

/// Device numbers and groups of /proc/net/igmp: a line for each device, then an indented one for each group.
pub(super) fn parse_igmp(text: &str) -> Vec<(u32, IpAddr)> {
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
pub(super) fn parse_igmp6(text: &str) -> Vec<(u32, IpAddr)> {
    let line = |line: &str| {
        let mut fields = line.split_ascii_whitespace();
        let index = fields.next()?.parse().ok()?;
        let address = u128::from_str_radix(fields.nth(1)?, 16).ok()?;
        Some((index, Ipv6Addr::from(address).into()))
    };
    text.lines().filter_map(line).collect()
}
