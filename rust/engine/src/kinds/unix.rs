//! Unix sockets: names, peers, and what waits to be read.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::socket::diag::{self, UnixSocket};
use torpor_sys::socket::options::{self, Values};
use torpor_sys::socket::{self, Address, Place};
use torpor_sys::{Pid, fd, namespace, proc, tree};

use super::creds::IdMaps;
use super::paths::View;
use crate::error::{About, Error, Result};

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

/// The name of a socket; empty when it has none, with NUL in front when it is abstract. As text, each byte is the
/// character with its number.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Name(pub Vec<u8>);

impl From<Name> for String {
    fn from(name: Name) -> String {
        name.0.into_iter().map(char::from).collect()
    }
}

impl TryFrom<String> for Name {
    type Error = std::char::TryFromCharError;

    fn try_from(text: String) -> std::result::Result<Name, Self::Error> {
        text.chars()
            .map(u8::try_from)
            .collect::<std::result::Result<_, _>>()
            .map(Name)
    }
}

impl Name {
    /// There is none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    fn is_path(&self) -> bool {
        self.0.first().is_some_and(|b| *b != 0)
    }

    fn of(address: Address) -> Name {
        match address {
            Address::Unix(name) => Name(name),
            Address::Inet(_) => Name::default(),
        }
    }
}

