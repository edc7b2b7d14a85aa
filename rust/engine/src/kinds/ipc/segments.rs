//! System V shared memory (shmop(2)). Its bytes are those of a shared object; here is what the namespace knows of it, and
//! how processes attach it: a mapping made by mmap(2) would not count (shm_nattch) and could not be taken away by shmdt(2).

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_sys::remote::Batch;
use torpor_sys::sysv::{self, Attached, Kind};
use torpor_sys::{PAGE_SIZE, Pid, fd, namespace, proc};

use super::limits::{RMID_FORCED, Values, number};
use super::{IdMaps, Owner, Scene, is_segment, name};
use crate::bounds::Bounds;
use crate::error::{About, Error, Result};
use crate::kinds::memory::{self, Area, Source};
use crate::kinds::shared;

/// A segment. How large it is, and its bytes, are told by the shared object that names its id.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Its id.
    pub id: i32,
    /// Whose it is. The key of one that was removed is the one that it had.
    #[serde(flatten)]
    pub owner: Owner,
    /// It was removed, and goes when nobody has it attached any more (IPC_RMID).
    #[serde(default)]
    pub removed: bool,
    /// Kept in memory (SHM_LOCK).
    #[serde(default)]
    pub locked: bool,
}

// linux/shm.h
const SHM_DEST: u32 = 0o1000;
const SHM_LOCKED: u32 = 0o2000;

/// Files of segments and what they were called, by id.
pub(super) struct Found(BTreeMap<i32, (OwnedFd, String)>);

impl Found {
    /// The files behind all segments: through a process that has one attached, since attaching it shows. Others are
    /// attached for a moment.
    pub(super) fn of(scene: &Scene<'_>, segments: &[(i32, sysv::Segment)]) -> Result<Found> {
        let mut found = Found(BTreeMap::new());
        if segments.is_empty() {
            return Ok(found);
        }
        if segments.iter().any(|s| s.1.attached > 0) {
            for pid in scene.stopped {
                found.add_mapped(*pid)?;
            }
        }
        let rest: Vec<(i32, u64)> = segments
            .iter()
            .filter(|s| !found.0.contains_key(&s.0))
            .map(|(id, segment)| (*id, segment.size))
            .collect();
        let opened = namespace::within(scene.init, &["ipc"], || {
            let open = |&(id, size): &(i32, u64)| {
                let file = Attached::to(id, size, libc::SHM_RDONLY)?.file(libc::O_RDONLY)?;
                Ok((id, (file, String::new())))
            };
            rest.iter().map(open).collect::<torpor_sys::Result<Vec<_>>>()
        });
        found.0.extend(opened.about(scene.init, "System V shared memory")?);
        Ok(found)
    }

    fn add_mapped(&mut self, pid: Pid) -> Result<()> {
        for vma in proc::maps(pid).about(pid, "maps")?.iter().filter(|v| is_segment(v)) {
            // The kernel gives the id as the number of the inode (newseg in ipc/shm.c).
            let id = vma.inode as i32;
            if self.0.contains_key(&id) {
                continue;
            }
            let path = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
            let file = fd::open(&path, libc::O_RDONLY).about(pid, &vma.name)?;
            self.0.insert(id, (file, vma.name.clone()));
        }
        Ok(())
    }

    pub(super) fn take(&mut self, id: i32) -> Result<(OwnedFd, String)> {
        let gone = || Error::nonsense(format!("System V shared memory {id} is gone"));
        self.0.remove(&id).ok_or_else(gone)
    }
}

/// The key in the name of a mapping, `/SYSV` and eight digits.
fn key_in(name: &str) -> Option<i32> {
    let digits = name.strip_prefix("/SYSV")?.get(..8)?;
    u32::from_str_radix(digits, 16).ok().map(|key| key as i32)
}

