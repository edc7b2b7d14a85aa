//! What descriptors and mappings refer to, made before any process gets it. Files with a name are opened by init
//! itself, so that its mounts and rights decide; the rest is made here and sent in.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use torpor_image::Reader;
use torpor_sys::remote::Batch;
use torpor_sys::{fd, pidfd, proc};

use super::Skeleton;
use crate::bounds::Bounds;
use crate::capture::SHARED;
use crate::error::{About, Error, Result};
use crate::kinds::creds::IdMaps;
use crate::kinds::files::{Description, Object, PathState};
use crate::kinds::unchanged::Unchanged;
use crate::kinds::{
    console, creds, epoll, eventfd, inet, ipc, locks, pidfd as pidfds, pipe, shared, signalfd, timerfd, unix,
};
use crate::model::Inventory;
use crate::source;
use crate::stage::Cancel;

/// Descriptors of ours, by the indices of the inventory.
#[derive(Debug)]
pub struct Objects {
    /// Open file descriptions.
    pub descriptions: Vec<OwnedFd>,
    /// What is mapped.
    pub files: Files,
    /// Unix sockets that lack what is in flight.
    unix: Option<unix::Pending>,
}

/// Descriptors of ours for what processes map.
#[derive(Debug)]
pub struct Files {
    /// Shared objects, open for reading and writing.
    pub shared: Vec<OwnedFd>,
    /// Mapped files.
    pub mapped: Vec<OwnedFd>,
    /// Id and size of the shared objects that are System V shared memory, by their indices.
    pub(super) segments: BTreeMap<usize, (i32, u64)>,
    ipc: ipc::Made,
}

impl Files {
    /// All processes have attached what they had.
    pub(super) fn release_segments(&mut self) {
        self.ipc.release();
    }
}

/// Status flags that open(2) takes again. Those about creation are not kept by the kernel.
const OPEN_FLAGS: i32 = libc::O_ACCMODE
    | libc::O_APPEND
    | libc::O_NONBLOCK
    | libc::O_DSYNC
    | libc::O_SYNC
    | libc::O_DIRECT
    | libc::O_LARGEFILE
    | libc::O_DIRECTORY
    | libc::O_NOFOLLOW
    | libc::O_NOATIME
    | libc::O_PATH;

/// How many files are opened in one stop.
const AT_ONCE: usize = 200;

impl Objects {
    /// Opens the descriptors of processes and threads, when all of those are there.
    pub fn open_pidfds(&mut self, skeleton: &Skeleton, inventory: &Inventory) -> Result<()> {
        for (description, fd) in inventory.descriptions.iter().zip(&mut self.descriptions) {
            if let Object::Pidfd(state) = &description.object {
                let (pid, flags) = pidfds::arguments(state);
                let what = format!("pidfd_open of process {pid}");
                *fd = skeleton.made_inside(&what, libc::SYS_pidfd_open, pid, flags)?;
                set_flags(fd, description)?;
            }
        }
        Ok(())
    }

    /// Sends what was in flight in unix sockets, when all that it may bring is there.
    pub fn deliver(&mut self, skeleton: &Skeleton, inventory: &Inventory, image: &Reader) -> Result<()> {
        let Some(pending) = self.unix.take() else { return Ok(()) };
        let all = inventory.descriptions.iter().zip(&self.descriptions);
        let sockets = all
            .filter(|(d, _)| matches!(d.object, Object::Unix(_)))
            .map(|(_, fd)| fd);
        pending.deliver(&unix::Recipients {
            init: skeleton.init,
            sockets: sockets.collect(),
            descriptions: &self.descriptions,
            pid: &|pid| skeleton.sites.get(&pid).map(|site| site.tid()),
            blob: &|r| Ok(image.blob(r)?),
        })
    }
}

/// Makes what is mapped, while there is no process but init.
pub(super) fn rebuild_files(
    skeleton: &Skeleton,
    inventory: &Inventory,
    image: &Reader,
    cancel: &Cancel,
) -> Result<Files> {
    let maps = IdMaps::of(skeleton.init)?;
    let states = &inventory.objects.shared;
    let ipc = match &inventory.ipc {
        Some(state) => ipc::rebuild(state, states, image, skeleton.init)?,
        None => ipc::Made::default(),
    };
    let mut shared = Vec::new();
    let segment = |id: i32| ipc.file(id);
    for (index, state) in inventory.objects.shared.iter().enumerate() {
        cancel.check()?;
        let unnamed = |directory: &str| skeleton.open_unnamed(directory);
        let file = shared::rebuild(state, &maps, unnamed, segment)?;
        fill(&file, image, SHARED + index as u32, state.size)?;
        shared.push(file);
    }
    let mapped = mapped(skeleton, inventory)?;
    let segments = states.iter().enumerate().filter_map(|(at, s)| Some((at, s.segment()?)));
    Ok(Files {
        shared,
        mapped,
        segments: segments.collect(),
        ipc,
    })
}

