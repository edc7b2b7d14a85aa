//! eventfd(2) counters.

use std::io::Write;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_sys::fd;
use torpor_sys::proc::FdInfo;

use crate::error::{About, Error, Result};

/// A counter.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Its value.
    pub count: u64,
    /// EFD_SEMAPHORE; the kernel tells since 6.5.
    pub semaphore: bool,
}

/// From fdinfo: "eventfd-count" in hexadecimal (proc(5)).
pub fn collect(pid: i32, number: i32, info: &FdInfo) -> Result<State> {
    let count = info.get("eventfd-count").and_then(|v| u64::from_str_radix(v, 16).ok());
    let count = count.ok_or_else(|| Error::unsupported(pid, format!("fd {number}"), "its count cannot be read", ""))?;
    let semaphore = info.get("eventfd-semaphore").is_some_and(|v| v == "1");
    Ok(State { count, semaphore })
}

/// A new counter with the same value.
pub fn rebuild(state: &State) -> Result<OwnedFd> {
    let flags = if state.semaphore { libc::EFD_SEMAPHORE } else { 0 };
    let fd = fd::eventfd(0, flags).about(1, "eventfd")?;
    if state.count > 0 {
        let file = fd
            .try_clone()
            .map_err(|e| torpor_sys::Error::io("dup", "eventfd", &e))
            .about(1, "eventfd")?;
        std::fs::File::from(file)
            .write_all(&state.count.to_le_bytes())
            .map_err(|e| torpor_sys::Error::io("write", "eventfd", &e))
            .about(1, "eventfd")?;
    }
    Ok(fd)
}
