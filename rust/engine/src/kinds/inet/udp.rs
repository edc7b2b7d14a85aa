//! UDP sockets: multicast groups, and what waits in either direction.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};
use std::time::Duration;

use torpor_sys::socket;

use super::{Group, State, Subject};
use crate::error::{About, Result};

impl Subject<'_> {
    pub(super) fn udp(&self, state: &mut State) -> Result<()> {
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
