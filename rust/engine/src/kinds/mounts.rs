//! Where what is mounted in a container. Mounts are not carried: the new container makes its own, and must have every
//! one that the image's programs may rely on.

use std::collections::BTreeSet;
use std::os::fd::{AsRawFd, OwnedFd};

use serde::{Deserialize, Serialize};
use torpor_sys::proc::{self, Mount};
use torpor_sys::{Pid, fd, tree};

use crate::error::{About, Error, Result};

/// One mount point, as the container's init sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Its path.
    pub point: String,
    /// What /proc calls the type of the file system.
    #[serde(rename = "type")]
    pub fs_type: String,
    /// It shows files that are also mounted outside: the root, a volume, a device.
    #[serde(default)]
    pub bind: bool,
    /// It can be written to.
    #[serde(default)]
    pub writable: bool,
    /// It only hides or protects what is there anyway: a masked or read-only path of the spec.
    #[serde(default)]
    pub mask: bool,
}

/// What runtimes make from what they find on the machine: hidden and read-only parts of /proc and /sys, cgroups.
const BELOW: [&str; 2] = ["/proc/", "/sys/"];

/// What runtimes write for each container anew and mount over the file of the image.
const IDENTITY: [&str; 3] = ["/etc/hosts", "/etc/hostname", "/etc/resolv.conf"];

/// What is mounted in a container at one moment.
#[derive(Debug)]
pub struct Table {
    init: Pid,
    root: OwnedFd,
    mounts: Vec<Mount>,
    /// In the same order.
    states: Vec<State>,
}

impl Table {
    /// The mounts that the process `init` sees.
    pub fn of(init: Pid) -> Result<Table> {
        let me = std::process::id() as Pid;
        let ours = proc::mountinfo(me).about(me, "own mounts")?;
        let mounts = proc::mountinfo(init).about(init, "mounts")?;
        Ok(Table {
            init,
            root: fd::open(&format!("/proc/{init}/root"), libc::O_PATH | libc::O_DIRECTORY).about(init, "root")?,
            states: from(&mounts, &ours.iter().map(|m| m.dev).collect()),
            mounts,
        })
    }

    /// The mount points; of several mounts at one point the one that is seen.
    pub fn seen(&self) -> Vec<State> {
        seen(&self.states)
    }

    /// What is seen at a point, with its mount options.
    pub fn at(&self, point: &str) -> Option<(&State, &str)> {
        let at = self.states.iter().rposition(|m| m.point == point)?;
        Some((&self.states[at], &self.mounts[at].options))
    }

    /// Where files in memory are under another mount at the same point.
    pub fn hidden(&self) -> Vec<&str> {
        let is_seen = |at: usize| self.states[at + 1..].iter().all(|m| m.point != self.states[at].point);
        let hidden = (0..self.states.len()).filter(|at| self.states[*at].is_memory() && !is_seen(*at));
        hidden.map(|at| self.states[at].point.as_str()).collect()
    }

    /// The directory mounted at a point; `None` when something else hides it.
    pub fn open(&self, point: &str) -> Result<Option<OwnedFd>> {
        const GONE: [i32; 3] = [libc::ENOENT, libc::ENOTDIR, libc::ELOOP];
        let flags = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOATIME;
        let found = match tree::open_mount(&self.root, point, flags) {
            Ok(found) => found,
            Err(e) if e.errno().is_some_and(|e| GONE.contains(&(e as i32))) => return Ok(None),
            Err(e) => return Err(e).about(self.init, format!("mount {point}")),
        };
        let me = std::process::id() as Pid;
        let id = proc::fdinfo(me, found.as_raw_fd()).about(self.init, point)?.mnt_id;
        let is_it = self.mounts.iter().any(|m| m.id == id && m.point == point);
        Ok(is_it.then_some(found))
    }

    /// # Errors
    /// Refused: files of huge pages, which no image holds.
    pub fn check(&self) -> Result<()> {
        for mount in self.states.iter().filter(|m| m.fs_type == "hugetlbfs" && !m.bind) {
            let directory = self.open(&mount.point)?;
            if directory.is_some_and(|d| tree::names(&d).next().is_some()) {
                let object = format!("files in {} (hugetlbfs)", mount.point);
                let why = "files of huge pages are not carried yet";
                let remedy = "remove them before the checkpoint";
                return Err(Error::unsupported(self.init, object, why, remedy));
            }
        }
        Ok(())
    }
}

