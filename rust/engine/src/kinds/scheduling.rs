//! How a thread gets its share of processors and disks (sched(7), ioprio_set(2)). All of it can be seen from outside.

use serde::{Deserialize, Serialize};
use torpor_sys::proc::Limits;
use torpor_sys::remote::Batch;
use torpor_sys::sched::{self, Attributes};
use torpor_sys::{Pid, Result};

const SCHED_OTHER: u32 = 0;
const SCHED_FIFO: u32 = 1;
const SCHED_RR: u32 = 2;
const SCHED_DEADLINE: u32 = 6;
/// SCHED_FLAG_RESET_ON_FORK, SCHED_FLAG_RECLAIM, SCHED_FLAG_DL_OVERRUN.
const KEPT_FLAGS: u64 = 1 | 2 | 4;
/// SCHED_FLAG_UTIL_CLAMP_MIN and _MAX.
const CLAMPS: u64 = 0x20 | 0x40;
const CLASS_SHIFT: i32 = 13;
const CLASS_REAL_TIME: i32 = 1;

/// The scheduling of a thread.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Nice value.
    pub nice: i32,
    /// Policy and real-time priority.
    pub scheduling: (i32, i32),
    /// SCHED_FLAG_*, as far as they are settings.
    #[serde(default, skip_serializing_if = "is_none")]
    pub scheduling_flags: u64,
    /// Runtime, deadline and period of SCHED_DEADLINE, in nanoseconds; a runtime alone is the slice of another policy
    /// where it is not the machine's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub deadline: Option<[u64; 3]>,
    /// Least and most utilisation, in parts of 1024, where they are not the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub clamps: Option<[u32; 2]>,
    /// I/O priority, 0 when none was set.
    #[serde(default, skip_serializing_if = "is_default")]
    pub io_priority: i32,
    /// CPUs the thread may run on, as a mask.
    pub affinity: Vec<u64>,
}

fn is_none(flags: &u64) -> bool {
    *flags == 0
}

fn is_default(priority: &i32) -> bool {
    *priority == 0
}

fn is_real_time(policy: u32) -> bool {
    policy == SCHED_FIFO || policy == SCHED_RR
}

/// The scheduling of a thread.
pub fn collect(tid: Pid) -> Result<State> {
    let found = sched::attributes(tid)?;
    let deadline = match found.policy {
        SCHED_DEADLINE => Some([found.runtime, found.deadline, found.period]),
        // Our own slice is the machine's.
        _ if found.runtime != sched::attributes(0)?.runtime => Some([found.runtime, 0, 0]),
        _ => None,
    };
    let clamps = [found.util_min, found.util_max];
    // Machines without the feature tell zeroes; a real-time task has all of a processor by default.
    let usual = [[0, 0], [if is_real_time(found.policy) { 1024 } else { 0 }, 1024]];
    Ok(State {
        nice: found.nice,
        scheduling: (found.policy as i32, found.priority as i32),
        scheduling_flags: found.flags & KEPT_FLAGS,
        deadline: deadline.filter(|d| d[0] != 0),
        clamps: (!usual.contains(&clamps)).then_some(clamps),
        io_priority: sched::io_priority(tid)?,
        affinity: sched::affinity(tid)?,
    })
}

/// What the new container's init has: nobody gets ahead of it without CAP_SYS_NICE.
#[derive(Debug)]
pub struct Most {
    nice: i32,
    real_time: u32,
    may_all: bool,
}

impl Most {
    /// What processes below `init` may ask for, under its limits (setrlimit(2), RLIMIT_NICE and RLIMIT_RTPRIO).
    pub fn of(init: Pid, limits: &Limits, may_all: bool) -> Result<Most> {
        let allowed = |limit: i32| limits[limit as usize].1.min(100) as i32;
        Ok(Most {
            nice: sched::attributes(init)?
                .nice
                .min(20 - allowed(libc::RLIMIT_NICE as i32).min(40)),
            real_time: allowed(libc::RLIMIT_RTPRIO as i32) as u32,
            may_all,
        })
    }

