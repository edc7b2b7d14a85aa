//! Open file descriptions and the descriptors that refer to them.

use std::collections::BTreeMap;
use std::os::fd::{AsRawFd, OwnedFd};

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::fd::{self, FileId};
use torpor_sys::kcmp;
use torpor_sys::proc::{self, FdInfo};
use torpor_sys::{Pid, pidfd};

use super::creds::IdMaps;
use super::tasks::Tasks;
use super::{
    console, epoll, eventfd, inet, inotify, listener, locks, memory, owner, pidfd as pidfds, pipe, pty, signalfd,
    timerfd, unix,
};
use crate::error::{About, Error, Result};

/// One entry of a descriptor table.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Descriptor {
    /// Its number.
    pub fd: i32,
    /// FD_CLOEXEC.
    pub cloexec: bool,
    /// Index of the open file description.
    pub description: usize,
}

/// An open file description, shared by however many descriptors.
#[derive(Debug, Serialize, Deserialize)]
pub struct Description {
    /// O_* flags without O_CLOEXEC.
    pub flags: i32,
    /// File position.
    pub pos: i64,
    /// Locks that belong to it.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub locks: Vec<locks::Lock>,
    /// Who is told by a signal that it is ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub told: Option<owner::State>,
    /// Who listens on it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub listener: Option<listener::State>,
    /// What is open.
    #[serde(flatten)]
    pub object: Object,
}

/// What a description is open on.
#[derive(Debug, Serialize, Deserialize)]
#[serde(tag = "object", rename_all = "kebab-case")]
pub enum Object {
    /// Leads out of the container: standard input, output or error of whoever started it.
    Stdio {
        /// 0, 1 or 2.
        index: usize,
    },
    /// A file, directory or device with a name.
    Path(PathState),
    /// A shared object (memfd, file without a name), by index.
    Shared {
        /// Index.
        index: usize,
    },
    /// One end of a pipe, by index; which end is in the flags.
    Pipe {
        /// Index.
        index: usize,
    },
    /// A counter.
    Eventfd(eventfd::State),
    /// An epoll instance.
    Epoll(epoll::State),
    /// A timer.
    Timerfd(timerfd::State),
    /// Signals to read.
    Signalfd(signalfd::State),
    /// File events to read.
    Inotify(inotify::State),
    /// An end of a pseudo-terminal.
    Pty(pty::End),
    /// A process.
    Pidfd(pidfds::State),
    /// A unix socket.
    Unix(Box<unix::State>),
    /// A TCP or UDP socket.
    Inet(Box<inet::State>),
}

impl Object {
    /// What a reader must know to restore it, if that is more than it is at first sight.
    pub fn requires(&self) -> Option<&'static str> {
        match self {
            Object::Inet(state) if state.has_met() => Some(torpor_image::CONNECTIONS),
            Object::Inet(state) => (!state.queue.is_empty()).then_some(torpor_image::IN_FLIGHT),
            Object::Unix(state) => state.has_cargo().then_some(torpor_image::IN_FLIGHT),
            _ => None,
        }
    }

    /// A word or path for people.
    pub fn name(&self) -> &str {
        match self {
            Object::Path(state) => &state.path,
            Object::Shared { .. } => "file without a name",
            _ => "descriptor",
        }
    }
}

/// A file with a name.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct PathState {
    /// Its path in the container.
    pub path: String,
    /// Type and permissions.
    pub mode: u32,
    /// Size in bytes.
    pub size: u64,
    /// Time of its last change, in nanoseconds after the epoch.
    pub mtime: i64,
}

/// A description as it is found, before it is known what it is.
#[derive(Debug)]
struct Found {
    holder: Pid,
    number: i32,
    info: FdInfo,
    link: String,
    id: FileId,
    fd: OwnedFd,
    locks: Vec<locks::Lock>,
    /// Bytes of events that wait in an inotify instance.
    events: i32,
    /// No process has it: it waits in the socket that the holder has at that number.
    in_flight: bool,
}

