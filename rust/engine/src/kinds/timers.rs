//! Interval timers (setitimer(2)).

use serde::{Deserialize, Serialize};
use torpor_sys::remote::{Batch, Data, Results};

/// `struct itimerval`: interval s, µs, value s, µs.
type Timer = [u64; 4];

/// ITIMER_REAL, ITIMER_VIRTUAL, ITIMER_PROF with the time that was left.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// By ITIMER_* number.
    pub interval: [Timer; 3],
}

/// Asks for all three.
pub fn ask(batch: &mut Batch) -> [Data; 3] {
    [0, 1, 2].map(|which: i32| {
        let room = batch.room(32);
        batch.must("getitimer", libc::SYS_getitimer, [which.into(), room.into()]);
        room
    })
}

/// The timers.
pub fn answer(asked: [Data; 3], results: &Results) -> State {
    State {
        interval: asked.map(|room| [0, 8, 16, 24].map(|at| results.u64(room.skip(at)))),
    }
}

/// Arms the timers: one of the last things, so that none fires in a half built process.
///
/// A periodic timer whose signal is still pending shows no time left: the kernel arms it again when the signal is
/// taken (kernel/signal.c, dequeue_signal), which it does not do for a signal that was queued by hand.
pub fn rebuild(batch: &mut Batch, state: &State) {
    for (which, timer) in state.interval.iter().enumerate().filter(|(_, t)| **t != [0; 4]) {
        let [interval_s, interval_us, s, us] = *timer;
        let timer = if (s, us) == (0, 0) {
            [interval_s, interval_us, interval_s, interval_us]
        } else {
            *timer
        };
        let bytes: Vec<u8> = timer.iter().flat_map(|w| w.to_le_bytes()).collect();
        let value = batch.data(&bytes);
        batch.must("setitimer", libc::SYS_setitimer, [which.into(), value.into(), 0.into()]);
    }
}
