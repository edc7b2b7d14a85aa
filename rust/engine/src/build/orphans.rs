//! Processes whose session is not one that their parent was ever in: their own parent has ended, and init or a
//! subreaper has taken them (prctl(2), PR_SET_CHILD_SUBREAPER). They are made the same way: by a helper in their session
//! that ends.

use std::collections::BTreeSet;

use torpor_sys::remote::{Batch, Site};
use torpor_sys::{Pid, proc};

use super::tree::clone3;
use super::{Nursery, Skeleton};
use crate::error::{About, Error, Result};
use crate::model::{Inventory, Process};

/// The smallest id that nothing in the image has: as process, thread, group or session.
fn free_id(inventory: &Inventory) -> i32 {
    let mut taken = BTreeSet::new();
    for process in &inventory.processes {
        taken.extend([process.pid, process.pgid, process.sid]);
        let threads = process.body.iter().flat_map(|b| &b.threads);
        taken.extend(threads.map(|t| t.tid));
    }
    (2..).find(|id| !taken.contains(id)).unwrap_or(i32::MAX)
}

impl Skeleton {
    /// Subreapers adopt from the beginning, as they did.
    pub(super) fn adopt(&self, process: &Process) -> Result<()> {
        let is_subreaper = process.body.as_ref().is_some_and(|b| b.settings.subreaper != 0);
        if !is_subreaper {
            return Ok(());
        }
        let mut batch = Batch::new();
        let args = [libc::PR_SET_CHILD_SUBREAPER.into(), 1.into()];
        batch.must("PR_SET_CHILD_SUBREAPER", libc::SYS_prctl, args);
        self.results(process.pid, &batch, "subreaper").map(drop)
    }

    /// Makes one.
    pub(super) fn orphan(&mut self, nursery: &Nursery<'_>, process: &Process) -> Result<()> {
        let inventory = nursery.inventory;
        let in_session = |p: &&Process| p.sid == process.sid && self.sites.contains_key(&p.pid);
        let (helper_id, parent) = match inventory.processes.iter().find(in_session) {
            Some(member) => (free_id(inventory), member.pid),
            // Its leader has ended: the helper stands in for it.
            None => (process.sid, process.ppid),
        };
        let helper = self.helper(helper_id, parent)?;
        let mut batch = Batch::new();
        if helper_id == process.sid {
            batch.must("setsid", libc::SYS_setsid, []);
        }
        let what = format!("clone3 of process {}", process.pid);
        clone3(&mut batch, what, 0, process.exit_signal, process.pid);
        let mut born = Vec::new();
        let made = helper.run_with(&batch, |child| {
            born.push(child);
            Ok(())
        });
        for tid in born {
            self.all.push(tid);
            let site = Site::cloned(tid, self.place).about(tid, "new process")?;
            self.sites.insert(process.pid, site);
            nursery.note_birth(self, parent, process);
        }
        made.about(process.pid, "new process")?;
        self.end_helper(helper_id, parent, &helper)?;
        self.check_parent(process)
    }

    /// A process that nobody is told the end of.
    pub(super) fn helper(&mut self, id: i32, parent: i32) -> Result<Site> {
        let mut batch = Batch::new();
        clone3(&mut batch, format!("clone3 of helper {id}"), 0, 0, id);
        let born = self.run_births(parent, &batch)?;
        let missing = || Error::nonsense("a helper was not born");
        let tid = born.first().copied().ok_or_else(missing)?;
        Site::cloned(tid, self.place).about(tid, "helper")
    }

    fn check_parent(&self, process: &Process) -> Result<()> {
        let tid = self.site(process.pid)?.tid();
        let parent: Pid = proc::stat(tid).about(tid, "stat")?.ppid;
        if parent == self.site(process.ppid)?.tid() {
            return Ok(());
        }
        let why = format!(
            "it is in session {}, which its parent {} can never have been in",
            process.sid, process.ppid
        );
        Err(Error::unsupported(process.pid, "session", why, ""))
    }
}