impl Found {
    /// A process and a number by which the kernel knows it; what is in flight we have ourselves.
    fn handle(&self) -> (Pid, i32) {
        match self.in_flight {
            true => (std::process::id() as Pid, self.fd.as_raw_fd()),
            false => (self.holder, self.number),
        }
    }

    fn socket(&self) -> unix::Holder<'_> {
        unix::Holder {
            pid: self.holder,
            number: self.number,
            ino: self.id.ino,
            fd: &self.fd,
        }
    }

    fn is_unix(&self) -> bool {
        self.id.kind() == libc::S_IFSOCK && fd::socket_domain(&self.fd).is_ok_and(|d| d == libc::AF_UNIX)
    }

    fn terminal(&self) -> pty::Candidate<'_> {
        pty::Candidate {
            pid: self.holder,
            number: self.number,
            link: &self.link,
            id: &self.id,
            flags: self.info.flags,
            fd: &self.fd,
        }
    }
}

/// All descriptions of a container, found once each.
#[derive(Debug, Default)]
pub struct Survey {
    found: Vec<Found>,
    by_key: BTreeMap<(u64, u64, i32, i64), Vec<usize>>,
    locks: BTreeMap<Pid, Vec<locks::Posix>>,
    /// What waits in unix sockets, by inode number.
    queues: BTreeMap<u64, Vec<unix::Unread<usize>>>,
    unix: Option<unix::Survey>,
}

impl Survey {
    /// The descriptor table of a process.
    pub fn add_process(&mut self, pid: Pid) -> Result<Vec<Descriptor>> {
        let process = pidfd::open(pid).about(pid, "pidfd")?;
        self.add_table(pid, &process)
    }

    /// That of a thread which has one of its own.
    ///
    /// # Errors
    /// Refused where the kernel gives no descriptor of a thread (before 6.9).
    pub fn add_thread(&mut self, tid: Pid) -> Result<Vec<Descriptor>> {
        let thread = pidfd::open_thread(tid).map_err(|_| {
            let why = "it is a thread that has one of its own, which this kernel does not let be read (it takes 6.9)";
            Error::unsupported(tid, "descriptor table", why, "")
        })?;
        self.add_table(tid, &thread)
    }

    fn add_table(&mut self, pid: Pid, process: &OwnedFd) -> Result<Vec<Descriptor>> {
        let mut table = Vec::new();
        for number in proc::fds(pid).about(pid, "descriptors")? {
            let object = || format!("fd {number}");
            let info = proc::fdinfo(pid, number).about(pid, object())?;
            let cloexec = info.flags & libc::O_CLOEXEC != 0;
            let fd = pidfd::get_fd(process, number).about(pid, object())?;
            let (held, posix) = locks::collect(pid, number, &info)?;
            let description = self.add((pid, number), info, fd, held, false)?;
            // Each descriptor of a description shows the same locks.
            if !table.iter().any(|d: &Descriptor| d.description == description) {
                self.locks.entry(pid).or_default().extend(posix);
            }
            table.push(Descriptor {
                fd: number,
                cloexec,
                description,
            });
        }
        Ok(table)
    }

    /// Looks into all unix sockets, and into those that wait in others, and so on.
    pub fn add_in_flight(&mut self, init: Pid) -> Result<()> {
        if !self.found.iter().any(Found::is_unix) {
            return Ok(());
        }
        let survey = unix::survey(init)?;
        loop {
            let inside = self.sockets();
            let is_new =
                |f: &&Found| f.is_unix() && !self.queues.contains_key(&f.id.ino) && survey.concerns(f.id.ino, &inside);
            let holders: Vec<unix::Holder<'_>> = self.found.iter().filter(is_new).map(Found::socket).collect();
            if holders.is_empty() {
                break;
            }
            let keys: Vec<(u64, Pid, i32)> = holders.iter().map(|h| (h.ino, h.pid, h.number)).collect();
            for ((ino, pid, number), unread) in keys.into_iter().zip(unix::look(&survey, &holders)?) {
                let mut queue = Vec::new();
                for message in unread {
                    queue.push(self.add_rights((pid, number), message)?);
                }
                self.queues.insert(ino, queue);
            }
        }
        self.unix = Some(survey);
        Ok(())
    }