/// Makes the rest. Those that [`Objects::open_pidfds`] opens are not what they should be yet.
pub(super) fn rebuild(skeleton: &Skeleton, inventory: &Inventory, image: &Reader, files: Files) -> Result<Objects> {
    let (descriptions, unix) = descriptions(skeleton, inventory, image, &files.shared)?;
    Ok(Objects {
        descriptions,
        files,
        unix,
    })
}

/// The bytes of a shared object, from the image's page cache into its own.
fn fill(file: &OwnedFd, image: &Reader, space: u32, size: u64) -> Result<()> {
    let file = file
        .try_clone()
        .map_err(|e| torpor_sys::Error::io("dup", "shared object", &e));
    let file = std::fs::File::from(file.about(1, "shared object")?);
    for run in image.runs_of(space).iter().filter(|r| !r.is_zero()) {
        source::each(image, 1, run.offset, run.bytes(), |at, bytes| {
            let start = run.start + at;
            let len = bytes.len().min(size.saturating_sub(start) as usize);
            file.write_all_at(&bytes[..len], start)
                .map_err(|e| torpor_sys::Error::io("write", "shared object", &e))
                .about(1, "shared object")
        })?;
    }
    Ok(())
}

fn mapped(skeleton: &Skeleton, inventory: &Inventory) -> Result<Vec<OwnedFd>> {
    let wanted: Vec<(String, i32)> = inventory
        .objects
        .mapped
        .iter()
        .map(|m| (m.path.clone(), if m.writable { libc::O_RDWR } else { libc::O_RDONLY }))
        .collect();
    let mut opened = skeleton.open_as(&wanted, None)?;
    // A program may run without being readable to its user; everything else must be.
    let mut judged = Vec::new();
    for (at, (file, (path, flags))) in opened.iter().zip(&wanted).enumerate() {
        let runs = fd::stat(file).about(1, path)?.mode & 0o111 != 0;
        if *flags != libc::O_RDONLY || !runs {
            judged.push(at);
        }
    }
    let again: Vec<(String, i32)> = judged.iter().map(|at| wanted[*at].clone()).collect();
    for (at, file) in judged.into_iter().zip(skeleton.open_inside(&again)?) {
        opened[at] = file;
    }
    for (file, state) in opened.iter().zip(&inventory.objects.mapped) {
        let now = fd::stat(file).about(1, &state.path)?;
        if now.kind() == libc::S_IFREG {
            skeleton.files.check(&state.path, state.size, state.mtime, &now)?;
        }
    }
    Ok(opened)
}

fn descriptions(
    skeleton: &Skeleton,
    inventory: &Inventory,
    image: &Reader,
    shared: &[OwnedFd],
) -> Result<(Vec<OwnedFd>, Option<unix::Pending>)> {
    let pipes = pipes(skeleton, inventory, image)?;
    let mut paths = named(skeleton, &inventory.descriptions)?.into_iter();
    let mut sockets = Sockets::rebuild(skeleton, &inventory.descriptions, image)?;
    let mut all = Vec::new();
    for description in &inventory.descriptions {
        let fd = match &description.object {
            Object::Path(_) => paths.next().ok_or_else(|| Error::nonsense("a file was not opened"))?,
            Object::Stdio { index } => standard(skeleton, *index)?,
            Object::Shared { index } => {
                let base = shared
                    .get(*index)
                    .ok_or_else(|| Error::nonsense("a shared object is missing"))?;
                let file = fd::reopen(base, description.flags & OPEN_FLAGS).about(1, "shared object")?;
                fd::seek(&file, description.pos).about(1, "shared object")?;
                file
            }
            Object::Pipe { index } => {
                let ends = pipes.get(*index).ok_or_else(|| Error::nonsense("a pipe is missing"))?;
                pipe_end(ends, description.flags)?
            }
            Object::Pty(end) => skeleton.terminal_end(inventory, *end, description.flags & OPEN_FLAGS)?,
            Object::Eventfd(state) => eventfd::rebuild(state)?,
            Object::Epoll(_) => fd::epoll().about(1, "epoll")?,
            Object::Timerfd(state) => timerfd::rebuild(state)?,
            Object::Signalfd(state) => signalfd::rebuild(state)?,
            Object::Inotify(_) => {
                skeleton.made_inside("inotify_init1", libc::SYS_inotify_init1, libc::IN_CLOEXEC, 0)?
            }
            // A stand-in, since threads are made later.
            Object::Pidfd(_) => pidfd::open(skeleton.init).about(1, "pidfd")?,
            Object::Unix(_) => sockets
                .unix
                .next()
                .ok_or_else(|| Error::nonsense("a socket is missing"))?,
            Object::Inet(_) => sockets
                .inet
                .next()
                .ok_or_else(|| Error::nonsense("a socket is missing"))?,
        };
        set_flags(&fd, description)?;
        locks::rebuild(&fd, &description.locks, description.object.name())?;
        all.push(fd);
    }
    if let (Some(state), Some(Some(terminal))) = (&inventory.console, skeleton.stdio.first()) {
        // A container that had a terminal may be restored without one.
        let _ = console::rebuild(terminal, state);
    }
    Ok((all, sockets.pending))
}

