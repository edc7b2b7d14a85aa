//! What was in flight: sent again when every open file and every process that it speaks of is there. Datagram sockets
//! get their peers only then, since one that has a peer takes nothing from others.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::OwnedFd;

use torpor_image::BlobRef;
use torpor_sys::socket::message::Credentials;
use torpor_sys::socket::{self, options};
use torpor_sys::{Pid, fd, namespace};

use super::call::{Letter, Made, address, bind, call, send_all};
use super::rebuild::missing;
use super::{Kind, Message, Name, Peer, State};
use crate::error::{About, Error, Result};

/// Sockets and who is connected to whom.
#[derive(Debug)]
pub(super) struct Graph {
    pub(super) states: Vec<State>,
    /// Places by inode number.
    pub(super) index: BTreeMap<u64, usize>,
}

impl Graph {
    pub(super) fn peer(&self, i: usize) -> Option<usize> {
        match self.states[i].peer {
            Peer::Socket(ino) => self.index.get(&ino).copied(),
            _ => None,
        }
    }

    pub(super) fn is_mutual(&self, i: usize) -> bool {
        self.peer(i).is_some_and(|j| j != i && self.peer(j) == Some(i))
    }

    /// Datagram sockets that were connected to each other before anybody else could be.
    pub(super) fn is_born_connected(&self, i: usize) -> bool {
        let is_alone = |i: usize| !self.has_strangers(i) && !self.callers(i).any(|k| self.peer(i) != Some(k));
        let state = &self.states[i];
        let is_tied = self.is_mutual(i) || matches!(state.peer, Peer::Gone(_));
        state.kind == Kind::Datagram && is_tied && is_alone(i) && self.peer(i).is_none_or(is_alone)
    }

    /// Who is connected to a socket.
    fn callers(&self, i: usize) -> impl Iterator<Item = usize> {
        (0..self.states.len()).filter(move |k| *k != i && self.peer(*k) == Some(i))
    }

    fn has_strangers(&self, i: usize) -> bool {
        let peer = match &self.states[i].peer {
            Peer::Gone(name) => Some(name),
            _ => self.peer(i).map(|j| &self.states[j].name),
        };
        self.states[i].queue.iter().any(|m| Some(&m.from) != peer)
    }
}

/// Sockets that have been made, and what they do not hold yet.
#[derive(Debug)]
pub struct Pending {
    pub(super) graph: Graph,
    /// Peers that are to be closed at the end.
    pub(super) gone: Vec<Option<OwnedFd>>,
}

/// What a delivery needs.
#[allow(missing_debug_implementations)]
pub struct Recipients<'a> {
    /// The container's init, in our pid namespace.
    pub init: Pid,
    /// The sockets, in the order of their states.
    pub sockets: Vec<&'a OwnedFd>,
    /// All open file descriptions.
    pub descriptions: &'a [OwnedFd],
    /// Our number for a process of the container.
    pub pid: &'a dyn Fn(i32) -> Option<Pid>,
    /// Reads bytes of the image.
    pub blob: &'a dyn Fn(BlobRef) -> Result<Vec<u8>>,
}

impl Pending {
    /// Completes the sockets.
    pub fn deliver(self, to: &Recipients<'_>) -> Result<()> {
        let states = &self.graph.states;
        let letters = |s: &State| s.queue.iter().map(|m| to.letter(m)).collect::<Result<Vec<_>>>();
        let mut work = Delivery {
            graph: &self.graph,
            sockets: &to.sockets,
            letters: states.iter().map(letters).collect::<Result<_>>()?,
            gone: self.gone,
            connected: BTreeSet::new(),
        };
        namespace::within(to.init, &["net"], || work.run()).about(to.init, "unix sockets")
    }
}

