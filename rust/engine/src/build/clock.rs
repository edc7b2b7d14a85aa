//! The time namespace of a restored container.

use torpor_sys::remote::Batch;
use torpor_sys::timens;

use super::Skeleton;
use crate::error::{About, Result};
use crate::kinds::{clocks, sharing};
use crate::model::{Inventory, Process};

impl Skeleton {
    /// Takes init there before it has children, where some will have memory in common: they could not go there themselves
    /// (setns(2)). Then building them is seen as time that has passed, too.
    pub(super) fn enter_time_early(&mut self, inventory: &Inventory) -> Result<()> {
        if sharing::is_memory_shared(inventory) {
            self.time = Some(self.move_in_time(inventory)?);
        }
        Ok(())
    }

    /// Takes every process to where the clocks go on from what they showed, as late as possible: what comes after is
    /// seen as time that has passed. Only a process of one thread can change its time namespace (setns(2)), so threads
    /// are made after this. Where it cannot be done, what to report about it.
    pub fn enter_time(&self, inventory: &Inventory) -> Result<Option<String>> {
        match &self.time {
            Some(done) => Ok(done.clone()),
            None => self.move_in_time(inventory),
        }
    }

    fn move_in_time(&self, inventory: &Inventory) -> Result<Option<String>> {
        let Some(state) = &inventory.clocks else {
            return Ok(None);
        };
        let root = self.root()?;
        let mut batch = Batch::new();
        let made = batch.may("unshare", libc::SYS_unshare, [libc::CLONE_NEWTIME.into()]);
        let results = root.run(&batch).about(self.init, "time namespace")?;
        if results.raw(made) != 0 {
            return Ok(Some(without(results.raw(made))));
        }
        // The namespace of a root without CAP_SYS_TIME shows the machine's clocks, but children are in it already.
        let refused = clocks::rebuild(self.init, state).err();
        let namespace = timens::of_children(self.init).about(self.init, "time namespace")?;
        let is_there = |p: &&Process| p.body.is_some() && self.sites.contains_key(&p.pid);
        for process in inventory.processes.iter().filter(is_there) {
            self.send(process.pid, &[&namespace])?;
            let mut batch = Batch::new();
            let args = [self.temporary(0).into(), libc::CLONE_NEWTIME.into()];
            batch.must("setns", libc::SYS_setns, args);
            self.close_temporary(&mut batch);
            self.results(process.pid, &batch, "time namespace")?;
        }
        Ok(refused.map(|e| format!("monotonic clocks go on as the machine's do: {e}")))
    }
}

fn without(result: i64) -> String {
    let why = std::io::Error::from_raw_os_error(-result as i32);
    format!("monotonic clocks go on as the machine's do: no time namespace ({why})")
}