/// Status flags that are set after the fact. A standard stream belongs to whoever gave it to us.
fn set_flags(fd: &OwnedFd, description: &Description) -> Result<()> {
    let settable = libc::O_NONBLOCK | libc::O_APPEND | libc::O_DIRECT;
    if matches!(description.object, Object::Stdio { .. } | Object::Path(_)) {
        return Ok(());
    }
    // Also to none: what was filled here was made not to block.
    let flags = i64::from(description.flags & settable);
    fd::fcntl(fd, libc::F_SETFL, flags).about(1, "status flags").map(drop)
}

fn standard(skeleton: &Skeleton, index: usize) -> Result<OwnedFd> {
    let stream = skeleton.stdio.get(index).and_then(Option::as_ref);
    let stream = stream.ok_or_else(|| {
        Error::unsupported(
            1,
            format!("standard stream {index}"),
            "the new container has none to connect to",
            "",
        )
    })?;
    stream
        .try_clone()
        .map_err(|e| torpor_sys::Error::io("dup", "standard stream", &e))
        .about(1, "standard stream")
}

/// Both ends of every pipe; a FIFO is open for both in one.
fn pipes(skeleton: &Skeleton, inventory: &Inventory, image: &Reader) -> Result<Vec<(OwnedFd, OwnedFd)>> {
    let mut all = Vec::new();
    for state in &inventory.objects.pipes {
        let ends = match &state.path {
            None => fd::pipe().about(1, "pipe")?,
            Some(path) => {
                let wanted = [(path.clone(), libc::O_RDWR | libc::O_NONBLOCK)];
                let fifo = skeleton
                    .open_inside(&wanted)?
                    .pop()
                    .ok_or_else(|| Error::nonsense("a FIFO was not opened"))?;
                (
                    fd::reopen(&fifo, libc::O_RDONLY | libc::O_NONBLOCK).about(1, path)?,
                    fifo,
                )
            }
        };
        pipe::fill(state, &ends.1, &image.blob(state.content)?)?;
        all.push(ends);
    }
    Ok(all)
}

/// An open file description for an end of a pipe: the one that pipe(2) made, or one more, made by opening it again.
/// They can be told apart: all that open(2) makes have O_LARGEFILE.
fn pipe_end(ends: &(OwnedFd, OwnedFd), flags: i32) -> Result<OwnedFd> {
    const O_LARGEFILE: i32 = 0o100_000;
    let end = if flags & libc::O_ACCMODE == libc::O_RDONLY {
        &ends.0
    } else {
        &ends.1
    };
    if flags & O_LARGEFILE != 0 {
        return fd::reopen(end, flags & (libc::O_ACCMODE | libc::O_NONBLOCK)).about(1, "pipe");
    }
    let same = end.try_clone().map_err(|e| torpor_sys::Error::io("dup", "pipe", &e));
    same.about(1, "pipe")
}

fn named(skeleton: &Skeleton, descriptions: &[Description]) -> Result<Vec<OwnedFd>> {
    let states: Vec<(&Description, &PathState)> = descriptions
        .iter()
        .filter_map(|d| match &d.object {
            Object::Path(state) => Some((d, state)),
            _ => None,
        })
        .collect();
    let wanted: Vec<(String, i32)> = states
        .iter()
        .map(|(d, s)| (s.path.clone(), d.flags & OPEN_FLAGS))
        .collect();
    let opened = skeleton.open_inside(&wanted)?;
    for (file, (description, state)) in opened.iter().zip(states) {
        check_named(file, description, state, skeleton.files)?;
    }
    Ok(opened)
}

fn check_named(file: &OwnedFd, description: &Description, state: &PathState, files: Unchanged) -> Result<()> {
    let now = fd::stat(file).about(1, &state.path)?;
    if now.kind() != state.mode & libc::S_IFMT {
        return Err(Error::unsupported(
            1,
            format!("file {}", state.path),
            "it is of another type now",
            "",
        ));
    }
    let is_file = now.kind() == libc::S_IFREG;
    let reads = description.flags & libc::O_ACCMODE == libc::O_RDONLY && description.flags & libc::O_PATH == 0;
    // What /proc and /sys show has no size of its own.
    if is_file && reads && state.size > 0 {
        files.check(&state.path, state.size, state.mtime, &now)?;
    }
    if description.flags & libc::O_PATH == 0 && (is_file || now.kind() == libc::S_IFDIR || now.kind() == libc::S_IFBLK)
    {
        fd::seek(file, description.pos).about(1, &state.path)?;
    }
    Ok(())
}

