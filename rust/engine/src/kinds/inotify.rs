//! inotify(7) instances. The kernel tells a watch by inode; a path that leads to it is looked for. Watches are set
//! when nothing else is opened any more, so that a restore is no event itself.

use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::fs::{DirEntryExt, MetadataExt};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use torpor_sys::proc::{self, FdInfo, Mount};
use torpor_sys::{Pid, event, fd};

use crate::error::{About, Error, Result};

/// How many names are looked at on a file system whose handles cannot be opened.
const PATIENCE: usize = 300_000;
/// A path that one of our threads can use, whatever the container's own is.
const OPEN: i32 = libc::O_PATH | libc::O_NOFOLLOW;

/// An instance.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// What it watches, by number.
    pub watches: Vec<Watch>,
}

/// One watched file or directory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Its number.
    pub wd: i32,
    /// IN_* bits.
    pub mask: u32,
    /// A path that leads to it.
    pub path: String,
}

/// A watch as fdinfo has it.
#[derive(Debug, PartialEq, Eq)]
struct Line {
    wd: i32,
    ino: u64,
    dev: (u32, u32),
    mask: u32,
    handle: Option<(i32, Vec<u8>)>,
}

/// `inotify wd:1 ino:98c001 sdev:fe00000 mask:84000100 ignored_mask:0 fhandle-bytes:8 fhandle-type:1
/// f_handle:01c09800b8b8bc9b` (proc(5)), all in hexadecimal.
fn parse(line: &str) -> Option<Line> {
    let get = |key: &str| line.split_ascii_whitespace().find_map(|w| w.strip_prefix(key));
    let hex = |key: &str| u64::from_str_radix(get(key)?, 16).ok();
    let handle = || {
        let text = get("f_handle:")?;
        let byte = |at: usize| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
        let bytes: Option<Vec<u8>> = (0..text.len()).step_by(2).map(byte).collect();
        Some((hex("fhandle-type:")? as i32, bytes?))
    };
    // The kernel's own form of a device number.
    let dev = hex("sdev:")?;
    Some(Line {
        wd: hex("wd:")?.try_into().ok()?,
        ino: hex("ino:")?,
        dev: ((dev >> 20) as u32, (dev & 0xf_ffff) as u32),
        mask: hex("mask:")? as u32,
        handle: handle(),
    })
}

/// How many bytes of events wait in the instance, if `link` says that it is one.
pub fn queued(link: &str, file: &OwnedFd) -> torpor_sys::Result<i32> {
    if link == "anon_inode:inotify" {
        fd::ioctl_int(file, libc::FIONREAD)
    } else {
        Ok(0)
    }
}

/// `queued` is what [`queued`] said before torpor opened files itself.
///
/// # Errors
/// Refused: events that wait to be read, since reading takes them away; watches of what has no name any more.
pub fn collect(pid: Pid, number: i32, info: &FdInfo, queued: i32, init: Pid) -> Result<State> {
    let object = format!("fd {number} (inotify)");
    if queued > 0 {
        let why = "events wait to be read, which cannot be looked at without taking them from the program";
        return Err(Error::unsupported(pid, object, why, "try again when it has read them"));
    }
    let place = Place::of(init)?;
    let mut watches = Vec::new();
    for text in info.lines.iter().filter(|l| l.starts_with("inotify ")) {
        let unknown = || Error::unsupported(pid, object.clone(), "its fdinfo has an unknown form", "");
        let line = parse(text).ok_or_else(unknown)?;
        let path = place.find(&line).ok_or_else(|| {
            let why = format!(
                "watch {} is on a file that no path leads to (inode {} of device {}:{})",
                line.wd, line.ino, line.dev.0, line.dev.1
            );
            Error::unsupported(pid, object.clone(), why, "remove the watch")
        })?;
        watches.push(Watch {
            wd: line.wd,
            mask: line.mask,
            path,
        });
    }
    watches.sort_by_key(|w| w.wd);
    Ok(State { watches })
}

/// The container's files, to look for some of them.
struct Place {
    root: OwnedFd,
    mounts: Vec<Mount>,
}

impl Place {
    fn of(init: Pid) -> Result<Place> {
        Ok(Place {
            root: root(init)?,
            mounts: proc::mountinfo(init).about(init, "mountinfo")?,
        })
    }

