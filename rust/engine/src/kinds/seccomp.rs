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

/// The filters of a thread, the first installed first, as indices into `all`.
///
/// # Errors
/// Refused: strict mode.
pub fn collect(tid: Pid, status: &Status, all: &mut Vec<State>) -> Result<Vec<usize>> {
    match status.seccomp {
        0 => return Ok(Vec::new()),
        2 => {}
        _ => return Err(Error::unsupported(tid, "seccomp", "strict mode is not carried yet", "")),
    }
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
        let known = all.iter().position(|s| *s == state);
        chain.push(known.unwrap_or_else(|| {
            all.push(state);
            all.len() - 1
        }));
    }
    chain.reverse();
    Ok(chain)
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
        if thread.seccomp.is_empty() {
            let why = "the container has a seccomp filter, this thread of the image has none";
            return Err(Error::refused(thread.tid, "seccomp", why));
        }
        if !thread.seccomp.iter().any(|index| same.contains(index)) {
            thread.seccomp.insert(0, all.len());
        }
    }
    all.push(filter.clone());
    Ok(())
}

/// Installs the filters. Calls made after this are not judged by them: the tracer suspends seccomp.
pub fn rebuild(batch: &mut Batch, chain: &[usize], all: &[State]) -> Result<()> {
    const SET_MODE_FILTER: i32 = 1;
    for &index in chain {
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