/// Sockets in the order of the descriptions.
struct Sockets {
    unix: std::vec::IntoIter<OwnedFd>,
    inet: std::vec::IntoIter<OwnedFd>,
    pending: Option<unix::Pending>,
}

impl Sockets {
    fn rebuild(skeleton: &Skeleton, descriptions: &[Description], image: &Reader) -> Result<Sockets> {
        let mut unix_states: Vec<&unix::State> = Vec::new();
        let mut inet_states: Vec<&inet::State> = Vec::new();
        for description in descriptions {
            match &description.object {
                Object::Unix(state) => unix_states.push(state),
                Object::Inet(state) => inet_states.push(state),
                _ => {}
            }
        }
        let blob = |r| Ok(image.blob(r)?);
        let (unix, pending) = if unix_states.is_empty() {
            (Vec::new(), None)
        } else {
            let (made, pending) = unix::rebuild(skeleton.init, &unix_states)?;
            (made, Some(pending))
        };
        let inet = if inet_states.is_empty() {
            Vec::new()
        } else {
            inet::rebuild(skeleton.init, &inet_states, &blob)?
        };
        Ok(Sockets {
            unix: unix.into_iter(),
            inet: inet.into_iter(),
            pending,
        })
    }
}

impl Skeleton {
    /// Opens files in init, as it sees them and as a program of the container could, and takes descriptors of ours
    /// for them.
    fn open_inside(&self, wanted: &[(String, i32)]) -> Result<Vec<OwnedFd>> {
        self.open_as(wanted, Some(&self.bounds))
    }

    pub(super) fn open_as(&self, wanted: &[(String, i32)], bounds: Option<&Bounds>) -> Result<Vec<OwnedFd>> {
        let have = proc::status(self.init).about(self.init, "status")?.cap_effective;
        let mut all = Vec::new();
        for group in wanted.chunks(AT_ONCE) {
            let mut batch = Batch::new();
            if let Some(bounds) = bounds {
                creds::act_within(&mut batch, bounds, have);
            }
            let mut calls = Vec::new();
            for (path, flags) in group {
                let name = batch.string(path);
                let flags = flags | libc::O_CLOEXEC | libc::O_NOCTTY;
                let args = [libc::AT_FDCWD.into(), name.into(), flags.into(), 0.into()];
                calls.push(batch.must(format!("open of {path}"), libc::SYS_openat, args));
            }
            if bounds.is_some() {
                creds::act_as_before(&mut batch, have);
            }
            all.extend(self.pull(&batch, &calls)?);
        }
        Ok(all)
    }

    /// A file without a name in a directory of the container (open(2), O_TMPFILE).
    fn open_unnamed(&self, directory: &str) -> Result<OwnedFd> {
        let mut batch = Batch::new();
        let name = batch.string(directory);
        let flags = libc::O_TMPFILE | libc::O_RDWR | libc::O_CLOEXEC;
        let what = format!("a file without a name in {directory}");
        let args = [libc::AT_FDCWD.into(), name.into(), flags.into(), 0o600.into()];
        let call = batch.must(what, libc::SYS_openat, args);
        let mut fds = self.pull(&batch, &[call])?;
        fds.pop().ok_or_else(|| Error::nonsense("a file was not opened"))
    }

    /// A call in init that gives a descriptor.
    fn made_inside(&self, what: &str, nr: i64, first: i32, second: i32) -> Result<OwnedFd> {
        let mut batch = Batch::new();
        let call = batch.must(what, nr, [first.into(), second.into()]);
        let mut fds = self.pull(&batch, &[call])?;
        fds.pop().ok_or_else(|| Error::nonsense("a descriptor was not made"))
    }

    /// Runs calls in init that give descriptors, takes those over and closes them there.
    fn pull(&self, batch: &Batch, calls: &[usize]) -> Result<Vec<OwnedFd>> {
        let root = self.root()?;
        let results = root.run(batch).about(1, "files")?;
        let process = pidfd::open(self.init).about(self.init, "pidfd")?;
        let mut fds = Vec::new();
        let mut close = Batch::new();
        for call in calls {
            let number = results.raw(*call) as i32;
            fds.push(pidfd::get_fd(&process, number).about(1, "files")?);
            close.must("close", libc::SYS_close, [number.into()]);
        }
        root.run(&close).about(1, "files")?;
        Ok(fds)
    }
}

/// What an epoll instance watches, of all descriptions.
pub(super) fn epoll_of(description: &Description) -> Option<&epoll::State> {
    match &description.object {
        Object::Epoll(state) => Some(state),
        _ => None,
    }
}
