//! timerfd(2): when it expires next, and how often it has since it was last read.
//!
//! A timer belongs to no time namespace, only the calls that set it do: so it is made by us, and an absolute time
//! is told in our own clock.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_sys::event;
use torpor_sys::proc::{self, FdInfo};

use crate::bounds::{Bounds, CAP_WAKE_ALARM};
use crate::error::{About, Error, Result};

const REALTIME_ALARM: i32 = 8;
const BOOTTIME_ALARM: i32 = 9;
/// Nanoseconds that a time of day may be wrong by, and how often that is tried.
const DUE_WITHIN: u64 = 50_000;
const DUE_TRIES: u32 = 20;

/// A timer. Times are in nanoseconds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// CLOCK_* that it follows.
    pub clock: i32,
    /// Expirations that the next read(2) tells.
    pub ticks: u64,
    /// TFD_TIMER_* that it was set with.
    pub settime: i32,
    /// Time until it expires; 0 when it does not.
    pub left: u64,
    /// Time between expirations; 0 for a single one.
    pub interval: u64,
    /// The time of day of its next expiration, when it was set to one.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due: Option<u64>,
}

/// `(4, 202172274)`: seconds and nanoseconds.
fn time(text: &str) -> Option<u64> {
    let (seconds, nanoseconds) = text.strip_prefix('(')?.strip_suffix(')')?.split_once(", ")?;
    let seconds: u64 = seconds.parse().ok()?;
    seconds
        .checked_mul(1_000_000_000)?
        .checked_add(nanoseconds.parse().ok()?)
}

fn parse(info: &FdInfo) -> Option<State> {
    Some(State {
        clock: info.get("clockid")?.parse().ok()?,
        ticks: info.get("ticks")?.parse().ok()?,
        settime: i32::from_str_radix(info.get("settime flags")?, 8).ok()?,
        left: time(info.get("it_value")?)?,
        interval: time(info.get("it_interval")?)?,
        due: None,
    })
}

impl State {
    /// Follows the time of day, and was set to one.
    fn is_dated(&self) -> bool {
        [libc::CLOCK_REALTIME, REALTIME_ALARM].contains(&self.clock) && self.settime & libc::TFD_TIMER_ABSTIME != 0
    }

    /// The same clock without the power to wake the machine, which can always be read.
    fn readable_clock(&self) -> i32 {
        match self.clock {
            REALTIME_ALARM => libc::CLOCK_REALTIME,
            BOOTTIME_ALARM => libc::CLOCK_BOOTTIME,
            clock => clock,
        }
    }
}

/// # Errors
/// Refused: a timer that has been cancelled by a change of the clock, which the program has not been told yet.
pub fn collect(pid: i32, number: i32, info: &FdInfo, fd: &OwnedFd) -> Result<State> {
    let object = || format!("fd {number} (timerfd)");
    let unknown = || Error::unsupported(pid, object(), "its fdinfo has an unknown form", "");
    let mut state = parse(info).ok_or_else(unknown)?;
    if state.left == 0 && state.interval > 0 && state.ticks > 0 {
        // The kernel counts on only when it is asked.
        event::timer_left(fd).about(pid, object())?;
        state = parse(&proc::fdinfo(pid, number).about(pid, object())?).ok_or_else(unknown)?;
    }
    if state.settime & libc::TFD_TIMER_CANCEL_ON_SET != 0 && state.interval == 0 && state.left > 0 && state.ticks > 0 {
        let why = "the clock was set, and the program has not read that yet (ECANCELED)";
        return Err(Error::unsupported(pid, object(), why, "try again"));
    }
    if state.is_dated() && state.left > 0 {
        state.due = Some(due(fd).about(pid, object())?);
    }
    Ok(state)
}

/// The time of day that a running timer expires at. The kernel only tells how long that is from now, so now must be known: it is what the
/// clock said before, if not much had passed after. On a busy machine that takes more than one try.
fn due(fd: &OwnedFd) -> torpor_sys::Result<u64> {
    let mut best = (u64::MAX, 0);
    for _ in 0..DUE_TRIES {
        let before = event::now(libc::CLOCK_REALTIME)?;
        let (left, _) = event::timer_left(fd)?;
        let took = event::now(libc::CLOCK_REALTIME)?.saturating_sub(before);
        best = best.min((took, before.saturating_add(left)));
        if took < DUE_WITHIN {
            break;
        }
    }
    Ok(best.1)
}

/// # Errors
/// Refused: a timer that could wake the machine, in a container that may not.
pub fn plan(state: &State, bounds: &Bounds) -> Result<()> {
    let wakes = [REALTIME_ALARM, BOOTTIME_ALARM].contains(&state.clock);
    if wakes && !bounds.grants(CAP_WAKE_ALARM) {
        let why = "it can wake the machine, which needs CAP_WAKE_ALARM that the container does not grant";
        return Err(Error::refused(1, "timerfd", why));
    }
    Ok(())
}

/// A timer that does not run yet.
pub fn rebuild(state: &State) -> Result<OwnedFd> {
    event::timer(state.clock).about(1, "timerfd")
}

/// Starts it with the time that was left. One that was set to a time of day expires at that time, or at once.
pub fn arm(state: &State, fd: &OwnedFd) -> Result<()> {
    let value = match state.left {
        0 => 0,
        left if state.settime & libc::TFD_TIMER_ABSTIME == 0 => left,
        left => {
            let now = event::now(state.readable_clock()).about(1, "timerfd")?;
            state.due.unwrap_or_else(|| now.saturating_add(left)).max(1)
        }
    };
    event::set_timer(fd, state.settime, value, state.interval).about(1, "timerfd")?;
    if state.ticks > 0 {
        event::set_timer_ticks(fd, state.ticks).about(1, "timerfd")?;
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn waking_the_machine_needs_the_power_to() {
        let state = State {
            clock: BOOTTIME_ALARM,
            ticks: 0,
            settime: 0,
            left: 0,
            interval: 0,
            due: None,
        };
        let bounds = |sets: &str| {
            let spec = serde_json::json!({"process": {"capabilities": {"bounding": [sets]}}});
            Bounds::of(&spec)
        };
        assert!(plan(&state, &bounds("CAP_KILL")).is_err());
        assert!(plan(&state, &bounds("CAP_WAKE_ALARM")).is_ok());
    }

    #[test]
    fn fdinfo_is_understood() {
        let text = "pos:\t0\nflags:\t02\nmnt_id:\t17\nino:\t18\nclockid: 1\nticks: 2\nsettime flags: 03\n\
                    it_value: (4, 202172274)\nit_interval: (1, 0)\n";
        let state = parse(&proc::parse_fdinfo(text).unwrap()).unwrap();
        let expected = State {
            clock: 1,
            ticks: 2,
            settime: 3,
            left: 4_202_172_274,
            interval: 1_000_000_000,
            due: None,
        };
        assert_eq!(state, expected);
    }
}
