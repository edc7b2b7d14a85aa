//! Memory shared by mapping (MAP_SHARED, memfd) and files that have lost their name: objects that live in the
//! image since nothing else keeps them.

use std::os::fd::OwnedFd;
use std::sync::OnceLock;

use serde::{Deserialize, Serialize};
use torpor_sys::Pid;
use torpor_sys::fd::{self, FileId};

use super::creds::IdMaps;
use crate::error::{About, Error, Result};

/// What it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "kind", rename_all = "kebab-case")]
pub enum Kind {
    /// mmap(2) with MAP_SHARED | MAP_ANONYMOUS, or of /dev/zero.
    Anonymous,
    /// memfd_create(2).
    Memfd {
        /// The name given to it.
        name: String,
        /// F_SEAL_* bits.
        seals: i32,
    },
    /// A file that was removed while it was open or mapped.
    Deleted {
        /// The directory it was in.
        directory: String,
    },
    /// System V shared memory; see [`super::ipc`].
    SystemV {
        /// Its id.
        id: i32,
    },
}

/// A shared object; its pages are in the image under a number of their own.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// What it is.
    #[serde(flatten)]
    pub kind: Kind,
    /// Size in bytes.
    pub size: u64,
    /// Permissions and owner.
    pub mode: u32,
    /// Owner in the container's ids.
    pub uid: u32,
    /// Group in the container's ids.
    pub gid: u32,
}

impl State {
    /// Id and size, if it is System V shared memory.
    pub fn segment(&self) -> Option<(i32, u64)> {
        match self.kind {
            Kind::SystemV { id } => Some((id, self.size)),
            _ => None,
        }
    }
}

/// The objects found so far, with a descriptor of ours to read each.
#[derive(Debug, Default)]
pub struct Table {
    /// In the order of their indices.
    pub states: Vec<State>,
    /// Open for reading, in the same order.
    pub sources: Vec<OwnedFd>,
    keys: Vec<Option<(u64, u64)>>,
    maps: IdMaps,
}

/// Whether a device, as maps(5) has it, is that of the kernel's own file systems in memory, which are mounted nowhere.
pub fn is_kernels_device(dev: (u32, u32)) -> bool {
    static DEVICES: OnceLock<Vec<u64>> = OnceLock::new();
    const HUGE: [u32; 2] = [21 << 26, 30 << 26];
    let device = |flags: u32| {
        fd::memfd("device", flags)
            .and_then(|file| fd::stat(&file))
            .map(|id| id.dev)
    };
    let all = || {
        let huge = HUGE.map(|size| device(libc::MFD_HUGETLB | size));
        [device(0)].into_iter().chain(huge).flatten().collect()
    };
    DEVICES.get_or_init(all).contains(&libc::makedev(dev.0, dev.1))
}

/// What a name in maps or a link in /proc/PID/fd says of a file without links; `None` when it is another kind.
fn kind_of(link: &str, id: &FileId) -> Option<Kind> {
    let name = link.strip_suffix(" (deleted)").unwrap_or(link);
    if let Some(name) = name.strip_prefix("/memfd:") {
        return Some(Kind::Memfd {
            name: name.into(),
            seals: 0,
        });
    }
    if name == "/dev/zero" || name.starts_with("[anon_shmem:") {
        return Some(Kind::Anonymous);
    }
    let is_file = id.kind() == libc::S_IFREG && id.nlink == 0;
    let directory = name.rsplit_once('/').map(|(d, _)| if d.is_empty() { "/" } else { d });
    directory
        .filter(|_| is_file)
        .map(|d| Kind::Deleted { directory: d.into() })
}

impl Table {
    /// An empty one, for a container that numbers users and groups so.
    pub fn of(maps: IdMaps) -> Table {
        Table {
            maps,
            ..Table::default()
        }
    }