    fn add_rights(&mut self, at: (Pid, i32), message: unix::Unread<OwnedFd>) -> Result<unix::Unread<usize>> {
        let me = std::process::id() as Pid;
        let mut rights = Vec::new();
        for fd in message.rights {
            let object = format!("what waits in fd {}", at.1);
            let info = proc::fdinfo(me, fd.as_raw_fd()).about(at.0, object)?;
            let (held, _) = locks::collect(me, fd.as_raw_fd(), &info)?;
            rights.push(self.add(at, info, fd, held, true)?);
        }
        Ok(unix::Unread {
            data: message.data,
            from: message.from,
            rights,
            credentials: message.credentials,
        })
    }

    /// Descriptions are the same when kcmp(2) says so; only those that look alike are compared.
    fn add(
        &mut self,
        (holder, number): (Pid, i32),
        mut info: FdInfo,
        fd: OwnedFd,
        locks: Vec<locks::Lock>,
        in_flight: bool,
    ) -> Result<usize> {
        let object = || format!("fd {number}");
        info.flags &= !libc::O_CLOEXEC;
        let id = fd::stat(&fd).about(holder, object())?;
        let key = (id.dev, id.ino, info.flags, info.pos);
        let mut found = Found {
            holder,
            number,
            info,
            link: String::new(),
            id,
            fd,
            locks,
            events: 0,
            in_flight,
        };
        let (pid, at) = found.handle();
        for &known in self.by_key.get(&key).into_iter().flatten() {
            let (other, other_at) = self.found[known].handle();
            let order = kcmp::order(other, pid, kcmp::Kind::File, other_at, at);
            if order.about(holder, object())?.is_eq() {
                return Ok(known);
            }
        }
        found.link = proc::link(&format!("/proc/{pid}/fd/{at}")).about(holder, object())?;
        found.events = inotify::queued(&found.link, &found.fd).about(holder, object())?;
        self.found.push(found);
        self.by_key.entry(key).or_default().push(self.found.len() - 1);
        Ok(self.found.len() - 1)
    }

    /// The locks that a process itself holds.
    pub fn locks(&mut self, pid: Pid) -> Vec<locks::Posix> {
        self.locks.remove(&pid).unwrap_or_default()
    }

    /// TCP sockets.
    fn streams(&self) -> Vec<inet::connection::Candidate<'_>> {
        let of = |f: &&Found| f.id.kind() == libc::S_IFSOCK && inet::is_tcp(&f.fd);
        let all = self.found.iter().filter(of);
        all.map(|f| inet::connection::Candidate {
            pid: f.holder,
            number: f.number,
            ino: f.id.ino,
            fd: &f.fd,
        })
        .collect()
    }

    fn terminals(&self) -> impl Iterator<Item = pty::Candidate<'_>> {
        self.found.iter().map(Found::terminal)
    }

    fn sockets(&self) -> std::collections::BTreeSet<u64> {
        self.found
            .iter()
            .filter(|f| f.id.kind() == libc::S_IFSOCK)
            .map(|f| f.id.ino)
            .collect()
    }
}

