//! Waits that the kernel goes on with by restart_syscall(2): nanosleep(2), clock_nanosleep(2), poll(2) and futex(2) with
//! a relative time. Until when they wait is in the kernel only.
//!
//! At a checkpoint the thread is let back into its wait for a moment, and what appears in the kernel's list of timers is
//! its own. At a restore the thread makes the call with what was left and is stopped in it: the kernel then holds the
//! same end as before, and the thread's registers are untouched.

use std::collections::BTreeSet;
use std::time::{Duration, Instant};

use torpor_sys::Pid;
use torpor_sys::ptrace::{self, Regs};
use torpor_sys::remote::{Site, site};
use torpor_sys::sleepers::{self, Sleepers};
use torpor_sys::wait::{self, Event};

use crate::error::{About, Error, Result};
use crate::stage;

/// -ERESTART_RESTARTBLOCK, which only a tracer sees.
const RESTARTED: i64 = -516;
const RESTART_SYSCALL: u64 = 219;
const POLL: u64 = 7;
const NANOSLEEP: u64 = 35;
const FUTEX: u64 = 202;
const CLOCK_NANOSLEEP: u64 = 230;

const SECOND: u64 = 1_000_000_000;
const LIMIT: Duration = Duration::from_secs(10);
/// How often a thread is let in to be told apart from sleepers of the rest of the machine.
const ROUNDS: usize = 5;
/// How long the container may stand still for this.
const BUDGET: Duration = Duration::from_millis(200);

/// Such a wait.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait {
    /// The number of the call.
    pub call: u64,
    /// What was left, in nanoseconds; `None` when the call has no relative time or nobody can tell.
    pub left: Option<u64>,
}

/// True when the registers are those of such a wait that was interrupted.
pub fn is_interrupted(regs: &Regs) -> bool {
    regs.rax as i64 == RESTARTED && regs.orig_rax as i64 >= 0
}

/// Whether making the call again with its own arguments would wait too long.
fn is_relative(call: u64, regs: &Regs) -> bool {
    const TIMER_ABSTIME: u64 = 1;
    const FUTEX_COMMAND: u64 = 0x7f;
    match call {
        NANOSLEEP => true,
        CLOCK_NANOSLEEP => regs.rsi & TIMER_ABSTIME == 0,
        POLL => regs.rdx as i32 >= 0,
        // FUTEX_WAIT is 0; all others that wait take a point in time.
        FUTEX => regs.rsi & FUTEX_COMMAND == 0,
        _ => false,
    }
}

/// Finds out how long the waits of one container go on.
#[derive(Debug)]
pub struct Watch {
    last: Option<Sleepers>,
    budget: Duration,
    /// When the budget is used up, for the thread that is being looked at.
    end: Instant,
    /// Waits that nobody could tell the end of.
    unknown: usize,
}

impl Default for Watch {
    fn default() -> Watch {
        Watch {
            last: None,
            budget: BUDGET,
            end: Instant::now(),
            unknown: 0,
        }
    }
}

impl Watch {
    /// The wait that a stopped thread is in, if it is in one. The thread is let back into it for a moment; nothing else
    /// of it runs, since it would stop at the end of the call.
    pub fn look(&mut self, tid: Pid, regs: &Regs) -> Result<Option<Wait>> {
        if !is_interrupted(regs) {
            return Ok(None);
        }
        let known = Some(regs.orig_rax).filter(|nr| *nr != RESTART_SYSCALL);
        if let Some(call) = known.filter(|call| !is_relative(*call, regs)) {
            return Ok(Some(Wait { call, left: None }));
        }
        if let Some(call) = known.filter(|_| self.budget.is_zero()) {
            self.unknown += 1;
            return Ok(Some(Wait { call, left: None }));
        }
        let began = Instant::now();
        self.end = began + self.budget;
        let found = self.dip(tid, regs, known);
        self.budget = self.budget.saturating_sub(began.elapsed());
        found
    }

    fn dip(&mut self, tid: Pid, regs: &Regs, known: Option<u64>) -> Result<Option<Wait>> {
        let mut call = known;
        let mut ends: Option<BTreeSet<i64>> = None;
        let mut now = 0;
        for _ in 0..ROUNDS {
            let before = self.snapshot();
            let is_inside = enter(tid)?;
            stage::point("wait-inside")?;
            if is_inside {
                call = call.or(sleeping_call(tid, regs));
            }
            let during = self.snapshot_anew();
            if is_inside {
                step_back(tid)?;
            }
            stage::point("wait-left")?;
            if !is_interrupted(&ptrace::regs(tid).about(tid, "registers")?) {
                // It has come to its end meanwhile.
                return Ok(None);
            }
            let (Some(_), Some(before), Some(during)) = (call.filter(|c| is_relative(*c, regs)), before, during) else {
                break;
            };
            let after = self.snapshot_anew().unwrap_or_default();
            now = during.now;
            let own = |t: &&i64| !before.times.contains(t) && !after.times.contains(t);
            let new: BTreeSet<i64> = during.times.iter().filter(own).copied().collect();
            let both = ends.map_or(new.clone(), |old| old.intersection(&new).copied().collect());
            let is_clear = both.len() < 2;
            ends = Some(both);
            if is_clear {
                break;
            }
        }
        let call = call.ok_or_else(|| {
            let why = "it is in a call that was interrupted before and cannot be told";
            Error::unsupported(tid, "system call", why, "try again")
        })?;
        let only = ends.filter(|c| c.len() == 1).and_then(|c| c.first().copied());
        let left = only.map(|end| u64::try_from(end - now).unwrap_or(0));
        self.unknown += usize::from(left.is_none() && is_relative(call, regs));
        Ok(Some(Wait { call, left }))
    }