impl<'a> Recipients<'a> {
    fn letter(&self, message: &Message) -> Result<Letter<'a>> {
        let right = |index: &usize| {
            let file = self.descriptions.get(*index);
            file.ok_or_else(|| Error::nonsense("a message brings a file that is not there"))
        };
        let sender = |sender: Credentials| {
            let pid = (self.pid)(sender.pid);
            let pid = pid.ok_or_else(|| Error::nonsense("a message is from a process that is not there"))?;
            Ok::<_, Error>(Credentials { pid, ..sender })
        };
        Ok(Letter {
            data: (self.blob)(message.data)?,
            rights: message.rights.iter().map(right).collect::<Result<_>>()?,
            credentials: message.credentials.map(sender).transpose()?,
        })
    }
}

struct Delivery<'a> {
    graph: &'a Graph,
    sockets: &'a [&'a OwnedFd],
    letters: Vec<Vec<Letter<'a>>>,
    gone: Vec<Option<OwnedFd>>,
    connected: BTreeSet<usize>,
}

impl Delivery<'_> {
    /// Runs in the container's network namespace.
    fn run(&mut self) -> Made<()> {
        let all = 0..self.graph.states.len();
        all.clone().try_for_each(|i| self.fill(i))?;
        all.clone().try_for_each(|i| self.connect(i))?;
        all.clone().try_for_each(|i| self.finish(i))
    }

    fn fd(&self, i: usize) -> Made<&OwnedFd> {
        let socket = self.sockets.get(i).copied();
        socket.ok_or_else(|| missing("a socket is missing"))
    }

    /// Sends what a socket has not read yet.
    fn fill(&self, i: usize) -> Made<()> {
        let state = &self.graph.states[i];
        let letters = &self.letters[i];
        if letters.is_empty() {
            return Ok(());
        }
        if state.kind != Kind::Datagram || self.graph.is_born_connected(i) {
            let from = match self.graph.peer(i) {
                Some(j) => self.fd(j)?,
                None => self.gone[i]
                    .as_ref()
                    .ok_or_else(|| missing("nobody can have sent its data"))?,
            };
            return send_all(from, letters, None);
        }
        self.fill_from_all(i)
    }

    /// Sends datagrams from whoever has the name, or from one that has it for the moment.
    fn fill_from_all(&self, i: usize) -> Made<()> {
        let state = &self.graph.states[i];
        let (to, _file) = address(self.fd(i)?, &state.name)?;
        let mut strangers: Vec<(&Name, OwnedFd)> = Vec::new();
        for (letter, message) in self.letters[i].iter().zip(&state.queue) {
            let has_sent = |s: &State| s.kind == Kind::Datagram && s.name == message.from && !s.name.is_empty();
            let known = self.graph.states.iter().position(has_sent);
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
            send_all(from, std::slice::from_ref(letter), Some(&to))?;
        }
        Ok(())
    }

    /// Gives a datagram socket its peer, after all who are connected to it: then they could not be any more.
    fn connect(&mut self, i: usize) -> Made<()> {
        let state = &self.graph.states[i];
        if state.kind != Kind::Datagram || self.graph.is_born_connected(i) || !self.connected.insert(i) {
            return Ok(());
        }
        let callers: Vec<usize> = self.graph.callers(i).collect();
        for caller in callers {
            self.connect(caller)?;
        }
        match &state.peer {
            Peer::Gone(name) => {
                let other = socket::create(libc::AF_UNIX, libc::SOCK_DGRAM, 0)?;
                bind(&other, name, None)?;
                call(self.fd(i)?, &other, name)
            }
            _ => match self.graph.peer(i) {
                Some(to) => call(self.fd(i)?, self.fd(to)?, &self.graph.states[to].name),
                None => Ok(()),
            },
        }
    }

    fn finish(&mut self, i: usize) -> Made<()> {
        let state = &self.graph.states[i];
        let socket = self.fd(i)?;
        if state.reset && self.gone[i].is_some() {
            // What it has not read makes its end a reset.
            send_all(socket, &[Letter::plain(vec![0])], None)?;
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