/// # Errors
/// Refused: one that could not be made again.
pub(super) fn collect(
    scene: &Scene<'_>,
    id: i32,
    segment: &sysv::Segment,
    (file, link): (OwnedFd, String),
    limits: &Values,
    shared: &mut shared::Table,
) -> Result<State> {
    let refuse = |why: String, remedy| {
        let object = name(Kind::Shm, id, segment.owner.key);
        Err(Error::unsupported(scene.init, object, why, remedy))
    };
    let most = number(limits, "kernel/shmmax", 0);
    if segment.size > most {
        let why = format!(
            "it has {} bytes, and kernel.shmmax was lowered to {most} since",
            segment.size
        );
        return refuse(why, "raise it again");
    }
    if fd::is_hugetlb(&file).about(scene.init, "System V shared memory")? {
        return refuse("memory of huge pages (hugetlbfs) is not carried yet".into(), "");
    }
    shared.add_segment(scene.init, id, file)?;
    let removed = segment.owner.mode & SHM_DEST != 0;
    let mut owner = Owner::of(&segment.owner, scene.maps);
    if removed {
        owner.key = key_in(&link).unwrap_or(0);
    }
    Ok(State {
        id,
        owner,
        removed,
        locked: segment.owner.mode & SHM_LOCKED != 0,
    })
}

/// # Errors
/// Refused: segments that would be taken away before anybody could attach them.
pub(super) fn check_orphans(init: Pid, states: &[State], limits: &Values, seen: &[(i32, sysv::Segment)]) -> Result<()> {
    if number(limits, RMID_FORCED, 0) != 1 {
        return Ok(());
    }
    match seen.iter().zip(states).find(|((_, segment), _)| segment.attached == 0) {
        None => Ok(()),
        Some((_, state)) => Err(Error::unsupported(
            init,
            name(Kind::Shm, state.id, state.owner.key),
            "nobody has it attached, and kernel.shm_rmid_forced removes it when who made it ends",
            "attach it, or set kernel.shm_rmid_forced to 0",
        )),
    }
}

/// Removed segments first: another may have got the key of one.
pub(super) fn in_order(states: &[State]) -> Vec<&State> {
    let mut all: Vec<&State> = states.iter().collect();
    all.sort_by_key(|s| !s.removed);
    all
}

/// The size of a segment, in bytes.
pub(super) fn size_of(shared: &[shared::State], id: i32) -> u64 {
    let is = |s: &&shared::State| s.kind == shared::Kind::SystemV { id };
    shared.iter().find(is).map_or(0, |s| s.size)
}

/// # Errors
/// Refused: more locked memory than the container may have.
pub(super) fn plan(states: &[State], shared: &[shared::State], init: Pid, bounds: &Bounds) -> Result<()> {
    const CAP_IPC_LOCK: u64 = 14;
    for state in states {
        if shared
            .iter()
            .filter(|s| s.kind == shared::Kind::SystemV { id: state.id })
            .count()
            != 1
        {
            return Err(Error::nonsense(format!(
                "System V shared memory {} has no bytes",
                state.id
            )));
        }
    }
    let locked: Vec<&State> = states.iter().filter(|s| s.locked).collect();
    let Some(first) = locked.first().filter(|_| !bounds.grants(CAP_IPC_LOCK)) else {
        return Ok(());
    };
    let most = proc::limits(init).about(init, "limits")?[libc::RLIMIT_MEMLOCK as usize].1;
    let all: u64 = locked
        .iter()
        .map(|s| size_of(shared, s.id))
        .fold(0, u64::saturating_add);
    if all > most {
        let object = name(Kind::Shm, first.id, first.owner.key);
        let why = format!("the image locks {all} bytes in memory, the container may lock {most} (RLIMIT_MEMLOCK)");
        return Err(Error::refused(init, object, why));
    }
    Ok(())
}

/// Makes a segment again in the namespace of the calling thread: it is there as long as what is returned.
pub(super) fn rebuild(state: &State, size: u64, maps: &IdMaps) -> torpor_sys::Result<(Attached, OwnedFd)> {
    // linux/shm.h; the kernel does not tell who had it.
    const SHM_NORESERVE: i32 = 0o10000;
    let owner = state.owner.outside(maps);
    super::make(Kind::Shm, state.id, &owner, || {
        // More than there is of memory must have been made without reserving it.
        sysv::make_segment(&owner, size, 0).or_else(|_| {
            sysv::ask_for_id(Kind::Shm, state.id)?;
            sysv::make_segment(&owner, size, SHM_NORESERVE)
        })
    })?;
    let held = Attached::to(state.id, size, 0)?;
    let file = held.file(libc::O_RDWR)?;
    sysv::own_segment(state.id, &owner)?;
    if state.locked {
        sysv::lock_segment(state.id)?;
    }
    if state.removed {
        sysv::remove_segment(state.id)?;
    }
    Ok((held, file))
}

