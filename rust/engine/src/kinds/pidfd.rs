//! Descriptors of processes (pidfd_open(2)).

use serde::{Deserialize, Serialize};
use torpor_sys::Pid;
use torpor_sys::proc::FdInfo;

use super::tasks::Tasks;
use crate::error::{Error, Result};

/// What a descriptor says it is of.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// The container's id of the process or thread.
    pub pid: i32,
    /// PIDFD_THREAD: it is of a thread. The kernel keeps that as O_EXCL.
    #[serde(default)]
    pub thread: bool,
}

/// # Errors
/// Refused: one of a process that is gone, or that is not saved.
pub fn collect(holder: Pid, number: i32, info: &FdInfo, tasks: &Tasks) -> Result<State> {
    let refuse = |why: &str| {
        let object = format!("fd {number} (pidfd)");
        Err(Error::unsupported(
            holder,
            object,
            why,
            "close it before the checkpoint",
        ))
    };
    let Some(pid) = info.get("Pid").and_then(|v| v.parse::<Pid>().ok()) else {
        return refuse("its process cannot be read");
    };
    if pid == -1 {
        return refuse("its process has ended and was waited for");
    }
    match tasks.inner(pid) {
        Some(pid) => Ok(State {
            pid,
            thread: info.flags & libc::O_EXCL != 0,
        }),
        None => refuse("its process is not one of the container that are saved"),
    }
}

/// The arguments of pidfd_open(2) inside the container.
pub fn arguments(state: &State) -> (i32, i32) {
    (state.pid, if state.thread { libc::O_EXCL } else { 0 })
}
