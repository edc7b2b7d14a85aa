//! Stopping every thread of a container, so that it goes on as if nothing had happened when we let go, in
//! whatever way that comes about.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use torpor_sys::cgroup::Freezer;
use torpor_sys::ptrace::{self, Options};
use torpor_sys::wait;
use torpor_sys::{Pid, fork, proc};

use crate::error::{About, Error, Result};
use crate::kinds::cpu;
use crate::vfork;

/// How long a task may take to stop or to end.
pub const LIMIT: Duration = Duration::from_secs(10);

/// How long init's end is waited for when only its parent's or an outsider's wait(2) is missing.
const ODD: Duration = Duration::from_millis(50);

/// How long a task may take to stop before somebody looks what keeps it.
const PATIENCE: Duration = Duration::from_millis(20);

/// How long a child of vfork(2) has to start its program, while the rest of the container may stand still.
const VFORK_LIMIT: Duration = Duration::from_secs(2);

/// A process whose threads are all stopped by us.
#[derive(Debug)]
pub struct FrozenProcess {
    /// Its id in our pid namespace.
    pub pid: Pid,
    /// Its threads, the leader first.
    pub threads: Vec<Pid>,
}

/// A stopped container. Dropping it lets it run on, paused if it was paused before.
#[derive(Debug)]
pub struct Frozen {
    /// Init first, then by id.
    pub processes: Vec<FrozenProcess>,
    /// When the first thread may have stopped.
    pub since: Instant,
    freezer: Option<Freezer>,
    was_paused: bool,
    seized: BTreeMap<Pid, Pid>,
    /// Threads stopped by a signal (SIGSTOP and its like) before we came.
    stopped: BTreeSet<Pid>,
    /// Threads whose call was set back to its beginning, since stopping made it end.
    rewound: BTreeSet<Pid>,
    /// The group is not frozen: a task that is interrupted stops at once.
    thawed: bool,
    /// A process was let go again, to be stopped in a later pass.
    let_run: bool,
}

/// Stops every thread of the container whose init is `init`.
///
/// Tasks are seized with their children followed, pass after pass, until a pass finds nothing new: whoever is
/// seized cannot make a child that is not. The freezer is needed only where that does not come to an end (a fork
/// storm) or where the container is paused: a tracer that is killed must not leave a frozen container.
pub fn freeze(init: Pid) -> Result<Frozen> {
    let freezer = Freezer::of(init).about(init, "cgroup")?;
    let was_paused = match &freezer {
        Some(f) => f.is_frozen().about(init, "freezer")?,
        None => false,
    };
    let mut frozen = Frozen {
        processes: Vec::new(),
        since: Instant::now(),
        freezer,
        was_paused,
        seized: BTreeMap::new(),
        stopped: BTreeSet::new(),
        rewound: BTreeSet::new(),
        thawed: true,
        let_run: false,
    };
    frozen.stop_all(init)?;
    frozen.keep_own_interrupts()?;
    frozen.sort(init);
    Ok(frozen)
}

/// How many passes are made before a container counts as a fork storm.
const PASSES: usize = 20;

impl Frozen {
    fn stop_all(&mut self, init: Pid) -> Result<()> {
        if self.was_paused {
            self.seize_frozen(init)?;
        }
        for pass in 0.. {
            let before = self.seized.len();
            for pid in self.candidates(init)? {
                self.seize_process(pid, |_| true)?;
            }
            self.wait_all()?;
            let again = std::mem::take(&mut self.let_run);
            if self.seized.len() == before && !again {
                break;
            }
            if pass == PASSES {
                self.freeze_storm(init)?;
            }
        }
        for tid in self.seized.keys() {
            ptrace::set_options(*tid, Options::SUSPEND_SECCOMP).about(*tid, "thread")?;
        }
        Ok(())
    }

    /// A signal with a handler waits for a thread whose call we set back: its EINTR was the program's own.
    fn keep_own_interrupts(&self) -> Result<()> {
        for tid in &self.rewound {
            if has_own_interrupt(*tid)? {
                cpu::keep_interrupted(*tid)?;
            }
        }
        Ok(())
    }

    /// Every process that may belong to the container.
    fn candidates(&self, init: Pid) -> Result<Vec<Pid>> {
        let mut all = tree(init)?;
        if let Some(freezer) = &self.freezer {
            all.extend(freezer.pids().about(init, "cgroup.procs")?);
        }
        Ok(all)
    }

