//! Unix sockets: names, peers, and what waits to be read.

mod call;
mod collect;
mod deliver;
mod name;
mod queue;
mod rebuild;
#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests;

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::socket::message::Credentials;
use torpor_sys::socket::options::Values;

pub use collect::{Found, Survey, collect, survey};
pub use deliver::{Pending, Recipients};
pub use name::Name;
pub use queue::{Holder, Unread, look};
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
    /// It has not been made yet: the socket with this inode number is to accept it.
    Waiting(u64),
}

/// What one call to send gave; the unread bytes of a stream are one message as far as the same came with them.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Message {
    /// The bytes.
    pub data: BlobRef,
    /// The name of the sender.
    #[serde(default, skip_serializing_if = "Name::is_empty")]
    pub from: Name,
    /// Open files that come with it (SCM_RIGHTS), by index of their descriptions.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub rights: Vec<usize>,
    /// Who sent it (SCM_CREDENTIALS), in the container's numbers.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub credentials: Option<Credentials>,
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
    /// Who waits to be accepted, by inode number, the first one first.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub waiting: Vec<u64>,
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
        let sender = |sender: Credentials| {
            let (_, uid, gid) = owner((0, sender.uid, sender.gid));
            Credentials { uid, gid, ..sender }
        };
        let message = |message: &Message| Message {
            credentials: message.credentials.map(sender),
            ..message.clone()
        };
        State {
            file: self.file.as_ref().map(file),
            owner: owner(self.owner),
            queue: self.queue.iter().map(message).collect(),
            ..self.clone()
        }
    }

    /// There is more in flight than bytes.
    pub fn has_cargo(&self) -> bool {
        let has_cargo = |m: &Message| !m.rights.is_empty() || m.credentials.is_some();
        !self.waiting.is_empty() || matches!(self.peer, Peer::Waiting(_)) || self.queue.iter().any(has_cargo)
    }

    /// The descriptions that are in flight here.
    pub fn rights(&self) -> impl Iterator<Item = usize> {
        self.queue.iter().flat_map(|m| m.rights.iter().copied())
    }
}
