//! What later verbs must know about a container, kept beside libcontainer's state: written before anything is built, so
//! that `delete` can clean up after a launcher that was killed half-way.

use std::ffi::CString;
use std::fs;
use std::path::{Path, PathBuf};

use libcontainer::container::{ContainerStatus, State};
use libcontainer::oci_spec::runtime::Spec;
use nix::unistd::Pid;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::error::Error;
use crate::layout::Layout;

#[derive(Debug, Serialize, Deserialize)]
pub struct Record {
    /// The bundle as the user gave it: hooks must see this one, not the effective one.
    pub bundle: PathBuf,
    pub cgroup: PathBuf,
    pub systemd_cgroup: bool,
    /// Whether the container has a session keyring of its own.
    pub keyring: bool,
    /// The spec before privileges were taken out of it.
    pub spec: Spec,
}

impl Record {
    pub fn load(layout: &Layout) -> Result<Self, Error> {
        match fs::metadata(layout.record()) {
            Ok(_) => load(&layout.record()),
            Err(_) => Err(Error::NotFound(layout.id().to_owned())),
        }
    }

    pub fn save(&self, layout: &Layout) -> Result<(), Error> {
        save(&layout.record(), self)
    }

    /// The state that hooks are given: that of the user's bundle.
    pub fn state(&self, layout: &Layout, status: ContainerStatus, pid: Option<Pid>) -> State {
        let pid = pid.map(Pid::as_raw);
        let mut state = State::new(layout.id(), status, pid, self.bundle.clone());
        state.annotations = self.spec.annotations().clone();
        state
    }

    pub fn keyring(&self, layout: &Layout) -> Option<CString> {
        self.keyring
            .then(|| CString::new(format!("_ses.{}", layout.id())).ok())?
    }
}

/// The init process, told apart from a later process with the same number by the time it started.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Init {
    pub pid: i32,
    pub start_time: u64,
}

impl Init {
    pub fn of(pid: Pid) -> Result<Self, Error> {
        let start_time =
            start_time(pid.as_raw()).ok_or_else(|| Error::Container("the container's init process died".to_owned()))?;
        Ok(Self {
            pid: pid.as_raw(),
            start_time,
        })
    }

    pub fn load(layout: &Layout) -> Option<Self> {
        load(&layout.init()).ok()
    }

    pub fn save(&self, layout: &Layout) -> Result<(), Error> {
        save(&layout.init(), self)
    }

    /// Whether it still runs; a zombie does not.
    pub fn is_alive(&self) -> bool {
        start_time(self.pid) == Some(self.start_time)
    }
}

fn start_time(pid: i32) -> Option<u64> {
    let stat = procfs::process::Process::new(pid).ok()?.stat().ok()?;
    (!matches!(stat.state, 'Z' | 'X')).then_some(stat.starttime)
}

fn load<T: DeserializeOwned>(path: &Path) -> Result<T, Error> {
    let text = fs::read(path).map_err(Error::io("read", path))?;
    serde_json::from_slice(&text).map_err(|error| Error::Container(format!("{} is damaged: {error}", path.display())))
}

/// By rename, so that a reader never sees half a file.
pub fn save<T: Serialize>(path: &Path, value: &T) -> Result<(), Error> {
    let text =
        serde_json::to_vec(value).map_err(|error| Error::Container(format!("write {}: {error}", path.display())))?;
    replace(path, &text)
}

pub fn replace(path: &Path, text: &[u8]) -> Result<(), Error> {
    let mut name = path.as_os_str().to_owned();
    name.push(".new");
    let new = PathBuf::from(name);
    fs::write(&new, text).map_err(Error::io("write", &new))?;
    fs::rename(&new, path).map_err(Error::io("write", path))
}
