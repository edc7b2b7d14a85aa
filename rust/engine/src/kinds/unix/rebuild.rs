//! Making sockets again, connected as they were and filled with what was unread.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use torpor_image::BlobRef;
use torpor_sys::socket::{self, options};
use torpor_sys::{Pid, fd, namespace};

use super::call::{Made, address, bind, call, send_all};
use super::{File, Kind, Name, Peer, State};
use crate::error::{About, Error, Result};
use crate::kinds::creds::IdMaps;

/// Makes the sockets, in the order of `states`. Files are made in the container's mounts, in place of old socket
/// files of the same path.
pub fn rebuild(init: Pid, states: &[&State], blob: &dyn Fn(BlobRef) -> Result<Vec<u8>>) -> Result<Vec<OwnedFd>> {
    let index: BTreeMap<u64, usize> = states.iter().enumerate().map(|(i, s)| (s.ino, i)).collect();
    check(states, &index)?;
    let maps = IdMaps::of(init)?;
    let states: Vec<State> = states.iter().map(|s| s.renumbered(|o| maps.outer_owner(o))).collect();
    let states: &[&State] = &states.iter().collect::<Vec<_>>();
    let read = |s: &&State| s.queue.iter().map(|m| blob(m.data)).collect::<Result<_>>();
    let root = fd::open(&format!("/proc/{init}/root"), libc::O_PATH | libc::O_DIRECTORY).about(init, "root")?;
    let builder = Builder {
        root,
        states,
        index,
        queues: states.iter().map(read).collect::<Result<_>>()?,
        made: states.iter().map(|_| None).collect(),
        gone: states.iter().map(|_| None).collect(),
    };
    namespace::within(init, &["net"], || builder.run()).about(init, "unix sockets")
}

/// # Errors
/// An image whose sockets contradict each other.
fn check(states: &[&State], index: &BTreeMap<u64, usize>) -> Result<()> {
    for state in states {
        let of_peer = match state.peer {
            Peer::Socket(ino) => Some(index.get(&ino).and_then(|i| states.get(*i))),
            _ => None,
        };
        let peer_fits = of_peer.is_none_or(|peer| {
            let fits = |p: &&&State| match state.kind {
                Kind::Datagram if p.ino == state.ino => !p.name.is_empty(),
                Kind::Datagram if p.peer == Peer::None => !p.name.is_empty(),
                _ => p.peer == Peer::Socket(state.ino) && p.ino != state.ino,
            };
            peer.filter(|p| p.kind == state.kind).filter(fits).is_some()
        });
        let listens = state.backlog.is_none() || (state.kind != Kind::Datagram && state.peer == Peer::None);
        if !peer_fits || !listens || state.name.is_path() != state.file.is_some() {
            return Err(Error::nonsense(format!("unix socket {}", state.ino)));
        }
    }
    if index.len() == states.len() {
        Ok(())
    } else {
        Err(Error::nonsense("one unix socket twice"))
    }
}

/// One end of a connection that is to be made.
#[derive(Clone, Copy)]
struct End<'a> {
    /// Its state; `None` for one that was closed.
    index: Option<usize>,
    name: &'a Name,
    file: Option<&'a File>,
}

struct Builder<'a> {
    /// The container's root directory.
    root: OwnedFd,
    states: &'a [&'a State],
    index: BTreeMap<u64, usize>,
    queues: Vec<Vec<Vec<u8>>>,
    made: Vec<Option<OwnedFd>>,
    /// Peers of streams that are to be closed at the end.
    gone: Vec<Option<OwnedFd>>,
}

fn missing(what: &str) -> torpor_sys::Error {
    torpor_sys::Error::Parse {
        file: "unix sockets".into(),
        text: what.into(),
    }
}

impl<'a> Builder<'a> {
    /// Runs in the container's network namespace. Connections come before what can be called by name: they need
    /// their names only for a moment, and nobody else is to get in between.
    fn run(mut self) -> Made<Vec<OwnedFd>> {
        let all = 0..self.states.len();
        all.clone().try_for_each(|i| self.datagram_pair(i))?;
        all.clone().try_for_each(|i| self.stream_pair(i))?;
        all.clone().try_for_each(|i| self.single(i))?;
        all.clone().try_for_each(|i| self.connect_datagram(i))?;
        all.clone().try_for_each(|i| self.fill(i))?;
        all.clone().try_for_each(|i| self.finish(i))?;
        self.made
            .into_iter()
            .map(|m| m.ok_or_else(|| missing("one was not made")))
            .collect()
    }

    fn fd(&self, i: usize) -> Made<&OwnedFd> {
        self.made
            .get(i)
            .and_then(Option::as_ref)
            .ok_or_else(|| missing("one is needed too early"))
    }

    fn peer(&self, i: usize) -> Option<usize> {
        match self.states[i].peer {
            Peer::Socket(ino) => self.index.get(&ino).copied(),
            _ => None,
        }
    }

    fn is_mutual(&self, i: usize) -> bool {
        self.peer(i).is_some_and(|j| j != i && self.peer(j) == Some(i))
    }

    /// Datagram sockets that are connected to each other, or to one that is gone.
    fn datagram_pair(&mut self, i: usize) -> Made<()> {
        let state = self.states[i];
        if state.kind != Kind::Datagram || self.made[i].is_some() {
            return Ok(());
        }
        match (&state.peer, self.peer(i)) {
            (Peer::Gone(name), _) => {
                let (own, other) = socket::pair(libc::SOCK_DGRAM)?;
                bind(&other, name, None)?;
                send_all(&other, &self.queues[i], None)?;
                self.made[i] = Some(own);
            }
            (_, Some(j)) if self.is_mutual(i) => {
                let (own, other) = socket::pair(libc::SOCK_DGRAM)?;
                self.made[i] = Some(own);
                self.made[j] = Some(other);
            }
            _ => {}
        }
        Ok(())
    }

