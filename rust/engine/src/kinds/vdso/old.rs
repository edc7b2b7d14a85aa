//! The vdso of another kernel, or of this one on another processor: it stays where it was, and its functions lead to
//! those of this kernel.
//!
//! Programs have the addresses of its functions in their C library, and maybe on their stacks. So its pages are mapped
//! again at the old place, as memory like any other, and each function begins with a jump into the vdso of this kernel,
//! which lies beside it together with its data pages. Whoever was stopped inside a function of the old one runs on in
//! it (a handler may have interrupted it: nobody can tell all of them). In place of the data that it reads there are
//! zeroes: by `seq` having changed it finds that what it had read is no longer true and begins again, and a clock mode
//! of 0 (VDSO_CLOCKMODE_NONE) sends it to the system call; getrandom does so because `is_ready` is 0
//! (lib/vdso/gettimeofday.c, lib/vdso/getrandom.c). time(2), clock_getres(2) and the coarse clocks have no such
//! way out: who was just in them may read 0 once, and the report says so.
//!
//! An image can hold any code in any mapping, so this one gives it no more power than the program has.

use std::collections::BTreeMap;

use torpor_sys::PAGE_SIZE;
use torpor_sys::mem::Memory;

use super::entries::{self, JUMP};
use crate::error::{About, Error, Result};
use crate::kinds::memory::{Area, Source};
use crate::model::{Body, Inventory};

/// How far a jump may lead, with room to spare.
const REACH: u64 = 1 << 30;
/// A hole of less is not used in its middle: a stack or a heap beside it is to grow.
const WIDE: u64 = 256 << 20;
/// Which of [`crate::kinds::cpu::State::regs`] is rip.
const RIP: usize = 16;
/// Functions that do not work with zeroes for data.
const NEED_DATA: [&str; 2] = ["__vdso_time", "__vdso_clock_getres"];

/// The kernel's parts as they lie in every new process here.
#[derive(Debug)]
pub struct Here {
    /// Distance from the first, and length of each.
    pub parts: Vec<(u64, u64)>,
    /// The code of the vdso.
    pub code: Vec<u8>,
}

/// What has to be written into processes.
#[derive(Debug, Default)]
pub struct Old(BTreeMap<i32, Written>);

#[derive(Debug)]
struct Written {
    address: u64,
    code: Vec<u8>,
}

impl Old {
    /// Gives every process of the image the old vdso as memory and this kernel's own beside it.
    pub fn adopt(inventory: &mut Inventory, code: &[u8], here: &Here) -> Result<Old> {
        let functions = (entries::of(code)?, entries::of(&here.code)?);
        let mut old = Old::default();
        let threads = threads(inventory);
        for process in &mut inventory.processes {
            // Memory in common is changed once.
            let Some(body) = process.body.as_mut().filter(|b| b.sharing.memory.is_none()) else {
                continue;
            };
            let kernel = body.memory.kernel.clone();
            let new = place(process.pid, body, here)?;
            for (at, &(start, len)) in kernel.iter().enumerate() {
                map(body, start, len, at + 1 == kernel.len())?;
            }
            // The code is the last of the parts.
            let (Some(from), Some(to)) = (kernel.last(), new.last()) else {
                continue;
            };
            let mut patched = code.to_vec();
            if patched.len() as u64 > from.1 {
                return Err(Error::nonsense("its vdso is longer than its place"));
            }
            let skipped = inside(
                threads.get(&process.pid).map_or(&[], Vec::as_slice),
                from.0,
                code.len() as u64,
                &functions.0,
                &mut inventory.warnings,
            )?;
            for (name, at) in &functions.0 {
                let Some(target) = functions.1.get(name).filter(|_| !skipped.contains(name)) else {
                    continue;
                };
                let jump = entries::jump(from.0 + at, to.0 + target);
                let range = *at as usize..(at + JUMP) as usize;
                match (jump, patched.get_mut(range)) {
                    (Some(jump), Some(room)) => room.copy_from_slice(&jump),
                    _ => return Err(Error::nonsense(format!("its vdso has no room in {name}"))),
                }
            }
            body.memory.kernel = new;
            let (address, code) = (from.0, patched);
            old.0.insert(process.pid, Written { address, code });
        }
        Ok(old)
    }

    /// Writes it into a process that is laid out.
    pub fn rebuild(&self, pid: i32, memory: &Memory) -> Result<()> {
        match self.0.get(&pid) {
            Some(old) => memory.write(old.address, &old.code).about(pid, "old vdso"),
            None => Ok(()),
        }
    }
}

/// Where a thread stands.
struct Place {
    pid: i32,
    tid: i32,
    rip: u64,
}

/// All threads that use the memory of a process, by that process.
fn threads(inventory: &Inventory) -> BTreeMap<i32, Vec<Place>> {
    let mut all: BTreeMap<i32, Vec<Place>> = BTreeMap::new();
    for process in &inventory.processes {
        let Some(body) = &process.body else { continue };
        let places = body.threads.iter().map(|thread| Place {
            pid: process.pid,
            tid: thread.tid,
            rip: thread.cpu.regs.get(RIP).copied().unwrap_or(0),
        });
        let holder = body.sharing.memory.unwrap_or(process.pid);
        all.entry(holder).or_default().extend(places);
    }
    all
}

