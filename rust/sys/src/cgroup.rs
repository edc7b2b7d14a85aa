//! The cgroup freezer, v1 (`freezer.state`) and v2 (`cgroup.freeze`).

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use crate::error::{Error, Result};
use crate::{Pid, proc, wait};

/// Whether the groups that `pid` is in have groups of their own; true also where that cannot be seen.
pub fn has_groups_below(pid: Pid) -> Result<bool> {
    let mounts = proc::mountinfo(std::process::id() as Pid)?;
    let has_controllers = |mount: &proc::Mount, entry: &proc::CgroupEntry| {
        let options: Vec<&str> = mount.super_options.split(',').collect();
        entry.controllers.iter().all(|c| options.contains(&c.as_str()))
    };
    let is_of = |mount: &proc::Mount, entry: &proc::CgroupEntry| match entry.controllers.is_empty() {
        true => mount.fs_type == "cgroup2",
        false => mount.fs_type == "cgroup" && has_controllers(mount, entry),
    };
    for entry in proc::cgroup(pid)?.iter().filter(|e| e.path != "/") {
        let Some(mount) = mounts.iter().find(|m| is_of(m, entry)) else {
            return Ok(true);
        };
        let dir = Path::new(&mount.point).join(entry.path.trim_start_matches('/'));
        let Ok(mut inside) = fs::read_dir(dir) else {
            return Ok(true);
        };
        if inside.any(|e| e.is_ok_and(|e| e.file_type().is_ok_and(|t| t.is_dir()))) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// The freezer of a container's cgroup.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Freezer {
    dir: PathBuf,
    v2: bool,
}

fn mount_of(mounts: &[proc::Mount], v2: bool) -> Option<PathBuf> {
    let fits = |m: &&proc::Mount| {
        if v2 {
            m.fs_type == "cgroup2"
        } else {
            m.fs_type == "cgroup" && m.super_options.split(',').any(|o| o == "freezer")
        }
    };
    mounts.iter().find(fits).map(|m| m.point.clone().into())
}

impl Freezer {
    /// The freezer of the cgroup that `pid` is in; `None` when that group is a root, or also ours: freezing it
    /// would freeze others.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn of(pid: Pid) -> Result<Option<Freezer>> {
        let mounts = proc::mountinfo(std::process::id() as Pid)?;
        let own = proc::cgroup(std::process::id() as Pid)?;
        let theirs = proc::cgroup(pid)?;
        for v2 in [false, true] {
            let fits = |e: &&proc::CgroupEntry| {
                if v2 {
                    e.controllers.is_empty()
                } else {
                    e.controllers.iter().any(|c| c == "freezer")
                }
            };
            let (Some(entry), Some(root)) = (theirs.iter().find(fits), mount_of(&mounts, v2)) else {
                continue;
            };
            let is_ours = own.iter().find(fits).is_some_and(|o| within(&o.path, &entry.path));
            if entry.path == "/" || is_ours {
                continue;
            }
            let dir = root.join(entry.path.trim_start_matches('/'));
            if dir.join(if v2 { "cgroup.freeze" } else { "freezer.state" }).exists() {
                return Ok(Some(Freezer { dir, v2 }));
            }
        }
        Ok(None)
    }

    /// A freezer at a known place, for tests.
    pub fn at(dir: &Path, v2: bool) -> Freezer {
        Freezer { dir: dir.into(), v2 }
    }

    /// The cgroup's directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn write(&self, name: &str, text: &str) -> Result<()> {
        let path = self.dir.join(name);
        fs::write(&path, text).map_err(|e| Error::io("write", path.display(), &e))
    }

    fn read(&self, name: &str) -> Result<String> {
        let path = self.dir.join(name);
        fs::read_to_string(&path).map_err(|e| Error::io("read", path.display(), &e))
    }

    /// True when somebody asked for the group to be frozen.
    pub fn is_frozen(&self) -> Result<bool> {
        if self.v2 {
            Ok(self.read("cgroup.freeze")?.trim() == "1")
        } else {
            Ok(self.read("freezer.state")?.trim() != "THAWED")
        }
    }

    /// Freezes and waits until every task is frozen.
    ///
    /// # Errors
    /// [`Error::Timeout`] after `limit`; the group is thawed again then.
    pub fn freeze(&self, limit: Duration) -> Result<()> {
        let end = Instant::now() + limit;
        self.write(
            if self.v2 { "cgroup.freeze" } else { "freezer.state" },
            if self.v2 { "1" } else { "FROZEN" },
        )?;
        let mut pause = Duration::from_micros(50);
        while !self.is_settled()? {
            if Instant::now() > end {
                let stuck = self.stuck();
                self.thaw()?;
                return Err(stuck);
            }
            std::thread::sleep(pause);
            pause = (pause * 2).min(Duration::from_millis(5));
            if !self.v2 {
                // A v1 group that a task joined while it froze settles only when told again.
                self.write("freezer.state", "FROZEN")?;
            }
        }
        Ok(())
    }

    /// True when every task of the group is frozen.
    pub fn is_settled(&self) -> Result<bool> {
        if self.v2 {
            Ok(self.read("cgroup.events")?.lines().any(|l| l == "frozen 1"))
        } else {
            Ok(self.read("freezer.state")?.trim() == "FROZEN")
        }
    }

    fn stuck(&self) -> Error {
        let pids = self.pids().unwrap_or_default();
        let state = |pid: &Pid| proc::stat(*pid).map(|s| s.state).unwrap_or('?');
        let pid = pids
            .iter()
            .copied()
            .find(|p| state(p) == 'D')
            .or(pids.first().copied())
            .unwrap_or(0);
        wait::timeout(pid, Duration::from_secs(10))
    }

    /// Asks for the group to be frozen without waiting: its tasks freeze when their tracer lets them go.
    pub fn pause_later(&self) -> Result<()> {
        self.write(
            if self.v2 { "cgroup.freeze" } else { "freezer.state" },
            if self.v2 { "1" } else { "FROZEN" },
        )
    }

    /// Lets the group run.
    pub fn thaw(&self) -> Result<()> {
        self.write(
            if self.v2 { "cgroup.freeze" } else { "freezer.state" },
            if self.v2 { "0" } else { "THAWED" },
        )
    }

    /// The processes of the group and of the groups below it.
    pub fn pids(&self) -> Result<Vec<Pid>> {
        let mut all = Vec::new();
        collect_pids(&self.dir, &mut all)?;
        all.sort_unstable();
        all.dedup();
        Ok(all)
    }
}

fn collect_pids(dir: &Path, all: &mut Vec<Pid>) -> Result<()> {
    let path = dir.join("cgroup.procs");
    let text = fs::read_to_string(&path).map_err(|e| Error::io("read", path.display(), &e))?;
    all.extend(
        text.lines()
            .filter_map(|l| l.trim().parse::<Pid>().ok())
            .filter(|p| *p != 0),
    );
    for entry in fs::read_dir(dir)
        .map_err(|e| Error::io("open", dir.display(), &e))?
        .flatten()
    {
        if entry.file_type().is_ok_and(|t| t.is_dir()) {
            collect_pids(&entry.path(), all)?;
        }
    }
    Ok(())
}

fn within(path: &str, group: &str) -> bool {
    path == group || path.strip_prefix(group).is_some_and(|rest| rest.starts_with('/'))
}
