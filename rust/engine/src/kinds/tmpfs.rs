//! Files in memory: what the container's own tmpfs mounts hold (/dev, /dev/shm, /run, /tmp). They end with the
//! container, so they travel in its image, and are put into the tmpfs that the new container has at the same place.
//!
//! The files are a list of lines, each a JSON object, in blobs of about a megabyte: a directory, then what is in it.
//! So neither saving nor restoring holds more of it in memory than the names of one directory. Nothing in that list
//! is believed: names are looked up without following links and without entering other mounts, and what the
//! container's own processes could not have done is refused.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::FileExt;

use serde::{Deserialize, Serialize};
use torpor_image::{BlobRef, Reader};
use torpor_sys::tree::{self, Node};
use torpor_sys::{Pid, fd, proc};

use super::creds::IdMaps;
use super::mounts;
use super::unix::Name;
use crate::error::{About, Error, Result};
use crate::plan::Bounds;
use crate::stage::Cancel;

/// One tmpfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Where it is mounted.
    pub point: String,
    /// Files, directories and all else, hard links once.
    pub nodes: u64,
    /// Memory that their content takes.
    pub bytes: u64,
    /// How much it could take; zero when there is no limit. The new container has its own.
    #[serde(default)]
    pub limit: u64,
    /// The list of its files.
    pub listing: Vec<BlobRef>,
}

/// A line of the list.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    /// The nodes that follow are in this directory; the first is the root, whose path is empty.
    Directory { path: Name, meta: Meta },
    /// Something in it. Those that were made first come first.
    Node(Entry),
    /// Content of the regular file before.
    Data { at: u64, bytes: BlobRef },
}

/// What a directory holds under a name.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    name: Name,
    kind: Kind,
    /// None for directories, which say it themselves, for links to other names, and under mounts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    meta: Option<Meta>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Directory,
    File {
        size: u64,
        /// It has memory for all of its bytes although not all were written (fallocate(2)).
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        reserved: bool,
    },
    Symlink {
        target: Name,
    },
    Fifo,
    /// A socket that is open is bound to it anew by `kinds/unix.rs`.
    Socket,
    Device {
        block: bool,
        rdev: u64,
    },
    /// One more name of a node that was listed before.
    Link {
        path: Name,
    },
    /// Something else is mounted there.
    Covered,
}

/// What every file has. Owners are in the container's ids, times in nanoseconds after the epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Meta {
    mode: u32,
    uid: u32,
    gid: u32,
    atime: i64,
    mtime: i64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    attributes: Vec<(Name, Name)>,
}

/// The id of an owner who has none in the container.
const STRANGER: u32 = u32::MAX;

/// A blob of the list is closed when it is this large.
const FULL: usize = 1 << 20;

/// How much content is copied at once.
const PIECE: usize = 1 << 20;

/// A file with more bytes of extended attributes is refused.
const MAX_ATTRIBUTES: usize = 4 << 20;

const LOOK: i32 = libc::O_PATH | libc::O_NOFOLLOW;
const LIST: i32 = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOATIME;

/// What tells a call's error apart from another.
fn is(error: &torpor_sys::Error, number: i32) -> bool {
    error.errno().is_some_and(|e| e as i32 == number)
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    match path.is_empty() {
        true => name.to_vec(),
        false => [path, b"/", name].concat(),
    }
}

/// The path in the container, for messages.
fn shown(point: &str, path: &[u8]) -> String {
    format!("{point}/{}", path.escape_ascii())
}

/// Whether an attribute is the files' own; others are made by the machine's security module.
fn is_carried(attribute: &[u8]) -> bool {
    const EXACT: [&[u8]; 3] = [
        b"security.capability",
        b"system.posix_acl_access",
        b"system.posix_acl_default",
    ];
    attribute.starts_with(b"user.") || attribute.starts_with(b"trusted.") || EXACT.contains(&attribute)
}

