//! Memory shared by mapping (MAP_SHARED, memfd) and files that have lost their name: objects that live in the
//! image since nothing else keeps them.

use std::os::fd::OwnedFd;

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

/// The objects found so far, with a descriptor of ours to read each.
#[derive(Debug, Default)]
pub struct Table {
    /// In the order of their indices.
    pub states: Vec<State>,
    /// Open for reading, in the same order.
    pub sources: Vec<OwnedFd>,
    keys: Vec<(u64, u64)>,
    maps: IdMaps,
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
    let is_file = id.kind() == libc::S_IFREG && id.nlink == 0 && !name.starts_with("/SYSV");
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
        if let Some(at) = self.keys.iter().position(|k| *k == (id.dev, id.ino)) {
            return Ok(Some(at));
        }
        let Some(mut kind) = kind_of(link, &id) else {
            return Ok(None);
        };
        let source = fd::reopen(file, libc::O_RDONLY).about(pid, link)?;
        if let Kind::Memfd { seals, .. } = &mut kind {
            *seals = fd::fcntl(&source, F_GET_SEALS, 0).about(pid, link)?;
        }
        self.keys.push((id.dev, id.ino));
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
}

/// A new empty object of the right kind and size, open for reading and writing. `unnamed` makes a nameless file
/// in a directory of the container.
pub fn rebuild(state: &State, maps: &IdMaps, unnamed: impl Fn(&str) -> Result<OwnedFd>) -> Result<OwnedFd> {
    let file = match &state.kind {
        Kind::Anonymous => fd::shared_anonymous(state.size).about(1, "shared memory")?,
        Kind::Memfd { name, .. } => fd::memfd(name, libc::MFD_ALLOW_SEALING).about(1, "memfd")?,
        Kind::Deleted { directory } => unnamed(directory)?,
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

/// # Errors
/// Refused: a System V segment.
pub fn check_name(pid: Pid, name: &str) -> Result<()> {
    if name.starts_with("/SYSV") {
        return Err(Error::unsupported(
            pid,
            name,
            "System V shared memory is not carried yet",
            "",
        ));
    }
    Ok(())
}
