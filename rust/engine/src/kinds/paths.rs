//! The container's own view of its files, from outside.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use torpor_sys::fd::{self, FileId};
use torpor_sys::{Pid, proc};

use crate::error::{About, Error, Result};

/// The mount namespace of a container.
#[derive(Debug)]
pub struct View {
    root: OwnedFd,
    mounts: BTreeSet<u64>,
}

impl View {
    /// The view of the process `init`.
    pub fn of(init: Pid) -> Result<View> {
        let root = fd::open(&format!("/proc/{init}/root"), libc::O_PATH | libc::O_DIRECTORY).about(init, "root")?;
        let mounts = proc::mountinfo(init)
            .about(init, "mountinfo")?
            .iter()
            .map(|m| m.id)
            .collect();
        Ok(View { root, mounts })
    }

    /// Whether a file on this mount can be reached from inside.
    pub fn has_mount(&self, id: u64) -> bool {
        self.mounts.contains(&id)
    }

    /// What a path names inside.
    pub fn stat(&self, path: &str) -> torpor_sys::Result<FileId> {
        fd::stat(fd::open_in_root(&self.root, path, libc::O_PATH)?)
    }

    /// Another name of a file in the directory that it was removed from.
    pub fn other_name(&self, gone: &str, id: &FileId) -> Option<String> {
        let (directory, _) = gone.rsplit_once('/')?;
        let inside = fd::open_in_root(&self.root, &format!("{directory}/"), libc::O_RDONLY | libc::O_DIRECTORY).ok()?;
        let names = fd::list(&inside).ok()?;
        let paths = names.into_iter().map(|name| format!("{directory}/{name}"));
        paths
            .into_iter()
            .find(|path| self.stat(path).is_ok_and(|h| (h.dev, h.ino) == (id.dev, id.ino)))
    }

    /// # Errors
    /// Refused when the path does not lead to this very file any more: it was renamed, replaced or mounted over.
    pub fn check(&self, pid: Pid, object: &str, path: &str, id: &FileId) -> Result<()> {
        let here = self.stat(path);
        if here.as_ref().is_ok_and(|h| (h.dev, h.ino) == (id.dev, id.ino)) {
            return Ok(());
        }
        let why = match here {
            Ok(_) => format!("{path} now names another file"),
            Err(e) => format!("{path} cannot be reached any more ({e})"),
        };
        Err(Error::unsupported(pid, object, why, "close it, or put the file back"))
    }
}
