//! Scheduling of any thread: sched(7), sched_setattr(2), ioprio_set(2).

use crate::Pid;
use crate::error::{Result, check};

/// `struct sched_attr` (sched_setattr(2)), 56 bytes.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Attributes {
    /// Bytes of this struct; [`Attributes::bytes`] says it by itself.
    pub size: u32,
    pub policy: u32,
    pub flags: u64,
    pub nice: i32,
    pub priority: u32,
    /// Nanoseconds; for other policies than SCHED_DEADLINE the length of a slice (Linux 6.12).
    pub runtime: u64,
    pub deadline: u64,
    pub period: u64,
    /// Parts of 1024.
    pub util_min: u32,
    pub util_max: u32,
}

impl Attributes {
    /// As the kernel takes it.
    pub fn bytes(&self) -> Vec<u8> {
        let size = size_of::<Attributes>() as u32;
        let mut all = Vec::with_capacity(size as usize);
        all.extend_from_slice(&size.to_le_bytes());
        all.extend_from_slice(&self.policy.to_le_bytes());
        all.extend_from_slice(&self.flags.to_le_bytes());
        all.extend_from_slice(&self.nice.to_le_bytes());
        all.extend_from_slice(&self.priority.to_le_bytes());
        for value in [self.runtime, self.deadline, self.period] {
            all.extend_from_slice(&value.to_le_bytes());
        }
        all.extend_from_slice(&self.util_min.to_le_bytes());
        all.extend_from_slice(&self.util_max.to_le_bytes());
        all
    }
}

/// The scheduling of a thread; 0 is the calling one.
pub fn attributes(tid: Pid) -> Result<Attributes> {
    let mut found = Attributes::default();
    let size = size_of::<Attributes>();
    // SAFETY: the kernel writes at most `size` bytes of plain integers into `found`.
    let ret = unsafe { libc::syscall(libc::SYS_sched_getattr, tid, &raw mut found, size, 0) };
    check(ret, "sched_getattr", tid)?;
    Ok(found)
}

/// The CPUs that a thread may run on, as a mask.
pub fn affinity(tid: Pid) -> Result<Vec<u64>> {
    let mut mask = [0u64; 128];
    // SAFETY: the kernel writes at most that many bytes into `mask`.
    let ret = unsafe { libc::syscall(libc::SYS_sched_getaffinity, tid, size_of_val(&mask), mask.as_mut_ptr()) };
    let bytes = check(ret, "sched_getaffinity", tid)?;
    Ok(mask[..(bytes as usize).div_ceil(8)].to_vec())
}

/// The I/O priority of a thread (ioprio_get(2)): class in the bits from 13 on, 0 when it follows the nice value.
pub fn io_priority(tid: Pid) -> Result<i32> {
    const IOPRIO_WHO_PROCESS: i32 = 1;
    // SAFETY: plain numbers.
    let ret = unsafe { libc::syscall(libc::SYS_ioprio_get, IOPRIO_WHO_PROCESS, tid) };
    Ok(check(ret, "ioprio_get", tid)? as i32)
}

/// The calling thread goes before all others while this lives; threads that it makes meanwhile inherit that. For whoever
/// holds a stopped container on a busy machine. Without CAP_SYS_NICE nothing changes.
#[derive(Debug)]
pub struct Urgent {
    before: i32,
}

impl Urgent {
    /// From now on.
    pub fn begin() -> Urgent {
        let urgent = Urgent { before: own_nice() };
        set_own_nice(-20);
        urgent
    }
}

impl Drop for Urgent {
    fn drop(&mut self) {
        set_own_nice(self.before);
    }
}

/// setpriority(2): on Linux the value belongs to a thread.
fn own_nice() -> i32 {
    // SAFETY: reads a number of the calling thread.
    unsafe { libc::getpriority(libc::PRIO_PROCESS, 0) }
}

fn set_own_nice(value: i32) {
    // SAFETY: sets a number of the calling thread; what is not allowed is an error without consequence.
    unsafe { libc::setpriority(libc::PRIO_PROCESS, 0, value) };
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn own_scheduling() {
        let own = attributes(0).unwrap();
        assert_eq!(own, attributes(std::process::id() as Pid).unwrap());
        assert_eq!(own.bytes().len(), 56);
        assert!(affinity(0).unwrap().iter().any(|word| *word != 0));
        assert!(io_priority(0).unwrap() >= 0);
        assert!(attributes(i32::MAX).is_err());
    }

    #[test]
    fn urgency_ends() {
        let before = own_nice();
        let urgent = Urgent::begin();
        assert!(own_nice() == -20 || own_nice() == before);
        drop(urgent);
        assert_eq!(own_nice(), before);
    }
}