/// What naming the descriptions needs.
#[allow(missing_debug_implementations)]
pub struct Naming<'a, 'v> {
    /// The container's init, in our pid namespace.
    pub init: Pid,
    /// What is known of its tasks.
    pub tasks: &'a Tasks,
    /// How it numbers users and groups.
    pub maps: &'a IdMaps,
    /// Paths and shared objects.
    pub tables: &'a mut memory::Tables<'v>,
    /// What becomes of TCP connections to the outside.
    pub policy: inet::connection::Policy,
    /// What keeps the peers of connections waiting that are saved.
    pub hold: Option<inet::Hold>,
    /// Pseudo-terminals.
    pub ptys: pty::Survey,
    /// Pipes found so far.
    pub pipes: Vec<pipe::State>,
    /// The console, once it is found.
    pub console: Option<OwnedFd>,
    /// Stores bytes in the image.
    pub blob: &'a mut dyn FnMut(&[u8]) -> Result<BlobRef>,
    /// What comes back a little different, in words.
    pub warnings: Vec<String>,
}

/// Says of each description what it is. `tables` are the descriptor tables of all processes, init's first, and of threads.
pub fn collect(
    survey: &Survey,
    tables: &[(Pid, Vec<Descriptor>)],
    naming: &mut Naming<'_, '_>,
) -> Result<Vec<Description>> {
    let sockets = survey.sockets();
    let pids: Vec<Pid> = naming.tasks.members().collect();
    let around = pty::Around {
        init: naming.init,
        tasks: naming.tasks,
        pids: &pids,
        stat: &|path| naming.tables.view.stat(path),
    };
    naming.ptys = pty::Survey::of(survey.terminals(), &around)?;
    let connections = inet::connection::survey(naming.init, &survey.streams(), naming.policy)?;
    let mut all = Vec::new();
    let known = Sockets {
        unix: survey.unix.as_ref(),
        inside: &sockets,
        connections: &connections,
    };
    for (index, found) in survey.found.iter().enumerate() {
        let description = describe(survey, tables, index, &known, naming);
        all.push(match found.in_flight {
            true => description.map_err(|e| e.within("what waits in "))?,
            false => description?,
        });
    }
    naming.hold = connections.into_hold();
    Ok(all)
}

/// Says of one description what it is.
fn describe(
    survey: &Survey,
    tables: &[(Pid, Vec<Descriptor>)],
    index: usize,
    known: &Sockets<'_>,
    naming: &mut Naming<'_, '_>,
) -> Result<Description> {
    let found = &survey.found[index];
    let own_end = naming.ptys.end(&found.terminal(), naming.init)?;
    let object = match own_end {
        Some(end) => Some(Object::Pty(end)),
        None if outside(survey, found, naming)? => None,
        None => object(survey, tables, found, known, naming)?,
    };
    let object = match object {
        Some(object) => object,
        None => stdio(survey, tables, index)?.ok_or_else(|| leads_out(found))?,
    };
    let mut description = Description {
        flags: found.info.flags,
        pos: found.info.pos,
        locks: found.locks.clone(),
        told: None,
        listener: None,
        object,
    };
    match description.object {
        Object::Stdio { .. } => check_standard(found)?,
        _ => relations(found, &holders(tables, index), &mut description, naming)?,
    }
    Ok(description)
}

/// What is known of all sockets before one is looked at.
struct Sockets<'a> {
    unix: Option<&'a unix::Survey>,
    inside: &'a std::collections::BTreeSet<u64>,
    connections: &'a inet::connection::Survey,
}

/// All who have a description, each once.
fn holders(tables: &[(Pid, Vec<Descriptor>)], index: usize) -> Vec<(Pid, i32)> {
    tables
        .iter()
        .filter_map(|(pid, table)| Some((*pid, table.iter().find(|d| d.description == index)?.fd)))
        .collect()
}

/// What ties a description to processes.
fn relations(
    found: &Found,
    holders: &[(Pid, i32)],
    description: &mut Description,
    naming: &mut Naming<'_, '_>,
) -> Result<()> {
    let (owner, differs) = owner::collect(&found.fd, found.info.flags, holders, naming.tasks)?;
    description.told = owner;
    naming.warnings.extend(differs);
    if let Object::Unix(state) = &description.object
        && let Some(backlog) = state.backlog
    {
        let (listener, differs) = listener::collect(&found.fd, backlog, holders, |pid| naming.tasks.inner(pid))?;
        description.listener = listener;
        naming.warnings.extend(differs);
    }
    Ok(())
}