    /// Seizes the tasks of a frozen group and thaws it: a frozen task reaches its ptrace stop only when thawed.
    /// One that a signal had stopped is left for after: seizing it waits for something that it can only do
    /// when it is thawed (kernel/ptrace.c, JOBCTL_TRAPPING).
    fn seize_frozen(&mut self, init: Pid) -> Result<()> {
        let Some(freezer) = self.freezer.clone() else {
            return Ok(());
        };
        let thaw = Thaw(&freezer);
        self.thawed = false;
        let pids = freezer.pids().about(init, "cgroup.procs")?;
        pids.into_iter()
            .try_for_each(|pid| self.seize_process(pid, |tid| !is_in_signal_stop(tid)))?;
        drop(thaw);
        self.thawed = true;
        self.wait_all()
    }

    fn freeze_storm(&mut self, init: Pid) -> Result<()> {
        let Some(freezer) = self.freezer.clone() else {
            let why = "it makes processes faster than they can be stopped";
            return Err(Error::unsupported(
                init,
                "fork storm",
                why,
                "give the container a cgroup of its own",
            ));
        };
        freezer.freeze(LIMIT).about(init, "freezer")?;
        self.seize_frozen(init)
    }

    fn seize_process(&mut self, pid: Pid, wanted: impl Fn(Pid) -> bool) -> Result<()> {
        let options = Options::SUSPEND_SECCOMP.and(Options::FOLLOW);
        let Ok(stat) = proc::stat(pid) else { return Ok(()) };
        if stat.state == 'Z' {
            return self.check_zombie(pid);
        }
        for tid in proc::threads(pid).unwrap_or_default() {
            if self.seized.contains_key(&tid) || !wanted(tid) {
                continue;
            }
            match ptrace::seize(tid, options) {
                Ok(()) => {
                    self.seized.insert(tid, pid);
                    self.stop_one(tid)?;
                }
                Err(e) if ptrace::is_gone(&e) || is_ending(tid) => {}
                Err(e) => return Err(why_not_seized(pid, tid, e)),
            }
        }
        Ok(())
    }

    /// Stops one thread and at once takes back what stopping does to the call that it is in, so that the time in
    /// which a killed tracer would show it an EINTR is a few microseconds for each thread, and not for all.
    /// A task of a frozen group stops only when thawed: it is waited for later.
    fn stop_one(&mut self, tid: Pid) -> Result<()> {
        match ptrace::interrupt(tid) {
            // It ended meanwhile; as our tracee it waits to be looked at.
            Err(e) if ptrace::is_gone(&e) => {}
            other => other.about(tid, "thread")?,
        }
        if self.thawed {
            self.wait_stop(tid, Instant::now() + LIMIT)?;
        }
        Ok(())
    }

    /// A zombie is state of its parent; one whose other threads live on is not carried yet.
    fn check_zombie(&self, pid: Pid) -> Result<()> {
        if proc::threads(pid).is_ok_and(|t| t.len() > 1) {
            return Err(Error::unsupported(
                pid,
                "thread group",
                "its main thread has ended while others run on, which is not carried yet",
                "try again when it has ended",
            ));
        }
        Ok(())
    }

    fn wait_all(&mut self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        let waiting: Vec<Pid> = self.seized.keys().copied().filter(|t| !self.is_waited(*t)).collect();
        for tid in waiting {
            self.wait_stop(tid, end)?;
        }
        Ok(())
    }

    fn is_waited(&self, tid: Pid) -> bool {
        self.processes.iter().any(|p| p.threads.contains(&tid))
    }

    fn wait_stop(&mut self, tid: Pid, end: Instant) -> Result<()> {
        let Some(signal) = self.stop_signal(tid, end)? else {
            self.seized.remove(&tid);
            return Ok(());
        };
        if signal != libc::SIGTRAP {
            self.stopped.insert(tid);
        }
        if cpu::rewind_unnoticed(tid)? {
            self.rewound.insert(tid);
        }
        self.note(tid);
        Ok(())
    }