/// Names of functions that begin where a thread stands on its first steps: no jump can be put under it. Says which threads
/// may notice.
fn inside(
    threads: &[Place],
    start: u64,
    len: u64,
    functions: &BTreeMap<String, u64>,
    warnings: &mut Vec<String>,
) -> Result<Vec<String>> {
    let mut skipped = Vec::new();
    for thread in threads {
        let Some(at) = thread.rip.checked_sub(start).filter(|at| *at < len) else {
            continue;
        };
        let under = |f: &(&String, &u64)| (1..JUMP).contains(&at.wrapping_sub(*f.1));
        let under: Vec<&String> = functions.iter().filter(under).map(|f| f.0).collect();
        if let Some(name) = under.iter().find(|n| NEED_DATA.contains(&n.as_str())) {
            return Err(Error::unsupported(
                thread.tid,
                "vdso",
                format!("it had just begun {name} of another kernel's vdso, which cannot go on here"),
                "restore on the kernel that the image was made on",
            ));
        }
        skipped.extend(under.into_iter().cloned());
        if !functions.values().any(|f| *f == at) {
            warnings.push(format!(
                "thread {} of process {} was inside another kernel's vdso: a coarse clock or time(2) that it was just \
                 reading may tell 0",
                thread.tid, thread.pid
            ));
        }
    }
    Ok(skipped)
}

/// Where this kernel's parts go: in reach of the old ones, above them if there is room, else in the widest hole.
fn place(pid: i32, body: &Body, here: &Here) -> Result<Vec<(u64, u64)>> {
    const TOP: u64 = 0x7fff_ffff_f000;
    let len = here.parts.last().map_or(0, |(at, len)| at + len);
    let mut taken: Vec<(u64, u64)> = body.memory.areas.iter().map(|a| (a.start, a.end)).collect();
    taken.extend(body.memory.kernel.iter().map(|k| (k.0, k.0.saturating_add(k.1))));
    taken.sort_unstable();
    let (Some(first), Some(last)) = (body.memory.kernel.first(), body.memory.kernel.last()) else {
        return Err(Error::nonsense("a process without vdso"));
    };
    let (low, high) = (last.0.saturating_sub(REACH), first.0.saturating_add(REACH).min(TOP));
    let mut holes = Vec::new();
    let mut from = low.max(1 << 20);
    for (start, end) in taken.into_iter().chain([(high, high)]) {
        if start.min(high) > from {
            holes.push((from, start.min(high)));
        }
        from = from.max(end);
    }
    let end = last.0.saturating_add(last.1);
    let fits = |hole: &&(u64, u64)| hole.1 - hole.0 >= len + 2 * PAGE_SIZE;
    let above = holes.iter().filter(fits).find(|hole| hole.0 == end);
    let widest = holes.iter().filter(fits).max_by_key(|hole| hole.1 - hole.0);
    let base = match (above, widest) {
        (Some(hole), _) if hole.1 == TOP || hole.1 - hole.0 < WIDE => hole.0 + PAGE_SIZE,
        (_, Some(hole)) => (hole.0 + (hole.1 - hole.0 - len) / 2) & !(PAGE_SIZE - 1),
        _ => {
            let why = "this kernel's is another one than the image's, and there is no room for it beside that";
            let remedy = "restore on the kernel that the image was made on";
            return Err(Error::unsupported(pid, "vdso", why, remedy));
        }
    };
    Ok(here.parts.iter().map(|(at, len)| (base + at, *len)).collect())
}

/// Makes memory of one of the old parts: zeroes, or code that is written into it later.
fn map(body: &mut Body, start: u64, len: u64, is_code: bool) -> Result<()> {
    let nonsense = || Error::nonsense(format!("the kernel's part at {start:x} has no place"));
    let end = start.checked_add(len).ok_or_else(nonsense)?;
    let areas = &mut body.memory.areas;
    let at = areas.partition_point(|a| a.end <= start);
    let is_free = areas.get(at).is_none_or(|next| end <= next.start);
    if !is_free || start % PAGE_SIZE != 0 || len % PAGE_SIZE != 0 || len == 0 {
        return Err(nonsense());
    }
    let prot = if is_code {
        libc::PROT_READ | libc::PROT_EXEC
    } else {
        libc::PROT_READ
    };
    areas.insert(
        at,
        Area {
            start,
            end,
            prot,
            flags: libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
            source: Source::Nothing,
            offset: 0,
            name: None,
            advice: Vec::new(),
            locked: false,
            locked_on_fault: false,
            sealed: false,
            policy: None,
            guards: Vec::new(),
            accounted: false,
            attached: false,
            only_read: false,
        },
    );
    Ok(())
}
