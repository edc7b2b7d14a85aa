//! Running calls inside a living task so that it never notices, not even when the tracer is killed half way.
//!
//! The stub is put into the unused tail of the task's vdso page, a page that every process has, that is
//! executable, and that nobody reads there. It holds, as constants, all that is needed to put the task back:
//! registers, flags, signal mask, and where to go on. So from the first changed register on, the task finds
//! its way home by itself if it is let run: no instant exists at which killing the tracer would harm it.
//! Because rt_sigreturn(2) is not used, an interrupted sleep keeps its restart block; because the stub leaves
//! vector registers alone, none have to be restored.
//!
//! A task that catches its own system calls by a selector (PR_SET_SYSCALL_USER_DISPATCH) has that set to "allow" by the
//! stub, and back at the end. All threads that may have the same selector must stand still meanwhile.
//!
//! The end of a batch is told to the tracer by a signal that an untraced task ignores (SIGURG, SIGWINCH or
//! SIGCHLD, whichever the process does not use); if it uses all of them, by stepping over system calls.

use std::time::Duration;

use super::batch::{Arg, Batch, RECORD, Results};
use super::stub;
use crate::error::{Error, Result};
use crate::mem::Memory;
use crate::proc::Vma;
use crate::ptrace::{self, Regs};
use crate::wait::{self, Event};
use crate::{PAGE_SIZE, Pid, RemoteAddr, fork};

const MARKERS: [i32; 3] = [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD];
const LIMIT: Duration = Duration::from_secs(10);

/// What a visit needs to know of the process.
#[derive(Debug, Clone)]
pub struct Host {
    /// The process id, in our pid namespace.
    pub pid: Pid,
    /// The process id as the process itself knows it.
    pub inner_pid: Pid,
    /// Signals caught by a handler, or blocked or pending in any thread.
    pub busy_signals: u64,
    /// Where its stopped threads are.
    pub instructions: Vec<RemoteAddr>,
}

/// The place in a living process where its threads can be visited. All of them are stopped by us.
#[derive(Debug)]
pub struct Door<'m> {
    host: Host,
    memory: &'m Memory,
    code: RemoteAddr,
    table: RemoteAddr,
    table_len: u64,
    marker: i32,
}

/// A thread inside the stub, with a table of its own. It is there from its first changed register to its last, so
/// that the way home of a thread whose tracer is gone always leads past the end of the table. Dropping it puts the
/// thread back.
#[derive(Debug)]
pub struct Visit<'d> {
    door: &'d Door<'d>,
    tid: Pid,
    inner_tid: Pid,
    regs: Regs,
    mask: u64,
    selector: Option<Selector>,
    home: bool,
    held: Vec<i32>,
    born: Option<Pid>,
}

/// The byte by which a thread says that its system calls are caught, when it says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Selector {
    address: RemoteAddr,
    value: u8,
}

impl Selector {
    fn of(tid: Pid, memory: &Memory) -> Result<Option<Selector>> {
        let Some(dispatch) = ptrace::dispatch(tid)? else {
            return Ok(None);
        };
        if dispatch.selector == 0 {
            return Err(Error::Unsuitable {
                pid: tid,
                why: "it catches its system calls without a selector".into(),
            });
        }
        let mut value = [0];
        memory.read(dispatch.selector, &mut value)?;
        Ok((value[0] != 0).then_some(Selector {
            address: dispatch.selector,
            value: value[0],
        }))
    }
}

/// Stands before the code, so that what a killed tracer has left there is known again and its place used again.
pub const MARK: [u8; 8] = *b"torpor\x01\n";

