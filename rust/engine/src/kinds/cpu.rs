//! Registers of a thread, and what becomes of the system call it was in.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::Pid;
use torpor_sys::mem::Memory;
use torpor_sys::ptrace::{self, Regs, Rseq};
use torpor_sys::wait::{self, Event};

use crate::error::{About, Error, Result};

/// General registers by name and extended state as a blob.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// In the order of `struct user_regs_struct` (arch/x86/include/asm/user_64.h).
    pub regs: Vec<u64>,
    /// XSAVE area.
    pub xstate: BlobRef,
    /// The call that restart_syscall(2) stands for, when the thread is in that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restarts: Option<u64>,
}

/// A thread's registers before anything is run in it.
#[derive(Debug, Clone, Copy)]
pub struct Settled {
    /// As they must be when it goes on.
    pub regs: Regs,
    /// See [`State::restarts`].
    pub restarts: Option<u64>,
}

const ERESTART_RESTARTBLOCK: i64 = 516;

const LIMIT: Duration = Duration::from_secs(10);
const COUNT: usize = 27;
const RAX: usize = 10;
const RIP: usize = 16;
const ORIG_RAX: usize = 15;

/// Both directions between registers and their numbers, from one list: the order is part of the image format.
macro_rules! registers {
    ($($name:ident)*) => {
        fn to_words(regs: &Regs) -> Vec<u64> {
            vec![$(regs.$name),*]
        }

        fn from_words(words: &[u64]) -> Option<Regs> {
            let &[$($name),*] = words else { return None };
            Some(Regs { $($name),* })
        }
    };
}

registers!(r15 r14 r13 r12 rbp rbx r11 r10 r9 r8 rax rcx rdx rsi rdi orig_rax rip cs eflags rsp ss fs_base gs_base ds es fs gs);

/// Registers of a stopped thread as they must be when it goes on. Anything run in the thread comes later.
///
/// A task that was in an rseq critical section must not go on inside it: it was preempted, and code that we run
/// clears the kernel's note of that. So its next instruction becomes the abort handler (rseq(2)).
pub fn settle(tid: Pid, memory: &Memory, rseq: Option<Rseq>) -> Result<Settled> {
    let mut regs = ptrace::regs(tid).about(tid, "registers")?;
    if regs.cs != 0x33 {
        return Err(Error::unsupported(
            tid,
            "32-bit code",
            "only 64-bit programs are carried",
            "",
        ));
    }
    if let Some(abort) = rseq.and_then(|r| rseq_abort(memory, r, regs.rip)) {
        regs.rip = abort;
        ptrace::set_regs(tid, &regs).about(tid, "registers")?;
    }
    let in_restart = regs.orig_rax == libc_nr::RESTART_SYSCALL && regs.rax as i64 == -ERESTART_RESTARTBLOCK;
    let restarts = if in_restart {
        Some(original_call(tid, &regs)?)
    } else {
        None
    };
    Ok(Settled { regs, restarts })
}

/// Calls that return EINTR when their task is merely stopped (signal(7), "Interruption of system calls and
/// library functions by stop signals"): the program would not have seen it, so the call is made again. True when
/// that was done.
pub fn rewind_unnoticed(tid: Pid) -> Result<bool> {
    const EINTR: i64 = 4;
    let mut regs = ptrace::regs(tid).about(tid, "registers")?;
    if regs.rax as i64 != -EINTR || !libc_nr::ENDED_BY_STOPS.contains(&(regs.orig_rax as i64)) {
        return Ok(false);
    }
    regs.rip -= 2;
    regs.rax = regs.orig_rax;
    regs.orig_rax = u64::MAX;
    ptrace::set_regs(tid, &regs).about(tid, "registers")?;
    Ok(true)
}

/// Undoes [`rewind_unnoticed`] for a thread that a signal with a handler waits for: its EINTR is the program's own.
pub fn keep_interrupted(tid: Pid) -> Result<()> {
    const EINTR: i64 = 4;
    let mut regs = ptrace::regs(tid).about(tid, "registers")?;
    regs.rip += 2;
    regs.orig_rax = regs.rax;
    regs.rax = -EINTR as u64;
    ptrace::set_regs(tid, &regs).about(tid, "registers")
}

