//! Looking at sockets of programs.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd};

use torpor_image::BlobRef;
use torpor_sys::socket;
use torpor_sys::socket::diag::{self, UnixSocket};
use torpor_sys::socket::options::{self, Values};
use torpor_sys::{Pid, fd, namespace, proc};

use super::queue::{Holder, Unread};
use super::{File, Kind, Message, Name, Peer, State};
use crate::error::{About, Error, Result};
use crate::kinds::paths::View;

/// What is known of all unix sockets before one is looked at.
#[derive(Debug)]
pub struct Survey {
    sockets: BTreeMap<u64, UnixSocket>,
    /// Sockets that wait to be accepted, with the socket that listens.
    waiting: BTreeMap<u64, u64>,
    /// Stream sockets of our own namespace whose other end is gone. A connection belongs to the namespace of the one
    /// who called, also the end that accepted it (net/unix/af_unix.c, unix_stream_connect).
    widowed: BTreeMap<u64, UnixSocket>,
    view: View,
}

impl Survey {
    fn entry(&self, ino: u64) -> Option<&UnixSocket> {
        self.sockets.get(&ino).or_else(|| self.widowed.get(&ino))
    }

    /// Whether what waits in a socket is to be looked at: its peer is not outside. `inside` are the inode numbers of the
    /// container's sockets.
    pub fn concerns(&self, ino: u64, inside: &BTreeSet<u64>) -> bool {
        let is_inside = |peer| peer == 0 || inside.contains(&peer);
        self.entry(ino).is_some_and(|e| e.peer.is_none_or(is_inside))
    }

    /// Memory of what a peer has sent that is connected to this socket only, as it is to that one.
    pub(super) fn sent_by_peer(&self, entry: &UnixSocket) -> Option<u32> {
        let peer = self.sockets.get(&entry.peer?)?;
        (peer.peer == Some(entry.ino)).then_some(peer.out)
    }
}

/// Lists the sockets of the container's network namespace.
pub fn survey(init: Pid) -> Result<Survey> {
    let all = namespace::within(init, &["net"], diag::unix_sockets).about(init, "unix sockets")?;
    let waiting = all.iter().flat_map(|s| s.waiting.iter().map(|w| (*w, s.ino))).collect();
    let is_widow = |s: &UnixSocket| s.kind != libc::SOCK_DGRAM && s.shutdown == 3 && s.peer.is_none_or(|p| p == 0);
    let ours = diag::unix_sockets().about(init, "unix sockets")?;
    Ok(Survey {
        widowed: ours.into_iter().filter(is_widow).map(|s| (s.ino, s)).collect(),
        sockets: all.into_iter().map(|s| (s.ino, s)).collect(),
        waiting,
        view: View::of(init)?,
    })
}

/// Whether a socket is the container's own.
#[derive(Debug)]
pub enum Found {
    /// It is.
    Inside(Box<State>),
    /// It is connected to a socket that none of the container's processes has.
    Outside,
}

/// A socket of a program, of which nothing may be changed.
pub(super) struct Subject<'a> {
    pub(super) pid: Pid,
    pub(super) fd: &'a OwnedFd,
    pub(super) kind: Kind,
    pub(super) entry: &'a UnixSocket,
    pub(super) object: String,
    name: Name,
    /// Of its peer, living or not, when it has one.
    peer_name: Option<Name>,
}