/// Changes the ids inside of an attribute: those of an ACL (struct posix_acl_xattr_entry: tag, perm, id), and the
/// root user of capabilities that belong to a user namespace (struct vfs_ns_cap_data).
fn translate(name: &[u8], value: &mut [u8], uid: impl Fn(u32) -> u32, gid: impl Fn(u32) -> u32) {
    const ACL_USER: u16 = 2;
    const ACL_GROUP: u16 = 8;
    fn change(at: &mut [u8], map: impl Fn(u32) -> u32) {
        if let Ok(bytes) = <[u8; 4]>::try_from(&*at) {
            at.copy_from_slice(&map(u32::from_le_bytes(bytes)).to_le_bytes());
        }
    }
    if name.starts_with(b"system.posix_acl_") {
        for entry in value.get_mut(4..).unwrap_or_default().chunks_exact_mut(8) {
            match u16::from_le_bytes([entry[0], entry[1]]) {
                ACL_USER => change(&mut entry[4..], &uid),
                ACL_GROUP => change(&mut entry[4..], &gid),
                _ => {}
            }
        }
    } else if name == b"security.capability" && value.len() == 24 && value[3] == 3 {
        change(&mut value[20..], uid);
    }
}

fn inside(map: &[(u32, u32, u32)], id: u32) -> u32 {
    let part = map
        .iter()
        .find(|(_, outside, count)| id.wrapping_sub(*outside) < *count);
    part.map_or(STRANGER, |(inside, outside, _)| inside + (id - outside))
}

fn outside(map: &[(u32, u32, u32)], id: u32) -> u32 {
    let part = map.iter().find(|(inside, _, count)| id.wrapping_sub(*inside) < *count);
    part.map_or(STRANGER, |(inside, outside, _)| outside + (id - inside))
}

/// The files of every tmpfs that the container has for itself. Their content goes to `blob` at once.
pub fn collect(
    init: Pid,
    mounts: &[mounts::State],
    maps: &IdMaps,
    blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>,
    warnings: &mut Vec<String>,
) -> Result<Vec<State>> {
    let root = proc::link(&format!("/proc/{init}/root")).about(init, "root directory")?;
    if root != "/" {
        warnings.push(format!(
            "files in memory outside of {root}, the root directory of the first process, are not saved"
        ));
    }
    let mut all = Vec::new();
    for mount in mounts.iter().filter(|m| m.is_memory()) {
        match mounts::open(init, &mount.point)? {
            Some(directory) => all.push(Walker::new(init, &mount.point, directory, maps, blob).run()?),
            None => warnings.push(format!(
                "{} is hidden by another mount: its files are not saved",
                mount.point
            )),
        }
    }
    // Where a program expects its shared memory to be; Podman saves and restores this one itself.
    let shm = mounts
        .iter()
        .find(|m| m.point == "/dev/shm" && m.bind && mounts::is_memory(&m.fs_type));
    if let Some(mount) = shm
        && let Some(directory) = mounts::open(init, &mount.point)?
        && tree::names(&directory).next().is_some()
    {
        warnings.push("/dev/shm is mounted from outside: its files are not saved".into());
    }
    Ok(all)
}

/// Lists one tmpfs.
struct Walker<'a> {
    pid: Pid,
    root: OwnedFd,
    maps: &'a IdMaps,
    blob: &'a mut dyn FnMut(&[u8]) -> Result<BlobRef>,
    /// Lines that are not in a blob yet.
    text: Vec<u8>,
    buffer: Vec<u8>,
    /// Nodes with several names: the first name, and how many are still to come.
    links: BTreeMap<u64, (Vec<u8>, u32)>,
    /// Directories to be listed.
    pending: Vec<Vec<u8>>,
    state: State,
}

