//! What waits to be read, looked at without taking it.

use std::os::fd::OwnedFd;

use torpor_sys::Pid;
use torpor_sys::socket::message::{self, Credentials, Seen};
use torpor_sys::socket::{self, options};

use super::collect::{Subject, Survey};
use super::{Kind, Name};
use crate::error::{About, Result};
use crate::kinds::ajar::Ajar;

/// A message as it is found; `R` is what stands for an open file that it brings.
#[derive(Debug, Clone)]
pub struct Unread<R> {
    /// The bytes; of a stream, all those that were sent by one and without anything beside them, or with the same.
    pub data: Vec<u8>,
    /// The name of the sender.
    pub from: Name,
    /// Open files.
    pub rights: Vec<R>,
    /// Who sent it, as we number processes and users; `None` when that was not noted.
    pub credentials: Option<Credentials>,
}

/// A socket to look into.
#[derive(Debug, Clone, Copy)]
pub struct Holder<'a> {
    /// Who has it.
    pub pid: Pid,
    /// At which number.
    pub number: i32,
    /// Its inode number.
    pub ino: u64,
    /// Our descriptor for it.
    pub fd: &'a OwnedFd,
}

/// What waits in each of these sockets. The open files among it are open here as well from then on.
///
/// # Errors
/// Refused: what cannot be looked at, and what is read by others meanwhile.
pub fn look(survey: &Survey, holders: &[Holder<'_>]) -> Result<Vec<Vec<Unread<OwnedFd>>>> {
    let mut subjects = Vec::new();
    for holder in holders {
        let subject = Subject::of(holder, survey)?;
        subjects.push(subject.filter(|s| s.has_messages()));
    }
    let sockets: Vec<&OwnedFd> = subjects.iter().flatten().map(|s| s.fd).collect();
    let first = holders.first().map_or(0, |h| h.pid);
    let senders = [(libc::SOL_SOCKET, libc::SO_PASSCRED, "SO_PASSCRED")];
    let ajar = Ajar::open(&sockets, &senders).about(first, "unix sockets")?;
    let read = |subject: &Option<Subject<'_>>| match subject {
        None => Ok(Vec::new()),
        Some(subject) if subject.kind == Kind::Stream => subject.stream(&ajar),
        Some(subject) => subject.messages(&ajar, survey),
    };
    subjects.iter().map(read).collect()
}

impl Subject<'_> {
    /// Looking for a message where there is none would take a pending error away; a stream says how many bytes it has.
    fn has_messages(&self) -> bool {
        let events = socket::poll(self.fd);
        match self.kind {
            _ if self.entry.is_listening => false,
            Kind::Stream => events & libc::POLLPRI == 0 && socket::incoming(self.fd).is_ok_and(|len| len > 0),
            _ => events & (libc::POLLIN | libc::POLLERR) == libc::POLLIN,
        }
    }

    fn see(&self, seen: Seen, data: &[u8]) -> Result<Unread<OwnedFd>> {
        if !seen.is_whole {
            let why = "more descriptors wait to be received than this process may have open";
            return self.refuse(why, "raise the limit of open files (ulimit -n)");
        }
        Ok(Unread {
            data: data[..seen.len].to_vec(),
            from: seen.sender.map(Name::of).unwrap_or_default(),
            rights: seen.rights,
            credentials: seen.credentials.filter(is_noted),
        })
    }

    fn next(&self, room: &mut [u8]) -> Result<Option<Seen>> {
        message::look(self.fd, room).about(self.pid, &self.object)
    }

    /// All bytes that wait. Looking further than they go would take a pending error away.
    fn stream(&self, ajar: &Ajar<'_>) -> Result<Vec<Unread<OwnedFd>>> {
        let len = socket::incoming(self.fd).about(self.pid, &self.object)?;
        let mut all = Vec::new();
        let mut room = vec![0; len];
        let mut at = 0;
        while at < len {
            let mut seen = self.bytes(ajar, at, &mut room[..len - at])?;
            if !seen.rights.is_empty() {
                let plain = self.before_rights(ajar, at, &mut room[..seen.len])?;
                // What comes before files is a part of its own: who reads no further does not get them yet.
                if plain > 0 {
                    seen.len = plain;
                    seen.rights.clear();
                }
            }
            at += seen.len;
            all.push(self.see(seen, &room)?);
        }
        Ok(all)
    }

    fn bytes(&self, ajar: &Ajar<'_>, at: usize, room: &mut [u8]) -> Result<Seen> {
        let offset = at.try_into().unwrap_or(i32::MAX);
        ajar.from(self.fd, offset).about(self.pid, &self.object)?;
        match self.next(room)?.filter(|seen| (1..=room.len()).contains(&seen.len)) {
            Some(seen) => Ok(seen),
            None => self.refuse("it was read by somebody else meanwhile", "stop who shares it"),
        }
    }

    /// How many bytes of those that are seen at once come before the ones that bring files: the kernel ends a look
    /// behind these.
    fn before_rights(&self, ajar: &Ajar<'_>, at: usize, room: &mut [u8]) -> Result<usize> {
        let Some((_, all_but_one)) = room.split_last_mut() else {
            return Ok(0);
        };
        let offset = at.try_into().unwrap_or(i32::MAX);
        ajar.from(self.fd, offset).about(self.pid, &self.object)?;
        message::parts_within(self.fd, all_but_one).about(self.pid, &self.object)
    }

    /// The messages that wait, each with its sender's name.
    fn messages(&self, ajar: &Ajar<'_>, survey: &Survey) -> Result<Vec<Unread<OwnedFd>>> {
        let mut at = 0;
        let mut all = Vec::new();
        let mut room = vec![0; socket::incoming(self.fd).about(self.pid, &self.object)?.max(4096)];
        while let Some(seen) = self.next(&mut room)? {
            if seen.len > room.len() {
                room.resize(seen.len, 0);
                ajar.from(self.fd, at).about(self.pid, &self.object)?;
                continue;
            }
            // The end of a connection looks like an empty message.
            let is_end = self.kind == Kind::Seqpacket && self.entry.shutdown & 1 != 0;
            if seen.len == 0 && seen.rights.is_empty() && is_end {
                break;
            }
            at = at.saturating_add(seen.len.try_into().unwrap_or(i32::MAX));
            all.push(self.see(seen, &room)?);
        }
        // The kernel shows an empty message at an offset only once.
        if let Some(sent) = survey.sent_by_peer(self.entry)
            && weight(self.kind, &all).about(self.pid, &self.object)? < sent as usize
        {
            let why = "empty messages wait, which can be looked at only once, and an earlier checkpoint did";
            return self.refuse(why, "try again when they have been received");
        }
        Ok(all)
    }
}

/// Of a message that was sent before anybody wanted to know the kernel shows no process and nobody's ids.
fn is_noted(credentials: &Credentials) -> bool {
    const NOBODY: u32 = 65534;
    (credentials.pid, credentials.uid, credentials.gid) != (0, NOBODY, NOBODY)
}

/// The memory that the kernel charges the sender for these messages.
fn weight<R>(kind: Kind, messages: &[Unread<R>]) -> torpor_sys::Result<usize> {
    let (from, _to) = socket::pair(kind.number())?;
    options::widen(&from, messages.iter().map(|m| m.data.len() + 4096).sum())?;
    for message in messages {
        socket::send(&from, &message.data, None)?;
    }
    socket::outgoing(&from)
}