/// Where the code goes: after [`MARK`], in the tail of the vdso that nobody reads.
fn tail_of_vdso(memory: &Memory, vmas: &[Vma], need: usize, instructions: &[u64]) -> Result<RemoteAddr> {
    let none = |why: &str| Error::Unsuitable {
        pid: memory.pid(),
        why: why.into(),
    };
    let vdso = vmas
        .iter()
        .find(|v| v.name == "[vdso]")
        .ok_or_else(|| none("it has no vdso to visit"))?;
    let base = vdso.end - PAGE_SIZE;
    let mut page = [0u8; PAGE_SIZE as usize];
    memory.read(base, &mut page)?;
    let left = (0..page.len()).step_by(64).find(|at| page[*at..].starts_with(&MARK));
    let used = page.iter().rposition(|b| *b != 0).map_or(0, |p| p + 1);
    let start = match left {
        // A thread that is still on its way home needs what is there.
        Some(at) if instructions.iter().any(|i| (base + at as u64..vdso.end).contains(i)) => {
            return Err(none("it is still recovering from a tracer that was killed; try again"));
        }
        Some(at) => at,
        // Keep a distance from what may be a terminator of the image.
        None => (used + 64).next_multiple_of(64),
    };
    if start + MARK.len() + need > page.len() {
        return Err(none("its vdso has no free tail to visit"));
    }
    memory.write(base + start as u64, &MARK)?;
    Ok(base + (start + MARK.len()) as u64)
}

/// A free range in the middle of the largest hole: far from where the kernel places new mappings.
fn hole(vmas: &[Vma], len: u64) -> RemoteAddr {
    let top: u64 = 0x7fff_ffff_f000;
    let mut best = (0u64, 0u64);
    let mut last = 0x10_0000u64;
    for (start, end) in vmas
        .iter()
        .map(|v| (v.start.min(top), v.end.min(top)))
        .chain([(top, top)])
    {
        if start > last && start - last > best.1 - best.0 {
            best = (last, start);
        }
        last = last.max(end);
    }
    (best.0 + (best.1 - best.0) / 2 - len) & !(PAGE_SIZE - 1)
}

impl<'m> Door<'m> {
    /// Looks for the place, and for `table_len` bytes of address space that are free.
    pub fn find(host: Host, memory: &'m Memory, vmas: &[Vma], table_len: u64) -> Result<Door<'m>> {
        let code = tail_of_vdso(memory, vmas, stub::visit().code.len(), &host.instructions)?;
        let is_free = |signal: &i32| host.busy_signals >> (signal - 1) & 1 == 0;
        let marker = MARKERS.into_iter().find(is_free).unwrap_or(0);
        let table = hole(vmas, table_len);
        Ok(Door {
            host,
            memory,
            code,
            table,
            table_len,
            marker,
        })
    }

    /// The same place in the twin of the process, which is `pid` to us and `inner_pid` to itself.
    pub fn of_twin<'t>(&self, memory: &'t Memory, pid: Pid, inner_pid: Pid) -> Door<'t> {
        let host = Host {
            pid,
            inner_pid,
            busy_signals: self.host.busy_signals,
            instructions: Vec::new(),
        };
        Door {
            host,
            memory,
            code: self.code,
            table: self.table,
            table_len: self.table_len,
            marker: self.marker,
        }
    }

    /// Takes a thread in: prepares its way home, then gives it a table. One thread at a time.
    pub fn enter(&self, tid: Pid, inner_tid: Pid) -> Result<Visit<'_>> {
        let visit = self.enter_without_table(tid, inner_tid)?;
        visit.map_table()
    }

    /// Takes in a twin that was made in a visit: it has the table of that visit.
    pub fn enter_twin(&self) -> Result<Visit<'_>> {
        self.enter_without_table(self.host.pid, self.host.inner_pid)
    }

    fn enter_without_table(&self, tid: Pid, inner_tid: Pid) -> Result<Visit<'_>> {
        let regs = ptrace::regs(tid)?;
        let mask = ptrace::sigmask(tid)?;
        let selector = Selector::of(tid, self.memory)?;
        let parts = stub::visit();
        let mut code = parts.code.to_vec();
        let pool = self.constants(inner_tid, &regs, mask, selector);
        code[parts.pool..parts.pool + pool.len()].copy_from_slice(&pool);
        self.memory.write(self.code, &code)?;
        Ok(Visit {
            door: self,
            tid,
            inner_tid,
            regs,
            mask,
            selector,
            home: true,
            held: Vec::new(),
            born: None,
        })
    }

    /// Removes the code, when nobody is inside any more.
    pub fn close(self) -> Result<()> {
        let len = MARK.len() + stub::visit().code.len();
        self.memory.write(self.code - MARK.len() as u64, &vec![0; len])
    }

    fn constants(&self, inner_tid: Pid, regs: &Regs, mask: u64, selector: Option<Selector>) -> Vec<u8> {
        let (rax, rip) = restart(regs);
        let words = [
            self.host.inner_pid as u64,
            inner_tid as u64,
            self.marker as u64,
            self.table,
            self.table_len,
            regs.eflags,
            regs.rsp,
            mask,
            rax,
            regs.rbx,
            regs.rcx,
            regs.rdx,
            regs.rsi,
            regs.rdi,
            regs.rbp,
            regs.r8,
            regs.r9,
            regs.r10,
            regs.r11,
            regs.r12,
            regs.r13,
            regs.r14,
            regs.r15,
            rip,
            selector.map_or(0, |s| s.address),
            selector.map_or(0, |s| s.value.into()),
        ];
        words.iter().flat_map(|w| w.to_le_bytes()).collect()
    }
}

