//! Threads that catch their own system calls (prctl(2), PR_SET_SYSCALL_USER_DISPATCH).
//!
//! A call that is made for a checkpoint must not be one that the thread catches. While its selector says "allow" none
//! is; where it says "block" the code of a visit sets it to "allow" and back by itself. All threads stand still
//! then, so nobody sees that; a twin of the process would, so its memory is copied in the pause.

use serde::{Deserialize, Serialize};
use torpor_sys::Pid;
use torpor_sys::proc::Vma;
use torpor_sys::ptrace::{self, Dispatch};

use crate::error::{About, Error, Result};

/// How the calls of a thread are caught.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Address of the byte that says whether they are.
    pub selector: u64,
    /// Where they are not, in any case.
    pub offset: u64,
    /// How many bytes of it.
    pub len: u64,
}

/// # Errors
/// Refused: what cannot be let through for a moment by the selector.
pub fn collect(tid: Pid, vmas: &[Vma]) -> Result<Option<State>> {
    let Some(Dispatch { selector, offset, len }) = ptrace::dispatch(tid).about(tid, "syscall user dispatch")? else {
        return Ok(None);
    };
    let refuse = |why: &str| {
        let remedy = "switch it off before the checkpoint";
        Err(Error::unsupported(tid, "syscall user dispatch", why, remedy))
    };
    let area = vmas.iter().find(|v| v.start <= selector && selector < v.end);
    if selector == 0 {
        return refuse("without a selector, a call made for the checkpoint would be one that it catches");
    }
    let both = libc::PROT_READ | libc::PROT_WRITE;
    if area.is_none_or(|v| v.prot() & both != both || v.key != 0) {
        return refuse("its selector cannot be written by the program itself");
    }
    Ok(Some(State { selector, offset, len }))
}

/// Switches it on: no more calls are made in the thread from here on.
pub fn rebuild(tid: Pid, state: &State) -> Result<()> {
    let &State { selector, offset, len } = state;
    let dispatch = Some(Dispatch { selector, offset, len });
    ptrace::set_dispatch(tid, dispatch).about(tid, "syscall user dispatch")
}
