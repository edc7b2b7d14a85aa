//! The address space of a process: its mappings, where its data is, and the addresses that the kernel keeps.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_sys::fd;
use torpor_sys::mem::Memory;
use torpor_sys::proc::{self, Stat, Vma};
use torpor_sys::remote::{Arg, Batch, Results};
use torpor_sys::{PAGE_SIZE, Pid};

use super::paths::View;
use super::{ipc, numa, shared, vdso};
use crate::error::{About, Error, Result};
use crate::track::Tracking;

/// An address space.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Mappings, by address.
    pub areas: Vec<Area>,
    /// Start and length of the kernel's own parts (vvar, vdso), by address.
    pub kernel: Vec<(u64, u64)>,
    /// The first eleven fields of `struct prctl_mm_map`: code, data, brk, stack, arguments, environment.
    pub map: [u64; 11],
    /// Auxiliary vector.
    pub auxv: Vec<u64>,
    /// The program, as an index into the mapped files or a shared object.
    pub exe: Source,
    /// What was in huge pages: start and end, multiples of 2 MiB, by address.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub huge: Vec<(u64, u64)>,
    /// What mlockall(2) does to mappings to come: MCL_FUTURE, MCL_ONFAULT.
    #[serde(default)]
    pub lock_future: i32,
}

impl State {
    /// That of a process which has the address space of another one, as far as the image goes.
    pub fn elsewhere() -> State {
        State {
            areas: Vec::new(),
            kernel: Vec::new(),
            map: [0; 11],
            auxv: Vec::new(),
            exe: Source::Nothing,
            huge: Vec::new(),
            lock_future: 0,
        }
    }
}

/// Where the pages of a mapping come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Source {
    /// Zeroes.
    Nothing,
    /// A file with a name, by index.
    File(usize),
    /// A shared object, by index.
    Shared(usize),
}

/// One mapping.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Area {
    /// First byte.
    pub start: u64,
    /// First byte after it.
    pub end: u64,
    /// PROT_* bits.
    pub prot: i32,
    /// MAP_* bits other than how the address is chosen.
    pub flags: i32,
    /// What is mapped.
    pub source: Source,
    /// Where in the file, in bytes.
    pub offset: u64,
    /// Name given by PR_SET_VMA_ANON_NAME.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub name: Option<String>,
    /// Advice given by madvise(2) that lasts.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub advice: Vec<i32>,
    /// Locked in memory.
    #[serde(default)]
    pub locked: bool,
    /// Only those pages that are touched (mlock2(2), MLOCK_ONFAULT).
    #[serde(default, skip_serializing_if = "is_not")]
    pub locked_on_fault: bool,
    /// Sealed (mseal(2)).
    #[serde(default, skip_serializing_if = "is_not")]
    pub sealed: bool,
    /// On which nodes its pages are put.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub policy: Option<numa::Policy>,
    /// Guard pages in it: start and end, by address. Found when memory is captured.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub guards: Vec<(u64, u64)>,
    /// Counted as memory in use (VmFlags "ac"): it is or once was writable.
    #[serde(default)]
    pub accounted: bool,
    /// It is System V shared memory (shmat(2)).
    #[serde(skip)]
    pub attached: bool,
    /// System V shared memory that was attached for reading only.
    #[serde(default, skip_serializing_if = "is_not")]
    pub only_read: bool,
}

fn is_not(flag: &bool) -> bool {
    !flag
}

/// A file that is mapped.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MappedFile {
    /// Its path in the container.
    pub path: String,
    /// Mapped so that it could be written.
    pub writable: bool,
    /// Size in bytes when it was saved.
    pub size: u64,
    /// Time of its last change, in nanoseconds after the epoch.
    pub mtime: i64,
}

/// VmFlags (proc(5)) and the madvise(2) advice that sets each.
const ADVICE: [(&[u8; 2], i32); 8] = [
    (b"sr", libc::MADV_SEQUENTIAL),
    (b"rr", libc::MADV_RANDOM),
    (b"dc", libc::MADV_DONTFORK),
    (b"dd", libc::MADV_DONTDUMP),
    (b"hg", libc::MADV_HUGEPAGE),
    (b"nh", libc::MADV_NOHUGEPAGE),
    (b"wf", libc::MADV_WIPEONFORK),
    (b"mg", libc::MADV_MERGEABLE),
];