    /// The signal that a thread is stopped by; `None` when it has ended.
    fn stop_signal(&mut self, tid: Pid, end: Instant) -> Result<Option<i32>> {
        let begin = Instant::now();
        loop {
            let mut born = Vec::new();
            let limit = end.saturating_duration_since(Instant::now()).min(PATIENCE);
            let stop = wait::interrupted(tid, limit, |child| born.push(child));
            // A child made before the stop is ours already.
            for child in born {
                if let Ok(status) = proc::status(child) {
                    self.seized.insert(child, status.tgid);
                }
            }
            match stop {
                Err(torpor_sys::Error::Timeout { .. }) if Instant::now() < end => self.let_vfork_end(tid, begin)?,
                Err(error) => return Err(in_all(error, begin)).about(tid, "thread"),
                Ok(signal) => return Ok(signal),
            }
        }
    }

    /// Where a thread sleeps for a child of vfork(2), lets that child run on.
    fn let_vfork_end(&mut self, tid: Pid, begin: Instant) -> Result<()> {
        let Some(&pid) = self.seized.get(&tid) else {
            return Ok(());
        };
        let borrowers = vfork::borrowers(tid, pid);
        let Some(&child) = borrowers.first() else { return Ok(()) };
        if begin.elapsed() > VFORK_LIMIT {
            let why =
                format!("it waits for process {child} to start a program or to end, and cannot be stopped before");
            return Err(Error::unsupported(pid, "vfork", why, "try again later"));
        }
        // A child may sleep for one of its own.
        borrowers.iter().rev().try_for_each(|p| self.let_run(*p))
    }

    /// Lets a process run that we have stopped or are about to stop.
    fn let_run(&mut self, pid: Pid) -> Result<()> {
        let tids: Vec<Pid> = self
            .seized
            .iter()
            .filter(|(_, p)| **p == pid)
            .map(|(t, _)| *t)
            .collect();
        for tid in tids {
            if !self.is_waited(tid) {
                wait::interrupted(tid, LIMIT, |_| {}).about(tid, "thread")?;
            }
            match ptrace::detach(tid, 0) {
                Err(e) if ptrace::is_gone(&e) => {}
                other => other.about(tid, "thread")?,
            }
            self.seized.remove(&tid);
            self.stopped.remove(&tid);
            self.rewound.remove(&tid);
            self.let_run = true;
        }
        self.processes.retain(|p| p.pid != pid);
        Ok(())
    }

    fn note(&mut self, tid: Pid) {
        let Some(&pid) = self.seized.get(&tid) else { return };
        match self.processes.iter_mut().find(|p| p.pid == pid) {
            Some(process) => process.threads.push(tid),
            None => self.processes.push(FrozenProcess {
                pid,
                threads: vec![tid],
            }),
        }
    }

    fn sort(&mut self, init: Pid) {
        for process in &mut self.processes {
            let pid = process.pid;
            process.threads.sort_unstable_by_key(|t| (*t != pid, *t));
        }
        self.processes.sort_unstable_by_key(|p| (p.pid != init, p.pid));
    }

    /// Whether a thread was stopped by a signal before we came.
    pub fn is_stopped(&self, tid: Pid) -> bool {
        self.stopped.contains(&tid)
    }

    /// Whether the container was paused when we came.
    pub fn was_paused(&self) -> bool {
        self.was_paused
    }

    /// Lets the container run on.
    pub fn release(mut self) -> Result<()> {
        self.let_go()
    }

    /// Ends the container: its init exits with status 0, which takes every other process with it.
    ///
    /// A tracee that has ended stays until its tracer has waited for it, and init does not end before all
    /// others are gone: so each is waited for here.
    pub fn kill(mut self, init: Pid) -> Result<()> {
        self.was_paused = false;
        end_with_success(init)?;
        let all: Vec<Pid> = self.seized.keys().copied().collect();
        let begin = Instant::now();
        // A process of `exec` has a parent outside, who may take its time to wait for it, and init's number stays
        // until then.
        let enough = |left: &[Pid]| left == [init] && begin.elapsed() > ODD && waits_for_outsiders(init);
        for tid in wait::gone_enough(&all, LIMIT, enough) {
            // It hangs in the kernel: what is left is to ask harder and to let it go.
            let _ = fork::kill(tid, 9);
            let _ = ptrace::detach(tid, 0);
        }
        self.seized.clear();
        Ok(())
    }