fn leads_out(found: &Found) -> Error {
    let why = "it leads out of the container and is not one of the standard streams of its first process";
    Error::unsupported(
        found.holder,
        format!("fd {} ({})", found.number, found.link),
        why,
        "close it before the checkpoint",
    )
}

/// # Errors
/// Refused: what a restore cannot ask of a stream that will be another one.
fn check_standard(found: &Found) -> Result<()> {
    let refuse = |why: &str| {
        let object = format!("fd {} ({})", found.number, found.link);
        Err(Error::unsupported(found.holder, object, why, ""))
    };
    if found.info.lines.iter().any(|l| l.starts_with("lock:")) {
        return refuse("it is a standard stream from outside of the container, with a lock");
    }
    if found.info.flags & libc::O_ASYNC != 0 {
        return refuse("it is a standard stream from outside of the container, with signal-driven I/O (O_ASYNC)");
    }
    Ok(())
}

/// Whether a description leads out of the container: a file on a mount that the container does not have, a
/// terminal whose master is outside, a pipe whose other end is.
fn outside(survey: &Survey, found: &Found, naming: &mut Naming<'_, '_>) -> Result<bool> {
    let pty = found.id.kind() == libc::S_IFCHR && console::is_pty(found.id.rdev);
    if pty && naming.console.is_none() {
        let copy = found
            .fd
            .try_clone()
            .map_err(|e| torpor_sys::Error::io("dup", "terminal", &e));
        naming.console = Some(copy.about(found.holder, "terminal")?);
    }
    match found.id.kind() {
        libc::S_IFCHR if pty => Ok(true),
        libc::S_IFREG | libc::S_IFDIR | libc::S_IFCHR | libc::S_IFBLK | libc::S_IFLNK => {
            let is_named = found.link.starts_with('/') && !found.link.starts_with("/memfd:");
            Ok(is_named && !naming.tables.view.has_mount(found.info.mnt_id))
        }
        libc::S_IFIFO if found.link.starts_with("pipe:") => Ok(pipe_leads_out(survey, found)),
        _ => Ok(false),
    }
}

/// An end that the container lacks exists elsewhere, or nowhere: poll(2) on the one that it has tells. The
/// pipe is then not ours, unless the other end was closed: that is a state like any other.
fn pipe_leads_out(survey: &Survey, found: &Found) -> bool {
    let ends = |mode: i32| {
        survey.found.iter().any(|f| {
            let access = f.info.flags & libc::O_ACCMODE;
            (f.id.dev, f.id.ino) == (found.id.dev, found.id.ino) && (access == mode || access == libc::O_RDWR)
        })
    };
    if ends(libc::O_RDONLY) && ends(libc::O_WRONLY) {
        return false;
    }
    let gone = if ends(libc::O_RDONLY) {
        libc::POLLHUP
    } else {
        libc::POLLERR
    };
    fd::poll_now(&found.fd) & gone == 0
}

