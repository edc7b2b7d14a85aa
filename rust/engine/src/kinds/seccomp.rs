//! Seccomp filters: the BPF programs as the kernel holds them, stored once however many threads have them.

use serde::{Deserialize, Serialize};
use torpor_sys::Pid;
use torpor_sys::proc::Status;
use torpor_sys::ptrace;
use torpor_sys::remote::Batch;

use crate::error::{About, Error, Result};
use crate::model::Inventory;

/// One filter.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Instructions of classic BPF, 8 bytes each, as one number.
    pub program: Vec<u64>,
    /// SECCOMP_FILTER_FLAG_* that it was installed with.
    pub flags: u64,
}

/// What a thread has.
#[derive(Debug, Default, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mode {
    /// Its filters, the first installed first; indices into [`crate::kinds::objects::Objects::seccomp`].
    pub seccomp: Vec<usize>,
    /// SECCOMP_MODE_STRICT: only read, write, exit and the return from a signal handler.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub strict: bool,
}

/// The mode of a thread; filters are added to `all`.
///
/// # Errors
/// Refused: a filter that asks another process, whose descriptor nobody could give it again.
pub fn collect(tid: Pid, status: &Status, all: &mut Vec<State>) -> Result<Mode> {
    let filters = match status.seccomp {
        2 => chain(tid, all)?,
        _ => Vec::new(),
    };
    Ok(Mode {
        seccomp: filters,
        strict: status.seccomp == 1,
    })
}

fn chain(tid: Pid, all: &mut Vec<State>) -> Result<Vec<usize>> {
    let mut chain = Vec::new();
    for index in 0.. {
        let Some(filter) = ptrace::seccomp_filter(tid, index).about(tid, "seccomp filter")? else {
            break;
        };
        let word = |c: &[u8]| u64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]);
        let state = State {
            program: filter.program.chunks_exact(8).map(word).collect(),
            flags: filter.flags,
        };
        if state.program.iter().any(|instruction| notifies(*instruction)) {
            let why = "it asks a listener (SECCOMP_RET_USER_NOTIF), which is not carried";
            return Err(Error::unsupported(
                tid,
                "seccomp filter",
                why,
                "use a profile without SCMP_ACT_NOTIFY",
            ));
        }
        let known = all.iter().position(|s| *s == state);
        chain.push(known.unwrap_or_else(|| {
            all.push(state);
            all.len() - 1
        }));
    }
    chain.reverse();
    Ok(chain)
}

/// Whether an instruction returns SECCOMP_RET_USER_NOTIF (struct sock_filter: code in the low 16 bits, k in the high 32).
fn notifies(instruction: u64) -> bool {
    const BPF_RET_K: u64 = 0x06;
    const USER_NOTIF: u64 = 0x7fc0_0000;
    instruction & 0xffff == BPF_RET_K && instruction >> 32 & 0xffff_0000 == USER_NOTIF
}

/// Gives every thread of the image the filter of the new container's spec, before its own. Those saved under the same
/// spec have it; other filters than the spec's are no stand-in for it.
///
/// # Errors
/// Refused: a thread without any filter. It was saved where none was asked for.
pub fn impose(inventory: &mut Inventory, filter: &State) -> Result<()> {
    let all = &mut inventory.objects.seccomp;
    let same: Vec<usize> = (0..all.len()).filter(|i| all[*i].program == filter.program).collect();
    for thread in inventory
        .processes
        .iter_mut()
        .filter_map(|p| p.body.as_mut())
        .flat_map(|b| &mut b.threads)
    {
        let filters = &mut thread.seccomp.seccomp;
        if filters.is_empty() {
            let why = "the container has a seccomp filter, this thread of the image has none";
            return Err(Error::refused(thread.tid, "seccomp", why));
        }
        if !filters.iter().any(|index| same.contains(index)) {
            filters.insert(0, all.len());
        }
    }
    all.push(filter.clone());
    Ok(())
}

/// Installs the filters. Calls made after this are not judged by them: the tracer suspends seccomp.
pub fn rebuild(batch: &mut Batch, mode: &Mode, all: &[State]) -> Result<()> {
    const SET_MODE_STRICT: i32 = 0;
    const SET_MODE_FILTER: i32 = 1;
    if mode.strict {
        let args = [SET_MODE_STRICT.into(), 0.into(), 0.into()];
        batch.must("strict seccomp", libc::SYS_seccomp, args);
    }
    for &index in &mode.seccomp {
        let filter = all
            .get(index)
            .ok_or_else(|| Error::nonsense("a seccomp filter is missing"))?;
        let bytes: Vec<u8> = filter.program.iter().flat_map(|w| w.to_le_bytes()).collect();
        let program = batch.data(&bytes);
        // struct sock_fprog: a 16-bit count, padding, a pointer.
        let mut head = (filter.program.len() as u64).to_le_bytes().to_vec();
        head.extend_from_slice(&[0; 8]);
        let fprog = batch.data(&head);
        batch.point(fprog.skip(8), program);
        let args = [SET_MODE_FILTER.into(), filter.flags.into(), fprog.into()];
        batch.must("seccomp", libc::SYS_seccomp, args);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn filters_that_ask_are_known() {
        let ret = |k: u64| k << 32 | 0x06;
        assert!(notifies(ret(0x7fc0_0000)) && notifies(ret(0x7fc0_1234)));
        // ALLOW, ERRNO, TRAP, a comparison with the same number.
        for other in [
            ret(0x7fff_0000),
            ret(0x0005_0001),
            ret(0x0003_0000),
            0x7fc0_0000 << 32 | 0x15,
        ] {
            assert!(!notifies(other));
        }
    }
}
