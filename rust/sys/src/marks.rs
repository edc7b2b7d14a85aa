//! Marks of mappings: what tells that one has not changed since it was looked at, without a look at its pages.
//!
//! The flags of a mapping are only in /proc/PID/smaps, which the kernel makes by a walk over every page, 15 ms per GiB.
//! An iterator over mappings (bpf(2), BPF_TRACE_ITER over `task_vma`; kernel 6.4 for the field `vm_lock_seq`) gives each
//! mapping's raw flags and the number of the last change in which it was locked, in some microseconds.
//!
//! Why two equal marks prove that nothing of a mapping but its pages has changed between them (include/linux/mmap_lock.h,
//! mm/vma.c, mm/madvise.c): whoever changes a mapping holds the address space's lock for writing and calls
//! vma_start_write, which stores `mm_lock_seq` into the mapping's `vm_lock_seq`. That number grows whenever the lock is
//! given back, and the iterator holds the lock for reading, so that it sees no change half done: one that is made after
//! it stores a larger number, and so does a mapping that is put in the place of another. `mm_lock_seq` begins anew in
//! the address space that execve(2) makes, so the number of those is in the mark (`self_exec_id`), and the time of birth,
//! should the pid belong to somebody else by now. The raw flags are in it for their own sake.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};

use crate::Pid;
use crate::btf::Btf;
use crate::error::{Error, Result, check};

const PROG_LOAD: i32 = 5;
const LINK_CREATE: i32 = 28;
const ITER_CREATE: i32 = 33;
const TRACING: u32 = 26;
const TRACE_ITER: u32 = 28;
const SEQ_WRITE: i32 = 127;

/// The mark of one mapping.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mark {
    /// First byte after it.
    pub end: u64,
    /// `vm_flags`, as this kernel numbers them.
    pub flags: u64,
    lock: u64,
    program: u64,
    born: u64,
}

/// The marks of all mappings of a process, by their first byte.
pub type Marks = BTreeMap<u64, Mark>;

/// The iterator's program, loaded.
#[derive(Debug)]
pub struct Marker {
    program: OwnedFd,
}

/// The iterator over one process, ready.
#[derive(Debug)]
pub struct Look {
    link: OwnedFd,
    pid: Pid,
}

/// Words of a record: start, end, flags, lock, program, born.
const WORDS: usize = 6;

impl Marker {
    /// Loads it.
    ///
    /// # Errors
    /// Where the kernel does not describe its types or has no such iterator, and without CAP_BPF and CAP_PERFMON.
    pub fn load() -> Result<Marker> {
        const TYPES: &str = "/sys/kernel/btf/vmlinux";
        let bytes = std::fs::read(TYPES).map_err(|e| Error::io("read", TYPES, &e))?;
        let (function, instructions) = program(&bytes).ok_or_else(|| Error::Parse {
            file: TYPES.into(),
            text: "no iterator over locked mappings".into(),
        })?;
        let mut attr = [0u32; 36];
        attr[0] = TRACING;
        attr[1] = instructions.len() as u32;
        put_address(&mut attr, 2, instructions.as_ptr().cast());
        put_address(&mut attr, 4, c"Dual MIT/GPL".as_ptr().cast());
        attr[17] = TRACE_ITER;
        attr[27] = function;
        let program = bpf(PROG_LOAD, &attr[..30], "iterator")?;
        Ok(Marker { program })
    }

    /// Makes it ready for one process.
    pub fn over(&self, pid: Pid) -> Result<Look> {
        let which = [pid as u32, 0, 0, 0];
        let mut attr = [0u32; 8];
        attr[0] = self.program.as_raw_fd() as u32;
        attr[2] = TRACE_ITER;
        put_address(&mut attr, 4, which.as_ptr().cast());
        attr[6] = size_of_val(&which) as u32;
        let link = bpf(LINK_CREATE, &attr, pid)?;
        Ok(Look { link, pid })
    }
}

