//! Looking at sockets of programs.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd};

use torpor_image::BlobRef;
use torpor_sys::socket;
use torpor_sys::socket::diag::{self, UnixSocket};
use torpor_sys::socket::options::{self, Values};
use torpor_sys::{Pid, fd, namespace, proc};

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
}

/// Looks at a socket. `fd` is our descriptor for the program's own description, `inside` are the inode numbers of
/// all sockets of the container, `blob` stores bytes in the image.
///
/// # Errors
/// Refused: connections that wait to be accepted, descriptors and credentials that wait to be received, urgent
/// data, packet filters, other network namespaces, and a few states of datagram sockets that nothing can rebuild.
pub fn collect(
    pid: Pid,
    fd_no: i32,
    fd: &OwnedFd,
    ino: u64,
    survey: &Survey,
    inside: &BTreeSet<u64>,
    blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>,
) -> Result<Found> {
    let name = Name::of(socket::local(fd).about(pid, format!("fd {fd_no}"))?);
    let object = format!("fd {fd_no}: socket unix:[{ino}] {name}").trim_end().to_owned();
    let refuse = |why: &str, remedy: &str| Err(Error::unsupported(pid, object.clone(), why, remedy));
    let peer_name = socket::peer(fd).about(pid, &object)?.map(Name::of);
    let Some(entry) = survey.sockets.get(&ino).or_else(|| survey.widowed.get(&ino)) else {
        return if peer_name.is_some() {
            Ok(Found::Outside)
        } else {
            refuse(
                "it belongs to another network namespace",
                "close it before the checkpoint",
            )
        };
    };
    let Some(kind) = Kind::of(entry.kind) else {
        return refuse("its type is not carried", "");
    };
    let peer = match entry.peer {
        None => Peer::None,
        Some(0) => match survey.waiting.get(&ino) {
            Some(listener) if inside.contains(listener) => {
                return refuse(
                    "it waits to be accepted, which is not carried yet",
                    "try again when it has been",
                );
            }
            Some(_) => return Ok(Found::Outside),
            // It waits at a socket of another network namespace.
            None if kind != Kind::Datagram && entry.shutdown != 3 => return Ok(Found::Outside),
            None => Peer::Gone(peer_name.clone().unwrap_or_default()),
        },
        Some(other) if inside.contains(&other) => Peer::Socket(other),
        Some(_) => return Ok(Found::Outside),
    };
    let other = match peer {
        Peer::Socket(ino) => survey.sockets.get(&ino),
        _ => None,
    };
    let is_mutual = other.is_some_and(|o| o.peer == Some(ino));
    if let Some(other) = other.filter(|o| !is_mutual && o.ino != ino)
        && (other.peer.is_some() || peer_name.as_ref().is_none_or(Name::is_empty))
    {
        return refuse(
            "its peer has another peer, or has lost it, which is not carried yet",
            "",
        );
    }
    if !entry.waiting.is_empty() {
        return refuse(
            "connections wait to be accepted, which is not carried yet",
            "try again when they have been",
        );
    }
    if options::has_filter(fd) {
        return refuse("a packet filter (SO_ATTACH_FILTER) is not carried yet", "");
    }
    let id = fd::stat(fd).about(pid, &object)?;
    let file = if name.is_path() {
        Some(file(pid, &object, fd, &survey.view)?)
    } else {
        None
    };
    let subject = Subject {
        pid,
        fd,
        kind,
        entry,
        object,
    };
    let reset = subject.check_events(&peer)?;
    let queue = match kind {
        _ if entry.is_listening => Vec::new(),
        Kind::Stream => subject.stream()?,
        _ => subject.messages(other.filter(|_| is_mutual))?,
    };
    let strangers = peer != Peer::None && queue.iter().any(|(_, from)| Some(from) != peer_name.as_ref());
    let unreachable = name.is_empty() && !is_mutual && !matches!(peer, Peer::Gone(_));
    if kind == Kind::Datagram && !queue.is_empty() && (strangers || unreachable) {
        let why = "datagrams wait that did not come from its present peer, which is not carried";
        return subject.refuse(why, "try again when they have been received");
    }
    let store = |(data, from): (Vec<u8>, Name)| {
        Ok(Message {
            data: blob(&data)?,
            from,
        })
    };
    Ok(Found::Inside(Box::new(State {
        ino,
        kind,
        name,
        file,
        backlog: entry.is_listening.then_some(entry.out),
        peer,
        queue: queue.into_iter().map(store).collect::<Result<_>>()?,
        shutdown: entry.shutdown,
        reset,
        owner: (id.mode, id.uid, id.gid),
        options: subject.options().about(pid, &subject.object)?,
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

impl Subject<'_> {
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
