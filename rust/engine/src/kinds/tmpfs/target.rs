//! What the new container has where the image has a tmpfs, and whether the image's files may be put there.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use torpor_image::Reader;
use torpor_sys::tree::{self, Node};
use torpor_sys::{Pid, proc};

use super::{Entry, Kind, LIST, LOOK, Line, Meta, STRANGER, State, inside, is, join, outside, shown};
use crate::bounds::Bounds;
use crate::error::{About, Error, Result};
use crate::kinds::creds::IdMaps;
use crate::kinds::mounts::Table;
use crate::stage::Cancel;

/// What the new container's own processes could do to its files.
#[derive(Debug, Clone, Default)]
struct Power {
    mknod: bool,
    chown: bool,
    fowner: bool,
    /// Attributes in the name space `trusted`.
    trusted: bool,
    /// Whose files they are confined to.
    only_uid: Option<u32>,
    /// Set-user-id bits of programs work.
    suid: bool,
}

impl Power {
    fn of(bounds: &Bounds, in_our_user_namespace: bool, options: &str) -> Power {
        const CHOWN: u64 = 0;
        const FOWNER: u64 = 3;
        const SYS_ADMIN: u64 = 21;
        const MKNOD: u64 = 27;
        Power {
            mknod: bounds.grants(MKNOD) && in_our_user_namespace,
            chown: bounds.grants(CHOWN),
            fowner: bounds.grants(FOWNER),
            trusted: bounds.grants(SYS_ADMIN) && in_our_user_namespace,
            only_uid: bounds.only_uid,
            suid: !bounds.no_new_privs && !options.split(',').any(|o| o == "nosuid"),
        }
    }
}

/// What the new container has under a name.
pub(super) enum Existing {
    Nothing,
    /// Something else is mounted there.
    Mount,
    File(OwnedFd, Node),
}

pub(super) fn existing(directory: &OwnedFd, name: &[u8]) -> torpor_sys::Result<Existing> {
    match tree::open(directory, name, LOOK) {
        Ok(file) => {
            let node = tree::node(&file)?;
            Ok(Existing::File(file, node))
        }
        Err(e) if is(&e, libc::ENOENT) => Ok(Existing::Nothing),
        Err(e) if is(&e, libc::EXDEV) => Ok(Existing::Mount),
        Err(e) => Err(e),
    }
}

/// A directory of the image in the new container.
pub(super) enum Place {
    Here(OwnedFd),
    /// It does not have it yet.
    Absent,
    /// Something else is mounted there, or on the way.
    Mounted,
}

/// A tmpfs of the new container, at the place of one of the image.
pub(super) struct Target<'a> {
    state: &'a State,
    pub(super) image: &'a Reader,
    pub(super) cancel: &'a Cancel,
    pub(super) root: OwnedFd,
    pub(super) maps: &'a IdMaps,
    power: Power,
}

/// What is the same for all tmpfs mounts of the new container.
pub(super) struct Ground<'a> {
    mounts: Table,
    maps: IdMaps,
    bounds: &'a Bounds,
    in_our_user_namespace: bool,
}

impl<'a> Ground<'a> {
    pub(super) fn of(init: Pid, bounds: &'a Bounds) -> Result<Ground<'a>> {
        let me = std::process::id() as Pid;
        let namespace = |pid| proc::namespace(pid, "user").about(pid, "user namespace");
        Ok(Ground {
            mounts: Table::of(init)?,
            maps: IdMaps::of(init)?,
            bounds,
            in_our_user_namespace: namespace(init)? == namespace(me)?,
        })
    }

    /// Users and groups outside that are the first of the container's, root as a rule.
    pub(super) fn first_ids(&self) -> (u32, u32) {
        let first = |map: &[(u32, u32, u32)]| map.first().map_or(0, |(_, outside, _)| *outside);
        (first(&self.maps.uids), first(&self.maps.gids))
    }
}

impl<'a> Target<'a> {
    pub(super) fn of(
        state: &'a State,
        image: &'a Reader,
        ground: &'a Ground<'a>,
        cancel: &'a Cancel,
    ) -> Result<Target<'a>> {
        let missing = || {
            let why = "the new container has no tmpfs of its own there for the files of the image";
            let object = format!("mount {}", state.point);
            Error::unsupported(1, object, why, "give the new container that mount")
        };
        let here = ground.mounts.at(&state.point).filter(|(m, _)| m.is_memory());
        let (_, options) = here.ok_or_else(missing)?;
        Ok(Target {
            state,
            image,
            cancel,
            root: ground.mounts.open(&state.point)?.ok_or_else(missing)?,
            maps: &ground.maps,
            power: Power::of(ground.bounds, ground.in_our_user_namespace, options),
        })
    }

