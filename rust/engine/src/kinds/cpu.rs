//! Registers of a thread, and what becomes of the system call it was in.

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::Pid;
use torpor_sys::mem::Memory;
use torpor_sys::ptrace::{self, Regs, Rseq};

use crate::error::{About, Error, Result};

/// General registers by name and extended state as a blob.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// In the order of `struct user_regs_struct` (arch/x86/include/asm/user_64.h).
    pub regs: Vec<u64>,
    /// XSAVE area.
    pub xstate: BlobRef,
}

const COUNT: usize = 27;
const RAX: usize = 10;
const RIP: usize = 16;
const ORIG_RAX: usize = 15;

fn to_words(regs: &Regs) -> Vec<u64> {
    vec![
        regs.r15, regs.r14, regs.r13, regs.r12, regs.rbp, regs.rbx, regs.r11, regs.r10, regs.r9, regs.r8,
        regs.rax, regs.rcx, regs.rdx, regs.rsi, regs.rdi, regs.orig_rax, regs.rip, regs.cs, regs.eflags,
        regs.rsp, regs.ss, regs.fs_base, regs.gs_base, regs.ds, regs.es, regs.fs, regs.gs,
    ]
}

fn from_words(w: &[u64]) -> Option<Regs> {
    let &[
        r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs, eflags, rsp,
        ss, fs_base, gs_base, ds, es, fs, gs,
    ] = w
    else {
        return None;
    };
    Some(Regs {
        r15, r14, r13, r12, rbp, rbx, r11, r10, r9, r8, rax, rcx, rdx, rsi, rdi, orig_rax, rip, cs, eflags, rsp,
        ss, fs_base, gs_base, ds, es, fs, gs,
    })
}

/// Registers of a stopped thread as they must be when it goes on. Anything run in the thread comes later.
/// `signalled` says that a signal with a handler waits for it: then an EINTR is the program's own.
///
/// A task that was in an rseq critical section must not go on inside it: it was preempted, and code that we run
/// clears the kernel's note of that. So its next instruction becomes the abort handler (rseq(2)).
pub fn settle(tid: Pid, memory: &Memory, rseq: Option<Rseq>, signalled: bool) -> Result<Regs> {
    let mut regs = ptrace::regs(tid).about(tid, "registers")?;
    if regs.cs != 0x33 {
        return Err(Error::unsupported(tid, "32-bit code", "only 64-bit programs are carried", ""));
    }
    if let Some(abort) = rseq.and_then(|r| rseq_abort(memory, r, regs.rip)) {
        regs.rip = abort;
        ptrace::set_regs(tid, &regs).about(tid, "registers")?;
    }
    if let (Some(rip), false) = (unnoticed_restart(&regs), signalled) {
        regs.rip = rip;
        regs.rax = regs.orig_rax;
        regs.orig_rax = u64::MAX;
        ptrace::set_regs(tid, &regs).about(tid, "registers")?;
    }
    Ok(regs)
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

/// Calls that return EINTR when their task is merely stopped (signal(7), "Interruption of system calls and
/// library functions by stop signals"): the program would not have seen it, so the call is made again.
fn unnoticed_restart(regs: &Regs) -> Option<u64> {
    const CALLS: [i64; 10] = [
        libc_nr::EPOLL_WAIT,
        libc_nr::EPOLL_PWAIT,
        libc_nr::EPOLL_PWAIT2,
        libc_nr::SEMOP,
        libc_nr::SEMTIMEDOP,
        libc_nr::RT_SIGTIMEDWAIT,
        libc_nr::IO_GETEVENTS,
        libc_nr::MSGRCV,
        libc_nr::MSGSND,
        libc_nr::IO_PGETEVENTS,
    ];
    const EINTR: i64 = 4;
    let interrupted = regs.rax as i64 == -EINTR && CALLS.contains(&(regs.orig_rax as i64));
    interrupted.then(|| regs.rip - 2)
}

mod libc_nr {
    pub const MSGSND: i64 = 69;
    pub const MSGRCV: i64 = 70;
    pub const SEMOP: i64 = 65;
    pub const RT_SIGTIMEDWAIT: i64 = 128;
    pub const IO_GETEVENTS: i64 = 208;
    pub const SEMTIMEDOP: i64 = 220;
    pub const EPOLL_WAIT: i64 = 232;
    pub const EPOLL_PWAIT: i64 = 281;
    pub const IO_PGETEVENTS: i64 = 333;
    pub const EPOLL_PWAIT2: i64 = 441;
}

/// The registers as numbers.
pub fn collect(regs: &Regs, xstate: BlobRef) -> State {
    State { regs: to_words(regs), xstate }
}

/// Gives a thread its registers. A relative wait that the kernel held the end of is begun again, since the
/// restart block does not survive (restart_syscall(2)).
pub fn rebuild(tid: Pid, state: &State, xstate: &[u8]) -> Result<()> {
    const ERESTART_RESTARTBLOCK: i64 = 516;
    let mut words = state.regs.clone();
    if words.len() == COUNT && words[RAX] as i64 == -ERESTART_RESTARTBLOCK && words[ORIG_RAX] as i64 >= 0 {
        words[RAX] = words[ORIG_RAX];
        words[ORIG_RAX] = u64::MAX;
        words[RIP] -= 2;
    }
    let regs = from_words(&words).ok_or_else(|| Error::nonsense("a thread has a wrong number of registers"))?;
    ptrace::set_xstate(tid, xstate).about(tid, "extended registers")?;
    ptrace::set_regs(tid, &regs).about(tid, "registers")
}
