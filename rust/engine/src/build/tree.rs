//! Growing the tree: every process at its id, in its session and process group, zombies included.

use std::collections::{BTreeMap, BTreeSet};

use torpor_sys::remote::{Batch, Site};
use torpor_sys::wait::{self, Event};
use torpor_sys::{Pid, fork, ptrace};

use super::{LIMIT, Nursery, Skeleton};
use crate::error::{About, Error, Result};
use crate::kinds::sharing::{self, Step};
use crate::model::{Inventory, Process};

/// `struct clone_args` (clone3(2)) up to set_tid_size.
pub(super) fn clone3(batch: &mut Batch, what: String, flags: u64, exit_signal: i32, tid: i32) {
    let wanted = batch.data(&tid.to_le_bytes());
    let words = [flags, 0, 0, 0, exit_signal as u64, 0, 0, 0, 0, 1, 0];
    let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
    let args = batch.data(&bytes);
    batch.point(args.skip(64), wanted);
    batch.must(what, libc::SYS_clone3, [args.into(), bytes.len().into()]);
}

/// Flags of a thread as pthread_create(3) makes it, less what it would write to memory.
const THREAD: i32 = libc::CLONE_VM
    | libc::CLONE_FS
    | libc::CLONE_FILES
    | libc::CLONE_SIGHAND
    | libc::CLONE_THREAD
    | libc::CLONE_SYSVSEM;

/// When a child of `parent` must be made: a child is born into the session that its parent is in at that time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Birth {
    BeforeSetsid,
    AfterSetsid,
    /// It was not its child then.
    Elsewhere,
}

fn birth(parent: &Process, parent_born_in: i32, child: &Process) -> Birth {
    if child.sid == child.pid || child.sid == parent.sid {
        return Birth::AfterSetsid;
    }
    if child.sid == parent_born_in {
        return Birth::BeforeSetsid;
    }
    Birth::Elsewhere
}

/// How processes come to be in their sessions.
#[derive(Debug, Default)]
pub struct Lineage {
    /// Those that are not made by cloning their parents.
    pub orphans: BTreeSet<i32>,
    /// Those that are made before their parents begin a session.
    pub early: BTreeSet<i32>,
}

impl Lineage {
    /// Finds out.
    pub fn of(inventory: &Inventory) -> Lineage {
        let mut lineage = Lineage::default();
        let mut born_in: BTreeMap<i32, (&Process, i32)> = BTreeMap::new();
        for process in &inventory.processes {
            let birth = born_in
                .get(&process.ppid)
                .map(|(p, b)| (birth(p, *b, process), p.sid, *b));
            let session = match birth {
                None => process.sid,
                Some((Birth::BeforeSetsid, _, earlier)) => {
                    lineage.early.insert(process.pid);
                    earlier
                }
                Some((Birth::AfterSetsid, of_parent, _)) => of_parent,
                Some((Birth::Elsewhere, _, _)) => {
                    lineage.orphans.insert(process.pid);
                    process.sid
                }
            };
            born_in.insert(process.pid, (process, session));
        }
        lineage
    }
}

impl Skeleton {
    /// Makes all processes, their groups, and lets those end that were zombies.
    pub(super) fn grow(&mut self, nursery: &Nursery<'_>) -> Result<()> {
        let inventory = nursery.inventory;
        let root = &inventory.processes[0];
        let mut orphans = Vec::new();
        self.children(nursery, root, root.sid, &mut orphans)?;
        // Those that are found under an orphan come later.
        let mut at = 0;
        while let Some(&orphan) = orphans.get(at) {
            self.orphan(nursery, orphan)?;
            self.children(nursery, orphan, orphan.sid, &mut orphans)?;
            at += 1;
        }
        self.groups(inventory)?;
        self.foregrounds(inventory)?;
        for process in inventory.processes.iter().filter(|p| p.zombie.is_some()) {
            self.end_zombie(process)?;
        }
        Ok(())
    }

