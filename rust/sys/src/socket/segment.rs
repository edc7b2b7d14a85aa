//! Packets that arrive once more: the end of a peer's data, as the segment that brought it (RFC 9293 §3.1), for a
//! connection that is made again and whose peer will not say so twice; and datagrams (RFC 768) that nobody had read.

use std::net::{IpAddr, SocketAddr};

use super::{Address, create, options};
use crate::error::{Error, Result, check};
use std::os::fd::AsRawFd;

/// What the segment says.
#[derive(Debug, Clone, Copy)]
pub struct End {
    /// The peer.
    pub from: SocketAddr,
    /// The socket that is to see the end.
    pub to: SocketAddr,
    /// Sequence number after the peer's last byte.
    pub sequence: u32,
    /// What the peer has acknowledged.
    pub acknowledged: u32,
    /// The peer's window, as scaled.
    pub window: u16,
}

/// The sum of RFC 1071.
fn checksum(parts: &[&[u8]]) -> u16 {
    let words = parts.iter().flat_map(|p| p.chunks(2));
    let word = |w: &[u8]| u32::from(w[0]) << 8 | u32::from(w.get(1).copied().unwrap_or(0));
    let mut sum: u32 = words.map(word).sum();
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    !(sum as u16)
}

impl End {
    /// The TCP header: FIN and ACK.
    fn segment(&self, pseudo: &[u8]) -> Vec<u8> {
        const OFFSET: u8 = 5 << 4;
        const FIN_ACK: u8 = 0x11;
        let mut bytes = Vec::new();
        bytes.extend(self.from.port().to_be_bytes());
        bytes.extend(self.to.port().to_be_bytes());
        bytes.extend(self.sequence.to_be_bytes());
        bytes.extend(self.acknowledged.to_be_bytes());
        bytes.extend([OFFSET, FIN_ACK]);
        bytes.extend(self.window.to_be_bytes());
        bytes.extend([0; 4]);
        let sum = checksum(&[pseudo, &bytes]);
        bytes[16..18].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    /// Hands it to this network namespace, as if it had come from outside.
    pub fn arrive(&self) -> Result<()> {
        let build = |pseudo: &[u8]| self.segment(pseudo);
        arrive(libc::IPPROTO_TCP as u8, (self.from, self.to), 20, build)
    }
}

/// Hands a datagram to a socket of this network namespace. `to` must be an address of its own: a packet for another would
/// leave it.
pub fn deliver(from: SocketAddr, to: SocketAddr, data: &[u8]) -> Result<()> {
    let length = u16::try_from(8 + data.len()).map_err(|_| Error::Parse {
        file: "datagram".into(),
        text: format!("{} bytes", data.len()),
    })?;
    let build = |pseudo: &[u8]| {
        let mut bytes = Vec::new();
        bytes.extend(from.port().to_be_bytes());
        bytes.extend(to.port().to_be_bytes());
        bytes.extend(length.to_be_bytes());
        bytes.extend([0; 2]);
        bytes.extend(data);
        // None at all is written as zero, so a sum of zero is written as its other form.
        let sum = match checksum(&[pseudo, &bytes]) {
            0 => u16::MAX,
            sum => sum,
        };
        bytes[6..8].copy_from_slice(&sum.to_be_bytes());
        bytes
    };
    arrive(libc::IPPROTO_UDP as u8, (from, to), length, build)
}

/// The whole packet; `None` when the addresses are of two families. `build` gets the pseudo header.
fn packet(
    protocol: u8,
    (from, to): (SocketAddr, SocketAddr),
    length: u16,
    build: impl Fn(&[u8]) -> Vec<u8>,
) -> Option<Vec<u8>> {
    /// Whatever a socket asks for (IP_MINTTL).
    const HOPS: u8 = 255;
    let [high, low] = length.to_be_bytes();
    match (from.ip().to_canonical(), to.ip().to_canonical()) {
        (IpAddr::V4(from), IpAddr::V4(to)) => {
            let addresses = [from.octets(), to.octets()].concat();
            let body = build(&[&addresses[..], &[0, protocol, high, low]].concat());
            let [all_high, all_low] = length.checked_add(20)?.to_be_bytes();
            let mut header = vec![0x45, 0, all_high, all_low, 0, 0, 0, 0, HOPS, protocol, 0, 0];
            header.extend(addresses);
            let sum = checksum(&[&header]);
            header[10..12].copy_from_slice(&sum.to_be_bytes());
            Some([header, body].concat())
        }
        (IpAddr::V6(from), IpAddr::V6(to)) => {
            let addresses = [from.octets(), to.octets()].concat();
            let body = build(&[&addresses[..], &[0, 0, high, low, 0, 0, 0, protocol]].concat());
            let mut header = vec![0x60, 0, 0, 0, high, low, protocol, HOPS];
            header.extend(addresses);
            Some([header, body].concat())
        }
        _ => None,
    }
}

fn arrive(protocol: u8, ends: (SocketAddr, SocketAddr), length: u16, build: impl Fn(&[u8]) -> Vec<u8>) -> Result<()> {
    const IPV6_HDRINCL: i32 = 36;
    let (from, to) = ends;
    let mismatch = || Error::Parse {
        file: "packet".into(),
        text: format!("{from} to {to}"),
    };
    let packet = packet(protocol, ends, length, build).ok_or_else(mismatch)?;
    let to = SocketAddr::new(to.ip().to_canonical(), 0);
    let family = if to.is_ipv4() { libc::AF_INET } else { libc::AF_INET6 };
    let socket = create(family, libc::SOCK_RAW, libc::IPPROTO_RAW)?;
    if to.is_ipv6() {
        options::set(
            &socket,
            libc::SOL_IPV6,
            IPV6_HDRINCL,
            &1i32.to_ne_bytes(),
            "IPV6_HDRINCL",
        )?;
    }
    let size = i32::try_from(packet.len() * 2 + 4096).unwrap_or(i32::MAX / 2);
    options::set_int(&socket, libc::SO_SNDBUFFORCE, size, "SO_SNDBUFFORCE")?;
    let address = Address::Inet(to).to_bytes();
    // SAFETY: a packet and an address with their lengths.
    let sent = unsafe {
        libc::sendto(
            socket.as_raw_fd(),
            packet.as_ptr().cast(),
            packet.len(),
            libc::MSG_DONTWAIT,
            address.as_ptr().cast(),
            address.len() as u32,
        )
    };
    check(sent as i64, "sendto", to).map(drop)
}
