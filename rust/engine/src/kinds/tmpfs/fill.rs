//! From the list of a tmpfs to its files.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::sync::OnceLock;

use torpor_image::{BlobRef, Reader};
use torpor_sys::{Pid, fd, tree};

use super::guest::Guest;
use super::target::{Existing, Ground, Place, Target, existing, is_name, keeps};
use super::{Entry, Kind, LIST, LOOK, Line, Meta, PIECE, STRANGER, State, is_carried, join, outside, translate};
use crate::bounds::Bounds;
use crate::error::{About, Error, Result};
use crate::stage::Cancel;

/// Brings the tmpfs mounts of the new container to the state of the image.
pub fn rebuild(states: &[State], image: &Reader, init: Pid, bounds: &Bounds, cancel: &Cancel) -> Result<()> {
    let ground = Ground::of(init, bounds)?;
    let guest = OnceLock::new();
    let join = || {
        guest.get_or_init(|| Guest::of(init));
    };
    let (uid, gid) = ground.first_ids();
    for state in states {
        let target = Target::of(state, image, &ground, cancel)?;
        tree::as_owner(uid, gid, || target.fill(&join)).about(1, &state.point)??;
    }
    Ok(())
}

/// The directory that is being filled.
struct Here {
    place: Place,
    path: Vec<u8>,
    meta: Meta,
    /// What the new container has in it and the image has not mentioned.
    rest: BTreeSet<Vec<u8>>,
}

/// The file that is being filled.
struct Filling {
    file: File,
    path: Vec<u8>,
    meta: Meta,
    size: u64,
    /// As far as it reaches now.
    end: u64,
}

struct Builder<'t> {
    target: &'t Target<'t>,
    /// Makes the memory of what follows the container's own.
    join: &'t dyn Fn(),
    here: Option<Here>,
    file: Option<Filling>,
    buffer: Vec<u8>,
}

impl Builder<'_> {
    fn take(&mut self, line: Line) -> Result<()> {
        if let Line::Data { at, bytes } = line {
            return self.data(at, bytes);
        }
        self.end_file()?;
        match line {
            Line::Directory { path, meta } => {
                self.end_directory()?;
                self.begin_directory(path.0, meta)
            }
            Line::Node(entry) => self.node(&entry),
            Line::Data { .. } => Ok(()),
        }
    }

    fn begin_directory(&mut self, path: Vec<u8>, meta: Meta) -> Result<()> {
        let place = self.target.enter(&path)?;
        self.target.check_directory(&path, &meta, &place)?;
        let rest = match &place {
            Place::Here(directory) => tree::names(directory).map(|e| e.map(|e| e.name)).collect(),
            Place::Mounted => Ok(BTreeSet::new()),
            Place::Absent => return self.target.nonsense(&path),
        };
        let rest = self.target.about(&path, rest)?;
        self.here = Some(Here {
            place,
            path,
            meta,
            rest,
        });
        Ok(())
    }

    /// Takes away what the image does not have; then nothing changes the directory's times any more.
    fn end_directory(&mut self) -> Result<()> {
        let Some(Here {
            place: Place::Here(directory),
            path,
            meta,
            rest,
        }) = self.here.take()
        else {
            return Ok(());
        };
        for name in &rest {
            self.target.about(&join(&path, name), clear(&directory, name))?;
        }
        self.target.dress(&path, &directory, &meta)
    }

    fn node(&mut self, entry: &Entry) -> Result<()> {
        let target = self.target;
        let Some(here) = &mut self.here else {
            return target.nonsense(&entry.name.0);
        };
        let (name, path) = (&entry.name.0, join(&here.path, &entry.name.0));
        let is_there = here.rest.remove(name);
        let now = target.check_entry(&path, entry, &here.place, is_there)?;
        let Place::Here(directory) = &here.place else {
            return Ok(());
        };
        match now {
            Existing::Mount => return Ok(()),
            Existing::File(file, node) if target.about(&path, keeps(&entry.kind, &file, &node))? => {
                return entry.meta.as_ref().map_or(Ok(()), |m| target.dress(&path, &file, m));
            }
            Existing::File(..) if !target.about(&path, clear(directory, name))? => return target.hidden(&path),
            Existing::File(..) | Existing::Nothing => {}
        }
        (self.join)();
        if let (Kind::File { size, reserved }, Some(meta)) = (&entry.kind, &entry.meta) {
            let file = target.about(&path, tree::create(directory, name))?;
            if *reserved {
                target.about(&path, tree::allocate(&file, *size))?;
            }
            self.file = Some(Filling {
                file: file.into(),
                path,
                meta: meta.clone(),
                size: *size,
                end: if *reserved { *size } else { 0 },
            });
            return Ok(());
        }
        target.make(directory, &path, entry)
    }

    fn data(&mut self, at: u64, bytes: BlobRef) -> Result<()> {
        let target = self.target;
        let Some(filling) = &mut self.file else {
            return Err(Error::nonsense("content of no file"));
        };
        if at.checked_add(bytes.len).is_none_or(|end| end > filling.size) {
            return target.nonsense(&filling.path);
        }
        let mut done = 0;
        while done < bytes.len {
            target.cancel.check()?;
            let piece = &mut self.buffer[..(bytes.len - done).min(PIECE as u64) as usize];
            target.image.read_at(bytes.offset.saturating_add(done), piece)?;
            let written = filling.file.write_all_at(piece, at + done);
            let written = written.map_err(|e| torpor_sys::Error::io("write", "file", &e));
            target.about(&filling.path, written)?;
            done += piece.len() as u64;
        }
        filling.end = filling.end.max(at + done);
        Ok(())
    }

    fn end_file(&mut self) -> Result<()> {
        let Some(filling) = self.file.take() else { return Ok(()) };
        if filling.end < filling.size {
            self.target
                .about(&filling.path, fd::truncate(&filling.file, filling.size))?;
        }
        self.target.dress(&filling.path, &filling.file, &filling.meta)
    }
}

