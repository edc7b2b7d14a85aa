//! signalfd(2): which signals can be read. The signals themselves are pending for tasks, not for the descriptor.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_sys::event;
use torpor_sys::proc::FdInfo;

use crate::error::{About, Error, Result};

/// A descriptor for signals.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Bit n - 1 for signal n.
    pub mask: u64,
}

/// From fdinfo: "sigmask" in hexadecimal (proc(5)).
pub fn collect(pid: i32, number: i32, info: &FdInfo) -> Result<State> {
    let mask = info.get("sigmask").and_then(|v| u64::from_str_radix(v, 16).ok());
    let unknown = || Error::unsupported(pid, format!("fd {number} (signalfd)"), "its mask cannot be read", "");
    Ok(State {
        mask: mask.ok_or_else(unknown)?,
    })
}

/// One for the same signals. Whoever reads it gets its own.
pub fn rebuild(state: &State) -> Result<OwnedFd> {
    event::signals(state.mask).about(1, "signalfd")
}