/// What the kernel would do with an interrupted system call when no signal is delivered: run it again
/// (arch/x86/kernel/signal.c). Only for a task that has to go home without its tracer.
fn restart(regs: &Regs) -> (u64, u64) {
    const RESTART_SYSCALL: u64 = 219;
    if (regs.orig_rax as i64) < 0 {
        return (regs.rax, regs.rip);
    }
    match -(regs.rax as i64) {
        512..=514 => (regs.orig_rax, regs.rip - 2),
        516 => (RESTART_SYSCALL, regs.rip - 2),
        _ => (regs.rax, regs.rip),
    }
}

impl<'d> Visit<'d> {
    fn map_table(mut self) -> Result<Visit<'d>> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let Door { table, table_len, .. } = *self.door;
        let args = [table, table_len, prot as u64, flags as u64, u64::MAX, 0];
        let got = self.call(libc::SYS_mmap, args)?;
        if got != table as i64 {
            let errno = nix::errno::Errno::from_raw(-got as i32);
            return Err(Error::Remote {
                pid: self.door.host.pid,
                call: "mmap of a table".into(),
                errno,
            });
        }
        Ok(self)
    }

    /// Runs a batch in the thread.
    pub fn run(&mut self, batch: &Batch) -> Result<Results> {
        let regs = self.lay_out(batch)?;
        self.go(&regs)?;
        self.results(batch)
    }

    /// Adds a halt to a batch for [`Visit::run_around`].
    pub fn halt(&self, batch: &mut Batch) -> usize {
        let args = [self.door.host.inner_pid, self.inner_tid, self.door.marker].map(Arg::from);
        batch.may("halt", libc::SYS_tgkill, args)
    }

    /// Runs a batch in the thread, and `work` at its `halt`; `work` gets what the call number `of` returned. The calls after the
    /// halt are made in any case, also when we are killed meanwhile: so what was made for `work` alone is taken away
    /// again. No result of `work` when the batch ended before the halt.
    pub fn run_around<T>(
        &mut self,
        batch: &Batch,
        of: usize,
        halt: usize,
        work: impl FnOnce(i64) -> T,
    ) -> Result<(Results, Option<T>)> {
        let regs = self.lay_out(batch)?;
        self.set_off(&regs)?;
        let mut done = None;
        if self.run_to_halt(halt)? {
            let mut word = [0; 8];
            let returned = self.door.table + (of * RECORD) as u64;
            if self.door.memory.read(returned, &mut word).is_ok() {
                done = Some(work(i64::from_le_bytes(word)));
            }
            self.arrive()?;
        }
        Ok((self.results(batch)?, done))
    }

    /// Puts the table into place; the registers to begin with.
    fn lay_out(&mut self, batch: &Batch) -> Result<Regs> {
        let Door {
            table,
            table_len,
            code,
            memory,
            ..
        } = *self.door;
        if batch.size() as u64 > table_len {
            return Err(Error::Unsuitable {
                pid: self.tid,
                why: "a batch is larger than its table".into(),
            });
        }
        memory.write(table, &batch.encode(table))?;
        Ok(Regs {
            rip: code,
            r15: table,
            r14: table + (batch.len() * RECORD) as u64,
            r12: 0,
            orig_rax: u64::MAX,
            ..self.regs
        })
    }

    fn results(&self, batch: &Batch) -> Result<Results> {
        let Door { table, memory, .. } = *self.door;
        let ran = ((ptrace::regs(self.tid)?.r15 - table) as usize) / RECORD;
        let mut bytes = vec![0; batch.size()];
        memory.read(table, &mut bytes)?;
        batch.decode(self.door.host.pid, bytes, ran)
    }

    /// Makes a twin of the process: a child that has its memory as it is now, copied on write, and that is held
    /// by us at its very first instruction. It is no child that the program can see by wait(2) without __WCLONE, and
    /// its end sends no signal. The thread must have [`ptrace::Options::FOLLOW`].
    pub fn twin(&mut self) -> Result<Pid> {
        self.born = None;
        // clone(2): no flags, no exit signal.
        let returned = self.enter_at(stub::visit().fork, libc::SYS_clone, [0; 6])?;
        self.born.take().ok_or_else(|| {
            let errno = nix::errno::Errno::from_raw(-returned as i32);
            Error::Remote {
                pid: self.door.host.pid,
                call: "clone of a twin".into(),
                errno,
            }
        })
    }

    fn call(&mut self, nr: i64, args: [u64; 6]) -> Result<i64> {
        self.enter_at(stub::visit().call, nr, args)
    }

    fn enter_at(&mut self, entry: u64, nr: i64, args: [u64; 6]) -> Result<i64> {
        let [rdi, rsi, rdx, r10, r8, r9] = args;
        let rip = self.door.code + entry;
        let regs = Regs {
            rip,
            rax: nr as u64,
            orig_rax: u64::MAX,
            r12: 0,
            rdi,
            rsi,
            rdx,
            r10,
            r8,
            r9,
            ..self.regs
        };
        self.go(&regs)?;
        Ok(ptrace::regs(self.tid)?.rbx as i64)
    }

    /// Runs from the given registers to the marker.
    fn go(&mut self, regs: &Regs) -> Result<()> {
        self.set_off(regs)?;
        self.arrive()
    }

    fn set_off(&mut self, regs: &Regs) -> Result<()> {
        self.home = false;
        ptrace::set_regs(self.tid, regs)?;
        let marker = self.door.marker;
        let open = if marker == 0 { 0 } else { 1 << (marker - 1) };
        ptrace::set_sigmask(self.tid, !open)
    }

    fn arrive(&mut self) -> Result<()> {
        match self.door.marker {
            0 => self.step_to_marker(),
            marker => self.run_to_marker(marker),
        }
    }

    /// False when the batch ended before it: then it has arrived.
    fn run_to_halt(&mut self, halt: usize) -> Result<bool> {
        let marker = self.door.marker;
        let record = self.door.table + (halt * RECORD) as u64;
        loop {
            let stopped = if marker == 0 {
                ptrace::cont_to_syscall(self.tid, 0)?;
                let (signal, event) = self.stop()?;
                event == 0 && signal & 0x7f == libc::SIGTRAP && self.call_returned()?
            } else {
                ptrace::cont(self.tid, 0)?;
                self.stop()? == (marker, 0)
            };
            if stopped && self.at_marker()? {
                return Ok(false);
            }
            if stopped && ptrace::regs(self.tid)?.r15 == record {
                return Ok(true);
            }
        }
    }

    fn run_to_marker(&mut self, marker: i32) -> Result<()> {
        loop {
            ptrace::cont(self.tid, 0)?;
            if self.stop()? == (marker, 0) && self.at_marker()? {
                return Ok(());
            }
        }
    }

    /// For a process that uses every marker signal: look at each system call, then stop at the next chance
    /// to take a signal, where the kernel also handles an interrupted system call.
    fn step_to_marker(&mut self) -> Result<()> {
        loop {
            ptrace::cont_to_syscall(self.tid, 0)?;
            let (signal, event) = self.stop()?;
            if event == 0 && signal & 0x7f == libc::SIGTRAP && self.at_marker()? && self.call_returned()? {
                break;
            }
        }
        ptrace::interrupt(self.tid)?;
        loop {
            ptrace::cont(self.tid, 0)?;
            if self.stop()?.1 == ptrace::EVENT_STOP {
                return Ok(());
            }
        }
    }

    fn call_returned(&self) -> Result<bool> {
        Ok(ptrace::regs(self.tid)?.rax as i64 != -i64::from(libc::ENOSYS))
    }

    fn at_marker(&self) -> Result<bool> {
        Ok(ptrace::regs(self.tid)?.rip == self.door.code + stub::visit().marked)
    }

    fn stop(&mut self) -> Result<(i32, i32)> {
        match wait::until(self.tid, LIMIT)? {
            Event::Stopped { signal, event } => {
                if [libc::PTRACE_EVENT_FORK, libc::PTRACE_EVENT_CLONE].contains(&event) {
                    self.take_twin()?;
                }
                let is_ours = signal == self.door.marker || signal & 0x7f == libc::SIGTRAP;
                if event == 0 && !is_ours {
                    // Only signals that nothing can block get here. They are sent again at the end.
                    self.held.push(signal);
                }
                Ok((signal, event))
            }
            Event::Exited(code) => Err(Error::Died {
                pid: self.tid,
                how: format!("exit code {code}"),
            }),
            Event::Killed(signal) => Err(Error::Died {
                pid: self.tid,
                how: format!("signal {signal}"),
            }),
            Event::Continued => Ok((0, 0)),
        }
    }

    /// From here on the twin dies with us.
    fn take_twin(&mut self) -> Result<()> {
        let twin = ptrace::event_message(self.tid)? as Pid;
        match wait::until(twin, LIMIT)? {
            // Its seccomp filters are those of the original, and must not judge our calls either.
            Event::Stopped { .. } => {
                let options = ptrace::Options::EXIT_KILL.and(ptrace::Options::SUSPEND_SECCOMP);
                ptrace::set_options(twin, options)?;
            }
            other => {
                return Err(Error::Died {
                    pid: twin,
                    how: format!("{other:?}"),
                });
            }
        }
        self.born = Some(twin);
        Ok(())
    }

    /// Unmaps the table and puts the thread back.
    pub fn leave(mut self) -> Result<()> {
        self.go_home()
    }

    /// Leaves the thread in the stub for good: a twin has no home.
    pub fn stay(mut self) {
        self.home = true;
    }

    fn go_home(&mut self) -> Result<()> {
        if self.home {
            return Ok(());
        }
        let Door { table, table_len, .. } = *self.door;
        let unmapped = self.call(libc::SYS_munmap, [table, table_len, 0, 0, 0, 0]);
        self.put_back()?;
        unmapped.map(drop)
    }

    /// The mask and the selector first: with the registers still in the stub, the task would find home alone.
    fn put_back(&mut self) -> Result<()> {
        ptrace::set_sigmask(self.tid, self.mask)?;
        if let Some(selector) = self.selector {
            self.door.memory.write(selector.address, &[selector.value])?;
        }
        ptrace::set_regs(self.tid, &self.regs)?;
        self.home = true;
        for signal in self.held.drain(..) {
            fork::kill_thread(self.door.host.pid, self.tid, signal)?;
        }
        Ok(())
    }
}

impl Drop for Visit<'_> {
    fn drop(&mut self) {
        // A task that is gone needs nothing put back.
        let _ = self.go_home();
    }
}