/// Which standard stream a description that leads out belongs to: init's own, by description, by file, or, when
/// init has closed its own, by the number at which some process holds it.
fn stdio(survey: &Survey, tables: &[(Pid, Vec<Descriptor>)], index: usize) -> Result<Option<Object>> {
    let found = &survey.found[index];
    let streams = |table: &'_ [Descriptor]| -> Vec<(usize, usize)> {
        table
            .iter()
            .filter(|d| (0..3).contains(&d.fd))
            .map(|d| (d.fd as usize, d.description))
            .collect()
    };
    let Some((_, init)) = tables.first() else {
        return Ok(None);
    };
    let of_init = streams(init);
    if let Some((at, _)) = of_init.iter().find(|(_, d)| *d == index) {
        return Ok(Some(Object::Stdio { index: *at }));
    }
    let same_file = |d: usize| {
        let other = &survey.found[d];
        (other.id.dev, other.id.ino) == (found.id.dev, found.id.ino)
            && other.info.flags & libc::O_ACCMODE == found.info.flags & libc::O_ACCMODE
    };
    if let Some((at, _)) = of_init.iter().find(|(_, d)| same_file(*d)) {
        return Ok(Some(Object::Stdio { index: *at }));
    }
    let elsewhere = tables
        .iter()
        .flat_map(|(_, t)| streams(t))
        .find(|(_, d)| *d == index || same_file(*d));
    Ok(elsewhere.map(|(at, _)| Object::Stdio { index: at }))
}

/// What a description inside the container is; `None` when it turns out to lead out.
fn object(
    survey: &Survey,
    tables: &[(Pid, Vec<Descriptor>)],
    found: &Found,
    known: &Sockets<'_>,
    naming: &mut Naming<'_, '_>,
) -> Result<Option<Object>> {
    let (pid, number) = (found.holder, found.number);
    match found.id.kind() {
        libc::S_IFREG | libc::S_IFDIR | libc::S_IFCHR | libc::S_IFBLK => path(found, naming).map(Some),
        libc::S_IFIFO => pipe_end(survey, found, naming).map(Some),
        libc::S_IFSOCK => socket(found, survey, known, naming),
        _ if found.link == "anon_inode:[eventfd]" => {
            Ok(Some(Object::Eventfd(eventfd::collect(pid, number, &found.info)?)))
        }
        _ if found.link == "anon_inode:[timerfd]" => Ok(Some(Object::Timerfd(timerfd::collect(
            pid,
            number,
            &found.info,
            &found.fd,
        )?))),
        _ if found.link == "anon_inode:[signalfd]" => {
            Ok(Some(Object::Signalfd(signalfd::collect(pid, number, &found.info)?)))
        }
        _ if found.link == "anon_inode:inotify" => {
            let state = inotify::collect(pid, number, &found.info, found.events, naming.init)?;
            Ok(Some(Object::Inotify(state)))
        }
        _ if found.link == "anon_inode:[pidfd]" => {
            let state = pidfds::collect(pid, number, &found.info, naming.tasks)?;
            Ok(Some(Object::Pidfd(state)))
        }
        _ if found.link == "anon_inode:[eventpoll]" => {
            let has = |fd: i32, ino: u64| {
                let table = tables.iter().filter(|(p, _)| *p == pid).flat_map(|(_, t)| t);
                table
                    .into_iter()
                    .any(|d| d.fd == fd && survey.found[d.description].id.ino == ino)
            };
            let state = epoll::collect(pid, number, &found.info, has)?;
            if found.in_flight && !state.watches.is_empty() {
                let why = "an epoll instance that watches something and that no process has is not carried";
                return Err(Error::unsupported(
                    pid,
                    format!("fd {number}"),
                    why,
                    "try again when it has been received",
                ));
            }
            Ok(Some(Object::Epoll(state)))
        }
        _ => {
            let object = format!("fd {number} ({})", found.link);
            Err(Error::unsupported(
                pid,
                object,
                "this kind of file is not carried yet",
                "close it before the checkpoint",
            ))
        }
    }
}