    /// The two ends of a stream, the one that called first. The other one was made by accept(2), which gave it the
    /// name of the socket that listened.
    fn ends(&self, i: usize) -> Option<(End<'a>, End<'a>)> {
        let states = self.states;
        let end = |i: usize| End {
            index: Some(i),
            name: &states[i].name,
            file: states[i].file.as_ref(),
        };
        let (a, b) = match &states[i].peer {
            Peer::Gone(name) => (
                end(i),
                End {
                    index: None,
                    name,
                    file: None,
                },
            ),
            Peer::Socket(_) => (end(i), end(self.peer(i)?)),
            Peer::None => return None,
        };
        let is_listened_to = |e: End<'_>| states.iter().any(|s| s.backlog.is_some() && s.name == *e.name);
        let a_was_called = b.name.is_empty() || (is_listened_to(a) && !is_listened_to(b));
        Some(if a_was_called { (b, a) } else { (a, b) })
    }

    fn stream_pair(&mut self, i: usize) -> Made<()> {
        let kind = self.states[i].kind;
        if kind == Kind::Datagram || self.made[i].is_some() {
            return Ok(());
        }
        let Some((caller, called)) = self.ends(i) else {
            return Ok(());
        };
        let (one, other) = if called.name.is_empty() {
            socket::pair(kind.number())?
        } else {
            let one = socket::create(libc::AF_UNIX, kind.number(), 0)?;
            self.bind(&one, caller)?;
            let listening = socket::create(libc::AF_UNIX, kind.number(), 0)?;
            bind(&listening, called.name, None)?;
            socket::listen(&listening, 128)?;
            call(&one, &listening, called.name)?;
            (one, socket::accept_own(&listening)?)
        };
        self.put(i, caller, one);
        self.put(i, called, other);
        Ok(())
    }

    fn put(&mut self, i: usize, end: End<'_>, socket: OwnedFd) {
        match end.index {
            Some(index) => self.made[index] = Some(socket),
            None => self.gone[i] = Some(socket),
        }
    }

    fn bind(&self, socket: &OwnedFd, end: End<'_>) -> Made<()> {
        let place = end.file.and_then(|f| Some((f.path.as_deref()?, f.owner)));
        bind(socket, end.name, place.map(|(path, owner)| (&self.root, path, owner)))
    }

    /// Everything that is not the accepted end of a stream has its name by bind(2).
    fn single(&mut self, i: usize) -> Made<()> {
        let states = self.states;
        let state = states[i];
        if state.kind != Kind::Datagram && state.peer != Peer::None {
            return Ok(());
        }
        if self.made[i].is_none() {
            self.made[i] = Some(socket::create(libc::AF_UNIX, state.kind.number(), 0)?);
        }
        let socket = self.fd(i)?;
        self.bind(
            socket,
            End {
                index: Some(i),
                name: &state.name,
                file: state.file.as_ref(),
            },
        )?;
        match state.backlog {
            Some(backlog) => socket::listen(socket, backlog),
            None => Ok(()),
        }
    }

    fn connect_datagram(&self, i: usize) -> Made<()> {
        match self
            .peer(i)
            .filter(|_| self.states[i].kind == Kind::Datagram && !self.is_mutual(i))
        {
            Some(to) => call(self.fd(i)?, self.fd(to)?, &self.states[to].name),
            None => Ok(()),
        }
    }

    /// Sends what a socket has not read yet.
    fn fill(&self, i: usize) -> Made<()> {
        let state = self.states[i];
        let queue = &self.queues[i];
        if queue.is_empty() || (state.kind == Kind::Datagram && matches!(state.peer, Peer::Gone(_))) {
            return Ok(());
        }
        if state.kind != Kind::Datagram || self.is_mutual(i) {
            let from = match self.peer(i) {
                Some(j) => self.fd(j)?,
                None => self.gone[i]
                    .as_ref()
                    .ok_or_else(|| missing("nobody can have sent its data"))?,
            };
            return send_all(from, queue, None);
        }
        let (to, _file) = address(self.fd(i)?, &state.name)?;
        let mut strangers: Vec<(&Name, OwnedFd)> = Vec::new();
        for (data, message) in queue.iter().zip(&state.queue) {
            let known = self.peer(i).or_else(|| {
                self.states
                    .iter()
                    .position(|s| s.kind == Kind::Datagram && s.name == message.from && !s.name.is_empty())
            });
            if known.is_none() && !strangers.iter().any(|(name, _)| **name == message.from) {
                let stranger = socket::create(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?;
                bind(&stranger, &message.from, None)?;
                strangers.push((&message.from, stranger));
            }
            let from = match known {
                Some(j) => self.fd(j)?,
                None => strangers
                    .iter()
                    .find_map(|(name, socket)| (**name == message.from).then_some(socket))
                    .ok_or_else(|| missing("a sender"))?,
            };
            send_all(from, std::slice::from_ref(data), Some(&to))?;
        }
        Ok(())
    }

    fn finish(&mut self, i: usize) -> Made<()> {
        let state = self.states[i];
        let socket = self.fd(i)?;
        if state.reset && self.gone[i].is_some() {
            // What it has not read makes its end a reset.
            send_all(socket, &[vec![0]], None)?;
        }
        socket::shutdown(socket, state.shutdown)?;
        let id = fd::stat(socket)?;
        let (mode, uid, gid) = state.owner;
        if (id.mode, id.uid, id.gid) != state.owner {
            fd::set_owner(socket, mode, uid, gid)?;
        }
        options::apply(socket, &state.options)?;
        self.gone[i] = None;
        Ok(())
    }
}