impl Look {
    /// The marks that there are now.
    pub fn marks(&self) -> Result<Marks> {
        let iterator = bpf(ITER_CREATE, &[self.link.as_raw_fd() as u32, 0], self.pid)?;
        let mut iterator = File::from(iterator);
        // What the kernel gathers for one read fits: else records would come in parts (kernel/bpf/bpf_iter.c).
        let mut bytes = vec![0; 64 << 10];
        let mut marks = Marks::new();
        loop {
            let got = iterator
                .read(&mut bytes)
                .map_err(|e| Error::io("read", format!("mappings of {}", self.pid), &e))?;
            let before = marks.len();
            marks.extend(bytes[..got].chunks_exact(WORDS * 8).map(record));
            // Over one task it never ends: it gives the last mapping again.
            if marks.len() == before {
                return Ok(marks);
            }
        }
    }
}

fn record(bytes: &[u8]) -> (u64, Mark) {
    let word = |at: usize| {
        let c = &bytes[at * 8..];
        u64::from_ne_bytes([c[0], c[1], c[2], c[3], c[4], c[5], c[6], c[7]])
    };
    let mark = Mark {
        end: word(1),
        flags: word(2),
        lock: word(3),
        program: word(4),
        born: word(5),
    };
    (word(0), mark)
}

/// Whether marks can be had here.
pub fn is_available() -> bool {
    let own = std::process::id() as Pid;
    Marker::load().is_ok_and(|m| {
        m.over(own)
            .is_ok_and(|look| look.marks().is_ok_and(|all| !all.is_empty()))
    })
}

/// The number of the iterator's function, and a program that writes a record for each mapping.
fn program(types: &[u8]) -> Option<(u32, Vec<u64>)> {
    let btf = Btf::parse(types)?;
    let of_vma = btf.fields("vm_area_struct", &["vm_start", "vm_end", "vm_flags", "vm_lock_seq"])?;
    let of_task = btf.fields("task_struct", &["self_exec_id", "start_boottime"])?;
    // Operations (Documentation/bpf/standardization/instruction-set.rst).
    const LOAD: u8 = 0x79;
    const LOAD_32: u8 = 0x61;
    const STORE: u8 = 0x7b;
    const IF_ZERO: u8 = 0x15;
    const SET: u8 = 0xb7;
    const COPY: u8 = 0xbf;
    const ADD: u8 = 0x07;
    const CALL: u8 = 0x85;
    const EXIT: u8 = 0x95;
    let op = |code: u8, to: u8, from: u8, offset: i16, value: i32| {
        u64::from(code)
            | u64::from(to | from << 4) << 8
            | u64::from(offset as u16) << 16
            | u64::from(value as u32) << 32
    };
    // The context is {meta, task, vma}; the last two are null after the last mapping.
    let mut all = vec![op(LOAD, 6, 1, 16, 0), op(LOAD, 8, 1, 8, 0), op(LOAD, 7, 1, 0, 0)];
    let mut body = vec![op(LOAD, 1, 7, 0, 0)];
    let fields = [
        (LOAD, 6, of_vma[0]),
        (LOAD, 6, of_vma[1]),
        (LOAD, 6, of_vma[2]),
        (LOAD_32, 6, of_vma[3]),
        (LOAD_32, 8, of_task[0]),
        (LOAD, 8, of_task[1]),
    ];
    let size = (WORDS * 8) as i32;
    for (i, (load, from, offset)) in fields.into_iter().enumerate() {
        body.push(op(load, 2, from, offset, 0));
        body.push(op(STORE, 10, 2, i as i16 * 8 - size as i16, 0));
    }
    body.extend([
        op(COPY, 2, 10, 0, 0),
        op(ADD, 2, 0, 0, -size),
        op(SET, 3, 0, 0, size),
        op(CALL, 0, 0, 0, SEQ_WRITE),
    ]);
    all.push(op(IF_ZERO, 6, 0, body.len() as i16 + 1, 0));
    all.push(op(IF_ZERO, 8, 0, body.len() as i16, 0));
    all.extend(body);
    all.extend([op(SET, 0, 0, 0, 0), op(EXIT, 0, 0, 0, 0)]);
    Some((btf.function("bpf_iter_task_vma")?, all))
}

fn put_address(attr: &mut [u32], at: usize, pointer: *const u8) {
    let address = pointer as u64;
    attr[at] = address as u32;
    attr[at + 1] = (address >> 32) as u32;
}

