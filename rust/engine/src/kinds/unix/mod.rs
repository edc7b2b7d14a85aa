//! Unix sockets: names, peers, and what waits to be read.

mod call;
mod collect;
mod name;
mod queue;
mod rebuild;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::socket::options::Values;

pub use collect::{Found, Survey, collect, survey};
pub use name::Name;
pub use rebuild::rebuild;

/// What socket(2) calls the type.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Kind {
    Stream,
    Datagram,
    Seqpacket,
}

impl Kind {
    fn of(number: i32) -> Option<Kind> {
        [Kind::Stream, Kind::Datagram, Kind::Seqpacket]
            .into_iter()
            .find(|k| k.number() == number)
    }

    fn number(self) -> i32 {
        match self {
            Kind::Stream => libc::SOCK_STREAM,
            Kind::Datagram => libc::SOCK_DGRAM,
            Kind::Seqpacket => libc::SOCK_SEQPACKET,
        }
    }
}

/// The file that a path name made.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct File {
    /// Where it is in the container; `None` when it has been removed.
    pub path: Option<String>,
    /// Mode, uid, gid.
    pub owner: (u32, u32, u32),
}

/// The other end.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Peer {
    /// Never connected.
    None,
    /// The socket with this inode number. For datagrams it need not be mutual.
    Socket(u64),
    /// It had this name and has been closed.
    Gone(Name),
}

/// What one call to send gave; all unread bytes of a stream are one message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Message {
    /// The bytes.
    pub data: BlobRef,
    /// The name of the sender.
    #[serde(default, skip_serializing_if = "Name::is_empty")]
    pub from: Name,
}

/// One socket.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Inode number, by which peers find each other.
    pub ino: u64,
    /// Its type.
    pub kind: Kind,
    /// Its own name.
    #[serde(default, skip_serializing_if = "Name::is_empty")]
    pub name: Name,
    /// The file of a name that is a path.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub file: Option<File>,
    /// How many may wait for accept, when it listens.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub backlog: Option<u32>,
    /// Its other end.
    pub peer: Peer,
    /// What it can read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub queue: Vec<Message>,
    /// 1: receives no more, 2: sends no more.
    #[serde(default)]
    pub shutdown: u8,
    /// Its peer was closed without reading everything, and the program does not know yet (ECONNRESET).
    #[serde(default)]
    pub reset: bool,
    /// Mode, uid, gid as fstat(2) shows them.
    pub owner: (u32, u32, u32),
    /// Options that are not as in a new socket.
    #[serde(default, skip_serializing_if = "Values::is_empty")]
    pub options: Values,
}

impl State {
    /// With other numbers for users and groups.
    pub fn renumbered(&self, owner: impl Fn((u32, u32, u32)) -> (u32, u32, u32)) -> State {
        let file = |file: &File| File {
            owner: owner(file.owner),
            ..file.clone()
        };
        State {
            file: self.file.as_ref().map(file),
            owner: owner(self.owner),
            ..self.clone()
        }
    }
}