impl<'a> Walker<'a> {
    fn new(
        pid: Pid,
        point: &str,
        root: OwnedFd,
        maps: &'a IdMaps,
        blob: &'a mut dyn FnMut(&[u8]) -> Result<BlobRef>,
    ) -> Walker<'a> {
        Walker {
            pid,
            root,
            maps,
            blob,
            text: Vec::with_capacity(FULL + (64 << 10)),
            buffer: vec![0; PIECE],
            links: BTreeMap::new(),
            pending: vec![Vec::new()],
            state: State {
                point: point.into(),
                nodes: 0,
                bytes: 0,
                limit: 0,
                listing: Vec::new(),
            },
        }
    }

    fn run(mut self) -> Result<State> {
        self.state.limit = tree::space(&self.root).about(self.pid, &self.state.point)?.bytes;
        while let Some(path) = self.pending.pop() {
            self.directory(&path)?;
        }
        self.flush()?;
        Ok(self.state)
    }

    fn about<T>(&self, path: &[u8], result: torpor_sys::Result<T>) -> Result<T> {
        result.about(self.pid, shown(&self.state.point, path))
    }

    fn line(&mut self, line: &Line) -> Result<()> {
        let unlikely = |e: serde_json::Error| Error::nonsense(format!("a line of a tmpfs: {e}"));
        serde_json::to_writer(&mut self.text, line).map_err(unlikely)?;
        self.text.push(b'\n');
        if self.text.len() >= FULL { self.flush() } else { Ok(()) }
    }

    fn flush(&mut self) -> Result<()> {
        if !self.text.is_empty() {
            self.state.listing.push((self.blob)(&self.text)?);
            self.text.clear();
        }
        Ok(())
    }

    fn directory(&mut self, path: &[u8]) -> Result<()> {
        let here: &[u8] = if path.is_empty() { b"." } else { path };
        let directory = self.about(path, tree::open(&self.root, here, LIST))?;
        let node = self.about(path, tree::node(&directory))?;
        let meta = self.meta(path, &directory, &node)?;
        self.line(&Line::Directory {
            path: Name(path.to_vec()),
            meta,
        })?;
        self.state.nodes += 1;
        // The kernel lists what was made last first: made again in this order, they are listed in the same.
        let names: torpor_sys::Result<Vec<Vec<u8>>> = tree::names(&directory).collect();
        for name in self.about(path, names)?.into_iter().rev() {
            self.node(&directory, path, name)?;
        }
        Ok(())
    }

    fn node(&mut self, directory: &OwnedFd, path: &[u8], name: Vec<u8>) -> Result<()> {
        let full = join(path, &name);
        let name = Name(name);
        let file = match tree::open(directory, &name.0, LOOK) {
            Ok(file) => file,
            Err(e) if is(&e, libc::EXDEV) => {
                return self.line(&Line::Node(Entry {
                    name,
                    kind: Kind::Covered,
                    meta: None,
                }));
            }
            Err(e) => return self.about(&full, Err(e)),
        };
        let node = self.about(&full, tree::node(&file))?;
        if node.kind() == libc::S_IFDIR {
            self.pending.push(full);
            return self.line(&Line::Node(Entry {
                name,
                kind: Kind::Directory,
                meta: None,
            }));
        }
        if let Some(path) = self.known(&full, &node) {
            return self.line(&Line::Node(Entry {
                name,
                kind: Kind::Link { path: Name(path) },
                meta: None,
            }));
        }
        let meta = Some(self.meta(&full, &file, &node)?);
        self.state.nodes += 1;
        let device = |block| Kind::Device { block, rdev: node.rdev };
        let kind = match node.kind() {
            libc::S_IFREG => return self.file(&full, name, meta, &file, &node),
            libc::S_IFLNK => Kind::Symlink {
                target: Name(self.about(&full, tree::target(&file))?),
            },
            libc::S_IFIFO => Kind::Fifo,
            libc::S_IFSOCK => Kind::Socket,
            libc::S_IFBLK => device(true),
            _ => device(false),
        };
        self.line(&Line::Node(Entry { name, kind, meta }))
    }

    /// Where a node with several names was listed before.
    fn known(&mut self, full: &[u8], node: &Node) -> Option<Vec<u8>> {
        if node.nlink < 2 {
            return None;
        }
        let Some((first, left)) = self.links.get_mut(&node.ino) else {
            self.links.insert(node.ino, (full.to_vec(), node.nlink - 1));
            return None;
        };
        let first = first.clone();
        *left -= 1;
        if *left == 0 {
            self.links.remove(&node.ino);
        }
        Some(first)
    }

    fn meta(&self, path: &[u8], file: &OwnedFd, node: &Node) -> Result<Meta> {
        if node.is_locked {
            let why = "a file that is immutable or append-only (chattr) is not carried";
            let path = shown(&self.state.point, path);
            return Err(Error::unsupported(
                self.pid,
                path,
                why,
                "chattr -i -a it before the checkpoint",
            ));
        }
        let uid = |id| inside(&self.maps.uids, id);
        let gid = |id| inside(&self.maps.gids, id);
        let mut attributes = Vec::new();
        for name in self
            .about(path, tree::attributes(file))?
            .into_iter()
            .filter(|n| is_carried(n))
        {
            let mut value = self.about(path, tree::attribute(file, &name))?;
            translate(&name, &mut value, uid, gid);
            attributes.push((Name(name), Name(value)));
        }
        if attributes.iter().map(|(_, value)| value.0.len()).sum::<usize>() > MAX_ATTRIBUTES {
            let why = "it has more extended attributes than are carried";
            return Err(Error::unsupported(self.pid, shown(&self.state.point, path), why, ""));
        }
        Ok(Meta {
            mode: node.mode & 0o7777,
            uid: uid(node.uid),
            gid: gid(node.gid),
            atime: node.atime,
            mtime: node.mtime,
            attributes,
        })
    }

    fn file(&mut self, full: &[u8], name: Name, meta: Option<Meta>, file: &OwnedFd, node: &Node) -> Result<()> {
        let file = self.about(full, fd::reopen(file, libc::O_RDONLY | libc::O_NOATIME))?;
        let file = File::from(file);
        self.state.bytes += node.allocated;
        let first = self.about(full, tree::next_data(&file, 0))?;
        let has_holes = first.is_none_or(|(start, end)| start > 0 || end < node.size);
        let reserved = has_holes && node.size > 0 && node.allocated >= node.size;
        let kind = Kind::File {
            size: node.size,
            reserved,
        };
        self.line(&Line::Node(Entry { name, kind, meta }))?;
        let mut next = first;
        while let Some((start, end)) = next {
            self.range(full, &file, start, end.min(node.size))?;
            next = self.about(full, tree::next_data(&file, end))?;
        }
        Ok(())
    }

    /// Content between two holes. Blobs that follow each other are one.
    fn range(&mut self, full: &[u8], file: &File, start: u64, end: u64) -> Result<()> {
        let mut at = start;
        let mut whole: Option<(u64, BlobRef)> = None;
        while at < end {
            let room = (end - at).min(PIECE as u64) as usize;
            let got = file
                .read_at(&mut self.buffer[..room], at)
                .map_err(|e| torpor_sys::Error::io("read", "tmpfs", &e));
            let got = self.about(full, got)?;
            if got == 0 {
                break;
            }
            let bytes = (self.blob)(&self.buffer[..got])?;
            whole = match whole {
                Some((from, blob)) if blob.offset + blob.len == bytes.offset => Some((
                    from,
                    BlobRef {
                        offset: blob.offset,
                        len: blob.len + bytes.len,
                    },
                )),
                Some((from, blob)) => {
                    self.line(&Line::Data { at: from, bytes: blob })?;
                    Some((at, bytes))
                }
                None => Some((at, bytes)),
            };
            at += got as u64;
        }
        whole.map_or(Ok(()), |(at, bytes)| self.line(&Line::Data { at, bytes }))
    }
}

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
        const CHOWN: u32 = 0;
        const FOWNER: u32 = 3;
        const SYS_ADMIN: u32 = 21;
        const MKNOD: u32 = 27;
        let has = |cap: u32| bounds.capabilities >> cap & 1 == 1;
        Power {
            mknod: has(MKNOD) && in_our_user_namespace,
            chown: has(CHOWN),
            fowner: has(FOWNER),
            trusted: has(SYS_ADMIN) && in_our_user_namespace,
            only_uid: bounds.only_uid,
            suid: !bounds.no_new_privs && !options.split(',').any(|o| o == "nosuid"),
        }
    }
}