    fn let_go(&mut self) -> Result<()> {
        if let (Some(freezer), true) = (&self.freezer, self.was_paused) {
            freezer.pause_later().about(0, "freezer")?;
        }
        let mut first_error = Ok(());
        for &tid in self.seized.keys() {
            if let Err(e) = ptrace::detach(tid, 0)
                && !ptrace::is_gone(&e)
                && first_error.is_ok()
            {
                first_error = Err(e).about(tid, "thread");
            }
        }
        self.seized.clear();
        first_error
    }
}

impl Drop for Frozen {
    fn drop(&mut self) {
        // Nothing better can be done about a task that cannot be detached: the kernel does it when we end.
        let _ = self.let_go();
    }
}

/// Thaws a group on every way out.
struct Thaw<'f>(&'f Freezer);

impl Drop for Thaw<'_> {
    fn drop(&mut self) {
        let _ = self.0.thaw();
    }
}

/// Says of a task that did not stop how long it was waited for in all, and not only since the last look at it.
fn in_all(mut error: torpor_sys::Error, begin: Instant) -> torpor_sys::Error {
    if let torpor_sys::Error::Timeout { ms, .. } = &mut error {
        *ms = begin.elapsed().as_millis().try_into().unwrap_or(u64::MAX);
    }
    error
}

/// Whether a signal with a handler waits for a thread, which ends the call that it is in.
pub fn has_own_interrupt(tid: Pid) -> Result<bool> {
    let status = proc::status(tid).about(tid, "status")?;
    let pending = (status.sig_pending | status.shared_pending) & !status.sig_blocked;
    Ok(pending & status.sig_caught != 0)
}

/// A task on its way out cannot be seized (EPERM) and need not be.
fn is_ending(tid: Pid) -> bool {
    proc::stat(tid).map_or(true, |s| matches!(s.state, 'Z' | 'X'))
}

fn is_in_signal_stop(tid: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{tid}/wchan")).is_ok_and(|w| w == "do_signal_stop")
}

/// Whether nothing is left of a pid namespace but processes that others have to wait for: its init has given up its
/// memory and files before it gets there (kernel/exit.c, kernel/pid_namespace.c).
fn waits_for_outsiders(init: Pid) -> bool {
    std::fs::read_to_string(format!("/proc/{init}/wchan")).is_ok_and(|w| w == "zap_pid_ns_processes")
}

/// The status of a container that was put to sleep is 0, as with runsc: it did not fail.
fn end_with_success(init: Pid) -> Result<()> {
    const EXIT_GROUP: u64 = 231;
    let vmas = proc::maps(init).about(init, "maps")?;
    let memory = torpor_sys::mem::Memory::open(init).about(init, "memory")?;
    let Some(at) = crate::kinds::vdso::syscall_instruction(&memory, &vmas)? else {
        return fork::kill(init, 9).about(init, "init");
    };
    if ptrace::dispatch(init).about(init, "registers")?.is_some() {
        ptrace::set_dispatch(init, None).about(init, "registers")?;
    }
    let mut regs = ptrace::regs(init).about(init, "registers")?;
    (regs.rip, regs.rax, regs.rdi, regs.orig_rax) = (at, EXIT_GROUP, 0, u64::MAX);
    ptrace::set_sigmask(init, u64::MAX).about(init, "signal mask")?;
    ptrace::set_regs(init, &regs).about(init, "registers")?;
    ptrace::cont(init, 0).about(init, "init")
}

fn why_not_seized(pid: Pid, tid: Pid, error: torpor_sys::Error) -> Error {
    let tracer = proc::status(tid).map(|s| s.tracer).unwrap_or(0);
    if tracer != 0 {
        let why = format!("it is traced by process {tracer}, and a task has one tracer");
        return Error::unsupported(pid, "ptrace", why, "detach the debugger first");
    }
    Error::Kernel {
        stage: None,
        pid: Some(pid),
        object: "ptrace".into(),
        source: error,
    }
}

/// A process and all its descendants.
pub fn tree(init: Pid) -> Result<Vec<Pid>> {
    let mut all = vec![init];
    let mut at = 0;
    while at < all.len() {
        all.extend(proc::children(all[at]).unwrap_or_default());
        at += 1;
    }
    if proc::stat(init).is_err() {
        return Err(torpor_sys::Error::Died {
            pid: init,
            how: "before it could be stopped".into(),
        })
        .about(init, "init");
    }
    Ok(all)
}