    /// The smallest nice value.
    pub fn least_nice(&self) -> i32 {
        if self.may_all { i32::MIN } else { self.nice }
    }

    /// Lowers what is more than that; says what was lowered.
    pub fn lower(&self, tid: i32, state: &mut State) -> Option<String> {
        if self.may_all {
            return None;
        }
        let before = state.clone();
        let (policy, priority) = state.scheduling;
        let ahead = match policy as u32 {
            SCHED_DEADLINE => true,
            policy if is_real_time(policy) => priority as u32 > self.real_time,
            _ => false,
        };
        if ahead {
            state.scheduling = (SCHED_OTHER as i32, 0);
            state.deadline = None;
            state.clamps = None;
        }
        state.nice = state.nice.max(self.nice);
        if state.io_priority >> CLASS_SHIFT == CLASS_REAL_TIME {
            state.io_priority = 0;
        }
        (*state != before).then(|| {
            format!("thread {tid}: its scheduling was ahead of what the container grants without CAP_SYS_NICE, and is not any more")
        })
    }
}

/// Sets it, in the thread itself.
pub fn rebuild(batch: &mut Batch, state: &State) {
    let bytes: Vec<u8> = state.affinity.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mask = batch.data(&bytes);
    // Another machine may have other CPUs: then the thread may run where its cgroup lets it.
    let args = [0.into(), bytes.len().into(), mask.into()];
    batch.may("sched_setaffinity", libc::SYS_sched_setaffinity, args);
    // A real-time thread has a nice value too, for the time after.
    let args = [0.into(), 0.into(), state.nice.into()];
    batch.must("setpriority", libc::SYS_setpriority, args);
    attributes(batch, state);
    if state.io_priority != 0 {
        const IOPRIO_WHO_PROCESS: i32 = 1;
        let args = [IOPRIO_WHO_PROCESS.into(), 0.into(), state.io_priority.into()];
        batch.must("ioprio_set", libc::SYS_ioprio_set, args);
    }
}

fn attributes(batch: &mut Batch, state: &State) {
    let [runtime, deadline, period] = state.deadline.unwrap_or_default();
    let [util_min, util_max] = state.clamps.unwrap_or_default();
    let wanted = Attributes {
        policy: state.scheduling.0 as u32,
        priority: state.scheduling.1 as u32,
        flags: state.scheduling_flags | if state.clamps.is_some() { CLAMPS } else { 0 },
        nice: state.nice,
        runtime,
        deadline,
        period,
        util_min,
        util_max,
        ..Attributes::default()
    };
    let plain = Attributes {
        nice: state.nice,
        ..Attributes::default()
    };
    if wanted != plain {
        let data = batch.data(&wanted.bytes());
        let what = format!("sched_setattr of policy {}", wanted.policy);
        batch.must(what, libc::SYS_sched_setattr, [0.into(), data.into(), 0.into()]);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn state() -> State {
        State {
            nice: -5,
            scheduling: (SCHED_FIFO as i32, 20),
            scheduling_flags: 0,
            deadline: None,
            clamps: None,
            io_priority: CLASS_REAL_TIME << CLASS_SHIFT,
            affinity: vec![1],
        }
    }

    #[test]
    fn nobody_gets_ahead_of_what_is_granted() {
        let most = |may_all| Most {
            nice: 0,
            real_time: 10,
            may_all,
        };
        let mut same = state();
        assert_eq!((most(true).lower(7, &mut same), same), (None, state()));
        let mut lowered = state();
        assert!(
            most(false)
                .lower(7, &mut lowered)
                .is_some_and(|w| w.contains("thread 7"))
        );
        assert_eq!((lowered.nice, lowered.scheduling, lowered.io_priority), (0, (0, 0), 0));
        assert_eq!(most(false).lower(7, &mut lowered), None);
    }

    #[test]
    fn real_time_within_the_limit_stays() {
        let mut within = State {
            nice: 3,
            scheduling: (SCHED_RR as i32, 10),
            io_priority: 0,
            ..state()
        };
        assert_eq!(
            Most {
                nice: 0,
                real_time: 10,
                may_all: false
            }
            .lower(7, &mut within),
            None
        );
    }
}
