//! CLOCK_MONOTONIC and CLOCK_BOOTTIME, which go on from what they showed: in a time namespace of the restored container
//! (time_namespaces(7)). CLOCK_REALTIME is the machine's.
//!
//! Where the kernel has no such namespaces, or we may not set clocks, they go on as the machine's do.

use serde::{Deserialize, Serialize};
use torpor_sys::Pid;
use torpor_sys::timens::{self, Offsets};

use crate::error::{About, Error, Result};

/// What the clocks showed when the container was stopped, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// CLOCK_MONOTONIC.
    pub monotonic: i64,
    /// CLOCK_BOOTTIME.
    pub boottime: i64,
}

/// Reads the clocks of the stopped container whose init is `init`.
pub fn collect(init: Pid) -> Result<State> {
    let offsets = timens::offsets(init).about(init, "clocks")?;
    let (monotonic, boottime) = timens::machine_clocks().about(init, "clocks")?;
    Ok(State {
        monotonic: monotonic + offsets.monotonic,
        boottime: boottime + offsets.boottime,
    })
}

/// # Errors
/// Damaged: clocks that no kernel shows.
pub fn plan(state: &State) -> Result<()> {
    // KTIME_SEC_MAX / 2, the kernel's own limit (kernel/time/namespace.c).
    const MAX: i64 = i64::MAX / 2;
    let possible = 0..MAX;
    if possible.contains(&state.monotonic) && possible.contains(&state.boottime) {
        return Ok(());
    }
    Err(Error::nonsense("its clocks show a time that cannot be"))
}

/// Lets the clocks go on in a namespace that `pid` has made and nobody has entered.
pub fn rebuild(pid: Pid, state: &State) -> Result<()> {
    let (monotonic, boottime) = timens::machine_clocks().about(pid, "clocks")?;
    let offsets = Offsets {
        monotonic: state.monotonic - monotonic,
        boottime: state.boottime - boottime,
    };
    timens::set_offsets(pid, offsets).about(pid, "clocks")
}