    /// Hands over the lines of the list, one after another.
    pub(super) fn each(&self, take: &mut dyn FnMut(Line) -> Result<()>) -> Result<()> {
        for blob in &self.state.listing {
            let text = self.image.blob(*blob)?;
            for line in text.split(|b| *b == b'\n').filter(|l| !l.is_empty()) {
                self.cancel.check()?;
                let line = serde_json::from_slice(line);
                take(line.map_err(|e| Error::nonsense(format!("files in {}: {e}", self.state.point)))?)?;
            }
        }
        Ok(())
    }

    fn shown(&self, path: &[u8]) -> String {
        shown(&self.state.point, path)
    }

    pub(super) fn about<T>(&self, path: &[u8], result: torpor_sys::Result<T>) -> Result<T> {
        match result {
            Err(e) if is(&e, libc::ENOSPC) => {
                let why = format!("the tmpfs {} is full", self.state.point);
                Err(Error::unsupported(1, self.shown(path), why, "give it a larger size"))
            }
            result => result.about(1, self.shown(path)),
        }
    }

    fn refused<T>(&self, path: &[u8], why: &str) -> Result<T> {
        Err(Error::refused(1, self.shown(path), why))
    }

    pub(super) fn nonsense<T>(&self, path: &[u8]) -> Result<T> {
        Err(Error::nonsense(format!("{} in a tmpfs", self.shown(path))))
    }

    pub(super) fn enter(&self, path: &[u8]) -> Result<Place> {
        if !path.is_empty() && !path.split(|b| *b == b'/').all(is_name) {
            return self.nonsense(path);
        }
        match tree::open(&self.root, if path.is_empty() { b"." } else { path }, LIST) {
            Ok(directory) => Ok(Place::Here(directory)),
            Err(e) if is(&e, libc::EXDEV) => Ok(Place::Mounted),
            Err(e) if [libc::ENOENT, libc::ENOTDIR, libc::ELOOP].iter().any(|n| is(&e, *n)) => Ok(Place::Absent),
            Err(e) => self.about(path, Err(e)),
        }
    }

    /// # Errors
    /// Refused: more than the container grants; unsupported: what cannot be made here.
    fn check(&self, path: &[u8], entry: &Entry, now: &Existing) -> Result<()> {
        let has_meta = !matches!(entry.kind, Kind::Directory | Kind::Link { .. } | Kind::Covered);
        if !is_name(&entry.name.0) || entry.meta.is_some() != has_meta {
            return self.nonsense(path);
        }
        match now {
            Existing::Mount => return self.check_under_mount(path, &entry.kind),
            Existing::File(file, node) if self.about(path, keeps(&entry.kind, file, node))? => {
                return entry
                    .meta
                    .as_ref()
                    .map_or(Ok(()), |m| self.check_change(path, m, Some(node)));
            }
            _ => {}
        }
        if let Kind::Device { block, rdev } = entry.kind
            && !self.power.mknod
            && (block || rdev != 0)
        {
            let why = "the image has a device node that the new container has not, and may not make (CAP_MKNOD)";
            return self.refused(path, why);
        }
        entry.meta.as_ref().map_or(Ok(()), |m| {
            self.check_program(path, &entry.kind, m)?;
            self.check_change(path, m, None)
        })
    }

    pub(super) fn check_directory(&self, path: &[u8], meta: &Meta, place: &Place) -> Result<()> {
        match place {
            Place::Here(directory) => {
                let now = self.about(path, tree::node(directory))?;
                self.check_change(path, meta, Some(&now))
            }
            Place::Absent => self.check_change(path, meta, None),
            Place::Mounted => Ok(()),
        }
    }

    /// What is there in the place of an entry, once it may be put there. `is_there`: the directory may have it.
    pub(super) fn check_entry(&self, path: &[u8], entry: &Entry, place: &Place, is_there: bool) -> Result<Existing> {
        let now = match place {
            Place::Here(_) if !is_there => Existing::Nothing,
            Place::Here(directory) => self.about(path, existing(directory, &entry.name.0))?,
            Place::Absent => Existing::Nothing,
            Place::Mounted if entry.kind == Kind::Covered => Existing::Mount,
            Place::Mounted => return self.hidden(path),
        };
        self.check(path, entry, &now)?;
        Ok(now)
    }

    /// An empty directory or file may be there to mount something on it.
    fn check_under_mount(&self, path: &[u8], kind: &Kind) -> Result<()> {
        match kind {
            Kind::Covered | Kind::Directory | Kind::File { size: 0, .. } => Ok(()),
            _ => self.hidden(path),
        }
    }

    pub(super) fn hidden<T>(&self, path: &[u8]) -> Result<T> {
        let why = "the new container has a mount where the image has a file";
        Err(Error::unsupported(1, self.shown(path), why, "leave that mount out"))
    }

    /// A program that acts as somebody else, in a container whose processes cannot.
    fn check_program(&self, path: &[u8], kind: &Kind, meta: &Meta) -> Result<()> {
        let acts = meta.mode & libc::S_ISUID != 0 && self.power.only_uid.is_some_and(|uid| uid != meta.uid);
        let belongs = meta.mode & libc::S_ISGID != 0 && self.power.only_uid.is_some();
        if matches!(kind, Kind::File { .. }) && self.power.suid && (acts || belongs) {
            return self.refused(
                path,
                "it is a set-user-id program, in a container that is confined to one user",
            );
        }
        Ok(())
    }

