//! One thread: what it registered, who it acts as, what waits for it, and at last its registers.

use torpor_image::Reader;
use torpor_sys::remote::{Batch, Site, site};
use torpor_sys::wait::{self, Event};
use torpor_sys::{Pid, ptrace};

use super::{LIMIT, Skeleton};
use crate::error::{About, Error, Result};
use crate::kinds::restart::{self, Outcome};
use crate::kinds::{cpu, creds, memory, posix_timers, seccomp, settings, signals};
use crate::model::{Body, Inventory, Process, Thread};

/// Credentials are set with what the blank process has; this is how much that is.
fn capabilities_of(tid: Pid) -> Result<u64> {
    Ok(torpor_sys::proc::status(tid).about(tid, "status")?.cap_effective)
}

impl Skeleton {
    pub(super) fn sites_of(&self, process: i32) -> Result<Vec<(i32, &Site)>> {
        let mut all = vec![(process, self.site(process)?)];
        all.extend(
            self.threads
                .get(&process)
                .into_iter()
                .flatten()
                .map(|(tid, site)| (*tid, site)),
        );
        Ok(all)
    }

    /// Gives the threads of a process everything but their registers. Limits and credentials come late: after
    /// them little is allowed any more.
    pub fn dress_threads(&self, process: &Process, inventory: &Inventory) -> Result<()> {
        let Some(body) = &process.body else { return Ok(()) };
        for (thread, (tid, site)) in body.threads.iter().zip(self.sites_of(process.pid)?) {
            if thread.tid != tid {
                return Err(Error::nonsense(format!("thread {tid} is out of order")));
            }
            let mut batch = Batch::new();
            settings::rebuild_thread(&mut batch, &thread.settings);
            signals::rebuild_altstack(&mut batch, &thread.signals);
            seccomp::rebuild(&mut batch, &thread.seccomp, &inventory.objects.seccomp)?;
            site.run(&batch).about(tid, "thread")?;
        }
        settings::rebuild_outside(self.site(process.pid)?.tid(), &body.settings)?;
        let mut batch = Batch::new();
        settings::rebuild_limits(&mut batch, &body.settings);
        self.site(process.pid)?.run(&batch).about(process.pid, "limits")?;
        // Before credentials and for good: closing any descriptor of a file would give its locks up.
        self.lock(process.pid, self.site(process.pid)?, &body.locks)?;
        for (thread, (tid, site)) in body.threads.iter().zip(self.sites_of(process.pid)?) {
            self.lock(tid, site, &thread.own.locks)?;
        }
        for (thread, (_, site)) in body.threads.iter().zip(self.sites_of(process.pid)?) {
            self.last(inventory, body, thread, site)?;
        }
        let mut batch = Batch::new();
        settings::rebuild_dumpable(&mut batch, &body.settings);
        self.site(process.pid)?
            .run(&batch)
            .about(process.pid, "settings")
            .map(drop)
    }

    fn last(&self, inventory: &Inventory, body: &Body, thread: &Thread, site: &Site) -> Result<()> {
        let tid = thread.tid;
        let is_leader = body.threads.first().is_some_and(|t| t.tid == tid);
        let leader = body.threads.first().map_or(tid, |t| t.tid);
        let mut batch = Batch::new();
        creds::rebuild(&mut batch, &thread.creds, capabilities_of(site.tid())?);
        settings::rebuild_after_creds(&mut batch, &thread.settings);
        let shared: &[signals::Info] = if is_leader { &body.signals.pending } else { &[] };
        signals::rebuild_pending(&mut batch, leader, tid, shared, &thread.signals.pending);
        if is_leader || thread.own.fds.is_some() {
            self.relate(tid, inventory, &mut batch);
        }
        site.run(&batch).about(tid, "credentials")?;
        if is_leader {
            let run = |batch: &Batch| site.run(batch).about(tid, "POSIX timers");
            posix_timers::rebuild(tid, &body.posix_timers, &run)?;
        }
        Ok(())
    }

    /// Removes the stub and gives every thread its registers: it could run now. Of processes with memory in common the one
    /// that holds it comes last.
    pub fn arm(&self, process: &Process, inventory: &Inventory, image: &Reader) -> Result<()> {
        let Some(body) = &process.body else { return Ok(()) };
        let syscall_at = self.syscall_at(inventory.memory_of(body))?;
        let mut waits = Vec::new();
        for (thread, (_, site)) in body.threads.iter().zip(self.sites_of(process.pid)?) {
            waits.push(match thread.cpu.wait()? {
                (_, Some(_)) if signals::will_interrupt(&body.signals, &thread.signals) => Outcome::Held,
                (regs, Some(wait)) => restart::rebuild(site, syscall_at, &regs, wait)?,
                (_, None) => Outcome::Held,
            });
        }
        self.remove_stub(process.pid, body, syscall_at)?;
        let threads = body.threads.iter().zip(waits);
        for ((thread, wait), (tid, site)) in threads.zip(self.sites_of(process.pid)?) {
            cpu::rebuild(site.tid(), &thread.cpu, &image.blob(thread.cpu.xstate)?, wait)?;
            ptrace::set_sigmask(site.tid(), thread.signals.mask).about(tid, "signal mask")?;
        }
        Ok(())
    }

    fn syscall_at(&self, memory: &memory::State) -> Result<u64> {
        // The code is the last of the kernel's parts.
        let code = memory
            .kernel
            .last()
            .ok_or_else(|| Error::nonsense("a process without vdso"))?;
        Ok(code.0 + self.syscall_offset)
    }

    fn remove_stub(&self, pid: i32, body: &Body, syscall_at: u64) -> Result<()> {
        let site = self.site(pid)?;
        let tid = site.tid();
        let own = signals::trap_action(&body.signals).filter(|_| body.sharing.actions.is_none());
        if let Some(action) = own {
            let table = self.place.table();
            site.memory().write(table, &action).about(pid, "SIGTRAP")?;
            let args = [libc::SIGTRAP as u64, table, 0, 8, 0, 0];
            site::call_at(tid, syscall_at, libc::SYS_rt_sigaction, args).about(pid, "SIGTRAP")?;
        }
        if body.sharing.memory.is_none() {
            let args = [self.place.base, self.place.len(), 0, 0, 0, 0];
            site::call_at(tid, syscall_at, libc::SYS_munmap, args).about(pid, "stub")?;
        }
        stop_for_signals(tid)
    }
}

/// Moves a task from the end of a system call to where the kernel looks at signals and at interrupted calls:
/// only there it does what the registers of an interrupted call ask for.
fn stop_for_signals(tid: Pid) -> Result<()> {
    ptrace::interrupt(tid).about(tid, "thread")?;
    loop {
        ptrace::cont(tid, 0).about(tid, "thread")?;
        match wait::until(tid, LIMIT).about(tid, "thread")? {
            Event::Stopped {
                event: ptrace::EVENT_STOP,
                ..
            } => return Ok(()),
            Event::Stopped { .. } | Event::Continued => {}
            other => {
                return Err(Error::nonsense(format!(
                    "a thread ended while it was armed ({other:?})"
                )));
            }
        }
    }
}
