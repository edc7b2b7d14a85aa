//! Memory of files is charged to the control group of who writes them. So whoever writes into a container's tmpfs
//! joins its group for that time: its limit holds for what an image brings, and its files are counted when they go.

use std::fs;
use std::path::PathBuf;

use torpor_sys::Pid;
use torpor_sys::proc::{self, CgroupEntry, Mount};

/// A stay in the memory control group of a container; dropping it ends it.
pub(super) struct Guest {
    /// Where we were; `None` when there was nothing to join.
    home: Option<PathBuf>,
}

impl Guest {
    /// Joins the group of `init`. Where there is none, or it cannot be joined, memory is not counted by group.
    pub(super) fn of(init: Pid) -> Guest {
        let me = std::process::id() as Pid;
        let place = |pid| group(&proc::mountinfo(me).ok()?, &proc::cgroup(pid).ok()?);
        let (Some(home), Some(group)) = (place(me), place(init)) else {
            return Guest { home: None };
        };
        let counts = ["memory.usage_in_bytes", "memory.current"]
            .iter()
            .any(|f| group.join(f).exists());
        let joined = counts && home != group && enter(&group);
        Guest {
            home: joined.then_some(home),
        }
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        if let Some(home) = &self.home {
            enter(home);
        }
    }
}

fn enter(group: &std::path::Path) -> bool {
    fs::write(group.join("cgroup.procs"), "0").is_ok()
}

/// The directory of the group that counts memory: of the v1 hierarchy if there is one.
fn group(mounts: &[Mount], entries: &[CgroupEntry]) -> Option<PathBuf> {
    let v1 = entries.iter().find(|e| e.controllers.iter().any(|c| c == "memory"));
    let entry = v1.or_else(|| entries.iter().find(|e| e.controllers.is_empty()))?;
    let fits = |m: &&Mount| match v1 {
        Some(_) => m.fs_type == "cgroup" && m.super_options.split(',').any(|o| o == "memory"),
        None => m.fs_type == "cgroup2",
    };
    let mount = mounts.iter().find(fits)?;
    let below = entry.path.strip_prefix(mount.root.trim_end_matches('/'))?;
    if !below.starts_with('/') {
        return None;
    }
    Some(PathBuf::from(&mount.point).join(below.trim_start_matches('/')))
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    #[test]
    fn the_group_that_counts_memory() {
        let mounts = "\
30 1 0:30 / /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory
31 1 0:31 /pod /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw
";
        let mounts = proc::parse_mountinfo(mounts).unwrap();
        let of = |text: &str| group(&mounts, &proc::parse_cgroup(text).unwrap());
        assert_eq!(of("4:memory:/a/b\n0::/c\n"), Some("/sys/fs/cgroup/memory/a/b".into()));
        assert_eq!(of("1:cpu:/a\n0::/pod/c\n"), Some("/sys/fs/cgroup/unified/c".into()));
        assert_eq!(of("0::/elsewhere\n"), None);
        assert_eq!(of("0::/pods/c\n"), None);
    }
}
