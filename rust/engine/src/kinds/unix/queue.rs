//! What waits to be read, looked at without taking it.

use torpor_sys::socket::diag::UnixSocket;
use torpor_sys::socket::{self, options};

use super::collect::Subject;
use super::{Kind, Name};
use crate::error::{About, Result};

impl Subject<'_> {
    fn control<T>(&self) -> Result<T> {
        let why = "descriptors or credentials wait to be received, which is not carried yet";
        self.refuse(why, "try again when they have been received")
    }

    /// All bytes that wait, as one message. Looking further than they go would take a pending error away.
    pub(super) fn stream(&self) -> Result<Vec<(Vec<u8>, Name)>> {
        let len = socket::incoming(self.fd).about(self.pid, &self.object)?;
        if len == 0 {
            return Ok(Vec::new());
        }
        let mut room = vec![0; len];
        match socket::peek(self.fd, &mut room).about(self.pid, &self.object)? {
            Some(seen) if seen.has_control || seen.len != len => self.control(),
            Some(_) => Ok(vec![(room, Name::default())]),
            None => self.refuse("it was read by somebody else meanwhile", "stop who shares it"),
        }
    }

    /// The messages that wait, each with its sender's name. They can be looked at one after another only with
    /// SO_PEEK_OFF, which is the socket's and so is put back. `sender` is the socket that they must be from.
    pub(super) fn messages(&self, sender: Option<&UnixSocket>) -> Result<Vec<(Vec<u8>, Name)>> {
        if socket::poll(self.fd) & (libc::POLLIN | libc::POLLERR) != libc::POLLIN {
            return Ok(Vec::new());
        }
        let offset = |at| options::set_int(self.fd, libc::SO_PEEK_OFF, at, "SO_PEEK_OFF");
        let before = options::int(self.fd, libc::SO_PEEK_OFF).about(self.pid, &self.object)?;
        let messages = self.peek_all(offset);
        offset(before).about(self.pid, &self.object)?;
        let messages = messages?;
        // The kernel shows an empty message at an offset only once.
        if let Some(sender) = sender
            && weight(self.kind, &messages).about(self.pid, &self.object)? < sender.out as usize
        {
            let why = "empty messages wait, which can be looked at only once, and an earlier checkpoint did";
            return self.refuse(why, "try again when they have been received");
        }
        Ok(messages)
    }

    fn peek_all(&self, offset: impl Fn(i32) -> torpor_sys::Result<()>) -> Result<Vec<(Vec<u8>, Name)>> {
        let mut at = 0;
        let mut all = Vec::new();
        let mut room = vec![0; socket::incoming(self.fd).about(self.pid, &self.object)?.max(4096)];
        offset(at).about(self.pid, &self.object)?;
        while let Some(seen) = socket::peek(self.fd, &mut room).about(self.pid, &self.object)? {
            if seen.has_control {
                return self.control();
            }
            if seen.len > room.len() {
                room.resize(seen.len, 0);
                offset(at).about(self.pid, &self.object)?;
                continue;
            }
            // The end of a connection looks like an empty message.
            if seen.len == 0 && self.kind == Kind::Seqpacket && self.entry.shutdown & 1 != 0 {
                break;
            }
            all.push((room[..seen.len].to_vec(), Name(seen.from)));
            at = at.saturating_add(seen.len.try_into().unwrap_or(i32::MAX));
        }
        Ok(all)
    }
}

/// The memory that the kernel charges the sender for these messages.
fn weight(kind: Kind, messages: &[(Vec<u8>, Name)]) -> torpor_sys::Result<usize> {
    let (from, _to) = socket::pair(kind.number())?;
    options::widen(&from, messages.iter().map(|(m, _)| m.len() + 4096).sum())?;
    for (message, _) in messages {
        socket::send(&from, message, None)?;
    }
    socket::outgoing(&from)
}
