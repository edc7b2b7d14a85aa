//! Registers of a thread, and what becomes of the system call it was in.

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::Pid;
use torpor_sys::mem::Memory;
use torpor_sys::proc::Vma;
use torpor_sys::ptrace::{self, Regs, Rseq};
use torpor_sys::xsave::Layout;

use super::restart::{self, Outcome, Wait, Watch};
use super::{dispatch, xstate};
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
    /// How long that call was to wait yet, in nanoseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub left: Option<u64>,
    /// How it catches its own system calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dispatch: Option<dispatch::State>,
}

/// A thread's registers before anything is run in it.
#[derive(Debug, Clone, Copy)]
pub struct Settled {
    /// As they must be when it goes on.
    pub regs: Regs,
    /// The wait that the kernel holds the end of, when it is in one.
    pub wait: Option<Wait>,
    /// How it catches its own system calls.
    pub dispatch: Option<dispatch::State>,
}

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
pub fn settle(tid: Pid, memory: &Memory, vmas: &[Vma], rseq: Option<Rseq>, watch: &mut Watch) -> Result<Settled> {
    let mut regs = ptrace::regs(tid).about(tid, "registers")?;
    if regs.cs != 0x33 {
        return Err(Error::unsupported(
            tid,
            "32-bit code",
            "only 64-bit programs are carried",
            "",
        ));
    }
    let dispatch = dispatch::collect(tid, vmas)?;
    let wait = watch.look(tid, &regs)?;
    if restart::is_interrupted(&regs) {
        regs = ptrace::regs(tid).about(tid, "registers")?;
    }
    if let Some(abort) = rseq.and_then(|r| rseq_abort(memory, r, regs.rip)) {
        regs.rip = abort;
        ptrace::set_regs(tid, &regs).about(tid, "registers")?;
    }
    Ok(Settled { regs, wait, dispatch })
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
    /// semop, msgsnd, msgrcv, rt_sigtimedwait, io_getevents, semtimedop, epoll_wait, epoll_pwait, io_pgetevents,
    /// epoll_pwait2; and on a socket with SO_RCVTIMEO or SO_SNDTIMEO, when nothing was transferred yet: read, write,
    /// readv, writev, connect, accept, sendto, recvfrom, sendmsg, recvmsg, accept4, recvmmsg, sendmmsg
    /// (arch/x86/entry/syscalls/syscall_64.tbl).
    pub const ENDED_BY_STOPS: [i64; 23] = [
        65, 69, 70, 128, 208, 220, 232, 281, 333, 441, 0, 1, 19, 20, 42, 43, 44, 45, 46, 47, 288, 299, 307,
    ];
}

/// The registers as numbers.
pub fn collect(settled: &Settled, xstate: BlobRef) -> State {
    State {
        regs: to_words(&settled.regs),
        xstate,
        restarts: settled.wait.map(|w| w.call),
        left: settled.wait.and_then(|w| w.left),
        dispatch: settled.dispatch,
    }
}

impl State {
    fn regs(&self) -> Result<Regs> {
        from_words(&self.regs).ok_or_else(|| Error::nonsense("a thread has a wrong number of registers"))
    }

    /// The registers, and the wait that they are in the middle of.
    pub fn wait(&self) -> Result<(Regs, Option<Wait>)> {
        let regs = self.regs()?;
        let wait = restart::is_interrupted(&regs).then(|| Wait {
            call: self.restarts.unwrap_or(regs.orig_rax),
            left: self.left,
        });
        Ok((regs, wait))
    }
}

/// Gives a thread its registers, the last thing that it gets. `wait` is what became of the wait that it was in.
pub fn rebuild(tid: Pid, state: &State, xstate: &[u8], wait: Outcome) -> Result<()> {
    let mut regs = state.regs()?;
    match wait {
        Outcome::Held => {}
        Outcome::Over(result) => (regs.rax, regs.orig_rax) = (result as u64, u64::MAX),
        Outcome::Anew(call) => (regs.rax, regs.orig_rax, regs.rip) = (call, u64::MAX, regs.rip - 2),
    }
    let xstate = xstate::widen(xstate, &Layout::here());
    ptrace::set_xstate(tid, &xstate).about(tid, "extended registers")?;
    ptrace::set_regs(tid, &regs).about(tid, "registers")?;
    state.dispatch.map_or(Ok(()), |d| dispatch::rebuild(tid, &d))
}
