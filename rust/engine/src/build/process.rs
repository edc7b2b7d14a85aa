//! One process: first its mappings, then, when they are filled, everything else.

use std::os::fd::OwnedFd;

use torpor_sys::remote::{Arg, Batch, Results};

use super::Skeleton;
use super::kernel_ranges;
use super::objects::{Files, Objects, epoll_of};
use crate::error::{About, Error, Result};
use crate::kinds::memory::{self, Area, Source};
use crate::kinds::{console, epoll, fs, settings, signals, vdso};
use crate::model::{Body, Inventory, Process};

/// Descriptors to be sent, each once.
#[derive(Default)]
struct Parcel<'o> {
    sources: Vec<Source>,
    fds: Vec<&'o OwnedFd>,
}

impl<'o> Parcel<'o> {
    fn add(&mut self, source: Source, files: &'o Files) -> Result<()> {
        if self.sources.contains(&source) {
            return Ok(());
        }
        let fd = match source {
            Source::Nothing => return Ok(()),
            Source::File(index) => files.mapped.get(index),
            Source::Shared(index) => files.shared.get(index),
        };
        self.fds
            .push(fd.ok_or_else(|| Error::nonsense("a mapped file is missing"))?);
        self.sources.push(source);
        Ok(())
    }

    fn arg(&self, skeleton: &Skeleton, source: Source) -> Arg {
        match self.sources.iter().position(|s| *s == source) {
            Some(n) => skeleton.temporary(n).into(),
            None => (-1).into(),
        }
    }
}

impl Skeleton {
    /// Lays out the address space of a process, around the areas that it has `kept` of its parent's.
    pub(super) fn map(&self, pid: i32, state: &memory::State, kept: &[(u64, u64)], files: &Files) -> Result<()> {
        let born_with = self.born_with.get(&pid);
        let new = |area: &&Area| kept.binary_search(&(area.start, area.end)).is_err();
        let mut parcel = Parcel::default();
        for area in state.areas.iter().filter(new) {
            parcel.add(area.source, files)?;
        }
        let exe = if born_with.is_some_and(|layout| layout.exe == state.exe) {
            // It is the parent's already, and cannot be set while a part of it is mapped.
            Source::Nothing
        } else {
            state.exe
        };
        parcel.add(exe, files)?;
        self.send(pid, &parcel.fds)?;
        let mut batch = Batch::new();
        let kernel = born_with.map_or(&self.kernel, |layout| &layout.kernel);
        if born_with.is_some() {
            self.clear(&mut batch, &[kernel_ranges(kernel), kept.to_vec()].concat());
        }
        let parking = self.place.base + self.place.len();
        vdso::rebuild(&mut batch, kernel, &state.kernel, parking);
        memory::rebuild_map(&mut batch, state, parcel.arg(self, exe));
        for area in state.areas.iter().filter(new) {
            memory::rebuild_area(&mut batch, area, parcel.arg(self, area.source));
            self.flush(pid, &mut batch, "mappings")?;
        }
        self.close_temporary(&mut batch);
        self.run(pid, &batch, "mappings")
    }

    /// Takes pages away from a process.
    pub(super) fn drop_pages(&self, pid: i32, ranges: &[(u64, u64)]) -> Result<()> {
        let mut batch = Batch::new();
        for &(start, end) in ranges {
            memory::drop_pages(&mut batch, start, end);
            self.flush(pid, &mut batch, "mappings")?;
        }
        self.run(pid, &batch, "mappings")
    }

    /// Runs what has gathered when the table is getting full.
    fn flush(&self, pid: i32, batch: &mut Batch, what: &str) -> Result<()> {
        if batch.size() > self.site(pid)?.capacity() * 3 / 4 {
            self.run(pid, batch, what)?;
            *batch = Batch::new();
        }
        Ok(())
    }

    fn run(&self, pid: i32, batch: &Batch, what: &str) -> Result<()> {
        self.results(pid, batch, what).map(drop)
    }

    pub(super) fn results(&self, pid: i32, batch: &Batch, what: &str) -> Result<Results> {
        self.site(pid)?.run(batch).about(pid, what)
    }

    /// Gives a process whose memory is filled all that its threads share.
    pub fn dress(&self, process: &Process, inventory: &Inventory, objects: &Objects) -> Result<()> {
        let Some(body) = &process.body else { return Ok(()) };
        let pid = process.pid;
        let mut batch = Batch::new();
        for area in &body.memory.areas {
            memory::seal(&mut batch, area);
            self.flush(pid, &mut batch, "mappings")?;
        }
        memory::rebuild_lock_future(&mut batch, &body.memory);
        settings::rebuild_process(&mut batch, &body.settings);
        signals::rebuild_actions(&mut batch, &body.signals);
        fs::rebuild_removed(pid, &body.fs, &|batch| self.results(pid, batch, "working directory"))?;
        fs::rebuild(&mut batch, &body.fs);
        self.run(pid, &batch, "settings")?;
        self.descriptors(process, body, inventory, objects)
    }

    fn descriptors(&self, process: &Process, body: &Body, inventory: &Inventory, objects: &Objects) -> Result<()> {
        let pid = process.pid;
        let fds: Vec<&OwnedFd> = body.fds.iter().map(|d| &objects.descriptions[d.description]).collect();
        self.send(pid, &fds)?;
        let mut batch = Batch::new();
        for (n, descriptor) in body.fds.iter().enumerate() {
            let flags = if descriptor.cloexec { libc::O_CLOEXEC } else { 0 };
            let args = [self.temporary(n).into(), descriptor.fd.into(), flags.into()];
            batch.must(format!("dup3 to fd {}", descriptor.fd), libc::SYS_dup3, args);
            self.flush(pid, &mut batch, "descriptors")?;
        }
        self.run(pid, &batch, "descriptors")?;
        let mut batch = Batch::new();
        self.watch(body, inventory, &mut batch);
        self.foreground(process, body, inventory, &mut batch);
        self.close_ours(&mut batch);
        self.run(pid, &batch, "descriptors")
    }

    /// An epoll instance that several processes have is filled by the first of them.
    fn watch(&self, body: &Body, inventory: &Inventory, batch: &mut Batch) {
        for descriptor in &body.fds {
            let Some(state) = epoll_of(&inventory.descriptions[descriptor.description]) else {
                continue;
            };
            let owner = inventory
                .processes
                .iter()
                .filter_map(|p| p.body.as_ref())
                .find_map(|b| {
                    b.fds
                        .iter()
                        .find(|d| d.description == descriptor.description)
                        .map(|d| (b, d.fd))
                });
            if owner.is_some_and(|(b, fd)| std::ptr::eq(b, body) && fd == descriptor.fd) {
                epoll::rebuild(batch, descriptor.fd, state);
            }
        }
    }

    fn foreground(&self, process: &Process, body: &Body, inventory: &Inventory, batch: &mut Batch) {
        use crate::kinds::files::Object;
        let Some(state) = inventory.console.as_ref().filter(|c| c.foreground > 0) else {
            return;
        };
        let is_stdio = |d: usize| matches!(inventory.descriptions[d].object, Object::Stdio { .. });
        if let Some(terminal) = body
            .fds
            .iter()
            .find(|d| is_stdio(d.description))
            .filter(|_| process.sid == process.pid)
        {
            console::rebuild_foreground(batch, terminal.fd, state);
        }
    }
}
