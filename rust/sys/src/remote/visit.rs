//! Running calls inside a living task so that it never notices, not even when the tracer is killed half way.
//!
//! The stub is put into the unused tail of the task's vdso page, a page that every process has, that is
//! executable, and that nobody reads there. It holds, as constants, all that is needed to put the task back:
//! registers, flags, signal mask, and where to go on. So from the first changed register on, the task finds
//! its way home by itself if it is let run: no instant exists at which killing the tracer would harm it.
//! Because rt_sigreturn(2) is not used, an interrupted sleep keeps its restart block; because the stub leaves
//! vector registers alone, none have to be restored.
//!
//! The end of a batch is told to the tracer by a signal that an untraced task ignores (SIGURG, SIGWINCH or
//! SIGCHLD, whichever the process does not use); if it uses all of them, by stepping over system calls.

use std::time::Duration;

use super::batch::{Batch, RECORD, Results};
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
}

/// A stub put into a living process whose threads are all stopped by us.
#[derive(Debug)]
pub struct Visit<'m> {
    host: Host,
    memory: &'m Memory,
    code: RemoteAddr,
    len: usize,
    table: RemoteAddr,
    table_len: u64,
    marker: i32,
}

/// A thread inside the stub. Dropping it puts the thread back.
struct Inside<'v> {
    tid: Pid,
    regs: Regs,
    mask: u64,
    home: bool,
    held: Vec<i32>,
    born: Option<Pid>,
    visit: &'v Visit<'v>,
}