/// Which call a thread is in that was interrupted before: its registers only tell restart_syscall(2). It is let
/// into the kernel once more, where the function that it sleeps in tells, and stopped again. Nothing else of it
/// runs: it would stop at the end of the call.
fn original_call(tid: Pid, regs: &Regs) -> Result<u64> {
    ptrace::cont_to_syscall(tid, 0).about(tid, "thread")?;
    wait::until(tid, LIMIT).about(tid, "thread")?;
    ptrace::cont_to_syscall(tid, 0).about(tid, "thread")?;
    let call = sleeping_call(tid, regs);
    ptrace::interrupt(tid).about(tid, "thread")?;
    loop {
        match wait::until(tid, LIMIT).about(tid, "thread")? {
            Event::Stopped {
                event: ptrace::EVENT_STOP,
                ..
            } => break,
            Event::Stopped { .. } => ptrace::interrupt_again(tid, 0).about(tid, "thread")?,
            other => {
                let how = format!("{other:?}");
                return Err(torpor_sys::Error::Died { pid: tid, how }).about(tid, "thread");
            }
        }
    }
    call.ok_or_else(|| {
        let why = "it is in a call that was interrupted before and cannot be told";
        Error::unsupported(tid, "system call", why, "try again")
    })
}

/// The call that a thread sleeps in, by the kernel functions on its stack: of those that restart_syscall(2)
/// stands for. The sleeping functions themselves are not shown, so a plain sleep shows nothing.
fn sleeping_call(tid: Pid, regs: &Regs) -> Option<u64> {
    // nanosleep(2) begins with a pointer, clock_nanosleep(2) with the number of a clock.
    let sleep = if regs.rdi < 4096 { 230 } else { 35 };
    let known = [
        ("trace", None),
        ("futex", Some(202)),
        ("poll", Some(7)),
        ("nsleep", Some(230)),
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
            .is_some_and(|nr| nr == libc_nr::RESTART_SYSCALL.to_string());
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

/// `struct rseq` has its `rseq_cs` pointer at offset 8; `struct rseq_cs` is {version u32, flags u32, start_ip,
/// post_commit_offset, abort_ip}.
fn rseq_abort(memory: &Memory, rseq: Rseq, rip: u64) -> Option<u64> {
    let section = memory.read_u64(rseq.address + 8).ok().filter(|p| *p != 0)?;
    let start = memory.read_u64(section + 8).ok()?;
    let length = memory.read_u64(section + 16).ok()?;
    let abort = memory.read_u64(section + 24).ok()?;
    (rip.wrapping_sub(start) < length).then_some(abort)
}

mod libc_nr {
    pub const RESTART_SYSCALL: u64 = 219;
    /// semop, msgsnd, msgrcv, rt_sigtimedwait, io_getevents, semtimedop, epoll_wait, epoll_pwait, io_pgetevents,
    /// epoll_pwait2 (arch/x86/entry/syscalls/syscall_64.tbl).
    pub const ENDED_BY_STOPS: [i64; 10] = [65, 69, 70, 128, 208, 220, 232, 281, 333, 441];
}

/// The registers as numbers.
pub fn collect(settled: &Settled, xstate: BlobRef) -> State {
    State {
        regs: to_words(&settled.regs),
        xstate,
        restarts: settled.restarts,
    }
}

/// Gives a thread its registers. A relative wait that the kernel held the end of is begun again, since the
/// restart block does not survive (restart_syscall(2)).
pub fn rebuild(tid: Pid, state: &State, xstate: &[u8]) -> Result<()> {
    let mut words = state.regs.clone();
    if words.len() == COUNT && words[RAX] as i64 == -ERESTART_RESTARTBLOCK && words[ORIG_RAX] as i64 >= 0 {
        words[RAX] = state.restarts.unwrap_or(words[ORIG_RAX]);
        words[ORIG_RAX] = u64::MAX;
        words[RIP] -= 2;
    }
    let regs = from_words(&words).ok_or_else(|| Error::nonsense("a thread has a wrong number of registers"))?;
    ptrace::set_xstate(tid, xstate).about(tid, "extended registers")?;
    ptrace::set_regs(tid, &regs).about(tid, "registers")
}
