//! Waiting for tracees, with a deadline and without ever waiting for "any child".
//!
//! nix's waitpid cannot decode stops by real-time signals, so the status is decoded here (wait(2)).

use std::time::{Duration, Instant};

use crate::error::{Error, Result, check};
use crate::{Pid, proc, ptrace};

/// What a tracee did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// It ended by `exit` with this code.
    Exited(i32),
    /// It was ended by this signal.
    Killed(i32),
    /// It stopped; `event` is a `PTRACE_EVENT_*` number or 0.
    Stopped {
        /// The signal reported with the stop.
        signal: i32,
        /// The ptrace event, or 0.
        event: i32,
    },
    /// It was continued by SIGCONT.
    Continued,
}

fn decode(status: i32) -> Event {
    if libc::WIFEXITED(status) {
        Event::Exited(libc::WEXITSTATUS(status))
    } else if libc::WIFSIGNALED(status) {
        Event::Killed(libc::WTERMSIG(status))
    } else if libc::WIFSTOPPED(status) {
        Event::Stopped {
            signal: (status >> 8) & 0xff,
            event: status >> 16,
        }
    } else {
        Event::Continued
    }
}

/// Looks for news of one task without blocking. `None` when there are none.
///
/// # Errors
/// ECHILD when the task is neither our child nor our tracee.
pub fn poll(tid: Pid) -> Result<Option<Event>> {
    let mut status = 0;
    // SAFETY: status is a valid place for the result.
    let ret = unsafe { libc::waitpid(tid, &raw mut status, libc::__WALL | libc::WNOHANG) };
    let got = check(i64::from(ret), "waitpid", tid)?;
    Ok((got != 0).then(|| decode(status)))
}

/// Blocks SIGCHLD in the calling thread, so that [`until`] can sleep on it without losing one.
/// For processes of our own only: a user's program keeps its mask.
pub fn block_sigchld() {
    // SAFETY: the set is initialised by sigemptyset before use.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::pthread_sigmask(libc::SIG_BLOCK, &raw const set, std::ptr::null_mut());
    }
}

fn sleep_for_sigchld(limit: Duration) {
    let time = libc::timespec {
        tv_sec: limit.as_secs().try_into().unwrap_or(1),
        tv_nsec: limit.subsec_nanos().into(),
    };
    // SAFETY: set and time are initialised and live over the call.
    unsafe {
        let mut set: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut set);
        libc::sigaddset(&raw mut set, libc::SIGCHLD);
        libc::sigtimedwait(&raw const set, std::ptr::null_mut(), &raw const time);
    }
}

/// Waits until the task has news or the limit has passed. SIGCHLD must be blocked ([`block_sigchld`]).
///
/// # Errors
/// [`Error::Timeout`] names the state the task hangs in.
pub fn until(tid: Pid, limit: Duration) -> Result<Event> {
    let end = Instant::now() + limit;
    // Most stops take a few microseconds: look for a while before paying for a sleep.
    for _ in 0..500 {
        if let Some(event) = poll(tid)? {
            return Ok(event);
        }
        std::hint::spin_loop();
    }
    loop {
        if let Some(event) = poll(tid)? {
            return Ok(event);
        }
        let left = end.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(timeout(tid, limit));
        }
        // SIGCHLD is not queued: a second one may be merged away, so never sleep for long on trust.
        sleep_for_sigchld(left.min(Duration::from_millis(20)));
    }
}

/// Waits for the stop that [`ptrace::interrupt`] asked for. Signals that come before it go their way; `born` is told
/// the children that a followed task makes before it stops. Gives the signal that the task is stopped by, SIGTRAP
/// for none, and `None` when it has ended instead.
///
/// # Errors
/// [`Error::Timeout`] after `limit`.
pub fn interrupted(tid: Pid, limit: Duration, mut born: impl FnMut(Pid)) -> Result<Option<i32>> {
    let end = Instant::now() + limit;
    loop {
        match until(tid, end.saturating_duration_since(Instant::now()))? {
            Event::Stopped {
                signal,
                event: ptrace::EVENT_STOP,
            } => return Ok(Some(signal)),
            Event::Stopped { signal, event: 0 } => ptrace::interrupt_again(tid, signal)?,
            Event::Stopped { event, .. } => {
                if ptrace::is_birth(event) {
                    born(ptrace::event_message(tid)? as Pid);
                }
                ptrace::interrupt_again(tid, 0)?;
            }
            Event::Exited(_) | Event::Killed(_) => return Ok(None),
            Event::Continued => {}
        }
    }
}

/// The error that tells what a task hangs in.
pub(crate) fn timeout(tid: Pid, limit: Duration) -> Error {
    let state = proc::stat(tid).map_or('?', |s| s.state);
    let read = |name: &str| std::fs::read_to_string(format!("/proc/{tid}/{name}")).unwrap_or_default();
    let call = read("syscall").split_whitespace().next().unwrap_or("?").into();
    Error::Timeout {
        pid: tid,
        ms: limit.as_millis().try_into().unwrap_or(u64::MAX),
        state,
        wchan: read("wchan"),
        call,
    }
}

/// Waits until all these tracees have ended, letting those run that stop on the way; what is left after `limit`
/// is returned. In no order: the first thread of a pid namespace to be told dead may be the last to die, since
/// its end waits for everybody else, and they wait for us.
pub fn all_gone(tids: &[Pid], limit: Duration) -> Vec<Pid> {
    gone_enough(tids, limit, |_| false)
}

/// As [`all_gone`], but done as soon as `enough` says so of those that are left.
pub fn gone_enough(tids: &[Pid], limit: Duration, mut enough: impl FnMut(&[Pid]) -> bool) -> Vec<Pid> {
    let end = Instant::now() + limit;
    let mut left = tids.to_vec();
    while !left.is_empty() && !enough(&left) && Instant::now() < end {
        let before = left.len();
        left.retain(|tid| match poll(*tid) {
            Ok(Some(Event::Exited(_) | Event::Killed(_))) | Err(_) => false,
            Ok(Some(Event::Stopped { .. })) => {
                // Gone meanwhile is as good.
                let _ = crate::ptrace::cont(*tid, 0);
                true
            }
            Ok(_) => true,
        });
        if left.len() == before {
            sleep_for_sigchld(Duration::from_millis(5));
        }
    }
    left
}