    fn children<'i>(
        &mut self,
        nursery: &Nursery<'i>,
        parent: &Process,
        born_in: i32,
        orphans: &mut Vec<&'i Process>,
    ) -> Result<()> {
        self.adopt(parent)?;
        let inventory = nursery.inventory;
        let children: Vec<&'i Process> = inventory
            .processes
            .iter()
            .skip(1)
            .filter(|p| p.ppid == parent.pid)
            .collect();
        let mut born_before = Vec::new();
        let mut own = Vec::new();
        for child in children {
            match birth(parent, born_in, child) {
                Birth::BeforeSetsid => born_before.push(child.pid),
                Birth::AfterSetsid => {}
                Birth::Elsewhere => {
                    orphans.push(child);
                    continue;
                }
            }
            own.push(child);
        }
        let steps = nursery.births.steps(parent, &own)?;
        let mut batch = Batch::new();
        let mut made = Vec::new();
        let mut is_in_session = false;
        for step in steps {
            match step {
                Step::GiveUp(flags) => Step::give_up(&mut batch, flags),
                Step::Make(child, flags) => {
                    if !born_before.contains(&child.pid) && !is_in_session {
                        self.begin_session(inventory, parent, &mut batch);
                        is_in_session = true;
                    }
                    let what = format!("clone3 of process {}", child.pid);
                    clone3(&mut batch, what, flags as u64, child.exit_signal, child.pid);
                    made.push(child);
                }
            }
        }
        if !is_in_session {
            self.begin_session(inventory, parent, &mut batch);
        }
        nursery.prepare(self, parent)?;
        let born = self.run_births(parent.pid, &batch)?;
        for (child, tid) in made.iter().zip(born) {
            self.all.push(tid);
            let site = Site::cloned(tid, self.place).about(tid, "new process")?;
            self.sites.insert(child.pid, site);
            nursery.note_birth(self, parent.pid, child);
        }
        for child in made {
            let session = if born_before.contains(&child.pid) {
                born_in
            } else {
                parent.sid
            };
            self.children(nursery, child, session, orphans)?;
        }
        Ok(())
    }

    /// What a leader of a session does before it has the children that are in it.
    fn begin_session(&self, inventory: &Inventory, parent: &Process, batch: &mut Batch) {
        let is_root = parent.pid == inventory.processes[0].pid;
        if parent.sid == parent.pid && !is_root {
            batch.must("setsid", libc::SYS_setsid, []);
        }
        self.take_terminal(inventory, parent, batch);
    }

    pub(super) fn run_births(&self, pid: i32, batch: &Batch) -> Result<Vec<Pid>> {
        let mut born = Vec::new();
        if !batch.is_empty() {
            let site = self.site(pid)?;
            let results = site.run_with(batch, |child| {
                born.push(child);
                Ok(())
            });
            results.about(pid, "new process")?;
        }
        Ok(born)
    }

    /// A group is named after its leader, who must be there when others join: where it has ended, a helper
    /// stands in for it.
    fn groups(&mut self, inventory: &Inventory) -> Result<()> {
        let sessions: BTreeMap<i32, i32> = inventory.processes.iter().map(|p| (p.pid, p.sid)).collect();
        let is_leader = |p: &&Process| p.pgid == p.pid && p.sid != p.pid;
        for leader in inventory.processes.iter().filter(is_leader) {
            self.setpgid(leader.pid, 0)?;
        }
        let mut helpers = Vec::new();
        for process in inventory.processes.iter().filter(|p| p.pgid != p.pid && p.sid != p.pid) {
            let known = process.pgid == process.sid
                || sessions.contains_key(&process.pgid)
                || helpers.iter().any(|(g, _, _)| *g == process.pgid);
            if !known {
                helpers.push(self.stand_in(process)?);
            }
            self.setpgid(process.pid, process.pgid)?;
        }
        for (group, parent, site) in helpers {
            self.end_helper(group, parent, &site)?;
        }
        Ok(())
    }

    fn setpgid(&self, pid: i32, group: i32) -> Result<()> {
        let mut batch = Batch::new();
        batch.must(
            format!("setpgid to {group}"),
            libc::SYS_setpgid,
            [0.into(), group.into()],
        );
        self.site(pid)?.run(&batch).about(pid, "process group").map(drop)
    }

    fn stand_in(&mut self, member: &Process) -> Result<(i32, i32, Site)> {
        let site = self.helper(member.pgid, member.pid)?;
        let tid = site.tid();
        let mut batch = Batch::new();
        batch.must("setpgid", libc::SYS_setpgid, [0.into(), 0.into()]);
        site.run(&batch).about(tid, "helper")?;
        Ok((member.pgid, member.pid, site))
    }

    pub(super) fn end_helper(&self, group: i32, parent: i32, helper: &Site) -> Result<()> {
        fork::kill(helper.tid(), 9).about(group, "helper")?;
        wait_end(helper.tid())?;
        let mut batch = Batch::new();
        let args = [group.into(), 0.into(), libc::__WCLONE.into(), 0.into()];
        batch.must("wait4 for a helper", libc::SYS_wait4, args);
        self.site(parent)?.run(&batch).about(parent, "helper").map(drop)
    }

    /// Lets a process end as it had ended, and takes the SIGCHLD back that its parent was sent long ago.
    fn end_zombie(&mut self, process: &Process) -> Result<()> {
        let status = process.zombie.unwrap_or(0);
        let site = self
            .sites
            .remove(&process.pid)
            .ok_or_else(|| Error::nonsense("a zombie was not born"))?;
        let tid = site.tid();
        let mut batch = Batch::new();
        let name = batch.string(&process.name);
        batch.must("PR_SET_NAME", libc::SYS_prctl, [libc::PR_SET_NAME.into(), name.into()]);
        site.run(&batch).about(tid, "zombie")?;
        let signal = status & 0x7f;
        if signal == 0 {
            let mut batch = Batch::new();
            batch.must("exit_group", libc::SYS_exit_group, [(status >> 8 & 0xff).into()]);
            match site.run(&batch) {
                Err(torpor_sys::Error::Died { .. }) => {}
                Err(e) => return Err(e).about(tid, "zombie"),
                Ok(_) => return Err(Error::nonsense("a zombie lives")),
            }
        } else {
            self.end_by_signal(&site, signal)?;
        }
        self.all.retain(|t| *t != tid);
        self.swallow_sigchld(process)
    }

    fn end_by_signal(&self, site: &Site, signal: i32) -> Result<()> {
        let tid = site.tid();
        if signal != libc::SIGKILL {
            let mut batch = Batch::new();
            let default = batch.room(32);
            batch.must(
                "rt_sigaction",
                libc::SYS_rt_sigaction,
                [signal.into(), default.into(), 0.into(), 8.into()],
            );
            let none = batch.room(16);
            let core = libc::RLIMIT_CORE;
            batch.must(
                "prlimit64",
                libc::SYS_prlimit64,
                [0.into(), core.into(), none.into(), 0.into()],
            );
            site.run(&batch).about(tid, "zombie")?;
            ptrace::set_sigmask(tid, 0).about(tid, "zombie")?;
        }
        fork::kill(tid, signal).about(tid, "zombie")?;
        if signal != libc::SIGKILL {
            // Stopped in front of the signal or still in its breakpoint: let it take the signal.
            ptrace::cont(tid, 0).about(tid, "zombie")?;
            if let Event::Stopped { signal: got, .. } = wait::until(tid, LIMIT).about(tid, "zombie")? {
                ptrace::cont(tid, got).about(tid, "zombie")?;
            } else {
                return Ok(());
            }
        }
        wait_end(tid)
    }

    fn swallow_sigchld(&self, process: &Process) -> Result<()> {
        let mut batch = Batch::new();
        let set = batch.data(&(1u64 << (libc::SIGCHLD - 1)).to_le_bytes());
        let now = batch.room(16);
        batch.may(
            "rt_sigtimedwait",
            libc::SYS_rt_sigtimedwait,
            [set.into(), 0.into(), now.into(), 8.into()],
        );
        self.site(process.ppid)?
            .run(&batch)
            .about(process.ppid, "SIGCHLD")
            .map(drop)
    }

    /// Makes the other threads of a process.
    pub fn grow_threads(&mut self, process: &Process) -> Result<()> {
        let Some(body) = &process.body else { return Ok(()) };
        // Each clone takes two pieces of the table.
        for group in body.threads[1..].chunks(1000) {
            let mut batch = Batch::new();
            for thread in group {
                let flags = THREAD & !sharing::thread_flags(&thread.own);
                let what = format!("clone3 of thread {}", thread.tid);
                clone3(&mut batch, what, flags as u64, 0, thread.tid);
            }
            let born = self.run_births(process.pid, &batch)?;
            for (thread, tid) in group.iter().zip(born) {
                self.all.push(tid);
                let site = Site::cloned(tid, self.place).about(tid, "new thread")?;
                self.threads.entry(process.pid).or_default().push((thread.tid, site));
            }
        }
        Ok(())
    }
}

fn wait_end(tid: Pid) -> Result<()> {
    loop {
        match wait::until(tid, LIMIT).about(tid, "process")? {
            Event::Exited(_) | Event::Killed(_) => return Ok(()),
            Event::Stopped { .. } => ptrace::cont(tid, 0).about(tid, "process")?,
            Event::Continued => {}
        }
    }
}