/// One shmat(2): where it was, and what is left of it.
#[derive(Debug)]
pub struct Attachment<'a> {
    id: i32,
    base: u64,
    end: u64,
    areas: Vec<&'a Area>,
}

/// What a process has attached. `segment` tells id and size of a shared object that is one.
pub fn attachments<'a>(
    areas: impl Iterator<Item = &'a Area>,
    segment: impl Fn(usize) -> Option<(i32, u64)>,
) -> Result<Vec<Attachment<'a>>> {
    let mut all: BTreeMap<(u64, i32), Attachment<'a>> = BTreeMap::new();
    for area in areas {
        let Source::Shared(index) = area.source else { continue };
        let Some((id, size)) = segment(index) else { continue };
        let base = area.start.checked_sub(area.offset);
        let end = base.and_then(|base| base.checked_add(size.checked_next_multiple_of(PAGE_SIZE)?));
        let (Some(base), Some(end)) = (base, end.filter(|end| area.end <= *end)) else {
            let what = format!(
                "the mapping at {:x} is not a part of System V shared memory {id}",
                area.start
            );
            return Err(Error::nonsense(what));
        };
        let new = Attachment {
            id,
            base,
            end,
            areas: Vec::new(),
        };
        all.entry((base, id)).or_insert(new).areas.push(area);
    }
    Ok(all.into_values().collect())
}

impl Attachment<'_> {
    /// The addresses that it takes when it is made.
    pub fn range(&self) -> (u64, u64) {
        (self.base, self.end)
    }

    /// # Errors
    /// Refused: what could not be attached again in the order of addresses, and mappings that do not all allow the same.
    pub fn check(&self, pid: Pid, areas: &[Area], kernel: &[(u64, u64)]) -> Result<()> {
        let is_own = |area: &Area| self.areas.iter().any(|own| own.start == area.start);
        let others = areas.iter().filter(|a| !is_own(a) && is_attached(a));
        let kernels = kernel.iter().map(|k| (k.0, k.0 + k.1));
        let mut taken = others.map(|a| (a.start, a.end)).chain(kernels);
        let why = if taken.any(|t| t.0 < self.end && self.base < t.1) {
            "something else is attached where a part of it was"
        } else if self.areas.iter().any(|a| a.only_read != self.areas[0].only_read) {
            "only parts of it may be written to"
        } else {
            return Ok(());
        };
        let object = format!("System V shared memory {} at {:x}", self.id, self.base);
        Err(Error::unsupported(pid, object, why, ""))
    }

    /// Attaches it, and takes away what is not there any more.
    pub fn rebuild(&self, batch: &mut Batch) {
        let only_read = self.areas.iter().all(|a| a.only_read);
        let (flags, given) = match only_read {
            true => (libc::SHM_RDONLY, libc::PROT_READ),
            false => (0, libc::PROT_READ | libc::PROT_WRITE),
        };
        let what = format!("shmat of {} at {:x}", self.id, self.base);
        batch.must(what, libc::SYS_shmat, [self.id.into(), self.base.into(), flags.into()]);
        let mut from = self.base;
        for (start, end) in self
            .areas
            .iter()
            .map(|a| (a.start, a.end))
            .chain([(self.end, self.end)])
        {
            if start > from {
                batch.must("munmap", libc::SYS_munmap, [from.into(), (start - from).into()]);
            }
            from = end;
        }
        for area in &self.areas {
            if area.prot != given {
                let args = [area.start.into(), (area.end - area.start).into(), area.prot.into()];
                batch.must("mprotect", libc::SYS_mprotect, args);
            }
            memory::advise(batch, area);
        }
    }
}

fn is_attached(area: &Area) -> bool {
    area.attached
}
