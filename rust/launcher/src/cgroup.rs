//! The container's cgroup: its name, the processes in it, and its end.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::io::ErrorKind;
use std::path::{Component, Path, PathBuf};
use std::thread::sleep;
use std::time::{Duration, Instant};

use libcgroups::common::{
    AnyCgroupManager, CgroupConfig, CgroupManager, CgroupSetup, DEFAULT_CGROUP_ROOT, FreezerState,
    create_cgroup_manager, get_cgroup_setup,
};
use libcgroups::v1::util::list_subsystem_mount_points;
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::error::{Error, one_line};
use crate::layout::Layout;

/// How long killed processes may take to die (a core dump, a slow disk) before we give up and say so.
const DEATH_TIMEOUT: Duration = Duration::from_secs(10);
const FIRST_PAUSE: Duration = Duration::from_micros(200);
const LONGEST_PAUSE: Duration = Duration::from_millis(20);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cgroup {
    pub path: PathBuf,
    pub systemd: bool,
    id: String,
}

impl Cgroup {
    /// The cgroup the spec names, or one of our own. By the driver `systemd` a name is `slice:prefix:name`. On cgroup v1,
    /// where libcontainer has no such driver, its cgroup is made where systemd would have made it, and `systemd` is false.
    pub fn choose(given: Option<&Path>, systemd: bool, layout: &Layout) -> Result<Self, Error> {
        let path = match given.filter(|path| !path.as_os_str().is_empty()) {
            Some(path) => path.to_owned(),
            None => default_path(systemd, layout),
        };
        let named = systemd && path.is_relative();
        let directory = if named { scope_directory(&path)? } else { path.clone() };
        check(&directory)?;
        if named && unified() {
            return Ok(Self::at(path, true, layout.id()));
        }
        Ok(Self::at(directory, false, layout.id()))
    }

    pub fn at(path: PathBuf, systemd: bool, id: &str) -> Self {
        Self {
            path,
            systemd,
            id: id.to_owned(),
        }
    }

    fn manager(&self) -> Result<AnyCgroupManager, Error> {
        create_cgroup_manager(CgroupConfig {
            cgroup_path: self.path.clone(),
            systemd_cgroup: self.systemd,
            container_name: self.id.clone(),
        })
        .map_err(|error| Error::Container(format!("cgroup {:?}: {}", self.path, one_line(&error))))
    }

    /// Refuses a cgroup with processes in it: `delete` kills all it finds there.
    pub fn check_unused(&self) -> Result<(), Error> {
        let processes = processes(&self.manager()?).len();
        if processes == 0 {
            return Ok(());
        }
        Err(Error::CgroupInUse {
            path: self.path.clone(),
            processes,
        })
    }

    /// Kills every process in the cgroup and waits until they are gone. A frozen one cannot die, so it is thawed.
    pub fn kill(&self) -> Result<(), Error> {
        let manager = self.manager()?;
        let deadline = Instant::now() + DEATH_TIMEOUT;
        let mut pause = FIRST_PAUSE;
        loop {
            let pids = processes(&manager);
            if pids.is_empty() {
                return Ok(());
            }
            // Number 0 is a process of a pid namespace we cannot see into; kill(0) would kill ourselves.
            for pid in pids.iter().filter(|pid| pid.as_raw() > 0) {
                let _ = kill(*pid, Signal::SIGKILL);
            }
            let _ = manager.freeze(FreezerState::Thawed);
            if Instant::now() > deadline {
                return Err(Error::Container(format!(
                    "{} killed process(es) do not die, the first is {}",
                    pids.len(),
                    pids[0]
                )));
            }
            sleep(pause);
            pause = (pause * 2).min(LONGEST_PAUSE);
        }
    }

    /// A process that joined it now would not run, nor would whoever waits for it.
    pub fn is_frozen(&self) -> bool {
        let says = |directory: &Path, file: &str, thawed: &str| {
            fs::read_to_string(directory.join(file)).is_ok_and(|state| state.trim() != thawed)
        };
        self.directories()
            .iter()
            .any(|directory| says(directory, "freezer.state", "THAWED") || says(directory, "cgroup.freeze", "0"))
    }

    /// Removes the cgroup from every hierarchy, with those made inside the container.
    pub fn remove(&self) -> Result<(), Error> {
        for directory in self.directories() {
            remove_tree(&directory, Instant::now() + DEATH_TIMEOUT)?;
        }
        Ok(())
    }

    /// Tells systemd that its scope is over; without systemd there is nothing left to do after `remove`.
    pub fn release(&self) -> Result<(), Error> {
        self.manager()?
            .remove()
            .map_err(|error| Error::Container(format!("cgroup {:?}: {}", self.path, one_line(&error))))
    }

    fn directories(&self) -> Vec<PathBuf> {
        let path = match self.systemd {
            true => scope_directory(&self.path).unwrap_or_default(),
            false => self.path.clone(),
        };
        let relative = path.strip_prefix("/").unwrap_or(&path);
        mount_points()
            .into_iter()
            .map(|mount| mount.join(relative))
            .filter(|directory| directory.is_dir())
            .collect()
    }
}

fn mount_points() -> Vec<PathBuf> {
    let root = PathBuf::from(DEFAULT_CGROUP_ROOT);
    match get_cgroup_setup() {
        Ok(CgroupSetup::Unified) => vec![root],
        _ => {
            let mut mounts = list_subsystem_mount_points().unwrap_or_default();
            mounts.push(root.join("unified"));
            mounts
        }
    }
}

