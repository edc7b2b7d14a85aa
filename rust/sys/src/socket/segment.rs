//! The end of a peer's data, as the segment that once brought it (RFC 9293 §3.1), for a connection that is made again
//! and whose peer will not say so twice.

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

    /// The whole packet; `None` when the addresses are of two families.
    fn packet(&self) -> Option<Vec<u8>> {
        const TCP: u8 = libc::IPPROTO_TCP as u8;
        match (self.from.ip().to_canonical(), self.to.ip().to_canonical()) {
            (IpAddr::V4(from), IpAddr::V4(to)) => {
                let addresses = [from.octets(), to.octets()].concat();
                let segment = self.segment(&[&addresses[..], &[0, TCP, 0, 20]].concat());
                let mut header = vec![0x45, 0, 0, 40, 0, 0, 0, 0, 64, TCP, 0, 0];
                header.extend(addresses);
                let sum = checksum(&[&header]);
                header[10..12].copy_from_slice(&sum.to_be_bytes());
                Some([header, segment].concat())
            }
            (IpAddr::V6(from), IpAddr::V6(to)) => {
                let addresses = [from.octets(), to.octets()].concat();
                let segment = self.segment(&[&addresses[..], &[0, 0, 0, 20, 0, 0, 0, TCP]].concat());
                let mut header = vec![0x60, 0, 0, 0, 0, 20, TCP, 64];
                header.extend(addresses);
                Some([header, segment].concat())
            }
            _ => None,
        }
    }

    /// Hands it to this network namespace, as if it had come from outside.
    pub fn arrive(&self) -> Result<()> {
        const IPV6_HDRINCL: i32 = 36;
        let mismatch = || Error::Parse {
            file: "TCP connection".into(),
            text: format!("{} to {}", self.from, self.to),
        };
        let packet = self.packet().ok_or_else(mismatch)?;
        let to = SocketAddr::new(self.to.ip().to_canonical(), 0);
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
        check(sent as i64, "sendto", self.to).map(drop)
    }
}