/// mmap(2): memory that the kernel may take away when it needs some (6.11).
const MAP_DROPPABLE: i32 = 8;
const MADV_GUARD_INSTALL: i32 = 102;
const SYS_MSEAL: i64 = 462;

/// Flags of mappings that are not carried, and what to call them.
const REFUSED: [(&[u8; 2], &str); 6] = [
    (b"ht", "memory of huge pages (hugetlbfs)"),
    (b"um", "memory watched by userfaultfd"),
    (b"uw", "memory write-protected by userfaultfd"),
    (b"ui", "memory watched by userfaultfd"),
    (b"ss", "a shadow stack"),
    (b"io", "memory of a device"),
];

/// What several address spaces share while they are collected.
#[derive(Debug)]
pub struct Tables<'v> {
    /// How the container sees its files.
    pub view: &'v View,
    /// Which mappings we ourselves watch.
    pub tracking: &'v Tracking,
    /// Files with a name that are mapped.
    pub mapped: Vec<MappedFile>,
    /// Shared objects.
    pub shared: shared::Table,
}

/// What only the process itself can be asked.
#[derive(Debug)]
pub struct Inside {
    brk: u64,
    lock_future: i32,
    policies: Vec<(u64, numa::Policy)>,
}

const PROT_BOTH: i32 = libc::PROT_READ | libc::PROT_WRITE;

/// Asks a process that is visited: its brk, the policies of its mappings, and whether a new mapping is locked, which a page
/// that is mapped for a moment shows: locked memory cannot be given up, and is there before it is touched.
pub fn ask(vmas: &[Vma], run: &mut dyn FnMut(&Batch) -> Result<Results>) -> Result<Inside> {
    const EINVAL: i64 = -22;
    let mut batch = Batch::new();
    let brk = batch.must("brk", libc::SYS_brk, [0.into()]);
    let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
    let args = [
        0.into(),
        PAGE_SIZE.into(),
        PROT_BOTH.into(),
        flags.into(),
        (-1).into(),
        0.into(),
    ];
    let page = Arg::Result(batch.must("a page", libc::SYS_mmap, args));
    let is_there = batch.room(8);
    batch.may("mincore", libc::SYS_mincore, [page, PAGE_SIZE.into(), is_there.into()]);
    let args = [page, PAGE_SIZE.into(), libc::MADV_DONTNEED.into()];
    let given_up = batch.may("MADV_DONTNEED", libc::SYS_madvise, args);
    batch.must("munmap", libc::SYS_munmap, [page, PAGE_SIZE.into()]);
    let results = run(&batch)?;
    let is_locked = results.raw(given_up) == EINVAL;
    let waits = results.bytes(is_there)[0] & 1 == 0;
    let starts: Vec<u64> = vmas.iter().filter(|v| !is_kernels(v)).map(|v| v.start).collect();
    Ok(Inside {
        brk: results.raw(brk) as u64,
        lock_future: match (is_locked, waits) {
            (false, _) => 0,
            (true, false) => libc::MCL_FUTURE,
            (true, true) => libc::MCL_FUTURE | libc::MCL_ONFAULT,
        },
        policies: numa::collect(&starts, run)?,
    })
}

fn is_kernels(vma: &Vma) -> bool {
    vdso::is_part(vma) || vma.name == "[vsyscall]"
}

/// The address space of a stopped process. `vmas` come from smaps.
pub fn collect(pid: Pid, vmas: &[Vma], stat: &Stat, inside: &Inside, tables: &mut Tables<'_>) -> Result<State> {
    let kernel: Vec<(u64, u64)> = vmas
        .iter()
        .filter(|v| vdso::is_part(v))
        .map(|v| (v.start, v.len()))
        .collect();
    let mut areas = Vec::new();
    for vma in vmas.iter().filter(|v| !is_kernels(v)) {
        let mut area = area(pid, vma, tables)?;
        let policy = inside.policies.iter().find(|(start, _)| *start == area.start);
        area.policy = policy.map(|(_, policy)| policy.clone());
        areas.push(area);
    }
    let segment = |index: usize| tables.shared.states.get(index).and_then(shared::State::segment);
    for attachment in ipc::segments::attachments(areas.iter(), segment)? {
        attachment.check(pid, &areas, &kernel)?;
    }
    let auxv = proc::auxv(pid).about(pid, "auxv")?;
    let word = |c: &[u8]| u64::from_le_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]]);
    Ok(State {
        areas,
        kernel,
        map: [
            stat.start_code,
            stat.end_code,
            stat.start_data,
            stat.end_data,
            stat.start_brk,
            inside.brk,
            stat.start_stack,
            stat.arg_start,
            stat.arg_end,
            stat.env_start,
            stat.env_end,
        ],
        auxv: auxv.chunks_exact(8).map(word).collect(),
        exe: exe(pid, tables)?,
        // Found when memory is captured.
        huge: Vec::new(),
        lock_future: inside.lock_future,
    })
}

