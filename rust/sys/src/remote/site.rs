//! Running calls inside a process that is being built. It carries PTRACE_O_EXITKILL: it dies with its tracer.

use std::time::Duration;

use super::batch::{Batch, RECORD, Results};
use super::stub;
use crate::error::{Error, Result};
use crate::mem::Memory;
use crate::ptrace::{self, Regs};
use crate::wait::{self, Event};
use crate::{PAGE_SIZE, Pid, RemoteAddr};

const LIMIT: Duration = Duration::from_secs(60);

/// Where the stub and its table are in every process of a tree that is being built.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// The page of code; the table follows it.
    pub base: RemoteAddr,
    /// Size of the table in bytes.
    pub table_len: u64,
}

impl Place {
    /// The address of the table.
    pub fn table(self) -> RemoteAddr {
        self.base + PAGE_SIZE
    }

    /// Size of code and table in bytes.
    pub fn len(self) -> u64 {
        PAGE_SIZE + self.table_len
    }

    /// Never true.
    pub fn is_empty(self) -> bool {
        false
    }
}

/// One stopped thread of a process that is being built, and the way to make it call the kernel.
#[derive(Debug)]
pub struct Site {
    tid: Pid,
    place: Place,
    memory: Memory,
}

fn died(tid: Pid, event: Event) -> Error {
    let how = match event {
        Event::Exited(code) => format!("exit code {code}"),
        Event::Killed(signal) => format!("signal {signal}"),
        Event::Stopped { signal, event } => format!("unexpected stop by signal {signal}, event {event}"),
        Event::Continued => "unexpected continue".into(),
    };
    Error::Died { pid: tid, how }
}

/// Makes one call in a stopped task through a `syscall` instruction that it has mapped at `syscall_at`. The
/// task must be one that is being built: it does not get its registers back.
pub fn call_at(tid: Pid, syscall_at: RemoteAddr, nr: i64, args: [u64; 6]) -> Result<i64> {
    enter_call(tid, syscall_at, nr, args)?;
    run_to_syscall(tid)?;
    Ok(ptrace::regs(tid)?.rax as i64)
}

/// Stops a task at the entry into a call.
fn enter_call(tid: Pid, syscall_at: RemoteAddr, nr: i64, args: [u64; 6]) -> Result<()> {
    let [rdi, rsi, rdx, r10, r8, r9] = args;
    let old = ptrace::regs(tid)?;
    let regs = Regs {
        rip: syscall_at,
        rax: nr as u64,
        orig_rax: u64::MAX,
        rdi,
        rsi,
        rdx,
        r10,
        r8,
        r9,
        ..old
    };
    ptrace::set_regs(tid, &regs)?;
    run_to_syscall(tid)
}

/// As [`call_at`], but the task is asked to stop as soon as it is inside the call: the result is what an interrupted
/// call leaves, -ERESTART_RESTARTBLOCK of one that the kernel can go on with.
pub fn interrupted_call_at(tid: Pid, syscall_at: RemoteAddr, nr: i64, args: [u64; 6]) -> Result<i64> {
    enter_call(tid, syscall_at, nr, args)?;
    ptrace::interrupt_again(tid, 0)?;
    loop {
        match wait::until(tid, LIMIT)? {
            Event::Stopped {
                event: ptrace::EVENT_STOP,
                ..
            } => return Ok(ptrace::regs(tid)?.rax as i64),
            Event::Stopped { signal, event: 0 } if !is_fault(signal & 0x7f) => ptrace::interrupt_again(tid, 0)?,
            other => return Err(died(tid, other)),
        }
    }
}

/// Lets a task run to its next entry into a call or exit from one.
fn run_to_syscall(tid: Pid) -> Result<()> {
    loop {
        ptrace::cont_to_syscall(tid, 0)?;
        match wait::until(tid, LIMIT)? {
            Event::Stopped { signal, event: 0 } if signal & 0x7f == libc::SIGTRAP => return Ok(()),
            Event::Stopped { signal, .. } if signal & 0x7f != libc::SIGSEGV => {}
            other => return Err(died(tid, other)),
        }
    }
}

