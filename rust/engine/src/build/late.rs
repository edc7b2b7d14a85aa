//! What comes last: what must not happen before everything else is there, or would be an event itself.

use std::os::fd::OwnedFd;

use torpor_sys::remote::{Batch, Site};

use super::Skeleton;
use super::objects::Objects;
use crate::error::{About, Result};
use crate::kinds::files::{Description, Object};
use crate::kinds::ipc::{self, semaphores};
use crate::kinds::{inotify, listener, locks, owner, posix_timers, timerfd, timers};
use crate::model::{Inventory, Process};

/// Descriptors of ours that are needed to the end.
#[derive(Debug)]
pub struct Late<'i>(Vec<(&'i Object, OwnedFd)>);

impl<'i> Late<'i> {
    /// Keeps them, when all others are closed.
    pub fn keep(inventory: &'i Inventory, objects: &Objects) -> Result<Late<'i>> {
        let of = |(description, fd): (&'i Description, &OwnedFd)| {
            let object = &description.object;
            if !matches!(object, Object::Timerfd(_) | Object::Inotify(_)) {
                return None;
            }
            Some(fd.try_clone().map(|fd| (object, fd)))
        };
        let kept: std::io::Result<Vec<_>> = inventory
            .descriptions
            .iter()
            .zip(&objects.descriptions)
            .filter_map(of)
            .collect();
        let kept = kept
            .map_err(|e| torpor_sys::Error::io("dup", "descriptor", &e))
            .about(1, "descriptors")?;
        Ok(Late(kept))
    }

    /// Watches files again, when no more are opened or closed.
    pub fn watch(&self, skeleton: &Skeleton) -> Result<()> {
        for (object, fd) in &self.0 {
            if let Object::Inotify(state) = object {
                inotify::rebuild(fd, state, skeleton.init)?;
            }
        }
        Ok(())
    }

    /// Starts every timer.
    pub fn start(&self, skeleton: &Skeleton, inventory: &Inventory) -> Result<()> {
        for process in &inventory.processes {
            skeleton.start_timers(process)?;
        }
        for (object, fd) in &self.0 {
            if let Object::Timerfd(state) = object {
                timerfd::arm(state, fd)?;
            }
        }
        Ok(())
    }
}

impl Skeleton {
    /// Gives System V semaphores what processes undo, then their values.
    pub fn set_semaphores(&self, inventory: &Inventory) -> Result<()> {
        let Some(ipc) = &inventory.ipc else { return Ok(()) };
        for (process, body) in inventory.processes.iter().filter_map(|p| Some((p, p.body.as_ref()?))) {
            for group in body.undo.chunks(200) {
                let mut batch = Batch::new();
                group.iter().for_each(|undo| semaphores::rebuild_undo(&mut batch, undo));
                self.results(process.pid, &batch, "semaphores")?;
            }
        }
        let lives = |pid: i32| self.sites.contains_key(&pid);
        for (&pid, site) in &self.sites {
            let mut batch = Batch::new();
            semaphores::rebuild_values(&mut batch, &ipc.semaphores, pid);
            if !batch.is_empty() {
                site.run(&batch).about(pid, "semaphores")?;
            }
        }
        ipc::finish(ipc, self.init, lives)
    }

    fn start_timers(&self, process: &Process) -> Result<()> {
        let Some(body) = &process.body else { return Ok(()) };
        let run = |batch: &Batch| self.results(process.pid, batch, "timers");
        let mut batch = Batch::new();
        timers::rebuild(&mut batch, &body.timers);
        run(&batch)?;
        posix_timers::start(&body.posix_timers, &run)
    }

    /// Takes the locks that belong to a descriptor table.
    pub(super) fn lock(&self, pid: i32, site: &Site, all: &[locks::Posix]) -> Result<()> {
        for group in all.chunks(500) {
            let mut batch = Batch::new();
            locks::rebuild_process(&mut batch, group);
            site.run(&batch).map_err(|e| locks::explain(pid, e))?;
        }
        Ok(())
    }

    /// What a process tells the kernel about descriptions as the user that it is.
    pub(super) fn relate(&self, pid: i32, inventory: &Inventory, batch: &mut Batch) {
        for description in &inventory.descriptions {
            if let Some(state) = description.told.as_ref().filter(|o| o.holder == pid) {
                owner::rebuild(batch, state, description.flags);
            }
            if let Some(state) = description.listener.as_ref().filter(|l| l.pid == pid) {
                listener::rebuild(batch, state);
            }
        }
    }
}
