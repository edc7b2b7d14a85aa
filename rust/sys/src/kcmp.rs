//! kcmp(2): do two tasks share a kernel object?

use crate::Pid;
use crate::error::{Result, check};

/// What is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Open file descriptions; the arguments are descriptor numbers.
    File = 0,
    /// Address spaces.
    Vm = 1,
    /// Descriptor tables.
    Files = 2,
    /// Root, working directory and umask.
    Fs = 3,
    /// Signal handlers.
    Sighand = 4,
    /// Adjustments of System V semaphores at the end of a process (SEM_UNDO).
    SysvSem = 6,
}

/// Orders the objects of two tasks; equal means shared. The order is stable while both live.
pub fn order(a: Pid, b: Pid, kind: Kind, fd_a: i32, fd_b: i32) -> Result<std::cmp::Ordering> {
    // SAFETY: plain numbers only.
    let ret = unsafe { libc::syscall(libc::SYS_kcmp, a, b, kind as i32, fd_a as u64, fd_b as u64) };
    Ok(match check(ret, "kcmp", format!("{a}, {b}"))? {
        0 => std::cmp::Ordering::Equal,
        1 => std::cmp::Ordering::Less,
        _ => std::cmp::Ordering::Greater,
    })
}

/// True when both tasks share the object.
pub fn same(a: Pid, b: Pid, kind: Kind) -> Result<bool> {
    Ok(order(a, b, kind, 0, 0)?.is_eq())
}
