//! Who is told by a signal that a description is ready: F_SETOWN, F_SETSIG and O_ASYNC of fcntl(2). The kernel
//! keeps as whom that was asked for, to decide who may be signalled: so it is asked inside a process that holds the
//! description, after its credentials are set.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_sys::remote::Batch;
use torpor_sys::{Pid, fd, lock, proc};

use super::tasks::Tasks;
use crate::error::{About, Error, Result};

const F_SETSIG: i32 = 10;
const F_GETSIG: i32 = 11;
const F_SETOWN_EX: i32 = 15;
const F_OWNER_PGRP: i32 = 2;

/// An owner.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// F_OWNER_TID, F_OWNER_PID or F_OWNER_PGRP.
    pub kind: i32,
    /// The thread, process or group; 0 for none.
    pub id: i32,
    /// The signal; 0 for SIGIO.
    pub signal: i32,
    /// The process that sets it.
    pub holder: i32,
    /// The number at which that has the description.
    pub fd: i32,
}

/// The owner of a description, if it has one, and in words what will differ. `holders` are all who have it.
///
/// # Errors
/// Refused: an owner that is not saved.
pub fn collect(
    description: &OwnedFd,
    flags: i32,
    holders: &[(Pid, i32)],
    tasks: &Tasks,
) -> Result<(Option<State>, Option<String>)> {
    let Some(&(first, number)) = holders.first().filter(|_| flags & libc::O_PATH == 0) else {
        return Ok((None, None));
    };
    let object = || format!("fd {number}");
    let (kind, owner) = lock::owner(description).about(first, object())?;
    let signal = fd::fcntl(description, F_GETSIG, 0).about(first, object())?;
    if owner == 0 && signal == 0 && flags & libc::O_ASYNC == 0 {
        return Ok((None, None));
    }
    let id = match (kind, owner) {
        (_, 0) => Some(0),
        (F_OWNER_PGRP, group) => tasks.inner_group(group),
        (_, pid) => tasks.inner(pid),
    };
    let Some(id) = id else {
        let why = format!("its owner (F_SETOWN) is {owner}, which is not one of the container that are saved");
        return Err(Error::unsupported(first, object(), why, "take the owner away"));
    };
    let uids = lock::owner_uids(description).about(first, object())?;
    let is_user = |holder: Pid| proc::status(holder).is_ok_and(|s| (s.uids[0], s.uids[1]) == uids);
    let same = holders.iter().find(|h| is_user(h.0));
    let differs = (same.is_none() && owner != 0).then(|| {
        format!("process {first}: fd {number}: its owner (F_SETOWN) was set by another user than any that has it now")
    });
    let &(holder, at) = same.unwrap_or(&(first, number));
    let state = tasks.inner(holder).map(|holder| State {
        kind,
        id,
        signal,
        holder,
        fd: at,
    });
    Ok((state, differs))
}

/// Sets it, in the process that [`State::holder`] says. `flags` are those of the description.
pub fn rebuild(batch: &mut Batch, state: &State, flags: i32) {
    let fd = state.fd;
    if state.id != 0 {
        let words = [state.kind.to_le_bytes(), state.id.to_le_bytes()].concat();
        let owner = batch.data(&words);
        let args = [fd.into(), F_SETOWN_EX.into(), owner.into()];
        batch.must(format!("F_SETOWN_EX of fd {fd}"), libc::SYS_fcntl, args);
    }
    if state.signal != 0 {
        let args = [fd.into(), F_SETSIG.into(), state.signal.into()];
        batch.must(format!("F_SETSIG of fd {fd}"), libc::SYS_fcntl, args);
    }
    if flags & libc::O_ASYNC != 0 {
        let args = [fd.into(), libc::F_SETFL.into(), flags.into()];
        batch.must(format!("O_ASYNC of fd {fd}"), libc::SYS_fcntl, args);
    }
}