fn exe(pid: Pid, tables: &mut Tables<'_>) -> Result<Source> {
    let path = format!("/proc/{pid}/exe");
    let link = proc::link(&path).about(pid, "exe")?;
    let file = fd::open(&path, libc::O_PATH).about(pid, "exe")?;
    source_of(pid, &link, &file, false, tables)
}

fn name_of(vma: &Vma) -> String {
    format!("mapping {:x}-{:x} {}", vma.start, vma.end, vma.name)
}

/// # Errors
/// Refused: what no image holds.
fn check(pid: Pid, vma: &Vma, is_watched_by_us: impl Fn() -> bool) -> Result<()> {
    let refuse = |what: String| {
        Err(Error::unsupported(
            pid,
            name_of(vma),
            format!("{what} is not carried yet"),
            "",
        ))
    };
    for (flag, what) in REFUSED {
        if vma.has(flag) && !(flag == b"uw" && is_watched_by_us()) {
            return refuse(what.into());
        }
    }
    if vma.key != 0 {
        return refuse(format!("its protection key {} (pkey_mprotect(2))", vma.key));
    }
    Ok(())
}

fn area(pid: Pid, vma: &Vma, tables: &mut Tables<'_>) -> Result<Area> {
    let object = || name_of(vma);
    // Our own watch is not the program's.
    check(pid, vma, || tables.tracking.owns(pid, vma.start, vma.end))?;
    let attached = ipc::is_segment(vma);
    let is_file = attached || vma.inode != 0;
    let source = if is_file {
        let path = format!("/proc/{pid}/map_files/{:x}-{:x}", vma.start, vma.end);
        // A mapping whose file was opened for writing could be made writable by mprotect(2) later.
        let writable = vma.shared && vma.has(b"mw");
        // Only to be looked at: opening it for reading would be an event for whoever watches it (inotify(7)).
        let file = fd::open(&path, libc::O_PATH).about(pid, object())?;
        source_of(pid, &vma.name, &file, writable, tables)?
    } else {
        Source::Nothing
    };
    let bit = |on: bool, flag| if on { flag } else { 0 };
    let flags = if vma.shared {
        libc::MAP_SHARED
    } else if vma.has(b"dp") {
        MAP_DROPPABLE
    } else {
        libc::MAP_PRIVATE
    } | bit(source == Source::Nothing, libc::MAP_ANONYMOUS)
        | bit(vma.has(b"gd"), libc::MAP_GROWSDOWN)
        | bit(vma.has(b"nr"), libc::MAP_NORESERVE);
    Ok(Area {
        start: vma.start,
        end: vma.end,
        prot: vma.prot(),
        flags,
        source,
        offset: vma.offset,
        name: given_name(&vma.name),
        advice: ADVICE
            .iter()
            .filter(|(flag, _)| vma.has(flag))
            .map(|(_, advice)| *advice)
            .collect(),
        locked: vma.has(b"lo"),
        locked_on_fault: vma.has(b"lf"),
        sealed: vma.has(b"sl"),
        policy: None,
        guards: Vec::new(),
        accounted: vma.has(b"ac"),
        attached,
        only_read: attached && !vma.has(b"mw"),
    })
}

fn given_name(name: &str) -> Option<String> {
    let inner = name
        .strip_prefix("[anon:")
        .or_else(|| name.strip_prefix("[anon_shmem:"))?;
    inner.strip_suffix(']').map(String::from)
}