fn processes(manager: &AnyCgroupManager) -> Vec<Pid> {
    // An error is a cgroup that does not exist (any more).
    manager.get_all_pids().unwrap_or_default()
}

/// One directory name per state directory, as two of them may hold the same id; and no common parent, which could not be
/// removed without disturbing a container that is created at that moment.
fn default_path(systemd: bool, layout: &Layout) -> PathBuf {
    let mut hasher = DefaultHasher::new();
    layout.root().hash(&mut hasher);
    let id = layout.id();
    let unique = hasher.finish() as u32;
    if systemd {
        return PathBuf::from(format!(":torpor:{id}-{unique:08x}"));
    }
    PathBuf::from(format!("/torpor-{id}-{unique:08x}"))
}

/// Where systemd keeps the scope that is called `slice:prefix:name`: `a-b.slice` lies in `a.slice` (systemd.slice(5)).
fn scope_directory(name: &Path) -> Result<PathBuf, Error> {
    let refuse = || {
        Error::BadSpec(format!(
            "linux.cgroupsPath {name:?} is not slice:prefix:name, as systemd needs it"
        ))
    };
    let text = name.to_str().filter(|text| !text.contains('/')).ok_or_else(refuse)?;
    let (slice, prefix, scope) = match text.split(':').collect::<Vec<_>>()[..] {
        [slice, prefix, scope] if !scope.is_empty() => (slice, prefix, scope),
        _ => return Err(refuse()),
    };
    let slice = if slice.is_empty() { "system.slice" } else { slice };
    let stem = slice.strip_suffix(".slice").ok_or_else(refuse)?;
    let mut directory = PathBuf::from("/");
    // `-.slice` is the root.
    if stem != "-" {
        let mut parent = String::new();
        for part in stem.split('-') {
            if part.is_empty() {
                return Err(refuse());
            }
            directory.push(format!("{parent}{part}.slice"));
            parent = format!("{parent}{part}-");
        }
    }
    if scope.ends_with(".slice") {
        return Ok(directory.join(scope));
    }
    Ok(directory.join(format!("{prefix}-{scope}.scope")))
}

fn unified() -> bool {
    matches!(get_cgroup_setup(), Ok(CgroupSetup::Unified))
}

/// A path that leads out, or to a cgroup that others live in: ours, or one above it.
fn check(path: &Path) -> Result<(), Error> {
    let refuse = |why| Err(Error::BadSpec(format!("linux.cgroupsPath {path:?} {why}")));
    if path.components().any(|part| part == Component::ParentDir) {
        return refuse("contains ..");
    }
    let relative: PathBuf = path
        .components()
        .filter(|part| matches!(part, Component::Normal(_)))
        .collect();
    if relative.as_os_str().is_empty() {
        return refuse("is the root cgroup");
    }
    let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
    let inside = own
        .lines()
        .filter_map(|line| line.splitn(3, ':').nth(2))
        .any(|own| Path::new(own.trim_start_matches('/')).starts_with(&relative));
    if inside {
        return refuse("holds the process that creates the container");
    }
    Ok(())
}

/// Depth first. A directory stays busy for a moment after its last process has died.
fn remove_tree(directory: &Path, deadline: Instant) -> Result<(), Error> {
    let entries = fs::read_dir(directory).into_iter().flatten().flatten();
    for entry in entries.filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
        remove_tree(&entry.path(), deadline)?;
    }
    let mut pause = FIRST_PAUSE;
    loop {
        match fs::remove_dir(directory) {
            Ok(()) => return Ok(()),
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(()),
            Err(error) if Instant::now() > deadline || error.kind() != ErrorKind::ResourceBusy => {
                return Err(Error::io("remove cgroup", directory)(error));
            }
            Err(_) => sleep(pause),
        }
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::{check, default_path, scope_directory};
    use crate::layout::Layout;

    #[test]
    fn cgroups_of_others_are_refused() {
        for path in ["/", "/..", "/a/../..", "//"] {
            assert!(check(Path::new(path)).is_err(), "{path}");
        }
        assert!(check(Path::new("/docker/0123")).is_ok());
    }

    #[test]
    fn scopes_are_where_systemd_has_them() -> Result<(), crate::error::Error> {
        for (name, directory) in [
            (":torpor:one", "/system.slice/torpor-one.scope"),
            ("machine.slice:libpod:one", "/machine.slice/libpod-one.scope"),
            (
                "a-b-c.slice:cri-containerd:one",
                "/a.slice/a-b.slice/a-b-c.slice/cri-containerd-one.scope",
            ),
            ("-.slice:x:one", "/x-one.scope"),
            ("a.slice:x:b.slice", "/a.slice/b.slice"),
        ] {
            assert_eq!(scope_directory(Path::new(name))?, Path::new(directory), "{name}");
        }
        for name in [
            "one",
            "a:b",
            "a:b:c",
            "a--b.slice:x:c",
            "../a.slice:x:c",
            "a.slice:x:",
            "a.slice:x:y:z",
        ] {
            assert!(scope_directory(Path::new(name)).is_err(), "{name}");
        }
        Ok(())
    }

    #[test]
    fn the_same_id_below_another_root_gets_another_cgroup() -> Result<(), crate::error::Error> {
        let one = Layout::new(Path::new("/run/one"), "c")?;
        let two = Layout::new(Path::new("/run/two"), "c")?;
        assert_ne!(default_path(false, &one), default_path(false, &two));
        Ok(())
    }
}