/// Looks at a socket. `holder` has our descriptor for the program's own description, `inside` are the inode numbers of
/// all sockets of the container, `queue` is what [`super::look`] saw, `blob` stores bytes in the image.
///
/// # Errors
/// Refused: data of connections that wait to be accepted, urgent data, packet filters, other network namespaces, and a
/// few states of datagram sockets that nothing can rebuild.
pub fn collect(
    holder: &Holder<'_>,
    survey: &Survey,
    inside: &BTreeSet<u64>,
    queue: &[Unread<usize>],
    blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>,
) -> Result<Found> {
    let (pid, fd) = (holder.pid, holder.fd);
    let Some(subject) = Subject::of(holder, survey)? else {
        return Ok(Found::Outside);
    };
    let Some(peer) = subject.peer(survey, inside)? else {
        return Ok(Found::Outside);
    };
    subject.check_peer(&peer, survey)?;
    subject.check_waiting(survey, inside)?;
    if options::has_filter(fd) {
        return subject.refuse("a packet filter (SO_ATTACH_FILTER) is not carried yet", "");
    }
    let id = fd::stat(fd).about(pid, &subject.object)?;
    let file = if subject.name.is_path() {
        Some(file(pid, &subject.object, fd, &survey.view)?)
    } else {
        None
    };
    let reset = subject.check_events(&peer)?;
    subject.check_senders(&peer, survey, queue)?;
    let store = |unread: &Unread<usize>| {
        Ok(Message {
            data: blob(&unread.data)?,
            from: unread.from.clone(),
            rights: unread.rights.clone(),
            credentials: unread.credentials,
        })
    };
    let entry = subject.entry;
    Ok(Found::Inside(Box::new(State {
        ino: holder.ino,
        kind: subject.kind,
        file,
        backlog: entry.is_listening.then_some(entry.out),
        waiting: entry.waiting.clone(),
        peer,
        queue: queue.iter().map(store).collect::<Result<_>>()?,
        shutdown: entry.shutdown,
        reset,
        owner: (id.mode, id.uid, id.gid),
        options: subject.options().about(pid, &subject.object)?,
        name: subject.name,
    })))
}

/// The file that a socket is bound to. The name may be one that only the program understands.
fn file(pid: Pid, object: &str, fd: &OwnedFd, view: &View) -> Result<File> {
    let file = socket::bound_file(fd).about(pid, object)?;
    let id = fd::stat(&file).about(pid, object)?;
    let owner = (id.mode, id.uid, id.gid);
    if id.nlink == 0 {
        return Ok(File { path: None, owner });
    }
    let me = std::process::id() as Pid;
    let path = proc::link(&format!("/proc/self/fd/{}", file.as_raw_fd())).about(pid, object)?;
    let mount = proc::fdinfo(me, file.as_raw_fd()).about(pid, object)?.mnt_id;
    if !view.has_mount(mount) {
        let why = format!("its file {path} is outside of the container");
        return Err(Error::unsupported(pid, object, why, "close it before the checkpoint"));
    }
    view.check(pid, object, &path, &id)?;
    Ok(File {
        path: Some(path),
        owner,
    })
}

