//! Root, working directory and umask of a process.

use serde::{Deserialize, Serialize};
use torpor_sys::Pid;
use torpor_sys::proc::{self, Status};
use torpor_sys::remote::Batch;

use crate::error::{About, Error, Result};

/// Where path look-ups of a process begin. Paths are those of the container's mount namespace.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Working directory.
    pub cwd: String,
    /// Root directory; "/" unless the process called chroot(2).
    pub root: String,
    /// umask(2).
    pub umask: u32,
}

/// # Errors
/// Refused: a working directory that has been removed.
pub fn collect(pid: Pid, status: &Status) -> Result<State> {
    let cwd = proc::link(&format!("/proc/{pid}/cwd")).about(pid, "working directory")?;
    let root = proc::link(&format!("/proc/{pid}/root")).about(pid, "root directory")?;
    for path in [&cwd, &root] {
        if path.ends_with(" (deleted)") {
            let why = "a removed working directory is not carried yet";
            return Err(Error::unsupported(pid, path.clone(), why, ""));
        }
    }
    Ok(State {
        cwd,
        root,
        umask: status.umask,
    })
}

/// Sets all three.
pub fn rebuild(batch: &mut Batch, state: &State) {
    let cwd = batch.string(&state.cwd);
    batch.must(format!("chdir to {}", state.cwd), libc::SYS_chdir, [cwd.into()]);
    if state.root != "/" {
        let root = batch.string(&state.root);
        batch.must(format!("chroot to {}", state.root), libc::SYS_chroot, [root.into()]);
    }
    batch.must("umask", libc::SYS_umask, [state.umask.into()]);
}