fn source_of(pid: Pid, name: &str, file: &OwnedFd, writable: bool, tables: &mut Tables<'_>) -> Result<Source> {
    if let Some(index) = tables.shared.index(pid, name, file)? {
        return Ok(Source::Shared(index));
    }
    let id = fd::stat(file).about(pid, name)?;
    let zero = id.kind() == libc::S_IFCHR && id.rdev == libc::makedev(1, 5);
    if id.kind() != libc::S_IFREG && !zero {
        let why = "a mapping of something that is not a file is not carried";
        return Err(Error::unsupported(pid, format!("mapping of {name}"), why, ""));
    }
    let path = name.replace("\\012", "\n");
    // glibc makes a named semaphore under another name, which it takes away again.
    let path = match path.strip_suffix(" (deleted)") {
        Some(gone) => tables.view.other_name(gone, &id).unwrap_or(path),
        None => path,
    };
    let known = tables
        .mapped
        .iter()
        .position(|m| m.path == path && m.writable == writable);
    if let Some(index) = known {
        return Ok(Source::File(index));
    }
    tables.view.check(pid, &format!("mapped file {path}"), &path, &id)?;
    tables.mapped.push(MappedFile {
        path,
        writable,
        size: id.size,
        mtime: id.mtime,
    });
    Ok(Source::File(tables.mapped.len() - 1))
}

impl Area {
    /// Whether its data belongs to the process alone, so that it is saved with it.
    pub fn is_private(&self) -> bool {
        self.flags & (libc::MAP_PRIVATE | MAP_DROPPABLE) != 0
    }

    /// Whether a child gets a copy of it (fork(2)): if not, a twin does not have it either.
    pub fn is_inherited(&self) -> bool {
        !self.advice.contains(&libc::MADV_DONTFORK) && !self.advice.contains(&libc::MADV_WIPEONFORK)
    }

    /// Whether its pages may come after the program runs: only plain memory can be watched (userfaultfd(2)), and what
    /// a child finds empty would be brought to it.
    pub fn can_wait(&self) -> bool {
        let wiped = self.advice.contains(&libc::MADV_WIPEONFORK);
        self.source == Source::Nothing && self.is_opened() && !self.locked && !wiped
    }

    /// Made writable until it is filled; then its real protection is set by [`seal`]. One that never was
    /// writable stays as it is: making it so would count it as memory in use.
    pub fn is_opened(&self) -> bool {
        self.is_private() && (self.accounted || self.prot & libc::PROT_WRITE != 0)
    }
}

/// Maps one area. `fd` is where its file is open.
pub fn rebuild_area(batch: &mut Batch, area: &Area, fd: Arg) {
    let prot = if area.is_opened() {
        libc::PROT_READ | libc::PROT_WRITE
    } else {
        area.prot
    };
    let flags = area.flags | libc::MAP_FIXED_NOREPLACE;
    let what = format!("mmap of {:x}-{:x}", area.start, area.end);
    let len = area.end - area.start;
    let args = [
        area.start.into(),
        len.into(),
        prot.into(),
        flags.into(),
        fd,
        area.offset.into(),
    ];
    batch.must(what, libc::SYS_mmap, args);
    advise(batch, area);
}

/// Gives an area that is mapped its memory policy and the advice that lasts.
pub fn advise(batch: &mut Batch, area: &Area) {
    let len = area.end - area.start;
    numa::rebuild_area(batch, area);
    for advice in &area.advice {
        batch.must(
            "madvise",
            libc::SYS_madvise,
            [area.start.into(), len.into(), (*advice).into()],
        );
    }
}

/// Gives an area that has been filled its final protection, name, guards, lock and seal.
pub fn seal(batch: &mut Batch, area: &Area) {
    const PR_SET_VMA: i32 = 0x5356_4d41;
    let len = area.end - area.start;
    if area.is_opened() && area.prot != libc::PROT_READ | libc::PROT_WRITE {
        let what = format!("mprotect of {:x}-{:x}", area.start, area.end);
        batch.must(
            what,
            libc::SYS_mprotect,
            [area.start.into(), len.into(), area.prot.into()],
        );
    }
    if let Some(name) = &area.name {
        let text = batch.string(name);
        let args = [PR_SET_VMA.into(), 0.into(), area.start.into(), len.into(), text.into()];
        batch.may("PR_SET_VMA", libc::SYS_prctl, args);
    }
    for &(start, end) in &area.guards {
        let args = [start.into(), (end - start).into(), MADV_GUARD_INSTALL.into()];
        batch.must(format!("guard of {start:x}-{end:x}"), libc::SYS_madvise, args);
    }
    let range = [area.start.into(), len.into()];
    if area.locked_on_fault {
        const MLOCK_ONFAULT: i32 = 1;
        let args = [range[0], range[1], MLOCK_ONFAULT.into()];
        batch.must("mlock2", libc::SYS_mlock2, args);
    } else if area.locked && area.guards.is_empty() {
        batch.must("mlock", libc::SYS_mlock, range);
    } else if area.locked {
        // It is locked, and then said that the guards cannot be brought in.
        batch.may("mlock", libc::SYS_mlock, range);
    }
    if area.sealed {
        let args = [range[0], range[1], 0.into()];
        batch.must(format!("mseal of {:x}-{:x}", area.start, area.end), SYS_MSEAL, args);
    }
}

