//! From a tmpfs to its list.

use std::collections::BTreeMap;
use std::fs::File;
use std::os::fd::OwnedFd;
use std::os::unix::fs::FileExt;

use torpor_image::BlobRef;
use torpor_sys::tree::{self, DirEntry, Node};
use torpor_sys::{Pid, proc};

use super::{Entry, FULL, Kind, LIST, LOOK, Line, MAX_ATTRIBUTES, Meta, PIECE, State};
use super::{inside, is, is_carried, join, shown, translate};
use crate::error::{About, Error, Result};
use crate::kinds::creds::IdMaps;
use crate::kinds::mounts::{self, Table};
use crate::kinds::unix::Name;

/// The files of every tmpfs that the container has for itself. Their content goes to `blob` at once.
pub fn collect(
    init: Pid,
    mounts: &Table,
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
    let hidden = |point: &str| format!("{point} is hidden by another mount: its files are not saved");
    warnings.extend(mounts.hidden().into_iter().map(hidden));
    let mut all = Vec::new();
    for mount in mounts.seen().iter().filter(|m| m.is_memory()) {
        match mounts.open(&mount.point)? {
            Some(directory) => all.push(Walker::new(init, &mount.point, directory, maps, blob).run()?),
            None => warnings.push(hidden(&mount.point)),
        }
    }
    // Where a program expects its shared memory to be; Podman saves and restores this one itself.
    if let Some((shm, _)) = mounts.at("/dev/shm")
        && shm.bind
        && mounts::is_memory(&shm.fs_type)
        && let Some(directory) = mounts.open("/dev/shm")?
        && tree::names(&directory).next().is_some()
    {
        warnings.push("/dev/shm is mounted from outside: its files are not saved".into());
    }
    Ok(all)
}

/// How a regular file is opened. What turned into a FIFO would not block, but nobody can change anything now.
const READ: i32 = libc::O_RDONLY | libc::O_NOFOLLOW | libc::O_NOATIME | libc::O_NONBLOCK;

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
        let entries: torpor_sys::Result<Vec<DirEntry>> = tree::names(&directory).collect();
        for entry in self.about(path, entries)?.into_iter().rev() {
            self.node(&directory, path, entry)?;
        }
        Ok(())
    }

    fn node(&mut self, directory: &OwnedFd, path: &[u8], entry: DirEntry) -> Result<()> {
        let full = join(path, &entry.name);
        let name = Name(entry.name);
        let file = match tree::open(directory, &name.0, if entry.is_file { READ } else { LOOK }) {
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
            libc::S_IFREG => return self.file(&full, name, meta, file, &node),
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

    fn file(&mut self, full: &[u8], name: Name, meta: Option<Meta>, file: OwnedFd, node: &Node) -> Result<()> {
        let file = File::from(file);
        self.state.bytes += node.allocated;
        let mut next = match node.size {
            0 => None,
            // A page is data as a whole, or not at all.
            1..=4096 if node.allocated > 0 => Some((0, node.size)),
            _ => self.about(full, tree::next_data(&file, 0))?,
        };
        let has_holes = next.is_none_or(|(start, end)| start > 0 || end < node.size);
        let reserved = has_holes && node.size > 0 && node.allocated >= node.size;
        let kind = Kind::File {
            size: node.size,
            reserved,
        };
        self.line(&Line::Node(Entry { name, kind, meta }))?;
        while let Some((start, end)) = next {
            self.range(full, &file, start, end.min(node.size))?;
            next = match end < node.size {
                true => self.about(full, tree::next_data(&file, end))?,
                false => None,
            };
        }
        Ok(())
    }

    /// Content between two holes. Blobs that follow each other are one.
    fn range(&mut self, full: &[u8], file: &File, start: u64, end: u64) -> Result<()> {
        let mut at = start;
        let mut found: Vec<(u64, BlobRef)> = Vec::new();
        while at < end {
            let piece = &mut self.buffer[..(end - at).min(PIECE as u64) as usize];
            let got = file.read_exact_at(piece, at);
            let got = got.map_err(|e| torpor_sys::Error::io("read", "tmpfs", &e));
            got.about(self.pid, shown(&self.state.point, full))?;
            let bytes = (self.blob)(piece)?;
            match found.last_mut() {
                Some((_, last)) if last.offset + last.len == bytes.offset => last.len += bytes.len,
                _ => found.push((at, bytes)),
            }
            at += bytes.len;
        }
        found
            .into_iter()
            .try_for_each(|(at, bytes)| self.line(&Line::Data { at, bytes }))
    }
}
