//! Root, working directory and umask of a process.

use serde::{Deserialize, Serialize};
use torpor_sys::proc::{self, Status};
use torpor_sys::remote::{Batch, Results};
use torpor_sys::{Pid, fd};

use super::creds::IdMaps;
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
    /// What the working directory was, when it has been removed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub removed: Option<Removed>,
}

/// A removed directory: nothing can be in it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Removed {
    /// Type and permissions.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// # Errors
/// Refused: a root directory that has been removed.
pub fn collect(pid: Pid, status: &Status, maps: &IdMaps) -> Result<State> {
    const REMOVED: &str = " (deleted)";
    let link = format!("/proc/{pid}/cwd");
    let mut cwd = proc::link(&link).about(pid, "working directory")?;
    let root = proc::link(&format!("/proc/{pid}/root")).about(pid, "root directory")?;
    let is_removed =
        |link: &str, path: &str| path.ends_with(REMOVED) && fd::stat_path(link).is_ok_and(|s| s.nlink == 0);
    if is_removed(&format!("/proc/{pid}/root"), &root) {
        let why = "a removed root directory is not carried";
        return Err(Error::unsupported(pid, root, why, ""));
    }
    let mut removed = None;
    if is_removed(&link, &cwd) {
        let id = fd::stat_path(&link).about(pid, "working directory")?;
        let (uid, gid) = maps.inner(id.uid, id.gid);
        let mode = id.mode;
        removed = Some(Removed { mode, uid, gid });
        cwd.truncate(cwd.len() - REMOVED.len());
    }
    Ok(State {
        cwd,
        root,
        umask: status.umask,
        removed,
    })
}

/// Makes a working directory that was removed, goes there and removes it. Every directory on the way that is not
/// there is removed too. `run` runs a batch in the process.
pub fn rebuild_removed(pid: i32, state: &State, run: &dyn Fn(&Batch) -> Result<Results>) -> Result<()> {
    let Some(removed) = &state.removed else { return Ok(()) };
    let mut paths: Vec<String> = state
        .cwd
        .match_indices('/')
        .skip(1)
        .map(|(at, _)| state.cwd[..at].into())
        .collect();
    // The name may be in use again: the other one keeps it.
    paths.extend([state.cwd.clone(), format!("{}.{pid}-removed", state.cwd)]);
    let mut batch = Batch::new();
    let mkdir = |path: &String| {
        let name = batch.string(path);
        batch.may(format!("mkdir of {path}"), libc::SYS_mkdir, [name.into(), 0o700.into()])
    };
    let calls: Vec<usize> = paths.iter().map(mkdir).collect();
    let results = run(&batch)?;
    let made: Vec<&String> = paths
        .iter()
        .zip(&calls)
        .filter(|(_, c)| results.raw(**c) == 0)
        .map(|(p, _)| p)
        .collect();
    let is_made = |path: &&String| made.contains(path);
    let Some(cwd) = paths.iter().rev().take(2).rev().find(is_made) else {
        let why = "a working directory that was removed cannot be made there again";
        return Err(Error::unsupported(
            pid,
            state.cwd.clone(),
            why,
            "make its parent writable",
        ));
    };
    let mut batch = Batch::new();
    let name = batch.string(cwd);
    batch.must(format!("chdir to {cwd}"), libc::SYS_chdir, [name.into()]);
    let here = batch.string(".");
    batch.must(
        "chown",
        libc::SYS_chown,
        [here.into(), removed.uid.into(), removed.gid.into()],
    );
    batch.must("chmod", libc::SYS_chmod, [here.into(), (removed.mode & 0o7777).into()]);
    for path in made.iter().rev() {
        let name = batch.string(path);
        batch.must(format!("rmdir of {path}"), libc::SYS_rmdir, [name.into()]);
    }
    run(&batch).map(drop)
}

/// Sets all three.
pub fn rebuild(batch: &mut Batch, state: &State) {
    if state.removed.is_none() {
        let cwd = batch.string(&state.cwd);
        batch.must(format!("chdir to {}", state.cwd), libc::SYS_chdir, [cwd.into()]);
    }
    if state.root != "/" {
        let root = batch.string(&state.root);
        batch.must(format!("chroot to {}", state.root), libc::SYS_chroot, [root.into()]);
    }
    batch.must("umask", libc::SYS_umask, [state.umask.into()]);
}