/// What the new container has under a name.
enum Existing {
    Nothing,
    /// Something else is mounted there.
    Mount,
    File(OwnedFd, Node),
}

fn existing(directory: &OwnedFd, name: &[u8]) -> torpor_sys::Result<Existing> {
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
enum Place {
    Here(OwnedFd),
    /// It does not have it yet.
    Absent,
    /// Something else is mounted there, or on the way.
    Mounted,
}

/// A tmpfs of the new container, at the place of one of the image.
struct Target<'a> {
    state: &'a State,
    image: &'a Reader,
    cancel: &'a Cancel,
    root: OwnedFd,
    maps: IdMaps,
    power: Power,
}

impl<'a> Target<'a> {
    fn of(state: &'a State, image: &'a Reader, init: Pid, bounds: &Bounds, cancel: &'a Cancel) -> Result<Target<'a>> {
        let me = std::process::id() as Pid;
        let missing = || {
            let why = "the new container has no tmpfs of its own there for the files of the image";
            Error::unsupported(
                1,
                format!("mount {}", state.point),
                why,
                "give the new container that mount",
            )
        };
        let here = mounts::collect(init)?;
        if !here.iter().any(|m| m.point == state.point && m.is_memory()) {
            return Err(missing());
        }
        let root = mounts::open(init, &state.point)?.ok_or_else(missing)?;
        let mounts = proc::mountinfo(init).about(init, "mounts")?;
        let options = mounts
            .iter()
            .rfind(|m| m.point == state.point)
            .map(|m| m.options.as_str());
        let namespace = |pid| proc::namespace(pid, "user").about(pid, "user namespace");
        Ok(Target {
            state,
            image,
            cancel,
            root,
            maps: IdMaps {
                uids: proc::id_map(init, "uid_map").about(init, "uid_map")?,
                gids: proc::id_map(init, "gid_map").about(init, "gid_map")?,
            },
            power: Power::of(bounds, namespace(init)? == namespace(me)?, options.unwrap_or_default()),
        })
    }

    /// Hands over the lines of the list, one after another.
    fn each(&self, take: &mut dyn FnMut(Line) -> Result<()>) -> Result<()> {
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

    fn about<T>(&self, path: &[u8], result: torpor_sys::Result<T>) -> Result<T> {
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

    fn nonsense<T>(&self, path: &[u8]) -> Result<T> {
        Err(Error::nonsense(format!("{} in a tmpfs", self.shown(path))))
    }

    fn enter(&self, path: &[u8]) -> Result<Place> {
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

    fn check_directory(&self, path: &[u8], meta: &Meta, place: &Place) -> Result<()> {
        match place {
            Place::Here(directory) => {
                let now = self.about(path, tree::node(directory))?;
                self.check_change(path, meta, Some(&now))
            }
            Place::Absent => self.check_change(path, meta, None),
            Place::Mounted => Ok(()),
        }
    }

    /// What is there in the place of an entry, once it may be put there.
    fn check_entry(&self, path: &[u8], entry: &Entry, place: &Place) -> Result<Existing> {
        let now = match place {
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

    fn hidden<T>(&self, path: &[u8]) -> Result<T> {
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

    /// User and group as we see them.
    fn owner(&self, meta: &Meta) -> (u32, u32) {
        (outside(&self.maps.uids, meta.uid), outside(&self.maps.gids, meta.gid))
    }

    /// Gives an open file all of it. Times come last, and permissions after the owner, whose change takes bits away.
    fn dress(&self, path: &[u8], file: &impl AsFd, meta: &Meta) -> Result<()> {
        let (uid, gid) = self.owner(meta);
        let some = |id| (id != STRANGER).then_some(id);
        let now = self.about(path, tree::node(file))?;
        if some(uid).is_some_and(|u| u != now.uid) || some(gid).is_some_and(|g| g != now.gid) {
            self.about(path, tree::set_owner(file, some(uid), some(gid)))?;
        }
        self.dress_attributes(path, file, meta)?;
        let now = self.about(path, tree::node(file))?;
        if now.kind() != libc::S_IFLNK && now.mode & 0o7777 != meta.mode & 0o7777 {
            self.about(path, tree::set_mode(file, meta.mode))?;
        }
        self.about(path, tree::set_times(file, meta.atime, meta.mtime))
    }

    fn dress_attributes(&self, path: &[u8], file: &impl AsFd, meta: &Meta) -> Result<()> {
        let wanted = |name: &[u8]| meta.attributes.iter().any(|(n, _)| n.0 == name);
        for name in self.about(path, tree::attributes(file))? {
            if is_carried(&name) && !wanted(&name) {
                self.about(path, tree::set_attribute(file, &name, None))?;
            }
        }
        for (name, value) in &meta.attributes {
            if !is_carried(&name.0) {
                return self.nonsense(path);
            }
            let mut value = value.0.clone();
            let uid = |id| outside(&self.maps.uids, id);
            translate(&name.0, &mut value, uid, |id| outside(&self.maps.gids, id));
            self.about(path, tree::set_attribute(file, &name.0, Some(&value)))?;
        }
        Ok(())
    }
}

/// What a directory can hold under this name.
fn is_name(name: &[u8]) -> bool {
    let len = 1..=255;
    len.contains(&name.len()) && name != b"." && name != b".." && !name.contains(&b'/') && !name.contains(&0)
}

/// Whether what is there can stay. A file never does: what else has its bytes is not known.
fn keeps(kind: &Kind, file: &OwnedFd, now: &Node) -> torpor_sys::Result<bool> {
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
    let mut points = BTreeSet::new();
    for state in states {
        if !points.insert(&state.point) {
            return Err(Error::nonsense(format!("{} is there twice", state.point)));
        }
        let target = Target::of(state, image, init, bounds, cancel)?;
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
                .check_entry(&join(&path, &entry.name.0), &entry, &place)
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

/// Brings the tmpfs mounts of the new container to the state of the image.
pub fn rebuild(states: &[State], image: &Reader, init: Pid, bounds: &Bounds, cancel: &Cancel) -> Result<()> {
    for state in states {
        let target = Target::of(state, image, init, bounds, cancel)?;
        let mut builder = Builder {
            target: &target,
            here: None,
            file: None,
            buffer: vec![0; PIECE],
        };
        target.each(&mut |line| builder.take(line))?;
        builder.end_file()?;
        builder.end_directory()?;
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
}

struct Builder<'t> {
    target: &'t Target<'t>,
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
            Place::Here(directory) => tree::names(directory).collect(),
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
        here.rest.remove(name);
        let now = target.check_entry(&path, entry, &here.place)?;
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
        if let (Kind::File { size, reserved }, Some(meta)) = (&entry.kind, &entry.meta) {
            let file = target.about(&path, empty_file(directory, name, *size, *reserved))?;
            self.file = Some(Filling {
                file: file.into(),
                path,
                meta: meta.clone(),
                size: *size,
            });
            return Ok(());
        }
        target.make(directory, &path, entry)
    }

    fn data(&mut self, at: u64, bytes: BlobRef) -> Result<()> {
        let target = self.target;
        let Some(filling) = &self.file else {
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
            let written = filling
                .file
                .write_all_at(piece, at + done)
                .map_err(|e| torpor_sys::Error::io("write", "file", &e));
            target.about(&filling.path, written)?;
            done += piece.len() as u64;
        }
        Ok(())
    }

    fn end_file(&mut self) -> Result<()> {
        match self.file.take() {
            Some(filling) => self.target.dress(&filling.path, &filling.file, &filling.meta),
            None => Ok(()),
        }
    }
}

impl Target<'_> {
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

fn empty_file(directory: &OwnedFd, name: &[u8], size: u64, reserved: bool) -> torpor_sys::Result<OwnedFd> {
    let file = tree::create(directory, name)?;
    fd::truncate(&file, size)?;
    if reserved {
        tree::allocate(&file, size)?;
    }
    Ok(file)
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
        let names: torpor_sys::Result<Vec<Vec<u8>>> = tree::names(&inner).collect();
        let mut all_gone = true;
        for name in names? {
            all_gone &= clear(&inner, &name)?;
        }
        if !all_gone {
            return Ok(false);
        }
    }
    tree::remove(directory, name, is_directory).map(|()| true)
}