fn seen(all: &[State]) -> Vec<State> {
    let mut seen: Vec<State> = Vec::new();
    for mount in all {
        seen.retain(|m| m.point != mount.point);
        seen.push(mount.clone());
    }
    seen
}

fn from(mounts: &[Mount], ours: &BTreeSet<(u32, u32)>) -> Vec<State> {
    let root = mounts.iter().rfind(|m| m.point == "/");
    let state = |mount: &Mount| State {
        point: mount.point.clone(),
        fs_type: mount.fs_type.clone(),
        bind: is_bind(mount, ours),
        writable: is_writable(mount),
        mask: is_mask(mount, root),
    };
    mounts.iter().map(state).collect()
}

/// Runtimes hide a directory under an empty read-only tmpfs and a file under /dev/null, and protect a path by mounting
/// it on itself.
fn is_mask(mount: &Mount, root: Option<&Mount>) -> bool {
    let hides_directory = mount.fs_type == "tmpfs" && mount.root == "/" && !is_writable(mount);
    let hides_file = mount.root == "/null" && ["tmpfs", "devtmpfs"].contains(&mount.fs_type.as_str());
    let protects = root.is_some_and(|r| r.dev == mount.dev && below(&r.root, &mount.point) == mount.root);
    hides_directory || hides_file || protects
}

fn below(root: &str, path: &str) -> String {
    format!("{}{path}", root.trim_end_matches('/'))
}

/// Whether a mount shows what somebody else has too. A file system that the container made for itself is mounted
/// whole, and nowhere outside; `ours` are the file systems that are mounted where we are.
fn is_bind(mount: &Mount, ours: &BTreeSet<(u32, u32)>) -> bool {
    mount.root != "/" || ours.contains(&mount.dev)
}

/// Neither this mount nor its file system is read-only.
fn is_writable(mount: &Mount) -> bool {
    let read_only = |options: &str| options.split(',').any(|o| o == "ro");
    !read_only(&mount.options) && !read_only(&mount.super_options)
}

impl State {
    /// Whether the container's programs may rely on it. Not so for what the runtime adds by itself, which differs
    /// between machines and runtimes.
    fn is_needed(&self) -> bool {
        let runtimes = self.is_kernels()
            || (self.point.starts_with("/dev/") && (self.bind || self.point == "/dev/console"))
            || (self.bind && IDENTITY.contains(&self.point.as_str()));
        self.point != "/" && !self.mask && !runtimes
    }

    fn is_kernels(&self) -> bool {
        BELOW.iter().any(|b| self.point.starts_with(b))
    }

    /// Whether it is a file system in memory whose files are the container's own.
    pub fn is_memory(&self) -> bool {
        is_memory(&self.fs_type) && !self.bind && self.writable && self.point != "/" && !self.is_kernels()
    }

    /// Whether `now` can stand for it. What comes from outside may come from any file system.
    fn is_like(&self, now: &State) -> bool {
        if self.is_memory() {
            return now.is_memory();
        }
        self.bind || class(&self.fs_type) == class(&now.fs_type)
    }
}

/// Whether files of this type of file system are in memory only.
pub fn is_memory(fs_type: &str) -> bool {
    class(fs_type) == "tmpfs"
}

fn class(fs_type: &str) -> &str {
    match fs_type {
        "cgroup" | "cgroup2" => "cgroup",
        "tmpfs" | "ramfs" => "tmpfs",
        other => other,
    }
}

/// # Errors
/// The first mount of the image that the new container `init` has nothing for.
pub fn plan(image: &[State], init: Pid) -> Result<()> {
    compare(image, &Table::of(init)?.seen())
}