fn tail_of_vdso(memory: &Memory, vmas: &[Vma], need: usize) -> Result<RemoteAddr> {
    let none = |why: &str| Error::Unsuitable {
        pid: memory.pid(),
        why: why.into(),
    };
    let vdso = vmas
        .iter()
        .find(|v| v.name == "[vdso]")
        .ok_or_else(|| none("it has no vdso to visit"))?;
    let mut page = [0u8; PAGE_SIZE as usize];
    memory.read(vdso.end - PAGE_SIZE, &mut page)?;
    let used = page.iter().rposition(|b| *b != 0).map_or(0, |p| p + 1);
    // Keep a distance from what may be a terminator of the image.
    let start = (used + 64).next_multiple_of(64);
    if start + need > page.len() {
        return Err(none("its vdso has no free tail to visit"));
    }
    Ok(vdso.end - PAGE_SIZE + start as u64)
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

impl<'m> Visit<'m> {
    /// Writes the stub into the process and gives it `table_len` bytes of memory for tables, by one call made
    /// in thread `tid`. All threads must be stopped.
    pub fn begin(
        host: Host,
        memory: &'m Memory,
        vmas: &[Vma],
        tid: Pid,
        inner_tid: Pid,
        table_len: u64,
    ) -> Result<Visit<'m>> {
        let parts = stub::visit();
        let code = tail_of_vdso(memory, vmas, parts.code.len())?;
        let marker = MARKERS
            .into_iter()
            .find(|s| host.busy_signals >> (s - 1) & 1 == 0)
            .unwrap_or(0);
        let table = hole(vmas, table_len);
        let visit = Visit {
            host,
            memory,
            code,
            len: parts.code.len(),
            table,
            table_len,
            marker,
        };
        let mut inside = visit.enter(tid, inner_tid)?;
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let prot = libc::PROT_READ | libc::PROT_WRITE;
        let args = [table, table_len, prot as u64, flags as u64, u64::MAX, 0];
        let got = inside.call(libc::SYS_mmap, args)?;
        inside.leave()?;
        if got != table as i64 {
            let errno = nix::errno::Errno::from_raw(-got as i32);
            return Err(Error::Remote {
                pid: visit.host.pid,
                call: "mmap of a table".into(),
                errno,
            });
        }
        Ok(visit)
    }

    /// Runs a batch in one thread of the process and puts the thread back.
    pub fn run(&self, tid: Pid, inner_tid: Pid, batch: &Batch) -> Result<Results> {
        if batch.size() as u64 > self.table_len {
            return Err(Error::Unsuitable {
                pid: tid,
                why: "a batch is larger than its table".into(),
            });
        }
        self.memory.write(self.table, &batch.encode(self.table))?;
        let mut inside = self.enter(tid, inner_tid)?;
        let end = self.table + (batch.len() * RECORD) as u64;
        let regs = Regs {
            rip: self.code,
            r15: self.table,
            r14: end,
            r12: 0,
            orig_rax: u64::MAX,
            ..inside.regs
        };
        inside.go(&regs)?;
        let ran = ((ptrace::regs(tid)?.r15 - self.table) as usize) / RECORD;
        inside.leave()?;
        let mut table = vec![0; batch.size()];
        self.memory.read(self.table, &mut table)?;
        batch.decode(self.host.pid, table, ran)
    }

    /// Makes a twin of the process: a child that has its memory as it is now, copied on write, and that is held
    /// by us at its very first instruction. It is no child that the program can see by wait(2) without __WCLONE, and
    /// its end sends no signal. The thread must have [`ptrace::Options::FOLLOW`].
    pub fn twin(&self, tid: Pid, inner_tid: Pid) -> Result<Pid> {
        let mut inside = self.enter(tid, inner_tid)?;
        let twin = inside.fork()?;
        inside.leave()?;
        Ok(twin)
    }

    /// The same stub in the twin of its process, which is `pid` to us and `inner_pid` to itself.
    pub fn in_twin<'t>(&self, memory: &'t Memory, pid: Pid, inner_pid: Pid) -> Visit<'t> {
        let host = Host {
            pid,
            inner_pid,
            busy_signals: self.host.busy_signals,
        };
        Visit {
            host,
            memory,
            code: self.code,
            len: self.len,
            table: self.table,
            table_len: self.table_len,
            marker: self.marker,
        }
    }

    /// Takes everything out of the process again.
    pub fn end(self, tid: Pid, inner_tid: Pid) -> Result<()> {
        let mut inside = self.enter(tid, inner_tid)?;
        inside.call(libc::SYS_munmap, [self.table, self.table_len, 0, 0, 0, 0])?;
        inside.leave()?;
        self.memory.write(self.code, &vec![0; self.len])
    }

    /// Prepares the way home of a thread, then blocks its signals. The order matters: see the module text.
    fn enter(&self, tid: Pid, inner_tid: Pid) -> Result<Inside<'_>> {
        let regs = ptrace::regs(tid)?;
        let mask = ptrace::sigmask(tid)?;
        let parts = stub::visit();
        let mut code = parts.code.to_vec();
        let pool = self.constants(inner_tid, &regs, mask);
        code[parts.pool..parts.pool + pool.len()].copy_from_slice(&pool);
        self.memory.write(self.code, &code)?;
        Ok(Inside {
            tid,
            regs,
            mask,
            home: true,
            held: Vec::new(),
            born: None,
            visit: self,
        })
    }

    fn constants(&self, inner_tid: Pid, regs: &Regs, mask: u64) -> Vec<u8> {
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

impl Inside<'_> {
    fn call(&mut self, nr: i64, args: [u64; 6]) -> Result<i64> {
        let entry = self.visit.code + stub::visit().call;
        let [rdi, rsi, rdx, r10, r8, r9] = args;
        let regs = Regs {
            rip: entry,
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

    fn fork(&mut self) -> Result<Pid> {
        // clone(2): no flags, no exit signal.
        let entry = self.visit.code + stub::visit().fork;
        let nr = libc::SYS_clone as u64;
        let regs = Regs {
            rip: entry,
            rax: nr,
            orig_rax: u64::MAX,
            rdi: 0,
            rsi: 0,
            rdx: 0,
            r10: 0,
            r8: 0,
            r9: 0,
            ..self.regs
        };
        self.born = None;
        self.go(&regs)?;
        let returned = ptrace::regs(self.tid)?.rbx as i64;
        match self.born.take() {
            Some(twin) => Ok(twin),
            None => {
                let errno = nix::errno::Errno::from_raw(-returned as i32);
                Err(Error::Remote {
                    pid: self.visit.host.pid,
                    call: "clone of a twin".into(),
                    errno,
                })
            }
        }
    }

    /// Runs from the given registers to the marker.
    fn go(&mut self, regs: &Regs) -> Result<()> {
        self.home = false;
        ptrace::set_regs(self.tid, regs)?;
        let marker = self.visit.marker;
        let open = if marker == 0 { 0 } else { 1 << (marker - 1) };
        ptrace::set_sigmask(self.tid, !open)?;
        if marker == 0 {
            self.step_to_marker()
        } else {
            self.run_to_marker(marker)
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
        Ok(ptrace::regs(self.tid)?.rip == self.visit.code + stub::visit().marked)
    }

    fn stop(&mut self) -> Result<(i32, i32)> {
        match wait::until(self.tid, LIMIT)? {
            Event::Stopped { signal, event } => {
                if [libc::PTRACE_EVENT_FORK, libc::PTRACE_EVENT_CLONE].contains(&event) {
                    self.take_twin()?;
                }
                let is_ours = signal == self.visit.marker || signal & 0x7f == libc::SIGTRAP;
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
            Event::Stopped { .. } => ptrace::set_options(twin, ptrace::Options::EXIT_KILL)?,
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

    fn leave(mut self) -> Result<()> {
        self.put_back()
    }

    /// The mask first: with the registers still in the stub, the task would find home alone.
    fn put_back(&mut self) -> Result<()> {
        if self.home {
            return Ok(());
        }
        ptrace::set_sigmask(self.tid, self.mask)?;
        ptrace::set_regs(self.tid, &self.regs)?;
        self.home = true;
        for signal in self.held.drain(..) {
            fork::kill_thread(self.visit.host.pid, self.tid, signal)?;
        }
        Ok(())
    }
}

impl Drop for Inside<'_> {
    fn drop(&mut self) {
        // A task that is gone needs nothing put back.
        let _ = self.put_back();
    }
}