impl Site {
    /// Maps the stub into a fresh process that is stopped, using a `syscall` instruction at `syscall_at`.
    pub fn found(tid: Pid, place: Place, syscall_at: RemoteAddr) -> Result<Site> {
        let flags = libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED_NOREPLACE;
        let rw = libc::PROT_READ | libc::PROT_WRITE;
        let rx = libc::PROT_READ | libc::PROT_EXEC;
        for (address, len, prot) in [(place.base, PAGE_SIZE, rx), (place.table(), place.table_len, rw)] {
            let args = [address, len, prot as u64, flags as u64, u64::MAX, 0];
            let got = call_at(tid, syscall_at, libc::SYS_mmap, args)?;
            if got != address as i64 {
                let errno = nix::errno::Errno::from_raw(-got as i32);
                return Err(Error::Remote {
                    pid: tid,
                    call: "mmap of the stub".into(),
                    errno,
                });
            }
        }
        let memory = Memory::open(tid)?;
        memory.write(place.base, stub::site())?;
        Ok(Site { tid, place, memory })
    }

    /// A task that was cloned from one with the stub already in it, stopped at its very start.
    pub fn cloned(tid: Pid, place: Place) -> Result<Site> {
        Ok(Site {
            tid,
            place,
            memory: Memory::open(tid)?,
        })
    }

    /// The task.
    pub fn tid(&self) -> Pid {
        self.tid
    }

    /// Its memory.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Where the stub is.
    pub fn place(&self) -> Place {
        self.place
    }

    /// How many bytes a batch may have.
    pub fn capacity(&self) -> usize {
        self.place.table_len as usize
    }

    /// Runs a batch. `on_event` is told of children that it makes.
    pub fn run(&self, batch: &Batch) -> Result<Results> {
        self.run_with(batch, |_| Ok(()))
    }

    /// Runs a batch; `born` is called with each child or thread that it makes, stopped at its start.
    pub fn run_with(&self, batch: &Batch, mut born: impl FnMut(Pid) -> Result<()>) -> Result<Results> {
        if batch.size() > self.capacity() {
            return Err(Error::Unsuitable {
                pid: self.tid,
                why: "a batch is larger than its table".into(),
            });
        }
        let table = self.place.table();
        self.memory.write(table, &batch.encode(table))?;
        let end = table + (batch.len() * RECORD) as u64;
        let old = ptrace::regs(self.tid)?;
        let regs = Regs {
            rip: self.place.base,
            r15: table,
            r14: end,
            orig_rax: u64::MAX,
            ..old
        };
        ptrace::set_regs(self.tid, &regs)?;
        let stop_at = self.place.base + stub::site().len() as u64;
        loop {
            ptrace::cont(self.tid, 0)?;
            match wait::until(self.tid, LIMIT)? {
                Event::Stopped {
                    signal: libc::SIGTRAP,
                    event: 0,
                } if ptrace::regs(self.tid)?.rip == stop_at => break,
                Event::Stopped { event, .. } if is_birth(event) => {
                    let child = ptrace::event_message(self.tid)? as Pid;
                    wait_birth(child)?;
                    born(child)?;
                }
                // Signals wait until the process is whole; a fault of the stub itself must not loop.
                Event::Stopped { signal, event: 0 } if !is_fault(signal) => {}
                Event::Stopped {
                    event: ptrace::EVENT_STOP,
                    ..
                } => {}
                other => return Err(died(self.tid, other)),
            }
        }
        let ran = (ptrace::regs(self.tid)?.r15 - table) as usize / RECORD;
        let mut bytes = vec![0; batch.size()];
        self.memory.read(table, &mut bytes)?;
        batch.decode(self.tid, bytes, ran)
    }
}

fn is_birth(event: i32) -> bool {
    [
        libc::PTRACE_EVENT_FORK,
        libc::PTRACE_EVENT_VFORK,
        libc::PTRACE_EVENT_CLONE,
    ]
    .contains(&event)
}

fn is_fault(signal: i32) -> bool {
    [
        libc::SIGSEGV,
        libc::SIGBUS,
        libc::SIGILL,
        libc::SIGFPE,
        libc::SIGTRAP,
        libc::SIGSYS,
    ]
    .contains(&signal)
}

fn wait_birth(child: Pid) -> Result<()> {
    match wait::until(child, LIMIT)? {
        Event::Stopped { .. } => Ok(()),
        other => Err(died(child, other)),
    }
}
