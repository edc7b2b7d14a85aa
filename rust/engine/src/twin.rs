//! Background capture: a twin of each process keeps its memory as it was, copied on write, while the process itself
//! runs on. The pause is then the copy of page tables, not of pages.
//!
//! A twin never runs an instruction of the program. It has no descriptors, so that no end of file or hang-up waits
//! for it; a session of its own, so that a signal to the program's group misses it; and it dies with its tracer. What the
//! program changes meanwhile takes memory: when there is none, the twin is killed and not the program.
//! The program cannot see it by wait(2), gets no SIGCHLD for it, and is made to wait for it by an injected call:
//! with exit signal 0 it would stay a zombie.

use std::time::{Duration, Instant};

use torpor_sys::cgroup::Freezer;
use torpor_sys::mem::Memory;
use torpor_sys::proc::{self, Vma};
use torpor_sys::ptrace::{self, Options};
use torpor_sys::remote::visit::Host;
use torpor_sys::remote::{Batch, Door, Visit};
use torpor_sys::wait;
use torpor_sys::{Pid, fork};

use crate::advance;
use crate::collect::Source;
use crate::error::{About, Error, Result};
use crate::freeze;
use crate::kinds::{cpu, ipc, memory};

const TABLE: u64 = 16 * 1024;

/// A twin and the process that it is one of.
#[derive(Debug)]
struct Twin {
    pid: Pid,
    inner: i32,
    original: Pid,
}

/// Twins of a whole tree. Dropping them ends them without a trace.
#[derive(Debug, Default)]
pub struct Twins {
    all: Vec<Twin>,
}

impl Drop for Twins {
    fn drop(&mut self) {
        // A process that is gone takes the trace of its twin with it.
        let _ = end(&std::mem::take(&mut self.all));
    }
}

/// Makes a twin of every process; all of their threads are stopped by us.
pub fn make(sources: &[Source]) -> Result<Twins> {
    let mut twins = Twins::default();
    for source in sources {
        twins.add(source)?;
    }
    Ok(twins)
}

fn ids(pid: Pid) -> Result<(i32, u64)> {
    let status = proc::status(pid).about(pid, "status")?;
    let busy = busy_signals(pid)?;
    Ok((status.ns_pids.last().copied().unwrap_or(pid), busy))
}

fn busy_signals(pid: Pid) -> Result<u64> {
    let mut busy = 0;
    for tid in proc::threads(pid).about(pid, "threads")? {
        // Of a running process, a thread may have ended since it was listed.
        let Ok(s) = proc::status(tid) else { continue };
        busy |= s.sig_caught | s.sig_blocked | s.sig_pending | s.shared_pending;
    }
    Ok(busy)
}

/// Visits a stopped process that nothing is known of.
pub(crate) fn visit_anew<T>(pid: Pid, work: impl FnOnce(&Door<'_>, &mut Visit<'_>) -> Result<T>) -> Result<T> {
    let (inner_pid, busy_signals) = ids(pid)?;
    let vmas = proc::maps(pid).about(pid, "maps")?;
    let instructions = vec![ptrace::regs(pid).about(pid, "registers")?.rip];
    let host = Host {
        pid,
        inner_pid,
        busy_signals,
        instructions,
    };
    visit(host, &vmas, work)
}

/// Visits a stopped process through its main thread.
fn visit<T>(host: Host, vmas: &[Vma], work: impl FnOnce(&Door<'_>, &mut Visit<'_>) -> Result<T>) -> Result<T> {
    let Host { pid, inner_pid, .. } = host;
    let memory = memory::open(pid)?;
    let door = Door::find(host, &memory, vmas, TABLE).about(pid, "visit")?;
    let mut visit = door.enter(pid, inner_pid).about(pid, "visit")?;
    let result = work(&door, &mut visit);
    // After an error the code stays: see collect.rs.
    visit.leave().about(pid, "visit")?;
    door.close().about(pid, "visit")?;
    result
}

impl Twins {
    fn add(&mut self, source: &Source) -> Result<()> {
        let original = source.pid;
        let options = Options::SUSPEND_SECCOMP;
        ptrace::set_options(original, options.and(Options::FOLLOW)).about(original, "twin")?;
        let made = visit(source.host.clone(), &source.vmas, |door, visit| {
            let pid = visit.twin().about(original, "twin")?;
            let inner = inner_pid(pid).unwrap_or(pid);
            self.all.push(Twin { pid, inner, original });
            isolate(door, pid, inner, &source.vmas)
        });
        ptrace::set_options(original, options).about(original, "twin")?;
        made
    }

