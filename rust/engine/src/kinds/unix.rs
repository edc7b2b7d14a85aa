//! Unix sockets: names, peers, and what waits to be read.

use std::collections::{BTreeMap, BTreeSet};
use std::os::fd::{AsRawFd, OwnedFd};

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::socket::diag::{self, UnixSocket};
use torpor_sys::socket::options::{self, Values};
use torpor_sys::socket::{self, Address, Place};
use torpor_sys::{Pid, fd, namespace, proc};

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
        [Kind::Stream, Kind::Datagram, Kind::Seqpacket].into_iter().find(|k| k.number() == number)
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
        text.chars().map(u8::try_from).collect::<std::result::Result<_, _>>().map(Name)
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

/// What is known of all unix sockets before one is looked at.
#[derive(Debug)]
pub struct Survey {
    sockets: BTreeMap<u64, UnixSocket>,
    /// Sockets that wait to be accepted, with the socket that listens.
    waiting: BTreeMap<u64, u64>,
    view: View,
}

/// Lists the sockets of the container's network namespace.
pub fn survey(init: Pid) -> Result<Survey> {
    let all = namespace::within(init, &["net"], diag::unix_sockets).about(init, "unix sockets")?;
    let waiting = all.iter().flat_map(|s| s.waiting.iter().map(|w| (*w, s.ino))).collect();
    Ok(Survey { sockets: all.into_iter().map(|s| (s.ino, s)).collect(), waiting, view: View::of(init)? })
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
    let Some(entry) = survey.sockets.get(&ino) else {
        return if peer_name.is_some() {
            Ok(Found::Outside)
        } else {
            refuse("it belongs to another network namespace", "close it before the checkpoint")
        };
    };
    let Some(kind) = Kind::of(entry.kind) else { return refuse("its type is not carried", "") };
    let peer = match entry.peer {
        None => Peer::None,
        Some(0) => match survey.waiting.get(&ino) {
            Some(listener) if inside.contains(listener) => {
                return refuse("it waits to be accepted, which is not carried yet", "try again when it has been");
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
        return refuse("its peer has another peer, or has lost it, which is not carried yet", "");
    }
    if !entry.waiting.is_empty() {
        return refuse("connections wait to be accepted, which is not carried yet", "try again when they have been");
    }
    if options::has_filter(fd) {
        return refuse("a packet filter (SO_ATTACH_FILTER) is not carried yet", "");
    }
    let id = fd::stat(fd).about(pid, &object)?;
    let file = if name.is_path() { Some(file(pid, &object, fd, &survey.view)?) } else { None };
    let subject = Subject { pid, fd, kind, entry, object };
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
    let store = |(data, from): (Vec<u8>, Name)| Ok(Message { data: blob(&data)?, from });
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
    Ok(File { path: Some(path), owner })
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
            return self.refuse("an error waits to be noticed", "try again when the program has read from it");
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
        let shown = weight(self.kind, &messages).about(self.pid, &self.object)?;
        if sender.is_some_and(|s| s.out as usize > shown) {
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
    if index.len() == states.len() { Ok(()) } else { Err(Error::nonsense("one unix socket twice")) }
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
    torpor_sys::Error::Parse { file: "unix sockets".into(), text: what.into() }
}

impl<'a> Builder<'a> {
    /// Runs in the container's network namespace. What has no place in it any more goes first, since an abstract
    /// name may have been taken by another socket since.
    fn run(mut self) -> Made<Vec<OwnedFd>> {
        let all = 0..self.states.len();
        all.clone().try_for_each(|i| self.datagram_pair(i))?;
        all.clone().try_for_each(|i| self.stream_pair(i, false))?;
        all.clone().try_for_each(|i| self.single(i))?;
        all.clone().try_for_each(|i| self.stream_pair(i, true))?;
        all.clone().try_for_each(|i| self.connect_datagram(i))?;
        all.clone().try_for_each(|i| self.fill(i))?;
        all.clone().try_for_each(|i| self.finish(i))?;
        self.made.into_iter().map(|m| m.ok_or_else(|| missing("one was not made"))).collect()
    }

    fn fd(&self, i: usize) -> Made<&OwnedFd> {
        self.made.get(i).and_then(Option::as_ref).ok_or_else(|| missing("one is needed too early"))
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

    /// The two ends of a stream, the one that called first, and the listening socket whose name the other one has.
    fn ends(&self, i: usize) -> Option<(End<'a>, End<'a>, Option<usize>)> {
        let states = self.states;
        let end = |i: usize| End { index: Some(i), name: &states[i].name, file: states[i].file.as_ref() };
        let (a, b) = match &states[i].peer {
            Peer::Gone(name) => (end(i), End { index: None, name, file: None }),
            Peer::Socket(_) => (end(i), end(self.peer(i)?)),
            Peer::None => return None,
        };
        let listener = |e: End<'_>| {
            let fits = |s: &&State| {
                let same_file = e.index.is_none() || s.file.as_ref().map(|f| &f.path) == e.file.map(|f| &f.path);
                s.backlog.is_some() && s.kind == states[i].kind && s.name == *e.name && same_file
            };
            states.iter().position(fits)
        };
        let of_a = if a.name.is_empty() { None } else { listener(a) };
        let of_b = if b.name.is_empty() { None } else { listener(b) };
        let a_was_called = of_b.is_none() && (of_a.is_some() || b.name.is_empty());
        Some(if a_was_called { (b, a, of_a) } else { (a, b, of_b) })
    }

    /// Connects a stream: at once unless it needs a listening socket of the container, which comes later.
    fn stream_pair(&mut self, i: usize, late: bool) -> Made<()> {
        let kind = self.states[i].kind;
        if kind == Kind::Datagram || self.made[i].is_some() {
            return Ok(());
        }
        let Some((caller, called, listener)) = self.ends(i) else { return Ok(()) };
        if listener.is_some() != late {
            return Ok(());
        }
        let (one, other) = if called.name.is_empty() {
            socket::pair(kind.number())?
        } else {
            let one = socket::create(libc::AF_UNIX, kind.number(), 0)?;
            self.bind(&one, caller)?;
            let temporary;
            let listening = match listener {
                Some(at) => self.fd(at)?,
                None => {
                    temporary = socket::create(libc::AF_UNIX, kind.number(), 0)?;
                    bind(&temporary, called.name, None)?;
                    socket::listen(&temporary, 1)?;
                    &temporary
                }
            };
            call(&one, listening, called.name)?;
            let other = socket::accept(listening)?;
            (one, other)
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
        self.bind(socket, End { index: Some(i), name: &state.name, file: state.file.as_ref() })?;
        match state.backlog {
            Some(backlog) => socket::listen(socket, backlog),
            None => Ok(()),
        }
    }

    fn connect_datagram(&self, i: usize) -> Made<()> {
        match self.peer(i).filter(|_| self.states[i].kind == Kind::Datagram && !self.is_mutual(i)) {
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
                None => self.gone[i].as_ref().ok_or_else(|| missing("nobody can have sent its data"))?,
            };
            return send_all(from, queue, None);
        }
        let (to, _file) = address(self.fd(i)?, &state.name)?;
        let mut strangers: Vec<(&Name, OwnedFd)> = Vec::new();
        for (data, message) in queue.iter().zip(&state.queue) {
            let known = self.peer(i).or_else(|| {
                self.states.iter().position(|s| s.kind == Kind::Datagram && s.name == message.from && !s.name.is_empty())
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
    let Some((root, path, (mode, uid, gid))) = place else { return socket::bind_file(socket, &name.0, None) };
    let (parent, file) = path.rsplit_once('/').unwrap_or(("", path));
    let parent = if parent.is_empty() { "/" } else { parent };
    let directory = fd::open_in_root(root, parent, libc::O_PATH | libc::O_DIRECTORY)?;
    let place = Place { directory: std::os::fd::AsFd::as_fd(&directory), name: file, mode, uid, gid };
    socket::bind_file(socket, &name.0, Some(&place))
}

/// An address that leads to a socket of ours with that name. A path goes through its open file, which must stay
/// open: what the name leads to may be in other mounts, or nowhere.
fn address(socket: &OwnedFd, name: &Name) -> Made<(Address, Option<OwnedFd>)> {
    if !name.is_path() {
        return Ok((Address::Unix(name.0.clone()), None));
    }
    let file = socket::bound_file(socket)?;
    Ok((Address::Unix(format!("/proc/self/fd/{}", file.as_raw_fd()).into_bytes()), Some(file)))
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
