//! Who a listening unix socket says it is of. SO_PEERCRED of a client shows whoever called listen(2): so that call
//! is made once more, by the process that made it, as the user that it is by then.

use serde::{Deserialize, Serialize};
use torpor_sys::remote::Batch;
use torpor_sys::{Pid, lock, proc};

use std::os::fd::OwnedFd;

use crate::error::{About, Result};

/// The process that listens.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Its id.
    pub pid: i32,
    /// The number at which it has the socket.
    pub fd: i32,
    /// How many may wait.
    pub backlog: u32,
}

/// `holders` are all who have the socket, in our numbering: the one that made the call if it is still among them,
/// else one that is the same user. The text says what will differ.
pub fn collect(
    socket: &OwnedFd,
    backlog: u32,
    holders: &[(Pid, i32)],
    inner: impl Fn(Pid) -> Option<i32>,
) -> Result<(Option<State>, Option<String>)> {
    let Some(&(first, number)) = holders.first() else {
        return Ok((None, None));
    };
    let (pid, uid, gid) = lock::listener(socket).about(first, format!("fd {number}"))?;
    let is_user = |holder: Pid| proc::status(holder).is_ok_and(|s| (s.uids[1], s.gids[1]) == (uid, gid));
    let caller = holders.iter().find(|(holder, _)| *holder == pid);
    let chosen = caller.or_else(|| holders.iter().find(|h| is_user(h.0)));
    let &(holder, fd) = chosen.unwrap_or(&(first, number));
    let differs = if caller.is_none() {
        Some("the process that called listen(2) has it no more: clients see another one (SO_PEERCRED)")
    } else if !is_user(holder) {
        Some("the process that called listen(2) is another user now: clients see that one (SO_PEERCRED)")
    } else {
        None
    };
    let state = inner(holder).map(|pid| State { pid, fd, backlog });
    Ok((state, differs.map(|d| format!("process {holder}: fd {fd}: {d}"))))
}

/// The call, in the process that holds the socket.
pub fn rebuild(batch: &mut Batch, state: &State) {
    let args = [state.fd.into(), state.backlog.into()];
    batch.must(format!("listen on fd {}", state.fd), libc::SYS_listen, args);
}