    fn snapshot_anew(&mut self) -> Option<Sleepers> {
        self.last = None;
        self.snapshot()
    }

    /// What to report about waits that will begin anew.
    pub fn report(&self) -> Option<String> {
        let why =
            "wait their full time again after a restore: the kernel does not tell what was left (/proc/timer_list)";
        (self.unknown > 0).then(|| format!("{} waiting threads {why}", self.unknown))
    }

    /// What was read after one thread had been stopped is what there was before the next is let in.
    fn snapshot(&mut self) -> Option<Sleepers> {
        if self.budget.is_zero() {
            return None;
        }
        if self.last.is_none() {
            self.last = sleepers::read(self.end).ok();
        }
        self.last.clone()
    }
}

/// Lets a stopped thread go back into the call that it was interrupted in. False when a signal came instead, which was
/// delivered, or when its job is stopped (SIGSTOP, ctrl-Z) and it does not run at all; the thread is stopped again then.
fn enter(tid: Pid) -> Result<bool> {
    ptrace::cont_to_syscall(tid, 0).about(tid, "thread")?;
    match wait::until(tid, LIMIT).about(tid, "thread")? {
        Event::Stopped {
            signal: ptrace::SYSCALL_STOP,
            event: 0,
        } => {
            stage::point("wait-entry")?;
            ptrace::cont_to_syscall(tid, 0).about(tid, "thread")?;
            Ok(true)
        }
        Event::Stopped { signal, event: 0 } => {
            ptrace::interrupt_again(tid, signal).about(tid, "thread")?;
            wait_stop(tid)?;
            Ok(false)
        }
        Event::Stopped {
            event: ptrace::EVENT_STOP,
            ..
        } => Ok(false),
        other => {
            let how = format!("{other:?}");
            Err(torpor_sys::Error::Died { pid: tid, how }).about(tid, "thread")
        }
    }
}

/// Stops it again.
fn step_back(tid: Pid) -> Result<()> {
    ptrace::interrupt(tid).about(tid, "thread")?;
    wait_stop(tid)
}

fn wait_stop(tid: Pid) -> Result<()> {
    loop {
        match wait::until(tid, LIMIT).about(tid, "thread")? {
            Event::Stopped {
                event: ptrace::EVENT_STOP,
                ..
            } => return Ok(()),
            // The end of the call.
            Event::Stopped {
                signal: ptrace::SYSCALL_STOP,
                ..
            } => ptrace::interrupt_again(tid, 0).about(tid, "thread")?,
            Event::Stopped { signal, .. } => ptrace::interrupt_again(tid, signal).about(tid, "thread")?,
            other => {
                let how = format!("{other:?}");
                return Err(torpor_sys::Error::Died { pid: tid, how }).about(tid, "thread");
            }
        }
    }
}

/// Waits until a thread sleeps in its call, and tells which it is by the kernel functions on its stack: of those that
/// restart_syscall(2) stands for. The sleeping functions themselves are not shown, so a plain sleep shows nothing.
fn sleeping_call(tid: Pid, regs: &Regs) -> Option<u64> {
    // nanosleep(2) begins with a pointer, clock_nanosleep(2) with the number of a clock.
    let sleep = if regs.rdi < 4096 { CLOCK_NANOSLEEP } else { NANOSLEEP };
    let known = [
        ("trace", None),
        ("futex", Some(FUTEX)),
        ("poll", Some(POLL)),
        ("nsleep", Some(CLOCK_NANOSLEEP)),
        ("nanosleep", Some(sleep)),
    ];
    let end = Instant::now() + Duration::from_millis(100);
    while Instant::now() < end {
        let path = |name: &str| format!("/proc/{tid}/{name}");
        let stack = std::fs::read_to_string(path("stack")).unwrap_or_default();
        let call = std::fs::read_to_string(path("syscall")).unwrap_or_default();
        let in_restart = call
            .split(' ')
            .next()
            .is_some_and(|nr| nr == RESTART_SYSCALL.to_string());
        if in_restart && stack.contains("syscall") {
            let found = known.iter().find(|(name, _)| stack.contains(name));
            if let Some(nr) = found.map_or(Some(sleep), |(_, nr)| *nr) {
                return Some(nr);
            }
        }
        std::thread::yield_now();
    }
    None
}

/// What became of a wait at a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The kernel holds its end again, or a signal will end it: the registers of the image are right.
    Held,
    /// It is over, and returned this.
    Over(i64),
    /// It has to be made again with its own arguments.
    Anew(u64),
}

/// Makes a thread wait for what was left, and stops it there.
pub fn rebuild(site: &Site, syscall_at: u64, regs: &Regs, wait: Wait) -> Result<Outcome> {
    let Some(left) = wait.left.filter(|_| is_relative(wait.call, regs)) else {
        return Ok(Outcome::Anew(wait.call));
    };
    let table = site.place().table();
    let time: Vec<u8> = [left / SECOND, left % SECOND]
        .iter()
        .flat_map(|w| w.to_le_bytes())
        .collect();
    site.memory().write(table, &time).about(site.tid(), "wait")?;
    let mut args = [regs.rdi, regs.rsi, regs.rdx, regs.r10, regs.r8, regs.r9];
    match wait.call {
        NANOSLEEP => args[0] = table,
        CLOCK_NANOSLEEP => args[2] = table,
        POLL => args[2] = left.div_ceil(1_000_000).min(i32::MAX as u64),
        _ => args[3] = table,
    }
    let result = site::interrupted_call_at(site.tid(), syscall_at, wait.call as i64, args).about(site.tid(), "wait")?;
    Ok(match result {
        RESTARTED => Outcome::Held,
        // Something else that the kernel would make again.
        -514..=-512 => Outcome::Anew(wait.call),
        other => Outcome::Over(other),
    })
}