impl std::fmt::Display for Name {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.0.split_first() {
            Some((0, rest)) => write!(f, "@{}", rest.escape_ascii()),
            _ => write!(f, "{}", self.0.escape_ascii()),
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
struct Subject<'a> {
    pid: Pid,
    fd: &'a OwnedFd,
    kind: Kind,
    entry: &'a UnixSocket,
    object: String,
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
    fn refuse<T>(&self, why: impl Into<String>, remedy: &str) -> Result<T> {
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

    fn control<T>(&self) -> Result<T> {
        let why = "descriptors or credentials wait to be received, which is not carried yet";
        self.refuse(why, "try again when they have been received")
    }

    /// All bytes that wait, as one message. Looking further than they go would take a pending error away.
    fn stream(&self) -> Result<Vec<(Vec<u8>, Name)>> {
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
    fn messages(&self, sender: Option<&UnixSocket>) -> Result<Vec<(Vec<u8>, Name)>> {
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

    fn options(&self) -> torpor_sys::Result<Values> {
        options::differing(self.fd, &socket::create(libc::AF_UNIX, self.kind.number(), 0)?)
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

type Made<T> = torpor_sys::Result<T>;

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

/// Gives a socket a name; the file of a path goes where it is said to be, or nowhere.
fn bind(socket: &OwnedFd, name: &Name, place: Option<(&OwnedFd, &str, (u32, u32, u32))>) -> Made<()> {
    if name.is_empty() {
        return Ok(());
    }
    if !name.is_path() {
        return socket::bind(socket, &Address::Unix(name.0.clone()));
    }
    let Some((root, path, (mode, uid, gid))) = place else {
        return socket::bind_file(socket, &name.0, None);
    };
    let (parent, file) = path.rsplit_once('/').unwrap_or(("", path));
    let parent = if parent.is_empty() { "/" } else { parent };
    let directory = fd::open_in_root(root, parent, libc::O_PATH | libc::O_DIRECTORY)?;
    let place = Place {
        directory: directory.as_fd(),
        name: file,
        mode,
        uid,
        gid,
    };
    // A file system of a user namespace takes no files of ids that it does not know.
    let bound = tree::as_owner(uid, gid, || socket::bind_file(socket, &name.0, Some(&place))).and_then(|made| made);
    bound.map_err(|error| match error {
        torpor_sys::Error::Call { call, errno, .. } => torpor_sys::Error::Call {
            call,
            object: path.into(),
            errno,
        },
        other => other,
    })
}

/// An address that leads to a socket of ours with that name. A path goes through its open file, which must stay
/// open: what the name leads to may be in other mounts, or nowhere.
fn address(socket: &OwnedFd, name: &Name) -> Made<(Address, Option<OwnedFd>)> {
    if !name.is_path() {
        return Ok((Address::Unix(name.0.clone()), None));
    }
    let file = socket::bound_file(socket)?;
    Ok((
        Address::Unix(format!("/proc/self/fd/{}", file.as_raw_fd()).into_bytes()),
        Some(file),
    ))
}

fn call(caller: &OwnedFd, called: &OwnedFd, name: &Name) -> Made<()> {
    let (to, _file) = address(called, name)?;
    socket::connect(caller, Some(&to))
}

/// Sends messages, or the bytes of a stream, with as much room as they need.
fn send_all(from: &OwnedFd, messages: &[Vec<u8>], to: Option<&Address>) -> Made<()> {
    let before = options::widen(from, messages.iter().map(|m| m.len() + 4096).sum())?;
    for message in messages {
        let mut sent = socket::send(from, message, to)?;
        while sent < message.len() {
            sent += socket::send(from, &message[sent..], to)?;
        }
    }
    options::narrow(from, before)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::cell::RefCell;
    use std::io::{Read, Write};
    use std::os::linux::net::SocketAddrExt;
    use std::os::unix::fs::PermissionsExt;
    use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
    use std::path::PathBuf;

    use super::*;

    /// An image of a few sockets of this very process.
    struct Image {
        blobs: RefCell<Vec<Vec<u8>>>,
        states: Vec<State>,
    }

    fn me() -> Pid {
        std::process::id() as Pid
    }

    fn find(fd: &OwnedFd, inside: &[&OwnedFd], blobs: &RefCell<Vec<Vec<u8>>>) -> Result<Found> {
        let inside = inside.iter().map(|f| fd::stat(*f).unwrap().ino).collect();
        let mut store = |bytes: &[u8]| {
            blobs.borrow_mut().push(bytes.to_vec());
            Ok(BlobRef {
                offset: blobs.borrow().len() as u64 - 1,
                len: bytes.len() as u64,
            })
        };
        let ino = fd::stat(fd).unwrap().ino;
        collect(me(), fd.as_raw_fd(), fd, ino, &survey(me())?, &inside, &mut store)
    }

    fn save(fds: &[&OwnedFd]) -> Image {
        let blobs = RefCell::default();
        let save = |fd: &&OwnedFd| {
            let before = all_options(fd);
            let flags = fd::fcntl(fd, libc::F_GETFL, 0).unwrap();
            let Found::Inside(state) = find(fd, fds, &blobs).unwrap() else {
                panic!("outside")
            };
            assert_eq!(before, all_options(fd), "collect left no trace");
            assert_eq!(flags, fd::fcntl(fd, libc::F_GETFL, 0).unwrap());
            *state
        };
        let states: Vec<State> = fds.iter().map(save).collect();
        let json = serde_json::to_string(&states).unwrap();
        Image {
            states: serde_json::from_str(&json).unwrap(),
            blobs,
        }
    }

    fn load(image: &Image) -> Vec<OwnedFd> {
        let states: Vec<&State> = image.states.iter().collect();
        rebuild(me(), &states, &|blob| {
            Ok(image.blobs.borrow()[blob.offset as usize].clone())
        })
        .unwrap()
    }

    /// Saves, closes and rebuilds; what is rebuilt has the same options and would be saved the same again.
    fn cycle<const N: usize>(fds: [OwnedFd; N]) -> [OwnedFd; N] {
        let options: Vec<_> = fds.iter().map(all_options).collect();
        let image = save(&fds.each_ref());
        drop(fds);
        let made: [OwnedFd; N] = load(&image).try_into().unwrap();
        assert_eq!(options, made.iter().map(all_options).collect::<Vec<_>>());
        let again = save(&made.each_ref());
        let inos: BTreeMap<u64, u64> = image
            .states
            .iter()
            .map(|s| s.ino)
            .zip(again.states.iter().map(|s| s.ino))
            .collect();
        for (mut old, new) in image.states.into_iter().zip(&again.states) {
            old.ino = inos[&old.ino];
            if old.kind != Kind::Datagram && old.peer != Peer::None {
                // The file of the socket that listened, which nobody sees.
                old.file.clone_from(&new.file);
            }
            if let Peer::Socket(ino) = &mut old.peer {
                *ino = inos[ino];
            }
            assert_eq!(format!("{old:?}"), format!("{new:?}"));
        }
        assert_eq!(image.blobs, again.blobs);
        made
    }

    /// Every option that can be read, but those that tell sockets or times apart or that reading changes.
    fn all_options(fd: &impl AsFd) -> Vec<(i32, Option<Vec<u8>>)> {
        const SO_ERROR_PEERCRED_MEMINFO_COOKIE_PEERGROUPS_NETNSCOOKIE_PEERPIDFD: [i32; 7] = [4, 17, 55, 57, 59, 71, 77];
        let numbers =
            (1..100).filter(|n| !SO_ERROR_PEERCRED_MEMINFO_COOKIE_PEERGROUPS_NETNSCOOKIE_PEERPIDFD.contains(n));
        let read = |n| {
            let mut room = [0; 256];
            let len = options::get(fd, libc::SOL_SOCKET, n, &mut room).ok()?;
            Some(room[..len.min(256)].to_vec())
        };
        numbers.map(|n| (n, read(n))).collect()
    }

    /// A directory that is removed at the end.
    struct Temp(PathBuf);

    impl Temp {
        fn new(name: &str) -> Temp {
            let dir = std::env::temp_dir().join(format!("torpor-unix-{}-{name}", std::process::id()));
            std::fs::create_dir(&dir).unwrap();
            Temp(dir)
        }

        fn join(&self, name: &str) -> PathBuf {
            self.0.join(name)
        }
    }

    impl Drop for Temp {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn abstract_name(name: &str) -> SocketAddr {
        SocketAddr::from_abstract_name(format!("torpor-{}-{name}", std::process::id())).unwrap()
    }

    fn refusal(fd: &OwnedFd, inside: &[&OwnedFd]) -> String {
        match find(fd, inside, &RefCell::default()) {
            Err(e) => e.to_string(),
            Ok(found) => panic!("not refused: {found:?}"),
        }
    }

    fn read_all(mut stream: &UnixStream) -> Vec<u8> {
        let mut room = vec![0; 1 << 20];
        let len = stream.read(&mut room).unwrap();
        room.truncate(len);
        room
    }

    #[test]
    fn a_stream_pair_keeps_what_is_unread_and_the_original_goes_on() {
        let (mut a, mut b) = UnixStream::pair().unwrap();
        a.write_all(&[7; 100_000]).unwrap();
        a.write_all(b"end").unwrap();
        b.write_all(b"back").unwrap();
        let (a, b): (OwnedFd, OwnedFd) = (a.into(), b.into());
        let image = save(&[&a, &b]);
        let made = load(&image).into_iter().map(UnixStream::from);
        let original = [a, b].into_iter().map(UnixStream::from);
        for pair in [original.collect::<Vec<_>>(), made.collect()] {
            assert_eq!(read_all(&pair[1]), [&[7; 100_000][..], b"end"].concat());
            assert_eq!(read_all(&pair[0]), b"back");
            (&pair[0]).write_all(b"more").unwrap();
            assert_eq!(read_all(&pair[1]), b"more");
            drop(pair);
        }
    }

    #[test]
    fn half_closed_pairs() {
        let (mut a, b) = UnixStream::pair().unwrap();
        a.write_all(b"last words").unwrap();
        a.shutdown(std::net::Shutdown::Write).unwrap();
        let [a, b] = cycle([a.into(), b.into()]).map(UnixStream::from);
        assert_eq!(read_all(&b), b"last words");
        assert_eq!(read_all(&b), b"");
        (&b).write_all(b"still heard").unwrap();
        assert_eq!(read_all(&a), b"still heard");
        assert_eq!((&a).write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
    }

    #[test]
    fn a_peer_that_is_gone_with_and_without_a_reset() {
        for unread in [false, true] {
            for kind in [libc::SOCK_STREAM, libc::SOCK_SEQPACKET] {
                let (a, b) = socket::pair(kind).unwrap();
                if unread {
                    socket::send(&a, b"never read", None).unwrap();
                } else {
                    socket::send(&b, b"last words", None).unwrap();
                }
                drop(b);
                let [a] = cycle([a]).map(UnixStream::from);
                if unread {
                    assert_eq!(
                        (&a).read(&mut [0; 8]).unwrap_err().kind(),
                        std::io::ErrorKind::ConnectionReset
                    );
                } else {
                    assert_eq!(read_all(&a), b"last words");
                }
                assert_eq!(read_all(&a), b"");
                assert_eq!((&a).write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
            }
        }
    }

    #[test]
    fn seqpacket_keeps_messages_apart() {
        let (a, b) = socket::pair(libc::SOCK_SEQPACKET).unwrap();
        for message in [&b"one"[..], b"two", &[9; 70_000]] {
            socket::send(&a, message, None).unwrap();
        }
        socket::send(&b, b"back", None).unwrap();
        let [a, b] = cycle([a, b]).map(UnixStream::from);
        assert_eq!(
            [read_all(&b), read_all(&b), read_all(&b), read_all(&a)],
            [&b"one"[..], b"two", &[9; 70_000], b"back"]
        );
    }

    #[test]
    fn empty_messages_are_kept_and_never_lost_in_silence() {
        for kind in [libc::SOCK_SEQPACKET, libc::SOCK_DGRAM] {
            let (a, b) = socket::pair(kind).unwrap();
            for message in [&b"one"[..], b"", b"", b"two", b""] {
                socket::send(&a, message, None).unwrap();
            }
            let lens = |i: &Image| i.states[1].queue.iter().map(|m| m.data.len).collect::<Vec<_>>();
            let image = save(&[&a, &b]);
            assert_eq!(lens(&image), [3, 0, 0, 3, 0]);
            assert_eq!(lens(&save(&load(&image).iter().collect::<Vec<_>>())), [3, 0, 0, 3, 0]);
            assert!(refusal(&b, &[&a, &b]).contains("empty messages"));
        }
    }

    #[test]
    fn datagram_pairs_hold_more_than_a_queue_of_strangers_may() {
        let (a, b) = UnixDatagram::pair().unwrap();
        let before = options::widen(&a, 1 << 20).unwrap();
        for i in 0..100 {
            a.send(&vec![i; 1 + 50 * usize::from(i)]).unwrap();
        }
        options::narrow(&a, before).unwrap();
        let [a, b] = cycle([a.into(), b.into()]).map(UnixDatagram::from);
        for i in 0..100 {
            let mut room = [0; 8192];
            let len = b.recv(&mut room).unwrap();
            assert_eq!(room[..len], vec![i; 1 + 50 * usize::from(i)]);
        }
        b.send(b"back").unwrap();
        assert_eq!(a.recv(&mut [0; 8]).unwrap(), 4);
        drop(b);
        let [a] = cycle([a.into()]).map(UnixDatagram::from);
        assert_eq!(a.send(b"x").unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
    }

    #[test]
    fn a_listening_socket_comes_back_with_its_file() {
        let dir = Temp::new("listen");
        let path = dir.join("socket");
        let listener = UnixListener::bind(&path).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o620)).unwrap();
        std::os::unix::fs::chown(&path, Some(12), Some(34)).unwrap();
        socket::listen(&listener, 77).unwrap();
        let [listener] = cycle([listener.into()]);
        let id = fd::stat_path(path.to_str().unwrap()).unwrap();
        assert_eq!((id.mode, id.uid, id.gid), (libc::S_IFSOCK | 0o620, 12, 34));
        let _client = UnixStream::connect(&path).unwrap();
        assert!(refusal(&listener, &[&listener]).contains("wait to be accepted"));
        UnixListener::from(listener).accept().unwrap();
        let left: Vec<_> = std::fs::read_dir(&dir.0)
            .unwrap()
            .map(|e| e.unwrap().file_name())
            .collect();
        assert_eq!(left, ["socket"]);
    }

    #[test]
    fn files_are_those_of_the_container() {
        let containers = [(); 2].map(|()| {
            let script = "mount -t tmpfs none /mnt && mkdir /mnt/dir && echo ready && exec sleep 600";
            let mut command = std::process::Command::new("unshare");
            let mut child = command
                .args(["-m", "sh", "-c", script])
                .stdout(std::process::Stdio::piped())
                .spawn()
                .unwrap();
            child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
            child
        });
        let [here, there] = containers.each_ref().map(|c| c.id() as Pid);
        let root = fd::open(&format!("/proc/{here}/root"), libc::O_PATH).unwrap();
        let listener = socket::create(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        bind(
            &listener,
            &Name(b"/mnt/dir/socket".to_vec()),
            Some((&root, "/mnt/dir/socket", (0o666, 0, 0))),
        )
        .unwrap();
        socket::listen(&listener, 5).unwrap();
        let ino = fd::stat(&listener).unwrap().ino;
        let look = |pid| {
            collect(
                pid,
                3,
                &listener,
                ino,
                &survey(pid).unwrap(),
                &BTreeSet::new(),
                &mut |_| unreachable!(),
            )
        };
        let Found::Inside(state) = look(here).unwrap() else {
            panic!("outside")
        };
        assert_eq!(state.file.as_ref().unwrap().path.as_deref(), Some("/mnt/dir/socket"));
        assert!(
            look(there)
                .unwrap_err()
                .to_string()
                .contains("outside of the container")
        );
        let made = rebuild(there, &[&state], &|_| Ok(Vec::new())).unwrap().remove(0);
        let _client = UnixStream::connect(format!("/proc/{there}/root/mnt/dir/socket")).unwrap();
        assert_eq!(
            UnixListener::from(made).local_addr().unwrap().as_pathname(),
            Some(std::path::Path::new("/mnt/dir/socket"))
        );
        assert!(!PathBuf::from("/mnt/dir").exists());
        for mut child in containers {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    #[test]
    fn only_socket_files_are_replaced() {
        let dir = Temp::new("replace");
        let path = dir.join("socket");
        let listener: OwnedFd = UnixListener::bind(&path).unwrap().into();
        let image = save(&[&listener]);
        std::fs::remove_file(&path).unwrap();
        std::fs::write(&path, "a file").unwrap();
        let states: Vec<&State> = image.states.iter().collect();
        let error = rebuild(me(), &states, &|_| Ok(Vec::new())).unwrap_err().to_string();
        assert!(error.contains("in use"), "{error}");
        assert_eq!(std::fs::read(&path).unwrap(), b"a file");
    }

    #[test]
    fn names_that_lead_nowhere_or_elsewhere() {
        let dir = Temp::new("names");
        let (removed, odd, moved) = (dir.join("removed"), dir.join("odd"), dir.join("moved"));
        let a = UnixListener::bind(&removed).unwrap();
        std::fs::remove_file(&removed).unwrap();
        // As a program names it that is elsewhere: in a directory or under a root of its own.
        let b = socket::create(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        let directory = fd::open(dir.0.to_str().unwrap(), libc::O_PATH).unwrap();
        let place = Place {
            directory: directory.as_fd(),
            name: "odd",
            mode: 0o600,
            uid: 0,
            gid: 0,
        };
        socket::bind_file(&b, b"../x/./y/../odd", Some(&place)).unwrap();
        socket::listen(&b, 5).unwrap();
        let c = UnixListener::bind(dir.join("old")).unwrap();
        std::fs::rename(dir.join("old"), &moved).unwrap();
        let [a, b, c] = cycle([a.into(), b, c.into()]);
        assert_eq!(socket::local(&b).unwrap(), Address::Unix(b"../x/./y/../odd".to_vec()));
        assert!(!removed.exists() && !dir.join("old").exists());
        assert_eq!(
            UnixListener::from(a).local_addr().unwrap().as_pathname(),
            Some(removed.as_path())
        );
        for (listener, path) in [(b, odd), (c, moved)] {
            let _client = UnixStream::connect(path).unwrap();
            UnixListener::from(listener).accept().unwrap();
        }
    }

    #[test]
    fn accepted_connections_keep_all_names() {
        let dir = Temp::new("accept");
        let path = dir.join("socket");
        for address in [SocketAddr::from_pathname(&path).unwrap(), abstract_name("accept")] {
            let listener = UnixListener::bind_addr(&address).unwrap();
            let clients = [0, 1].map(|_| UnixStream::connect_addr(&address).unwrap());
            let servers = [0, 1].map(|_| listener.accept().unwrap().0);
            let named = socket::create(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
            socket::bind(&named, &Address::Unix(b"\0torpor-test-client".to_vec())).unwrap();
            socket::connect(&named, Some(&socket::local(&listener).unwrap())).unwrap();
            let of_named = listener.accept().unwrap().0;
            (&clients[1]).write_all(b"waits").unwrap();
            let [c0, c1] = clients.map(OwnedFd::from);
            let [s0, s1] = servers.map(OwnedFd::from);
            let all = cycle([s0, c0, listener.into(), c1, s1, named, of_named.into()]);
            let names = |all: &[OwnedFd]| -> Vec<String> {
                let show = |fd| format!("{} {:?}", socket::local(fd).unwrap(), socket::peer(fd).unwrap());
                all.iter().map(show).collect()
            };
            let before = names(&all);
            // The one that listened is gone, its connections stay.
            let [s0, c0, listener, c1, s1, named, of_named] = all;
            drop(listener);
            let all = cycle([s0, c0, c1, s1, named, of_named]);
            assert_eq!(
                before
                    .iter()
                    .enumerate()
                    .filter(|(i, _)| *i != 2)
                    .map(|(_, n)| n.clone())
                    .collect::<Vec<_>>(),
                names(&all)
            );
            let [s0, c0, c1, s1, ..] = all.map(UnixStream::from);
            assert_eq!(read_all(&s1), b"waits");
            for (mut from, to) in [(&s0, &c0), (&c1, &s1)] {
                from.write_all(b"hello").unwrap();
                assert_eq!(read_all(to), b"hello");
            }
            drop((s0, s1));
            let [c0, c1] = cycle([c0.into(), c1.into()]);
            assert_eq!(socket::peer(&c0).unwrap(), socket::peer(&c1).unwrap());
            let _ = std::fs::remove_file(&path);
        }
    }

    #[test]
    fn datagrams_remember_their_senders() {
        let dir = Temp::new("datagrams");
        let path = dir.join("server");
        let server = UnixDatagram::bind(&path).unwrap();
        let connected = UnixDatagram::unbound().unwrap();
        connected.connect(&path).unwrap();
        let named = UnixDatagram::bind_addr(&abstract_name("sender")).unwrap();
        connected.send(b"from nobody").unwrap();
        named.send_to(b"from a name", &path).unwrap();
        let brief = path.with_file_name("brief");
        UnixDatagram::bind(&brief)
            .unwrap()
            .send_to(b"from one that is gone", &path)
            .unwrap();
        std::fs::remove_file(&brief).unwrap();
        let [server, connected, named] = cycle([server.into(), connected.into(), named.into()]).map(UnixDatagram::from);
        let mut room = [0; 64];
        for (text, from) in [
            ("from nobody", None),
            ("from a name", None),
            ("from one that is gone", Some(brief.as_path())),
        ] {
            let (len, sender) = server.recv_from(&mut room).unwrap();
            assert_eq!(&room[..len], text.as_bytes());
            assert_eq!(sender.as_pathname(), from);
            assert_eq!(sender.as_abstract_name().is_some(), text == "from a name");
        }
        connected.send(b"more").unwrap();
        assert_eq!(server.recv(&mut room).unwrap(), 4);
        named.send_to(b"more", &path).unwrap();
        assert_eq!(server.recv(&mut room).unwrap(), 4);
        drop(server);
        std::fs::remove_file(&path).unwrap();
        let [connected] = cycle([connected.into()]);
        assert_eq!(
            socket::peer(&connected).unwrap(),
            Some(Address::Unix(path.to_str().unwrap().into()))
        );
    }

    #[test]
    fn options_of_every_form() {
        let (a, b) = UnixStream::pair().unwrap();
        a.set_read_timeout(Some(std::time::Duration::from_millis(1500)))
            .unwrap();
        a.set_nonblocking(true).unwrap();
        let (a, b): (OwnedFd, OwnedFd) = (a.into(), b.into());
        for (number, value) in [
            (libc::SO_PASSCRED, 1),
            (libc::SO_SNDBUF, 5000),
            (libc::SO_RCVBUFFORCE, 1 << 24),
            (libc::SO_PRIORITY, 5),
            (libc::SO_MARK, 77),
            (libc::SO_KEEPALIVE, 1),
            (libc::SO_RCVLOWAT, 9),
            (libc::SO_PEEK_OFF, 3),
        ] {
            options::set_int(&a, number, value, "test").unwrap();
        }
        options::set(&a, libc::SOL_SOCKET, libc::SO_LINGER, &[1, 0, 0, 0, 5, 0, 0, 0], "test").unwrap();
        fd::set_owner(&a, 0o640, 5, 6).unwrap();
        let image = save(&[&a, &b]);
        assert_eq!(image.states[0].options.len(), 10);
        assert_eq!(image.states[1].options.len(), 0);
        cycle([a, b]);
    }

    #[test]
    fn peek_offset_of_the_program_is_put_back() {
        let (a, b) = UnixDatagram::pair().unwrap();
        a.send(b"one").unwrap();
        a.send(b"two").unwrap();
        let (a, b): (OwnedFd, OwnedFd) = (a.into(), b.into());
        options::set_int(&b, libc::SO_PEEK_OFF, 3, "test").unwrap();
        let [_a, b] = cycle([a, b]);
        let mut room = [0; 8];
        assert_eq!(socket::peek(&b, &mut room).unwrap().unwrap().len, 3);
        assert_eq!(&room[..3], b"two");
    }

    #[test]
    fn what_is_outside() {
        let (a, b) = UnixStream::pair().unwrap();
        let (a, b): (OwnedFd, OwnedFd) = (a.into(), b.into());
        assert!(matches!(find(&a, &[&a], &RefCell::default()), Ok(Found::Outside)));
        assert!(matches!(find(&a, &[&a, &b], &RefCell::default()), Ok(Found::Inside(_))));
        let name = abstract_name("outside");
        let listener: OwnedFd = UnixListener::bind_addr(&name).unwrap().into();
        let client: OwnedFd = UnixStream::connect_addr(&name).unwrap().into();
        assert!(matches!(
            find(&client, &[&client], &RefCell::default()),
            Ok(Found::Outside)
        ));
        assert!(refusal(&client, &[&client, &listener]).contains("waits to be accepted"));
    }

    #[test]
    fn what_is_refused() {
        for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
            let (a, b) = socket::pair(kind).unwrap();
            socket::send(&a, b"plain", None).unwrap();
            fd::send_fds(&a, &[&a]).unwrap();
            assert!(refusal(&b, &[&a, &b]).contains("descriptors or credentials"));
            let link = |fd: i32| proc::link(&format!("/proc/self/fd/{fd}")).ok();
            let copies = proc::fds(me())
                .unwrap()
                .into_iter()
                .filter(|fd| link(*fd) == link(a.as_raw_fd()))
                .count();
            assert_eq!(copies, 1, "no descriptor was received");
            let (a, b) = socket::pair(kind).unwrap();
            options::set_int(&b, libc::SO_PASSCRED, 1, "test").unwrap();
            socket::send(&a, b"x", None).unwrap();
            assert!(refusal(&b, &[&a, &b]).contains("descriptors or credentials"));
        }
    }

    #[test]
    fn an_image_that_contradicts_itself() {
        let (a, b) = socket::pair(libc::SOCK_STREAM).unwrap();
        let good = save(&[&a, &b]).states;
        let bad = |change: fn(&mut Vec<State>)| {
            let mut states = good.clone();
            change(&mut states);
            let states: Vec<&State> = states.iter().collect();
            rebuild(me(), &states, &|_| Ok(Vec::new())).unwrap_err().to_string()
        };
        let all = [
            bad(|s| s[0].peer = Peer::Socket(1)),
            bad(|s| s[0].peer = Peer::Socket(s[0].ino)),
            bad(|s| s[0].peer = Peer::None),
            bad(|s| s[0].kind = Kind::Datagram),
            bad(|s| s[0].backlog = Some(1)),
            bad(|s| s[0].name = Name(b"/path".to_vec())),
            bad(|s| s[0].ino = s[1].ino),
        ];
        assert!(all.iter().all(|e| e.contains("damaged")), "{all:?}");
    }
}