fn bpf(command: i32, attr: &[u32], object: impl ToString) -> Result<OwnedFd> {
    // SAFETY: the kernel reads as much of attr as we say, and what its addresses point to lives with our callers.
    let raw = unsafe { libc::syscall(libc::SYS_bpf, command, attr.as_ptr(), size_of_val(attr)) };
    let fd = check(raw, "bpf", object)? as i32;
    // SAFETY: the kernel has just opened it for us.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::ptr;

    use super::*;
    use crate::proc;

    const LEN: usize = 8 << 12;

    fn map(at: *mut libc::c_void, flags: i32) -> u64 {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | flags;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        // SAFETY: a fresh mapping, or one in the place of another of ours.
        let got = unsafe { libc::mmap(at, LEN, prot, flags, -1, 0) };
        assert_ne!(got, libc::MAP_FAILED);
        got as u64
    }

    fn advise(at: u64, advice: i32) {
        // SAFETY: a mapping of ours; the advice does not touch its pages.
        assert_eq!(unsafe { libc::madvise(at as *mut libc::c_void, LEN, advice) }, 0);
    }

    /// A mapping that can be no neighbour's part: between two that nobody can touch.
    fn alone() -> u64 {
        // SAFETY: a reservation of our own.
        let whole = unsafe {
            let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS;
            libc::mmap(ptr::null_mut(), 3 * LEN, libc::PROT_NONE, flags, -1, 0)
        };
        assert_ne!(whole, libc::MAP_FAILED);
        map((whole as usize + LEN) as *mut libc::c_void, libc::MAP_FIXED)
    }

    fn look() -> Option<Look> {
        // In a container of its own a test may lack the rights.
        let marker = Marker::load().ok()?;
        Some(marker.over(std::process::id() as Pid).unwrap())
    }

    #[test]
    fn marks_are_those_of_the_mappings() {
        let Some(look) = look() else { return };
        let at = alone();
        let marks = look.marks().unwrap();
        let vma = proc::maps(std::process::id() as Pid)
            .unwrap()
            .into_iter()
            .find(|v| v.start == at)
            .unwrap();
        assert_eq!(marks[&at].end, vma.end);
        assert_eq!(marks[&at].flags & 7, 3, "read and write");
    }

    #[test]
    fn a_mapping_that_is_left_alone_keeps_its_mark() {
        let Some(look) = look() else { return };
        let at = alone();
        let before = look.marks().unwrap()[&at];
        // SAFETY: inside the mapping.
        unsafe { (at as *mut u8).write_volatile(1) };
        let other = alone();
        advise(other, libc::MADV_DONTDUMP);
        // Gives up pages, changes no flag.
        advise(at, libc::MADV_DONTNEED);
        assert_eq!(look.marks().unwrap()[&at], before);
    }

    #[test]
    fn what_is_changed_and_changed_back_has_another_mark() {
        let Some(look) = look() else { return };
        let at = alone();
        let before = look.marks().unwrap()[&at];
        advise(at, libc::MADV_DONTFORK);
        let between = look.marks().unwrap()[&at];
        advise(at, libc::MADV_DOFORK);
        let after = look.marks().unwrap()[&at];
        assert_ne!(between.flags, before.flags);
        assert_eq!(after.flags, before.flags);
        assert_ne!(after, before);
    }

    #[test]
    fn what_is_mapped_again_in_the_same_place_has_another_mark() {
        let Some(look) = look() else { return };
        let at = alone();
        let before = look.marks().unwrap()[&at];
        map(at as *mut libc::c_void, libc::MAP_FIXED);
        let again = look.marks().unwrap()[&at];
        assert_eq!((again.end, again.flags), (before.end, before.flags));
        assert_ne!(again, before);
        // SAFETY: both mappings are ours, of one size; the second gives way.
        let moved = unsafe {
            let (from, flags) = (alone(), libc::MREMAP_MAYMOVE | libc::MREMAP_FIXED);
            libc::mremap(from as *mut libc::c_void, LEN, LEN, flags, at)
        };
        assert_eq!(moved as u64, at);
        assert_ne!(look.marks().unwrap()[&at], again);
    }
}
