//! Laying processes out: those that give pages to their children before these are made, all others when the tree stands.

use torpor_image::Reader;
use torpor_sys::pidfd;

use super::objects::Files;
use super::{Layout, Shares, Skeleton};
use crate::error::{About, Result};
use crate::fill;
use crate::huge;
use crate::kinds::sharing::Births;
use crate::model::{Inventory, Process};
use crate::stage::Cancel;

/// What processes are laid out from.
#[derive(Debug)]
pub(super) struct Nursery<'a> {
    pub(super) inventory: &'a Inventory,
    pub(super) births: &'a Births,
    pub(super) image: &'a Reader,
    pub(super) cancel: &'a Cancel,
    pub(super) files: &'a Files,
    pub(super) shares: &'a Shares,
}

impl Nursery<'_> {
    fn index(&self, pid: i32) -> Option<usize> {
        self.inventory.processes.iter().position(|p| p.pid == pid)
    }

    /// Puts into a process what its children are to get from it.
    pub(super) fn prepare(&self, skeleton: &mut Skeleton, parent: &Process) -> Result<()> {
        let Some(index) = self.index(parent.pid) else {
            return Ok(());
        };
        let share = self.shares.get(index);
        if let Some(body) = parent.body.as_ref().filter(|_| share.is_early) {
            self.lay_out(skeleton, index)?;
            let memory = skeleton.site(parent.pid)?.memory();
            fill::put(memory, body, &share.seed, self.image, self.cancel)?;
            let mut whole = body.memory.huge.clone();
            whole.retain(|range| share.holds_all_of(*range));
            let tid = skeleton.site(parent.pid)?.tid();
            huge::collapse(pidfd::open(tid).about(tid, "pidfd")?, &whole);
        }
        Ok(())
    }

    /// Notes what a child has been born with.
    pub(super) fn note_birth(&self, skeleton: &mut Skeleton, parent: i32, child: &Process) {
        let parent = self.inventory.memory_holder(parent);
        let is_parent = |p: &&Process| p.pid == parent && skeleton.laid_out.contains(&parent);
        let own = self
            .inventory
            .processes
            .iter()
            .find(is_parent)
            .and_then(|p| p.body.as_ref());
        let layout = match own {
            Some(body) => Some(Layout {
                kernel: body.memory.kernel.clone(),
                exe: body.memory.exe,
            }),
            None => skeleton.born_with.get(&parent).cloned(),
        };
        if let Some(layout) = layout {
            skeleton.born_with.insert(child.pid, layout);
        }
    }

    /// Lays a process out, and takes from it what only its children were to have. All children are there.
    pub(super) fn complete(&self, skeleton: &mut Skeleton, index: usize) -> Result<()> {
        self.lay_out(skeleton, index)?;
        let lent = &self.shares.get(index).lent;
        if !lent.is_empty() {
            skeleton.drop_pages(self.inventory.processes[index].pid, lent)?;
        }
        Ok(())
    }

    fn lay_out(&self, skeleton: &mut Skeleton, index: usize) -> Result<()> {
        let process = &self.inventory.processes[index];
        let Some(body) = process.body.as_ref().filter(|b| b.sharing.memory.is_none()) else {
            return Ok(());
        };
        if !skeleton.laid_out.insert(process.pid) {
            return Ok(());
        }
        let share = self.shares.get(index);
        skeleton.map(process.pid, &body.memory, &share.kept, self.files)?;
        if share.stale.is_empty() {
            return Ok(());
        }
        skeleton.drop_pages(process.pid, &share.stale)
    }
}