/// A socket; `None` when it is connected to one outside.
fn socket(found: &Found, survey: &Survey, known: &Sockets<'_>, naming: &mut Naming<'_, '_>) -> Result<Option<Object>> {
    let (pid, number) = (found.holder, found.number);
    match fd::socket_domain(&found.fd).about(pid, format!("fd {number}"))? {
        libc::AF_INET | libc::AF_INET6 => {
            let mut state = inet::collect(pid, number, &found.fd, known.connections, naming.blob)?;
            state.owner = naming.maps.inner_owner(state.owner);
            naming.warnings.extend(state.warning());
            Ok(Some(Object::Inet(Box::new(state))))
        }
        libc::AF_UNIX => {
            let Some(unix) = known.unix else { return Ok(None) };
            let queue = unread(found, survey, naming)?;
            match unix::collect(&found.socket(), unix, known.inside, &queue, naming.blob)? {
                unix::Found::Inside(state) => {
                    let state = state.renumbered(|owner| naming.maps.inner_owner(owner));
                    Ok(Some(Object::Unix(Box::new(state))))
                }
                unix::Found::Outside => Ok(None),
            }
        }
        // Refused by name.
        _ => inet::collect(pid, number, &found.fd, known.connections, naming.blob).map(|_| None),
    }
}

/// What waits in a unix socket, with the senders as the container numbers processes.
fn unread(found: &Found, survey: &Survey, naming: &Naming<'_, '_>) -> Result<Vec<unix::Unread<usize>>> {
    let mut queue = Vec::new();
    for message in survey.queues.get(&found.id.ino).into_iter().flatten() {
        let mut message = message.clone();
        if let Some(sender) = &mut message.credentials {
            let lives = proc::stat(sender.pid).is_ok_and(|s| s.state != 'Z');
            let Some(pid) = naming.tasks.inner(sender.pid).filter(|_| lives) else {
                let why =
                    "a message waits that shows its sender's credentials, and that process has ended or is not saved";
                let remedy = "try again when it has been received";
                return Err(Error::unsupported(
                    found.holder,
                    format!("fd {}", found.number),
                    why,
                    remedy,
                ));
            };
            sender.pid = pid;
        }
        queue.push(message);
    }
    Ok(queue)
}

fn pipe_end(survey: &Survey, found: &Found, naming: &mut Naming<'_, '_>) -> Result<Object> {
    let id = &found.id;
    if let Some(index) = naming.pipes.iter().position(|p| p.ino == id.ino) {
        return Ok(Object::Pipe { index });
    }
    let same = |f: &&Found| (f.id.dev, f.id.ino) == (id.dev, id.ino);
    let packets = survey
        .found
        .iter()
        .filter(same)
        .any(|f| f.info.flags & libc::O_DIRECT != 0);
    let mut state = pipe::collect(found.holder, id.ino, &found.fd, packets, naming.blob)?;
    if !found.link.starts_with("pipe:") {
        let object = format!("fd {} ({})", found.number, found.link);
        naming.tables.view.check(found.holder, &object, &found.link, id)?;
        state.path = Some(found.link.clone());
    }
    naming.pipes.push(state);
    Ok(Object::Pipe {
        index: naming.pipes.len() - 1,
    })
}

fn path(found: &Found, naming: &mut Naming<'_, '_>) -> Result<Object> {
    let (pid, object) = (found.holder, format!("fd {} ({})", found.number, found.link));
    if found.id.kind() == libc::S_IFREG
        && found.info.flags & libc::O_PATH == 0
        && let Some(index) = naming.tables.shared.index(pid, &found.link, &found.fd)?
    {
        return Ok(Object::Shared { index });
    }
    if found.id.nlink == 0 {
        return Err(Error::unsupported(
            pid,
            object,
            "a removed file of this kind is not carried yet",
            "",
        ));
    }
    let id = &found.id;
    // Its name is gone, but it has another one.
    let path = match found.link.strip_suffix(" (deleted)") {
        Some(gone) => naming
            .tables
            .view
            .other_name(gone, id)
            .unwrap_or_else(|| found.link.clone()),
        None => found.link.clone(),
    };
    naming.tables.view.check(pid, &object, &path, id)?;
    Ok(Object::Path(PathState {
        path,
        mode: id.mode,
        size: id.size,
        mtime: id.mtime,
    }))
}