    fn find(&self, line: &Line) -> Option<String> {
        let mounts = || self.mounts.iter().filter(|m| m.dev == line.dev);
        let by_handle = || mounts().find_map(|m| self.by_handle(m, line));
        mounts()
            .find_map(|m| self.if_it_is(&m.point, line.ino, &m.point))
            .or_else(by_handle)
            .or_else(|| mounts().find_map(|m| self.search(m, line.ino)))
    }

    /// The path, when it leads to that inode of the file system that is mounted at `point`.
    fn if_it_is(&self, path: &str, ino: u64, point: &str) -> Option<String> {
        let stat = |path: &str| fd::stat(fd::open_in_root(&self.root, path, OPEN).ok()?).ok();
        let (here, there) = (stat(path)?, stat(point)?);
        (here.ino == ino && here.dev == there.dev).then(|| path.to_owned())
    }

    fn by_handle(&self, mount: &Mount, line: &Line) -> Option<String> {
        let (kind, bytes) = line.handle.as_ref()?;
        let directory = fd::open_in_root(&self.root, &mount.point, OPEN | libc::O_DIRECTORY).ok()?;
        let file = event::open_handle(directory, *kind, bytes).ok()?;
        let path = proc::link(&format!("/proc/self/fd/{}", file.as_raw_fd())).ok()?;
        self.if_it_is(&path, line.ino, &mount.point)
    }

    /// Walks through a file system, as long as there is patience.
    fn search(&self, mount: &Mount, ino: u64) -> Option<String> {
        let top = fd::open_in_root(&self.root, &mount.point, OPEN | libc::O_DIRECTORY).ok()?;
        let base = PathBuf::from(format!("/proc/self/fd/{}", top.as_raw_fd()));
        let device = std::fs::metadata(&base).ok()?.dev();
        let mut directories = vec![PathBuf::new()];
        let mut seen = 0;
        while let Some(directory) = directories.pop() {
            let Ok(entries) = std::fs::read_dir(base.join(&directory)) else {
                continue;
            };
            for entry in entries.flatten() {
                let name = directory.join(entry.file_name());
                if entry.ino() == ino
                    && let Some(path) = Path::new(&mount.point).join(&name).to_str()
                    && let Some(path) = self.if_it_is(path, ino, &mount.point)
                {
                    return Some(path);
                }
                let is_inside = || entry.metadata().is_ok_and(|m| m.is_dir() && m.dev() == device);
                if entry.file_type().is_ok_and(|t| t.is_dir()) && is_inside() {
                    directories.push(name);
                }
                seen += 1;
                if seen > PATIENCE {
                    return None;
                }
            }
        }
        None
    }
}

fn root(init: Pid) -> Result<OwnedFd> {
    fd::open(&format!("/proc/{init}/root"), libc::O_PATH | libc::O_DIRECTORY).about(init, "root")
}

/// Watches everything again, under the numbers that it had.
pub fn rebuild(inotify: &OwnedFd, state: &State, init: Pid) -> Result<()> {
    let root = root(init)?;
    for watch in &state.watches {
        let object = || format!("inotify watch of {}", watch.path);
        let file = fd::open_in_root(&root, &watch.path, OPEN).map_err(|e| {
            let why = format!("it cannot be reached any more ({e})");
            Error::unsupported(1, object(), why, "restore with the files of the checkpoint")
        })?;
        let wd = event::watch(inotify, watch.wd, &file, watch.mask).about(1, object())?;
        if wd != watch.wd {
            let why = format!("it is the same file as another watched one now (watch {wd})");
            return Err(Error::unsupported(
                1,
                object(),
                why,
                "restore with the files of the checkpoint",
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_fdinfo() {
        let line = "inotify wd:1f ino:98c001 sdev:fe00003 mask:84000100 ignored_mask:0 fhandle-bytes:8 \
                    fhandle-type:1 f_handle:01c09800b8b8bc9b";
        let expected = Line {
            wd: 31,
            ino: 0x98_c001,
            dev: (254, 3),
            mask: 0x8400_0100,
            handle: Some((1, vec![1, 0xc0, 0x98, 0, 0xb8, 0xb8, 0xbc, 0x9b])),
        };
        assert_eq!(parse(line), Some(expected));
    }
}
