//! What can be known of mappings before anything is stopped.
//!
//! Only smaps tells the flags of a mapping, and the kernel makes it by a walk over every page: some 15 ms per GiB that
//! a pause need not hold. So it is read while the container runs. What was read is believed for one of two reasons:
//!
//! - *Proof*, where no twin may be made (memory is tracked: a watch is in the flags of a mapping and not in those of its
//!   twin). Marks are read before smaps and in the pause (see `torpor_sys::marks`). A mapping whose mark is the same has
//!   not changed since before its flags were read: they are its flags now, however the program changed it and changed
//!   it back, or mapped another in its place. All others are told by their raw flags: the letters of smaps depend on
//!   those alone (show_smap_vma_flags in fs/proc/task_mmu.c), so a mapping with the raw flags of one that is proven has
//!   its letters. If there is one whose raw flags no proven mapping has, smaps is read in the pause.
//! - *Assumption*, that is confirmed later. The plain list of mappings is read in the pause, and must be the same. A flag
//!   can have changed without the list changing (madvise(2)): so when the container runs again, smaps of its twin, which
//!   is as it was in the pause, has to confirm what was assumed.

use std::collections::{BTreeMap, HashMap};

use torpor_sys::Pid;
use torpor_sys::marks::{Look, Marker, Marks};
use torpor_sys::proc::{self, Status, Vma};

use crate::error::{About, Result};
use crate::freeze;
use crate::kinds::ipc;

/// Flags that a twin does not inherit (fork(2), userfaultfd(2)), or that come and go by themselves.
const NOT_INHERITED: [&[u8; 2]; 6] = [b"lo", b"lf", b"um", b"uw", b"ui", b"sd"];

/// A process with less memory is read in the pause: that takes less time than a proof.
const SMALL: u64 = 32 << 20;

/// The mappings of running processes, with their flags.
#[derive(Debug, Default)]
pub struct Advance(BTreeMap<Pid, Seen>);

/// Those of one process.
#[derive(Debug)]
struct Seen {
    vmas: Vec<Vma>,
    proof: Option<Proof>,
}

/// What was there before they were read, and how to look at it again.
#[derive(Debug)]
struct Proof {
    look: Look,
    marks: Marks,
}

impl Advance {
    /// Reads them, of the container whose init is `init`, to be confirmed by twins. A process that cannot be read is left
    /// for the pause.
    pub fn assume(init: Pid) -> Advance {
        let read = |pid| {
            let vmas = proc::smaps(pid).ok()?;
            Some((pid, Seen { vmas, proof: None }))
        };
        let pids = freeze::tree(init).unwrap_or_default();
        Advance(pids.into_iter().filter_map(read).collect())
    }

    /// Reads those of large processes, with what will prove that they are still true. Where the kernel gives no proof
    /// nothing is read.
    pub fn prove(init: Pid) -> Advance {
        let mut pids = freeze::tree(init).unwrap_or_default();
        pids.retain(|pid| proc::resident(*pid).is_ok_and(|bytes| bytes >= SMALL));
        let Some(marker) = (!pids.is_empty()).then(Marker::load).and_then(|m| m.ok()) else {
            return Advance::default();
        };
        let read = |pid| {
            let look = marker.over(pid).ok()?;
            // Before smaps: it is the look that has to be the older one.
            let marks = look.marks().ok()?;
            let proof = Some(Proof { look, marks });
            let vmas = proc::smaps(pid).ok()?;
            Some((pid, Seen { vmas, proof }))
        };
        Advance(pids.into_iter().filter_map(read).collect())
    }

    /// There will be no twin.
    pub fn believe_only_proof(&mut self) {
        self.0.retain(|_, seen| seen.proof.is_some());
    }

    /// The mappings of a process that has stopped, and whether a twin has to confirm their flags.
    pub fn settle(&mut self, pid: Pid, status: &Status) -> Result<(Vec<Vma>, bool)> {
        match self.0.remove(&pid) {
            Some(Seen {
                vmas,
                proof: Some(proof),
            }) => {
                let now = proc::maps(pid).about(pid, "maps")?;
                if let Some(proven) = proof.look.marks().ok().and_then(|after| {
                    let letters = Letters::proven(&vmas, &proof.marks, &after);
                    letters.of_all(now, &after)
                }) {
                    return Ok((proven, false));
                }
            }
            // A twin cannot tell what is locked, and has no System V shared memory.
            Some(Seen { vmas, proof: None })
                if status.locked_kib == 0 && !vmas.iter().any(|v| v.has(b"lo") || ipc::is_segment(v)) =>
            {
                let now = proc::maps(pid).about(pid, "maps")?;
                if is_same_list(&vmas, &now) {
                    return Ok((vmas, true));
                }
            }
            _ => {}
        }
        Ok((proc::smaps(pid).about(pid, "smaps")?, false))
    }
}

/// What smaps says of mappings with the same raw flags.
#[derive(Debug)]
struct Letters(HashMap<u64, (Vec<[u8; 2]>, u32)>);

impl Letters {
    /// From mappings that have not changed from `before` to `after` and were read in between.
    fn proven(read: &[Vma], before: &Marks, after: &Marks) -> Letters {
        let is_proven = |vma: &&Vma| {
            before
                .get(&vma.start)
                .is_some_and(|m| m.end == vma.end && after.get(&vma.start) == Some(m))
        };
        Letters(
            read.iter()
                .filter(is_proven)
                .map(|vma| (before[&vma.start].flags, (vma.flags.clone(), vma.key)))
                .collect(),
        )
    }

    /// Gives them to a list of mappings without; nothing when those of one are not known.
    fn of_all(&self, list: Vec<Vma>, marks: &Marks) -> Option<Vec<Vma>> {
        list.into_iter()
            .map(|vma| {
                // A page of the kernel, at an address that no mapping of a program has: it is refused or left out by name.
                if vma.name == "[vsyscall]" {
                    return Some(vma);
                }
                let mark = marks.get(&vma.start).filter(|m| m.end == vma.end)?;
                let (flags, key) = self.0.get(&mark.flags)?.clone();
                Some(Vma { flags, key, ..vma })
            })
            .collect()
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