    /// The index of the object behind `file`, a descriptor of ours; `None` when it is a file with a name.
    /// `link` is how /proc names it.
    pub fn index(&mut self, pid: Pid, link: &str, file: &OwnedFd) -> Result<Option<usize>> {
        const F_GET_SEALS: i32 = 1034;
        let id = fd::stat(file).about(pid, link)?;
        if id.kind() != libc::S_IFREG {
            return Ok(None);
        }
        if is_segment(link, &id) {
            // The number of its inode is its id, which an inode of another kind may have as well.
            return self.segment(pid, link, &id).map(Some);
        }
        if let Some(at) = self.keys.iter().position(|k| *k == Some((id.dev, id.ino))) {
            return Ok(Some(at));
        }
        let Some(mut kind) = kind_of(link, &id) else {
            return Ok(None);
        };
        let source = fd::reopen(file, libc::O_RDONLY).about(pid, link)?;
        if let Kind::Memfd { seals, .. } = &mut kind {
            *seals = fd::fcntl(&source, F_GET_SEALS, 0).about(pid, link)?;
        }
        self.keys.push(Some((id.dev, id.ino)));
        let (uid, gid) = self.maps.inner(id.uid, id.gid);
        self.states.push(State {
            kind,
            size: id.size,
            mode: id.mode & 0o7777,
            uid,
            gid,
        });
        self.sources.push(source);
        Ok(Some(self.states.len() - 1))
    }

    /// Adds System V shared memory, open for reading.
    pub fn add_segment(&mut self, init: Pid, id: i32, source: OwnedFd) -> Result<()> {
        let file = fd::stat(&source).about(init, "System V shared memory")?;
        self.keys.push(None);
        self.states.push(State {
            kind: Kind::SystemV { id },
            size: file.size,
            mode: 0,
            uid: 0,
            gid: 0,
        });
        self.sources.push(source);
        Ok(())
    }

    /// # Errors
    /// Refused: a segment of a namespace that is not saved.
    fn segment(&self, pid: Pid, link: &str, id: &FileId) -> Result<usize> {
        let kind = Kind::SystemV { id: id.ino as i32 };
        let at = self.states.iter().position(|s| s.kind == kind);
        let is_same = |at: &usize| {
            let known = fd::stat(&self.sources[*at]);
            known.is_ok_and(|k| (k.dev, k.ino, k.size) == (id.dev, id.ino, id.size))
        };
        at.filter(is_same).ok_or_else(|| {
            let why = "it is System V shared memory of an IPC namespace that is not the container's own";
            let remedy = "detach it, or run the container in an IPC namespace of its own";
            Error::unsupported(pid, link, why, remedy)
        })
    }
}

fn is_segment(link: &str, id: &FileId) -> bool {
    link.starts_with("/SYSV") && is_kernels_device((libc::major(id.dev), libc::minor(id.dev)))
}

/// A new empty object of the right kind and size, open for reading and writing. `unnamed` makes a nameless file
/// in a directory of the container; `segment` gives System V shared memory, which has been made before.
pub fn rebuild(
    state: &State,
    maps: &IdMaps,
    unnamed: impl Fn(&str) -> Result<OwnedFd>,
    segment: impl Fn(i32) -> Result<OwnedFd>,
) -> Result<OwnedFd> {
    let file = match &state.kind {
        Kind::Anonymous => fd::shared_anonymous(state.size).about(1, "shared memory")?,
        Kind::Memfd { name, .. } => fd::memfd(name, libc::MFD_ALLOW_SEALING).about(1, "memfd")?,
        Kind::Deleted { directory } => unnamed(directory)?,
        Kind::SystemV { id } => return segment(*id),
    };
    if state.kind != Kind::Anonymous {
        fd::truncate(&file, state.size).about(1, "shared object")?;
        let (mode, uid, gid) = maps.outer_owner((state.mode, state.uid, state.gid));
        fd::set_owner(&file, mode, uid, gid).about(1, "shared object")?;
    }
    Ok(file)
}

/// Seals a memfd again, once everything is written and mapped.
pub fn rebuild_seals(state: &State, file: &OwnedFd) -> Result<()> {
    const F_ADD_SEALS: i32 = 1033;
    if let Kind::Memfd { seals, name } = &state.kind
        && *seals != 0
    {
        fd::fcntl(file, F_ADD_SEALS, (*seals).into()).about(1, format!("seals of memfd {name}"))?;
    }
    Ok(())
}
