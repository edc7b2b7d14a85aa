//! Making sockets again, with their names, and connected as far as that has to come first.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use torpor_sys::socket;
use torpor_sys::{Pid, fd, namespace};

use super::call::{Made, address, bind, call};
use super::deliver::{Graph, Pending};
use super::{File, Kind, Name, Peer, State};
use crate::error::{About, Error, Result};
use crate::kinds::creds::IdMaps;

/// Makes the sockets, in the order of `states`. Files are made in the container's mounts, in place of old socket
/// files of the same path. What waits in them is delivered when everything else is there.
pub fn rebuild(init: Pid, states: &[&State]) -> Result<(Vec<OwnedFd>, Pending)> {
    let index: BTreeMap<u64, usize> = states.iter().enumerate().map(|(i, s)| (s.ino, i)).collect();
    check(states, &index)?;
    let maps = IdMaps::of(init)?;
    let states: Vec<State> = states.iter().map(|s| s.renumbered(|o| maps.outer_owner(o))).collect();
    let root = fd::open(&format!("/proc/{init}/root"), libc::O_PATH | libc::O_DIRECTORY).about(init, "root")?;
    let graph = Graph { states, index };
    let builder = Builder {
        root,
        graph: &graph,
        made: graph.states.iter().map(|_| None).collect(),
        gone: graph.states.iter().map(|_| None).collect(),
    };
    let (made, gone) = namespace::within(init, &["net"], || builder.run()).about(init, "unix sockets")?;
    Ok((made, Pending { graph, gone }))
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
                Kind::Datagram if p.peer != Peer::Socket(state.ino) || p.ino == state.ino => !p.name.is_empty(),
                _ => p.peer == Peer::Socket(state.ino) && p.ino != state.ino,
            };
            peer.filter(|p| p.kind == state.kind).filter(fits).is_some()
        });
        let waits = match state.peer {
            Peer::Waiting(ino) => index.get(&ino).is_some_and(|i| states[*i].waiting.contains(&state.ino)),
            _ => true,
        };
        let is_called_by = |ino: &u64| {
            let caller = index.get(ino).map(|i| states[*i]);
            caller.is_some_and(|c| c.peer == Peer::Waiting(state.ino) && c.kind == state.kind)
        };
        let calls_fit = waits
            && state.waiting.iter().all(is_called_by)
            && (state.waiting.is_empty() || (state.backlog.is_some() && !state.name.is_empty()));
        let listens = state.backlog.is_none() || (state.kind != Kind::Datagram && state.peer == Peer::None);
        if !peer_fits || !calls_fit || !listens || state.name.is_path() != state.file.is_some() {
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
    graph: &'a Graph,
    made: Vec<Option<OwnedFd>>,
    /// Peers that are to be closed at the end.
    gone: Vec<Option<OwnedFd>>,
}

pub(super) fn missing(what: &str) -> torpor_sys::Error {
    torpor_sys::Error::Parse {
        file: "unix sockets".into(),
        text: what.into(),
    }
}

impl<'a> Builder<'a> {
    /// Runs in the container's network namespace. Connections come before what can be called by name: they need
    /// their names only for a moment, and nobody else is to get in between.
    fn run(mut self) -> Made<(Vec<OwnedFd>, Vec<Option<OwnedFd>>)> {
        let all = 0..self.graph.states.len();
        all.clone().try_for_each(|i| self.datagram_pair(i))?;
        all.clone().try_for_each(|i| self.stream_pair(i))?;
        all.clone().try_for_each(|i| self.single(i))?;
        let made = self.made.into_iter();
        let made = made.map(|m| m.ok_or_else(|| missing("one was not made")));
        Ok((made.collect::<Made<_>>()?, self.gone))
    }

    fn fd(&self, i: usize) -> Made<&OwnedFd> {
        self.made
            .get(i)
            .and_then(Option::as_ref)
            .ok_or_else(|| missing("one is needed too early"))
    }

    /// Datagram sockets that are connected to each other, or to one that is gone, and to which nobody else has sent.
    fn datagram_pair(&mut self, i: usize) -> Made<()> {
        let state = &self.graph.states[i];
        if self.made[i].is_some() || !self.graph.is_born_connected(i) {
            return Ok(());
        }
        let (own, other) = socket::pair(libc::SOCK_DGRAM)?;
        self.made[i] = Some(own);
        match self.graph.peer(i) {
            Some(j) => self.made[j] = Some(other),
            None => {
                if let Peer::Gone(name) = &state.peer {
                    bind(&other, name, None)?;
                }
                self.gone[i] = Some(other);
            }
        }
        Ok(())
    }

    /// The two ends of a stream, the one that called first. The other one was made by accept(2), which gave it the
    /// name of the socket that listened.
    fn ends(&self, i: usize) -> Option<(End<'a>, End<'a>)> {
        let states = &self.graph.states;
        let (a, b) = match &states[i].peer {
            Peer::Gone(name) => (
                self.end(i),
                End {
                    index: None,
                    name,
                    file: None,
                },
            ),
            Peer::Socket(_) => (self.end(i), self.end(self.graph.peer(i)?)),
            Peer::None | Peer::Waiting(_) => return None,
        };
        let is_listened_to = |e: End<'_>| states.iter().any(|s| s.backlog.is_some() && s.name == *e.name);
        let a_was_called = b.name.is_empty() || (is_listened_to(a) && !is_listened_to(b));
        Some(if a_was_called { (b, a) } else { (a, b) })
    }

    fn stream_pair(&mut self, i: usize) -> Made<()> {
        let kind = self.graph.states[i].kind;
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
        let state = &self.graph.states[i];
        if state.kind != Kind::Datagram && state.peer != Peer::None {
            return Ok(());
        }
        if self.made[i].is_none() {
            self.made[i] = Some(socket::create(libc::AF_UNIX, state.kind.number(), 0)?);
        }
        self.bind(self.fd(i)?, self.end(i))?;
        state.backlog.map_or(Ok(()), |backlog| self.listen(i, backlog))
    }

    /// Those that wait call before anybody else can.
    fn listen(&mut self, i: usize, backlog: u32) -> Made<()> {
        let state = &self.graph.states[i];
        let callers = state.waiting.iter().filter_map(|ino| self.graph.index.get(ino));
        let callers: Vec<usize> = callers.copied().collect();
        socket::listen(self.fd(i)?, backlog.max(callers.len() as u32))?;
        for caller in &callers {
            let socket = socket::create(libc::AF_UNIX, state.kind.number(), 0)?;
            self.bind(&socket, self.end(*caller))?;
            let (to, _file) = address(self.fd(i)?, &state.name)?;
            socket::connect_later(&socket, &to)?;
            self.made[*caller] = Some(socket);
        }
        socket::listen(self.fd(i)?, backlog)
    }

    fn end(&self, i: usize) -> End<'a> {
        let state = &self.graph.states[i];
        End {
            index: Some(i),
            name: &state.name,
            file: state.file.as_ref(),
        }
    }
}
