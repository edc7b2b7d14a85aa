//! Time namespaces (time_namespaces(7)): how far the clocks that count from the machine's start are set off.

use std::os::fd::OwnedFd;

use crate::error::{Error, Result};
use crate::{Pid, event, fd};

const SECOND: i64 = 1_000_000_000;

/// Offsets from the machine's own clocks, in nanoseconds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Offsets {
    /// Of CLOCK_MONOTONIC, CLOCK_MONOTONIC_RAW, CLOCK_MONOTONIC_COARSE.
    pub monotonic: i64,
    /// Of CLOCK_BOOTTIME and CLOCK_BOOTTIME_ALARM.
    pub boottime: i64,
}

fn path(pid: Pid) -> String {
    format!("/proc/{pid}/timens_offsets")
}

/// Parses /proc/PID/timens_offsets: lines of a clock, seconds (signed), and nanoseconds.
pub fn parse(text: &str) -> Option<Offsets> {
    let of = |clock: &str| {
        let mut words = text.lines().find_map(|l| l.strip_prefix(clock))?.split_whitespace();
        let seconds: i64 = words.next()?.parse().ok()?;
        let nanoseconds: i64 = words.next()?.parse().ok()?;
        seconds.checked_mul(SECOND)?.checked_add(nanoseconds)
    };
    Some(Offsets {
        monotonic: of("monotonic")?,
        boottime: of("boottime")?,
    })
}

/// The offsets of the time namespace that children of the process are born in. A kernel without time namespaces
/// sets nothing off.
pub fn offsets(pid: Pid) -> Result<Offsets> {
    let path = path(pid);
    match std::fs::read_to_string(&path) {
        Ok(text) => parse(&text).ok_or_else(|| Error::Unsuitable {
            pid,
            why: format!("{path} has an unknown form"),
        }),
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => Ok(Offsets::default()),
        Err(e) => Err(Error::io("read", path, &e)),
    }
}

/// Sets the offsets of the namespace that children of the process will be born in, which nobody may have entered yet.
pub fn set_offsets(pid: Pid, offsets: Offsets) -> Result<()> {
    let line = |clock: &str, offset: i64| {
        let (seconds, nanoseconds) = (offset.div_euclid(SECOND), offset.rem_euclid(SECOND));
        format!("{clock} {seconds} {nanoseconds}\n")
    };
    let text = line("monotonic", offsets.monotonic) + &line("boottime", offsets.boottime);
    let path = path(pid);
    std::fs::write(&path, text).map_err(|e| Error::io("write", path, &e))
}

/// The namespace that children of the process will be born in, for setns(2).
pub fn of_children(pid: Pid) -> Result<OwnedFd> {
    fd::open(&format!("/proc/{pid}/ns/time_for_children"), libc::O_RDONLY)
}

/// What the machine's own clocks show, in whatever time namespace we are.
pub fn machine_clocks() -> Result<(i64, i64)> {
    let own = offsets(std::process::id() as Pid)?;
    let now = |clock| event::now(clock).map(|t| t as i64);
    Ok((
        now(libc::CLOCK_MONOTONIC)? - own.monotonic,
        now(libc::CLOCK_BOOTTIME)? - own.boottime,
    ))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn offsets_are_signed() {
        let text = "monotonic          -3 250000000\nboottime            7         9\n";
        let expected = Offsets {
            monotonic: -2_750_000_000,
            boottime: 7_000_000_009,
        };
        assert_eq!(parse(text), Some(expected));
        assert_eq!(parse("monotonic 1"), None);
    }

    #[test]
    fn the_machine_runs() {
        let (monotonic, boottime) = machine_clocks().unwrap();
        assert!(monotonic > 0 && boottime >= monotonic);
    }
}