/// What mlockall(2) is to do to mappings to come.
pub fn rebuild_lock_future(batch: &mut Batch, state: &State) {
    if state.lock_future != 0 {
        batch.must("mlockall", libc::SYS_mlockall, [state.lock_future.into()]);
    }
}

/// Sets the kernel's notes on the address space: brk, arguments, auxiliary vector, program.
pub fn rebuild_map(batch: &mut Batch, state: &State, exe: Arg) {
    const PR_SET_MM: i32 = 35;
    const PR_SET_MM_MAP: i32 = 14;
    const SIZE: u64 = 104;
    let auxv: Vec<u8> = state.auxv.iter().flat_map(|w| w.to_le_bytes()).collect();
    let vector = batch.data(&auxv);
    let mut bytes: Vec<u8> = state.map.iter().flat_map(|w| w.to_le_bytes()).collect();
    bytes.extend_from_slice(&[0; 8]);
    bytes.extend_from_slice(&(auxv.len() as u32).to_le_bytes());
    let exe = match exe {
        Arg::Value(fd) => fd as u32,
        _ => u32::MAX,
    };
    bytes.extend_from_slice(&exe.to_le_bytes());
    let map = batch.data(&bytes);
    batch.point(map.skip(88), vector);
    let args = [
        PR_SET_MM.into(),
        PR_SET_MM_MAP.into(),
        map.into(),
        SIZE.into(),
        0.into(),
    ];
    batch.must("PR_SET_MM_MAP", libc::SYS_prctl, args);
}

/// Takes private pages away: what is behind them shows again.
pub fn drop_pages(batch: &mut Batch, start: u64, end: u64) {
    let args = [start.into(), (end - start).into(), libc::MADV_DONTNEED.into()];
    batch.must("MADV_DONTNEED", libc::SYS_madvise, args);
}

/// Unmaps everything below the end of user space but the given ranges (sorted).
pub fn clear(batch: &mut Batch, keep: &[(u64, u64)]) {
    const TOP: u64 = 0x7fff_ffff_f000;
    let mut from = 0;
    for &(start, end) in keep.iter().chain([&(TOP, TOP)]) {
        if start > from {
            batch.must("munmap", libc::SYS_munmap, [from.into(), (start - from).into()]);
        }
        from = from.max(end);
    }
}

/// A range of `len` bytes that is free in all of the given layouts.
pub fn common_hole(taken: &[(u64, u64)], len: u64) -> Option<u64> {
    let mut taken = taken.to_vec();
    taken.sort_unstable();
    // Above the lowest addresses, which a program may map itself, and away from the top.
    let mut from = 0x1000_0000u64;
    for (start, end) in taken.into_iter().chain([(0x7000_0000_0000, 0)]) {
        if start >= from.saturating_add(len + 2 * PAGE_SIZE) {
            return Some(from + PAGE_SIZE);
        }
        from = from.max(end);
    }
    None
}

/// Reads the memory of a process that is being visited or built.
pub fn open(pid: Pid) -> Result<Memory> {
    Memory::open(pid).about(pid, "memory")
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn a_mapping_with_a_protection_key_is_refused_by_name() {
        let smaps = |key| {
            format!(
                "7f00-8f00 rw-p 00000000 00:00 0 \nSize: 4 kB\nProtectionKey:  {key}\nVmFlags: rd wr mr mw me ac uw \n"
            )
        };
        let vma = |key: u32| proc::parse_maps(&smaps(key)).unwrap().remove(0);
        check(1, &vma(0), || true).unwrap();
        let watched = check(1, &vma(0), || false).unwrap_err().to_string();
        assert!(watched.contains("write-protected by userfaultfd"), "{watched}");
        let refused = check(12, &vma(3), || true).unwrap_err().to_string();
        assert!(
            refused.contains("12") && refused.contains("mapping 7f00-8f00"),
            "{refused}"
        );
        assert!(refused.contains("protection key 3"), "{refused}");
    }
}