impl Target<'_> {
    fn fill(&self, join: &dyn Fn()) -> Result<()> {
        let mut builder = Builder {
            target: self,
            join,
            here: None,
            file: None,
            buffer: vec![0; PIECE],
        };
        self.each(&mut |line| builder.take(line))?;
        builder.end_file()?;
        builder.end_directory()
    }

    /// Gives an open file all of it. Times come last, and permissions after the owner, whose change takes bits away.
    fn dress(&self, path: &[u8], file: &impl AsFd, meta: &Meta) -> Result<()> {
        let (uid, gid) = self.owner(meta);
        let some = |id| (id != STRANGER).then_some(id);
        let mut now = self.about(path, tree::node(file))?;
        let is_given = some(uid).is_some_and(|u| u != now.uid) || some(gid).is_some_and(|g| g != now.gid);
        if is_given {
            self.about(path, tree::set_owner(file, some(uid), some(gid)))?;
        }
        self.dress_attributes(path, file, meta)?;
        if is_given || !meta.attributes.is_empty() {
            now = self.about(path, tree::node(file))?;
        }
        if now.kind() != libc::S_IFLNK && now.mode & 0o7777 != meta.mode & 0o7777 {
            self.about(path, tree::set_mode(file, meta.mode))?;
        }
        self.about(path, tree::set_times(file, meta.atime, meta.mtime))
    }

    fn dress_attributes(&self, path: &[u8], file: &impl AsFd, meta: &Meta) -> Result<()> {
        let wanted = |name: &[u8]| meta.attributes.iter().any(|(n, _)| n.0 == name);
        for name in self.about(path, tree::attributes(file))? {
            if is_carried(&name) && !wanted(&name) {
                self.about(path, tree::remove_attribute(file, &name))?;
            }
        }
        for (name, value) in &meta.attributes {
            if !is_carried(&name.0) {
                return self.nonsense(path);
            }
            let mut value = value.0.clone();
            let uid = |id| outside(&self.maps.uids, id);
            translate(&name.0, &mut value, uid, |id| outside(&self.maps.gids, id));
            self.about(path, tree::set_attribute(file, &name.0, &value))?;
        }
        Ok(())
    }

    /// Makes what is not a regular file.
    fn make(&self, directory: &OwnedFd, path: &[u8], entry: &Entry) -> Result<()> {
        let name = &entry.name.0;
        let special = |format: u32, rdev| tree::make_node(directory, name, format | 0o600, rdev);
        let made = match &entry.kind {
            Kind::Covered | Kind::File { .. } => Ok(()),
            Kind::Directory => tree::make_directory(directory, name),
            Kind::Symlink { target } => tree::make_link(directory, name, &target.0),
            Kind::Fifo => special(libc::S_IFIFO, 0),
            Kind::Socket => special(libc::S_IFSOCK, 0),
            Kind::Device { block: true, rdev } => special(libc::S_IFBLK, *rdev),
            Kind::Device { block: false, rdev } => special(libc::S_IFCHR, *rdev),
            Kind::Link { path: other } => return self.make_name(directory, path, name, &other.0),
        };
        self.about(path, made)?;
        let Some(meta) = &entry.meta else { return Ok(()) };
        let file = self.about(path, tree::open(directory, name, LOOK))?;
        self.dress(path, &file, meta)
    }

    fn make_name(&self, directory: &OwnedFd, path: &[u8], name: &[u8], other: &[u8]) -> Result<()> {
        if !other.split(|b| *b == b'/').all(is_name) {
            return self.nonsense(other);
        }
        let file = self.about(other, tree::open(&self.root, other, LOOK))?;
        if self.about(other, tree::node(&file))?.kind() == libc::S_IFDIR {
            return self.nonsense(other);
        }
        self.about(path, tree::add_name(&file, directory, name))
    }
}

/// Removes a name and all below it, but nothing that is a mount point; false when something is left.
fn clear(directory: &OwnedFd, name: &[u8]) -> torpor_sys::Result<bool> {
    let (file, node) = match existing(directory, name)? {
        Existing::Nothing => return Ok(true),
        Existing::Mount => return Ok(false),
        Existing::File(file, node) => (file, node),
    };
    let is_directory = node.kind() == libc::S_IFDIR;
    if is_directory {
        let inner = tree::open(&file, b".", LIST)?;
        let entries: torpor_sys::Result<Vec<_>> = tree::names(&inner).collect();
        let mut all_gone = true;
        for entry in entries? {
            all_gone &= clear(&inner, &entry.name)?;
        }
        if !all_gone {
            return Ok(false);
        }
    }
    tree::remove(directory, name, is_directory).map(|()| true)
}