    /// `now` is what the new container has and keeps.
    fn check_change(&self, path: &[u8], meta: &Meta, now: Option<&Node>) -> Result<()> {
        let (uid, gid) = self.owner(meta);
        if (uid == STRANGER && meta.uid != STRANGER) || (gid == STRANGER && meta.gid != STRANGER) {
            let why = format!("its owner {}:{} has no id in the new container", meta.uid, meta.gid);
            return Err(Error::unsupported(
                1,
                self.shown(path),
                why,
                "give it the same id mappings",
            ));
        }
        if !self.power.trusted && meta.attributes.iter().any(|(name, _)| name.0.starts_with(b"trusted.")) {
            return self.refused(
                path,
                "trusted attributes need CAP_SYS_ADMIN, which the container does not grant",
            );
        }
        let Some(now) = now else { return Ok(()) };
        let other_owner = (uid != STRANGER && uid != now.uid) || (gid != STRANGER && gid != now.gid);
        if other_owner && !self.power.chown {
            return self.refused(path, "the image gives it another owner, which needs CAP_CHOWN");
        }
        let own = self
            .power
            .only_uid
            .is_none_or(|uid| uid == inside(&self.maps.uids, now.uid));
        let other_mode = meta.mode & 0o7777 != now.mode & 0o7777 && now.kind() != libc::S_IFLNK;
        if other_mode && !self.power.fowner && !own {
            return self.refused(path, "the image gives it other permissions, which needs CAP_FOWNER");
        }
        Ok(())
    }

    /// User and group as we see them. An owner without an id in the container stays without one.
    pub(super) fn owner(&self, meta: &Meta) -> (u32, u32) {
        let of = |map: &[_], id| match id {
            STRANGER if inside(map, 0) == STRANGER => 0,
            id => outside(map, id),
        };
        (of(&self.maps.uids, meta.uid), of(&self.maps.gids, meta.gid))
    }
}

/// What a directory can hold under this name.
pub(super) fn is_name(name: &[u8]) -> bool {
    let len = 1..=255;
    len.contains(&name.len()) && name != b"." && name != b".." && !name.contains(&b'/') && !name.contains(&0)
}

/// Whether what is there can stay. A file never does: what else has its bytes is not known.
pub(super) fn keeps(kind: &Kind, file: &OwnedFd, now: &Node) -> torpor_sys::Result<bool> {
    let format = now.kind();
    Ok(match kind {
        Kind::Directory => format == libc::S_IFDIR,
        Kind::Symlink { target } => format == libc::S_IFLNK && tree::target(file)? == target.0,
        Kind::Fifo => format == libc::S_IFIFO,
        Kind::Socket => format == libc::S_IFSOCK,
        Kind::Device { block: true, rdev } => format == libc::S_IFBLK && now.rdev == *rdev,
        Kind::Device { block: false, rdev } => format == libc::S_IFCHR && now.rdev == *rdev,
        Kind::Covered => true,
        Kind::File { .. } | Kind::Link { .. } => false,
    })
}

/// # Errors
/// The first reason why the files of the image cannot be put into the tmpfs mounts of the waiting process `init`.
pub fn plan(states: &[State], image: &Reader, init: Pid, bounds: &Bounds, cancel: &Cancel) -> Result<()> {
    let ground = Ground::of(init, bounds)?;
    let mut points = BTreeSet::new();
    for state in states {
        if !points.insert(&state.point) {
            return Err(Error::nonsense(format!("{} is there twice", state.point)));
        }
        let target = Target::of(state, image, &ground, cancel)?;
        plan_room(state, &target.root)?;
        let mut place = Place::Absent;
        let mut path = Vec::new();
        target.each(&mut |line| match line {
            Line::Directory { path: new, meta } => {
                place = target.enter(&new.0)?;
                path = new.0;
                target.check_directory(&path, &meta, &place)
            }
            Line::Node(entry) => target
                .check_entry(&join(&path, &entry.name.0), &entry, &place, true)
                .map(drop),
            Line::Data { .. } => Ok(()),
        })?;
    }
    Ok(())
}

fn plan_room(state: &State, root: &OwnedFd) -> Result<()> {
    let space = tree::space(root).about(1, &state.point)?;
    let too_small = |what: &str, has: u64, room: u64| {
        let why = format!("the image has {has} {what} in it, the new container has room for {room}");
        Error::unsupported(1, format!("tmpfs {}", state.point), why, "give it a larger size")
    };
    if space.bytes != 0 && state.bytes > space.bytes {
        return Err(too_small("bytes", state.bytes, space.bytes));
    }
    if space.nodes != 0 && state.nodes > space.nodes {
        return Err(too_small("files", state.nodes, space.nodes));
    }
    Ok(())
}
