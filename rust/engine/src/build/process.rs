//! One process: first its mappings, then, when they are filled, everything else.

use std::os::fd::OwnedFd;

use torpor_sys::remote::{Arg, Batch, Results, Site};

use super::Skeleton;
use super::kernel_ranges;
use super::objects::{Files, Objects, epoll_of};
use crate::error::{About, Error, Result};
use crate::kinds::files::Descriptor;
use crate::kinds::ipc::segments;
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
        let is_attached =
            |area: &&Area| matches!(area.source, Source::Shared(index) if files.segments.contains_key(&index));
        let plain = |area: &&Area| new(area) && !is_attached(area);
        for area in state.areas.iter().filter(plain) {
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
        // First, since a whole segment is attached also where only a part of it is left.
        let segment = |index: usize| files.segments.get(&index).copied();
        for attachment in segments::attachments(state.areas.iter(), segment)? {
            attachment.rebuild(&mut batch);
            self.flush(pid, &mut batch, "mappings")?;
        }
        for area in state.areas.iter().filter(plain) {
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
        if body.sharing.actions.is_none() {
            signals::rebuild_actions(&mut batch, &body.signals);
        }
        self.run(pid, &batch, "settings")?;
        if body.sharing.fs.is_none() {
            place(pid, self.site(pid)?, &body.fs)?;
        }
        if body.sharing.files.is_none() {
            self.descriptors(pid, self.site(pid)?, &body.fds, inventory, objects)?;
        }
        self.dress_apart(process.pid, body, inventory, objects)?;
        let mut batch = Batch::new();
        self.foreground(process, inventory.table_of(body), inventory, &mut batch);
        self.run(pid, &batch, "terminal")
    }

    /// What threads have apart from their process.
    fn dress_apart(&self, pid: i32, body: &Body, inventory: &Inventory, objects: &Objects) -> Result<()> {
        for (thread, (tid, site)) in body.threads.iter().zip(self.sites_of(pid)?) {
            if let Some(state) = &thread.own.fs {
                place(tid, site, state)?;
            }
            if let Some(fds) = &thread.own.fds {
                self.descriptors(tid, site, fds, inventory, objects)?;
            }
        }
        Ok(())
    }

    /// Gives a task its descriptor table.
    fn descriptors(
        &self,
        pid: i32,
        site: &Site,
        table: &[Descriptor],
        inventory: &Inventory,
        objects: &Objects,
    ) -> Result<()> {
        let fds: Vec<&OwnedFd> = table.iter().map(|d| &objects.descriptions[d.description]).collect();
        self.send_to(site, pid, &fds)?;
        let mut batch = Batch::new();
        for (n, descriptor) in table.iter().enumerate() {
            let flags = if descriptor.cloexec { libc::O_CLOEXEC } else { 0 };
            let args = [self.temporary(n).into(), descriptor.fd.into(), flags.into()];
            batch.must(format!("dup3 to fd {}", descriptor.fd), libc::SYS_dup3, args);
            if batch.size() > site.capacity() * 3 / 4 {
                site.run(&batch).about(pid, "descriptors")?;
                batch = Batch::new();
            }
        }
        site.run(&batch).about(pid, "descriptors")?;
        let mut batch = Batch::new();
        watch(table, inventory, &mut batch);
        self.close_ours(&mut batch);
        site.run(&batch).about(pid, "descriptors").map(drop)
    }

    fn foreground(&self, process: &Process, table: &[Descriptor], inventory: &Inventory, batch: &mut Batch) {
        use crate::kinds::files::Object;
        let Some(state) = inventory.console.as_ref().filter(|c| c.foreground > 0) else {
            return;
        };
        let is_stdio = |d: usize| matches!(inventory.descriptions[d].object, Object::Stdio { .. });
        let mut terminals = table.iter().filter(|d| is_stdio(d.description));
        if let Some(terminal) = terminals.next().filter(|_| process.sid == process.pid) {
            console::rebuild_foreground(batch, terminal.fd, state);
        }
    }
}

/// Takes a task to where its path look-ups begin.
fn place(pid: i32, site: &Site, state: &fs::State) -> Result<()> {
    let run = |batch: &Batch| site.run(batch).about(pid, "working directory");
    fs::rebuild_removed(pid, state, &run)?;
    let mut batch = Batch::new();
    fs::rebuild(&mut batch, state);
    run(&batch).map(drop)
}

/// An epoll instance that several tables have is filled by the first of them.
fn watch(table: &[Descriptor], inventory: &Inventory, batch: &mut Batch) {
    for descriptor in table {
        let Some(state) = epoll_of(&inventory.descriptions[descriptor.description]) else {
            continue;
        };
        let same = |d: &&Descriptor| d.description == descriptor.description;
        let first = inventory
            .tables()
            .find_map(|t| t.iter().find(same).map(|d| (t.as_ptr(), d.fd)));
        if first == Some((table.as_ptr(), descriptor.fd)) {
            epoll::rebuild(batch, descriptor.fd, state);
        }
    }
}
