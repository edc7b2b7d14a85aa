//! Who sleeps until when: /proc/timer_list, which tells of every timer but not whose it is.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::time::Instant;

use crate::error::{Error, Result};

const FILE: &str = "/proc/timer_list";

/// The times at which sleeping tasks of the whole machine will be woken, in nanoseconds of the machine's
/// CLOCK_MONOTONIC.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Sleepers {
    /// When this was read.
    pub now: i64,
    /// Their times. Two of the same nanosecond are one.
    pub times: BTreeSet<i64>,
}

/// Reads /proc/timer_list (kernel/time/timer_list.c), which the kernel makes CPU by CPU: a machine with many of them and
/// many timers may need longer than there is time for.
///
/// # Errors
/// ETIME when it is not read by `end`.
pub fn read(end: Instant) -> Result<Sleepers> {
    let failed = |call, errno| Error::Call {
        call,
        object: FILE.into(),
        errno,
    };
    let mut file = File::open(FILE).map_err(|e| Error::io("open", FILE, &e))?;
    let mut text = Vec::new();
    let mut part = [0; 16 * 1024];
    loop {
        if Instant::now() > end {
            return Err(failed("read", nix::errno::Errno::ETIME));
        }
        match file.read(&mut part).map_err(|e| Error::io("read", FILE, &e))? {
            0 => break,
            n => text.extend_from_slice(&part[..n]),
        }
    }
    let text = String::from_utf8_lossy(&text);
    parse(&text).ok_or_else(|| failed("parse", nix::errno::Errno::EINVAL))
}

fn first_number(text: &str) -> Option<i64> {
    text.split_whitespace().next()?.parse().ok()
}

/// A timer takes two lines: `#0: <address>, function, S:01` and `# expires at SOFT-HARD nsecs [...]`. The clocks before
/// them have lines `.offset: N nsecs`: how far they are ahead of CLOCK_MONOTONIC.
fn parse(text: &str) -> Option<Sleepers> {
    let mut found = Sleepers::default();
    let mut known = false;
    let (mut offset, mut wakes) = (0, false);
    for line in text.lines().map(str::trim_start) {
        if let Some(rest) = line.strip_prefix("now at ") {
            found.now = first_number(rest)?;
            known = true;
        } else if let Some(rest) = line.strip_prefix(".offset:") {
            offset = first_number(rest)?;
        } else if let Some(rest) = line.strip_prefix("# expires at ") {
            let time: i64 = rest.split('-').next()?.parse().ok()?;
            if wakes {
                found.times.insert(time.checked_sub(offset)?);
            }
        } else if line.starts_with('#') {
            wakes = line.contains(" hrtimer_wakeup,");
        }
    }
    known.then_some(found)
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn sleepers_of_all_clocks() {
        let text = "Timer List Version: v0.10\nHRTIMER_MAX_CLOCK_BASES: 8\nnow at 1000 nsecs\n\ncpu: 0\n clock 0:\n\
                    \x20 .offset:     0 nsecs\nactive timers:\n #0: <0000000000000001>, tick_nohz_handler, S:01\n\
                    \x20# expires at 1100-1100 nsecs [in 100 to 100 nsecs]\n #1: <0000000000000002>, hrtimer_wakeup, S:01\n\
                    \x20# expires at 2000-52000 nsecs [in 1000 to 51000 nsecs]\n clock 1:\n  .offset:     70 nsecs\n\
                    active timers:\n #0: <0000000000000003>, hrtimer_wakeup, S:01\n\
                    \x20# expires at 3070-3070 nsecs [in 2070 to 2070 nsecs]\n";
        let found = parse(text).unwrap();
        assert_eq!((found.now, found.times), (1000, BTreeSet::from([2000, 3000])));
        assert_eq!(parse("nothing"), None);
    }

    #[test]
    fn reading_ends_when_the_time_is_over() {
        let past = Instant::now() - std::time::Duration::from_millis(1);
        assert!(read(past).is_err());
    }

    #[test]
    fn a_sleep_of_ours_is_listed() {
        let soon = || Instant::now() + std::time::Duration::from_secs(10);
        let Ok(before) = read(soon()) else { return };
        let sleeper = std::thread::spawn(|| std::thread::sleep(std::time::Duration::from_millis(400)));
        std::thread::sleep(std::time::Duration::from_millis(100));
        let during = read(soon()).unwrap();
        let new = |t: &&i64| !before.times.contains(t) && (0..=400_000_000).contains(&(**t - during.now));
        assert!(during.times.iter().any(|t| new(&t)), "{before:?} {during:?}");
        sleeper.join().unwrap();
    }
}