    /// The twin of a process.
    pub fn of(&self, original: Pid) -> Option<Pid> {
        self.all.iter().find(|t| t.original == original).map(|t| t.pid)
    }

    /// Whether the flags of mappings that were read before the pause are those of the pause: see `advance`.
    pub fn confirm(&self, sources: &[Source]) -> Result<bool> {
        for source in sources {
            let twin = self.of(source.pid).filter(|_| source.is_assumed);
            if let Some(twin) = twin
                && !advance::confirms(&proc::smaps(twin).about(twin, "twin")?, &source.vmas)
            {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Ends all twins. An error means that a program may see what is left of one.
    pub fn dismiss(mut self) -> Result<()> {
        end(&std::mem::take(&mut self.all))
    }

    /// # Errors
    /// When a twin has died: what was read from it is not to be trusted.
    pub fn check(&self) -> Result<()> {
        for twin in &self.all {
            if let Some(event) = wait::poll(twin.pid).about(twin.pid, "twin")? {
                let why = format!("the copy of its memory that was being saved was killed ({event:?})");
                return Err(Error::unsupported(
                    twin.original,
                    "background capture",
                    why,
                    "try --capture=stop",
                ));
            }
        }
        Ok(())
    }
}

/// Takes from a twin what others could notice.
fn isolate(door: &Door<'_>, pid: Pid, inner: i32, vmas: &[Vma]) -> Result<()> {
    proc::give_up_first(pid).about(pid, "twin")?;
    let memory = Memory::open(pid).about(pid, "twin")?;
    let mut batch = Batch::new();
    batch.must(
        "close_range",
        libc::SYS_close_range,
        [0.into(), u32::MAX.into(), 0.into()],
    );
    batch.must("setsid", libc::SYS_setsid, []);
    let inside = door.of_twin(&memory, pid, inner);
    let mut visit = inside.enter_twin().about(pid, "twin")?;
    visit.run(&batch).about(pid, "twin")?;
    // It is not read from a twin, and would count as attached once more.
    let attached: Vec<&Vma> = vmas.iter().filter(|v| ipc::is_segment(v)).collect();
    for group in attached.chunks(100) {
        let mut batch = Batch::new();
        for vma in group {
            batch.must("munmap", libc::SYS_munmap, [vma.start.into(), vma.len().into()]);
        }
        visit.run(&batch).about(pid, "twin")?;
    }
    // It has no home to go to: it stays where it is until it is ended.
    visit.stay();
    Ok(())
}

/// Ends twins without a trace. Somebody may have paused the container meanwhile: then it runs for the moment that this takes.
///
/// All of them end before anybody is made to wait for one: an init that has died stays, and answers nobody, until the last
/// process of its pid namespace is gone (pid_namespaces(7)), and a twin is gone when we have seen its end.
fn end(twins: &[Twin]) -> Result<()> {
    let (paused, thawed) = thaw(twins);
    for twin in twins {
        let _ = fork::kill(twin.pid, 9);
    }
    let pids: Vec<Pid> = twins.iter().map(|t| t.pid).collect();
    wait::all_gone(&pids, freeze::LIMIT);
    let reaped = twins.iter().map(Twin::leave_no_trace).fold(Ok(()), Result::and);
    let again = |(freezer, original): &(Freezer, Pid)| freezer.pause_later().about(*original, "freezer");
    let paused_again = paused.iter().map(again).fold(Ok(()), Result::and);
    thawed.and(reaped).and(paused_again)
}

/// Lets those that are paused run. Processes of one cgroup are thawed together, so each is listed once.
fn thaw(twins: &[Twin]) -> (Vec<(Freezer, Pid)>, Result<()>) {
    let mut paused = Vec::new();
    let mut result = Ok(());
    for &Twin { original, .. } in twins {
        let freezer = Freezer::of(original).ok().flatten();
        if let Some(freezer) = freezer.filter(|f| f.is_frozen().unwrap_or(false)) {
            result = result.and(freezer.thaw().about(original, "freezer"));
            paused.push((freezer, original));
        }
    }
    (paused, result)
}

impl Twin {
    fn leave_no_trace(&self) -> Result<()> {
        match reap(self.original, &[self.inner]) {
            // A process that has ended leaves no trace of its twin either.
            Err(_) if proc::stat(self.original).map_or(true, |s| matches!(s.state, 'Z' | 'X')) => Ok(()),
            other => other,
        }
    }
}

/// Makes a process wait for twins of its own that have ended.
fn reap(original: Pid, twins: &[i32]) -> Result<()> {
    let stopped_by_us = ptrace::regs(original).is_ok();
    let stopped = if stopped_by_us {
        None
    } else {
        Some(Stopped::stop(original)?)
    };
    let mut batch = Batch::new();
    for twin in twins {
        let args = [(*twin).into(), 0.into(), libc::__WCLONE.into(), 0.into()];
        batch.may("wait4 for a twin", libc::SYS_wait4, args);
    }
    let done = visit_anew(original, |_, visit| visit.run(&batch).about(original, "twin").map(drop));
    drop(stopped);
    done
}

/// Removes what a killed tracer has left: twins that end with it and that nobody will ever wait for. One with much
/// memory takes a while to end.
pub fn reap_orphans(init: Pid) -> Result<()> {
    let end = Instant::now() + freeze::LIMIT;
    while reap_pass(init)? && Instant::now() < end {
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(())
}

/// True when twins are left that have not ended yet.
fn reap_pass(init: Pid) -> Result<bool> {
    let mut unfinished = false;
    let mut all = vec![init];
    let mut at = 0;
    while at < all.len() {
        let children = proc::children(all[at]).unwrap_or_default();
        let mut ended = Vec::new();
        for child in children.iter().filter(|c| is_twin(**c)) {
            match proc::stat(*child) {
                Ok(stat) if stat.state == 'Z' => ended.extend(inner_pid(*child)),
                _ => unfinished = true,
            }
        }
        if !ended.is_empty() {
            reap(all[at], &ended)?;
        }
        all.extend(children);
        at += 1;
    }
    Ok(unfinished)
}

/// No exit signal and no descriptors: a program hardly makes such a child itself.
fn is_twin(pid: Pid) -> bool {
    proc::stat(pid).is_ok_and(|s| s.exit_signal == 0) && proc::fds(pid).is_ok_and(|f| f.is_empty())
}

fn inner_pid(pid: Pid) -> Option<i32> {
    proc::status(pid).ok()?.ns_pids.last().copied()
}

/// One thread stopped for a moment while all others run.
struct Stopped(Pid);

impl Stopped {
    fn stop(tid: Pid) -> Result<Stopped> {
        ptrace::seize(tid, Options::SUSPEND_SECCOMP).about(tid, "thread")?;
        let stopped = Stopped(tid);
        ptrace::interrupt(tid).about(tid, "thread")?;
        if wait::interrupted(tid, freeze::LIMIT, |_| {})
            .about(tid, "thread")?
            .is_none()
        {
            let how = "while its twin was read".into();
            return Err(torpor_sys::Error::Died { pid: tid, how }).about(tid, "thread");
        }
        if cpu::rewind_unnoticed(tid)? && freeze::has_own_interrupt(tid)? {
            cpu::keep_interrupted(tid)?;
        }
        Ok(stopped)
    }
}

impl Drop for Stopped {
    fn drop(&mut self) {
        let _ = ptrace::detach(self.0, 0);
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::process::Command;

    use super::*;

    /// The children of a process, once they are so many.
    fn children_of(parent: Pid, count: usize) -> Vec<Pid> {
        for _ in 0..1000 {
            let children = proc::children(parent).unwrap_or_default();
            if children.len() == count {
                return children;
            }
            std::thread::sleep(Duration::from_millis(10));
        }
        panic!("{parent} has no {count} children");
    }

    #[test]
    fn twins_end_together_when_init_has_died() {
        wait::block_sigchld();
        let script = "sleep 1000 & sleep 1000 & sleep 1000 & wait";
        let started = Command::new("unshare")
            .args(["--pid", "--fork", "sh", "-c", script])
            .spawn();
        let Ok(mut outside) = started else { return };
        let init = children_of(outside.id() as Pid, 1)[0];
        let mut all = Vec::new();
        for pid in children_of(init, 3) {
            ptrace::seize(pid, Options::SUSPEND_SECCOMP).unwrap();
            let inner = inner_pid(pid).unwrap();
            all.push(Twin {
                pid,
                inner,
                original: init,
            });
        }
        fork::kill(init, 9).unwrap();
        // One by one: init could not be stopped to wait for the first while the others were left.
        Twins { all }.dismiss().unwrap();
        outside.wait().unwrap();
    }
}