impl<'a> Subject<'a> {
    /// `None` for an end of a connection to another network namespace.
    pub(super) fn of(holder: &Holder<'a>, survey: &'a Survey) -> Result<Option<Subject<'a>>> {
        let Holder { pid, number, ino, fd } = *holder;
        let name = Name::of(socket::local(fd).about(pid, format!("fd {number}"))?);
        let object = format!("fd {number}: socket unix:[{ino}] {name}").trim_end().to_owned();
        let peer_name = socket::peer(fd).about(pid, &object)?.map(Name::of);
        let refuse = |why: &str, remedy: &str| Err(Error::unsupported(pid, object.clone(), why, remedy));
        let Some(entry) = survey.entry(ino) else {
            if peer_name.is_some() {
                return Ok(None);
            }
            return refuse(
                "it belongs to another network namespace",
                "close it before the checkpoint",
            );
        };
        let Some(kind) = Kind::of(entry.kind) else {
            return refuse("its type is not carried", "");
        };
        Ok(Some(Subject {
            pid,
            fd,
            kind,
            entry,
            object,
            name,
            peer_name,
        }))
    }

    /// Its other end; `None` when that is outside.
    fn peer(&self, survey: &Survey, inside: &BTreeSet<u64>) -> Result<Option<Peer>> {
        let entry = self.entry;
        Ok(match entry.peer {
            None => Some(Peer::None),
            Some(0) => match survey.waiting.get(&entry.ino) {
                Some(listener) if inside.contains(listener) => {
                    if entry.out > 0 {
                        let why = "it waits to be accepted and has sent data, which nobody can look at";
                        return self.refuse(why, "try again when it has been");
                    }
                    Some(Peer::Waiting(*listener))
                }
                Some(_) => None,
                // It waits at a socket of another network namespace.
                None if self.kind != Kind::Datagram && entry.shutdown != 3 => None,
                None => Some(Peer::Gone(self.peer_name.clone().unwrap_or_default())),
            },
            Some(other) if inside.contains(&other) => Some(Peer::Socket(other)),
            Some(_) => None,
        })
    }

    /// The socket at its other end, and whether it is that one's.
    fn other<'s>(&self, peer: &Peer, survey: &'s Survey) -> Option<(&'s UnixSocket, bool)> {
        let Peer::Socket(ino) = peer else { return None };
        let other = survey.sockets.get(ino)?;
        Some((other, other.peer == Some(self.entry.ino)))
    }

    /// # Errors
    /// Refused: a socket without a name that has had another peer. Nobody can connect to it.
    fn check_peer(&self, peer: &Peer, survey: &Survey) -> Result<()> {
        match self.other(peer, survey) {
            Some((other, false))
                if other.ino != self.entry.ino && self.peer_name.as_ref().is_none_or(Name::is_empty) =>
            {
                self.refuse(
                    "its peer has lost it and has no name to be reached by, which is not carried",
                    "",
                )
            }
            _ => Ok(()),
        }
    }

    /// # Errors
    /// Refused: connections that wait to be accepted and were made by others, or by who has ended since.
    fn check_waiting(&self, survey: &Survey, inside: &BTreeSet<u64>) -> Result<()> {
        let remedy = "try again when it has been";
        for caller in &self.entry.waiting {
            if *caller == 0 {
                let why =
                    "a connection waits to be accepted whose caller has closed it, and nobody can look at what it sent";
                return self.refuse(why, remedy);
            }
            if !inside.contains(caller) || !survey.sockets.contains_key(caller) {
                return self.refuse(
                    "a connection from outside of the container waits to be accepted",
                    remedy,
                );
            }
        }
        Ok(())
    }

    /// # Errors
    /// Refused: datagrams that nobody can send again to a socket that has no name, or whose peer has none.
    fn check_senders(&self, peer: &Peer, survey: &Survey, queue: &[Unread<usize>]) -> Result<()> {
        if self.kind != Kind::Datagram || queue.is_empty() {
            return Ok(());
        }
        let is_mutual = self.other(peer, survey).is_some_and(|(_, mutual)| mutual);
        let is_tied = is_mutual || matches!(peer, Peer::Gone(_));
        let peer_is_named = self.peer_name.as_ref().is_some_and(|name| !name.is_empty());
        // A pair is connected from the first: what others sent has to be there before.
        let comes_before = !self.name.is_empty() && (!is_tied || peer_is_named);
        let strangers = queue.iter().any(|m| Some(&m.from) != self.peer_name.as_ref());
        if comes_before || (is_tied && !strangers) {
            return Ok(());
        }
        let why = "datagrams wait that did not come from its present peer, which is not carried";
        self.refuse(why, "try again when they have been received")
    }

    pub(super) fn refuse<T>(&self, why: impl Into<String>, remedy: &str) -> Result<T> {
        Err(Error::unsupported(self.pid, self.object.clone(), why, remedy))
    }

    /// True when a reset waits to be noticed.
    fn check_events(&self, peer: &Peer) -> Result<bool> {
        let events = socket::poll(self.fd);
        if self.kind == Kind::Stream && events & libc::POLLPRI != 0 {
            return self.refuse("urgent data is not carried yet", "try again when it has been received");
        }
        if events & libc::POLLERR == 0 {
            return Ok(false);
        }
        // Looking for messages would take the error away; a stream says how many bytes it has.
        let unseen = self.kind != Kind::Stream && socket::incoming(self.fd).about(self.pid, &self.object)? > 0;
        if unseen || self.kind == Kind::Datagram || !matches!(peer, Peer::Gone(_)) {
            return self.refuse(
                "an error waits to be noticed",
                "try again when the program has read from it",
            );
        }
        Ok(true)
    }

    fn options(&self) -> torpor_sys::Result<Values> {
        options::differing(self.fd, &socket::create(libc::AF_UNIX, self.kind.number(), 0)?)
    }
}
