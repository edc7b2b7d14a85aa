//! Signal actions, masks, pending signals, alternate stacks.

use serde::{Deserialize, Serialize};
use torpor_sys::Pid;
use torpor_sys::proc::Status;
use torpor_sys::ptrace::{self, SigInfo};
use torpor_sys::remote::{Arg, Batch, Data, Results};

use crate::error::{About, Result};

const SIGKILL: i32 = 9;
const SIGSTOP: i32 = 19;
const COUNT: i32 = 64;
/// `struct kernel_sigaction`: handler, flags, restorer, mask; 32 bytes.
const ACTION: usize = 32;
/// `stack_t`: pointer, flags, size; 24 bytes.
const STACK: usize = 24;

/// One signal's action, if it is not the default.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Action {
    /// Its number.
    pub signal: i32,
    /// handler, flags, restorer, mask.
    pub words: [u64; 4],
}

/// What all threads of a process share.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessState {
    /// Actions that are not the default.
    pub actions: Vec<Action>,
    /// siginfo of signals queued for the process, in order.
    pub pending: Vec<Info>,
}

/// What a thread has of its own.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ThreadState {
    /// Blocked signals.
    pub mask: u64,
    /// siginfo of signals queued for the thread, in order.
    pub pending: Vec<Info>,
    /// `stack_t`: pointer, flags, size.
    pub altstack: [u64; 3],
    /// Stopped by a signal.
    #[serde(default)]
    pub stopped: bool,
}

/// A siginfo as sixteen words, since JSON has no bytes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Info(pub [u64; 16]);

impl Info {
    fn from_bytes(bytes: &SigInfo) -> Info {
        let mut words = [0; 16];
        for (word, chunk) in words.iter_mut().zip(bytes.chunks_exact(8)) {
            *word = u64::from_le_bytes([
                chunk[0], chunk[1], chunk[2], chunk[3], chunk[4], chunk[5], chunk[6], chunk[7],
            ]);
        }
        Info(words)
    }

    fn bytes(&self) -> Vec<u8> {
        self.0.iter().flat_map(|w| w.to_le_bytes()).collect()
    }

    fn signal(&self) -> i32 {
        self.0[0] as u32 as i32
    }
}

/// The places of answers in a batch.
#[derive(Debug)]
pub struct AskedProcess(Vec<(i32, Data)>);

/// Asks for the actions of the signals that have one.
pub fn ask_process(batch: &mut Batch, status: &Status) -> AskedProcess {
    let set = status.sig_caught | status.sig_ignored;
    let wanted = (1..=COUNT).filter(|s| set >> (s - 1) & 1 == 1 && *s != SIGKILL && *s != SIGSTOP);
    AskedProcess(
        wanted
            .map(|signal| {
                let room = batch.room(ACTION);
                let args = [signal.into(), 0.into(), room.into(), 8.into()];
                batch.must(format!("rt_sigaction of signal {signal}"), libc::SYS_rt_sigaction, args);
                (signal, room)
            })
            .collect(),
    )
}

/// The state of the process.
pub fn answer_process(pid: Pid, asked: AskedProcess, results: &Results) -> Result<ProcessState> {
    let action = |(signal, room): (i32, Data)| Action {
        signal,
        words: [0, 8, 16, 24].map(|at| results.u64(room.skip(at))),
    };
    Ok(ProcessState {
        actions: asked.0.into_iter().map(action).collect(),
        pending: pending(pid, true)?,
    })
}

fn pending(tid: Pid, of_process: bool) -> Result<Vec<Info>> {
    let queue = ptrace::pending(tid, of_process).about(tid, "pending signals")?;
    Ok(queue.iter().map(Info::from_bytes).collect())
}

/// Asks for the alternate stack of a thread.
pub fn ask_thread(batch: &mut Batch) -> Data {
    let room = batch.room(STACK);
    batch.must("sigaltstack", libc::SYS_sigaltstack, [0.into(), room.into()]);
    room
}

/// The state of a thread.
pub fn answer_thread(tid: Pid, asked: Data, results: &Results, stopped: bool) -> Result<ThreadState> {
    Ok(ThreadState {
        mask: ptrace::sigmask(tid).about(tid, "signal mask")?,
        pending: pending(tid, false)?,
        altstack: [0, 8, 16].map(|at| results.u64(asked.skip(at))),
        stopped,
    })
}

/// Whether a signal with a handler waits for the thread, which ends the call that it is in.
pub fn will_interrupt(process: &ProcessState, thread: &ThreadState) -> bool {
    const SIG_IGN: u64 = 1;
    let is_caught = |signal: i32| {
        process
            .actions
            .iter()
            .any(|a| a.signal == signal && a.words[0] > SIG_IGN)
    };
    let mut pending = process.pending.iter().chain(&thread.pending).map(Info::signal);
    pending.any(|signal| (1..=COUNT).contains(&signal) && thread.mask >> (signal - 1) & 1 == 0 && is_caught(signal))
}

/// Sets every action: what the blank process had is gone too.
///
/// SIGTRAP is left alone: the stub of a process that is being built ends in one (see [`trap_action`]).
pub fn rebuild_actions(batch: &mut Batch, state: &ProcessState) {
    for signal in (1..=COUNT).filter(|s| ![SIGKILL, SIGSTOP, libc::SIGTRAP].contains(s)) {
        let words = state
            .actions
            .iter()
            .find(|a| a.signal == signal)
            .map_or([0; 4], |a| a.words);
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let action = batch.data(&bytes);
        let args = [signal.into(), action.into(), 0.into(), 8.into()];
        batch.must(format!("rt_sigaction of signal {signal}"), libc::SYS_rt_sigaction, args);
    }
}

/// The action of SIGTRAP, when the program has one.
pub fn trap_action(state: &ProcessState) -> Option<Vec<u8>> {
    let action = state.actions.iter().find(|a| a.signal == libc::SIGTRAP)?;
    Some(action.words.iter().flat_map(|w| w.to_le_bytes()).collect())
}

/// Sets the alternate stack. SS_ONSTACK is what the kernel derives, not what it takes.
pub fn rebuild_altstack(batch: &mut Batch, state: &ThreadState) {
    const SS_ONSTACK: u64 = 1;
    const SS_DISABLE: u64 = 2;
    let [pointer, flags, size] = state.altstack;
    let flags = if size == 0 { SS_DISABLE } else { flags & !SS_ONSTACK };
    let bytes: Vec<u8> = [pointer, flags, size].iter().flat_map(|w| w.to_le_bytes()).collect();
    let stack = batch.data(&bytes);
    batch.must("sigaltstack", libc::SYS_sigaltstack, [stack.into(), 0.into()]);
}

/// Queues pending signals again. A task may queue any siginfo for itself (rt_sigqueueinfo(2)).
pub fn rebuild_pending(batch: &mut Batch, pid: i32, tid: i32, process: &[Info], thread: &[Info]) {
    for info in process {
        let data = batch.data(&info.bytes());
        let args: [Arg; 3] = [pid.into(), info.signal().into(), data.into()];
        batch.must("queueing a signal", libc::SYS_rt_sigqueueinfo, args);
    }
    for info in thread {
        let data = batch.data(&info.bytes());
        let args: [Arg; 4] = [pid.into(), tid.into(), info.signal().into(), data.into()];
        batch.must("queueing a signal", libc::SYS_rt_tgsigqueueinfo, args);
    }
}
