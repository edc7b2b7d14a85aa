//! What can be known of mappings before anything is stopped.
//!
//! Only smaps tells the flags of a mapping, and the kernel makes it by a walk over every page: some 10 ms per GiB that
//! a pause need not hold. So it is read while the container runs. In the pause the plain list of mappings is read,
//! and must be the same. A flag can have changed without the list changing (madvise(2)): so when the container runs
//! again, smaps of its twin, which is as it was in the pause, has to confirm what was assumed.

use std::collections::BTreeMap;

use torpor_sys::Pid;
use torpor_sys::proc::{self, Status, Vma};

use crate::error::{About, Result};
use crate::freeze;
use crate::kinds::ipc;

/// Flags that a twin does not inherit (fork(2), userfaultfd(2)), or that come and go by themselves.
const NOT_INHERITED: [&[u8; 2]; 6] = [b"lo", b"lf", b"um", b"uw", b"ui", b"sd"];

/// The mappings of running processes, with their flags.
#[derive(Debug, Default)]
pub struct Advance(BTreeMap<Pid, Vec<Vma>>);

impl Advance {
    /// Reads them, of the container whose init is `init`. A process that cannot be read is left for the pause.
    pub fn read(init: Pid) -> Advance {
        let pids = freeze::tree(init).unwrap_or_default();
        Advance(
            pids.into_iter()
                .filter_map(|pid| Some((pid, proc::smaps(pid).ok()?)))
                .collect(),
        )
    }

    /// The mappings of a process that has stopped, and whether a twin has to confirm their flags.
    pub fn settle(&mut self, pid: Pid, status: &Status) -> Result<(Vec<Vma>, bool)> {
        // A twin cannot tell what is locked, and has no System V shared memory.
        let known = self.0.remove(&pid).filter(|_| status.locked_kib == 0);
        let untold = |v: &Vma| v.has(b"lo") || ipc::is_segment(v);
        if let Some(known) = known.filter(|k| !k.iter().any(untold)) {
            let now = proc::maps(pid).about(pid, "maps")?;
            if is_same_list(&known, &now) {
                return Ok((known, true));
            }
        }
        Ok((proc::smaps(pid).about(pid, "smaps")?, false))
    }
}

fn is_same_list(known: &[Vma], now: &[Vma]) -> bool {
    let plain = |v: &Vma| Vma {
        flags: Vec::new(),
        key: 0,
        ..v.clone()
    };
    known.len() == now.len() && known.iter().zip(now).all(|(k, n)| plain(k) == *n)
}

/// Whether a twin, or what its smaps lists, confirms the assumed flags. What is its own (a table) does not matter.
pub fn confirms(twin: &[Vma], assumed: &[Vma]) -> bool {
    let flags = |v: &Vma| -> Vec<[u8; 2]> {
        let lasts = |f: &&[u8; 2]| !NOT_INHERITED.contains(f);
        v.flags.iter().filter(lasts).copied().collect()
    };
    assumed.iter().filter(|v| !v.has(b"dc")).all(|v| {
        let at = twin.partition_point(|t| t.start < v.start);
        twin.get(at)
            .is_some_and(|t| (t.start, t.end, t.key) == (v.start, v.end, v.key) && flags(t) == flags(v))
    })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn vma(start: u64, end: u64, flags: &[&[u8; 2]]) -> Vma {
        Vma {
            start,
            end,
            read: true,
            write: true,
            exec: false,
            shared: false,
            offset: 0,
            dev: (0, 0),
            inode: 0,
            name: String::new(),
            flags: flags.iter().map(|f| **f).collect(),
            key: 0,
        }
    }

    #[test]
    fn a_twin_confirms_what_it_has_inherited() {
        let assumed = [
            vma(0x1000, 0x3000, &[b"rd", b"wr", b"uw"]),
            vma(0x5000, 0x6000, &[b"rd", b"dc"]),
        ];
        let table = vma(0x8000, 0x9000, &[b"rd"]);
        let twin = |end, flags: &[&[u8; 2]]| [vma(0x1000, end, flags), table.clone()];
        assert!(confirms(&twin(0x3000, &[b"rd", b"wr"]), &assumed));
        assert!(!confirms(&twin(0x3000, &[b"rd", b"wr", b"wf"]), &assumed));
        assert!(!confirms(&twin(0x2000, &[b"rd", b"wr"]), &assumed));
        assert!(!confirms(&[], &assumed));
    }

    #[test]
    fn the_lists_differ_by_everything_but_flags() {
        let known = [vma(0x1000, 0x3000, &[b"rd"])];
        assert!(is_same_list(&known, &[vma(0x1000, 0x3000, &[])]));
        assert!(!is_same_list(&known, &[vma(0x1000, 0x4000, &[])]));
        assert!(!is_same_list(&known, &[]));
    }

    #[test]
    fn own_mappings_are_confirmed_by_themselves() {
        let me = std::process::id() as Pid;
        let all = proc::smaps(me).unwrap();
        assert!(confirms(&all, &all));
    }
}