fn compare(image: &[State], here: &[State]) -> Result<()> {
    for mount in image.iter().filter(|m| m.is_needed()) {
        let now = here.iter().find(|m| m.point == mount.point);
        if now.is_some_and(|now| mount.is_like(now)) {
            continue;
        }
        let kind = |m: &State| match (m.bind, m.is_memory()) {
            (true, _) => format!("a mount of files from outside ({})", m.fs_type),
            (false, true) => format!("a writable {} of its own", m.fs_type),
            (false, false) => m.fs_type.clone(),
        };
        let has = now.map_or("nothing".into(), kind);
        let why = format!(
            "the image was made with {} there, the new container has {has}",
            kind(mount)
        );
        return Err(Error::unsupported(
            1,
            format!("mount {}", mount.point),
            why,
            "give the new container that mount",
        ));
    }
    Ok(())
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Vec<State> {
        seen(&from(
            &proc::parse_mountinfo(text).unwrap(),
            &BTreeSet::from([(0, 5), (8, 1)]),
        ))
    }

    const DOCKER: &str = "\
10 1 0:40 / / rw - overlay overlay rw
11 10 0:41 / /proc rw - proc proc rw
12 10 0:42 / /dev rw,nosuid - tmpfs tmpfs rw,size=65536k
13 12 0:43 / /dev/pts rw - devpts devpts rw
14 10 0:44 / /sys ro - sysfs sysfs ro
15 14 0:45 / /sys/fs/cgroup rw - tmpfs tmpfs rw
16 12 0:46 / /dev/shm rw - tmpfs shm rw
17 10 8:1 /var/lib/docker/c/resolv.conf /etc/resolv.conf rw - ext4 /dev/vda1 rw
18 10 8:1 /srv /srv rw - ext4 /dev/vda1 rw
19 11 0:47 / /proc/acpi ro - tmpfs tmpfs ro
20 12 0:43 /0 /dev/console rw - devpts devpts rw
21 10 0:40 /etc/keys /etc/keys ro - overlay overlay rw
22 10 0:48 / /root/secret ro - tmpfs tmpfs rw
23 10 0:42 /null /etc/shadow rw - tmpfs tmpfs rw,size=65536k
";

    #[test]
    fn what_a_runtime_adds_is_not_missed() {
        let image = parse(DOCKER);
        let without = |points: &[&str]| {
            let rest: Vec<State> = image
                .iter()
                .filter(|m| !points.contains(&m.point.as_str()))
                .cloned()
                .collect();
            compare(&image, &rest)
        };
        without(&[]).unwrap();
        without(&["/", "/proc/acpi", "/dev/console", "/sys/fs/cgroup", "/etc/resolv.conf"]).unwrap();
        without(&["/etc/keys", "/root/secret", "/etc/shadow"]).unwrap();
        let memory: Vec<&str> = image
            .iter()
            .filter(|m| m.is_memory())
            .map(|m| m.point.as_str())
            .collect();
        assert_eq!(memory, ["/dev", "/dev/shm"]);
        for needed in ["/proc", "/dev", "/dev/pts", "/dev/shm", "/sys", "/srv"] {
            let refused = without(&[needed]).unwrap_err();
            assert_eq!(
                (refused.code(), refused.object()),
                ("unsupported", Some(format!("mount {needed}").as_str()))
            );
        }
    }

    #[test]
    fn a_volume_may_be_of_any_type_and_a_tmpfs_must_be_its_own() {
        let image = parse("18 10 8:1 /srv /srv rw - ext4 a rw\n12 10 0:42 / /run rw - tmpfs tmpfs rw\n");
        let run = |line: &str| compare(&image, &parse(&format!("18 10 0:60 / /srv rw - nfs a rw\n{line}\n")));
        run("12 10 0:77 / /run rw - tmpfs tmpfs rw").unwrap();
        for other in [
            "0:5 / /run rw - tmpfs tmpfs rw",
            "0:77 / /run ro - tmpfs tmpfs rw",
            "8:1 /x /run rw - ext4 a rw",
        ] {
            assert!(
                run(&format!("12 10 {other}"))
                    .unwrap_err()
                    .to_string()
                    .contains("mount /run"),
                "{other}"
            );
        }
    }

    #[test]
    fn the_last_mount_at_a_point_is_the_one_that_is_seen() {
        let seen = parse("12 10 0:42 / /run rw - tmpfs a rw\n13 12 8:1 /x /run rw - ext4 b rw\n");
        assert_eq!((seen.len(), seen[0].fs_type.as_str(), seen[0].bind), (1, "ext4", true));
    }
}
