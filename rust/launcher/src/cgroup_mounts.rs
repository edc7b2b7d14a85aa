//! What libcontainer leaves undone for cgroup v1 inside the container.
//!
//! It mounts every hierarchy of the host into the container, but read-write whatever the spec says, and those that it
//! does not manage (systemd's own) from the host's root, because it puts no process of the container into them.

use std::fs::{self, File};
use std::mem;
use std::os::fd::AsFd;
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use libcgroups::common::{CgroupSetup, get_cgroup_setup};
use libcgroups::v1::ControllerType;
use libcgroups::v1::util::list_subsystem_mount_points;
use libcontainer::oci_spec::runtime::{Mount, Spec};
use libcontainer::syscall::Syscall;
use libcontainer::syscall::linux::{
    AT_EMPTY_PATH, AT_RECURSIVE, MOUNT_ATTR_NODEV, MOUNT_ATTR_NOEXEC, MOUNT_ATTR_NOSUID, MOUNT_ATTR_RDONLY, MountAttr,
};

use crate::causes::lower;
use crate::error::reason;
use crate::program::Failure;

const MANAGED: [ControllerType; 12] = [
    ControllerType::Cpu,
    ControllerType::CpuAcct,
    ControllerType::CpuSet,
    ControllerType::Devices,
    ControllerType::HugeTlb,
    ControllerType::Pids,
    ControllerType::PerfEvent,
    ControllerType::Memory,
    ControllerType::Blkio,
    ControllerType::NetworkPriority,
    ControllerType::NetworkClassifier,
    ControllerType::Freezer,
];

/// This process as a member of the container's cgroup in the hierarchies libcontainer does not manage, so that the
/// processes it forks are; it goes home when dropped.
#[derive(Debug, Default)]
pub struct Guest {
    homes: Vec<PathBuf>,
}

impl Guest {
    pub fn of(cgroup: &Path) -> Self {
        let mut guest = Self::default();
        if !matches!(get_cgroup_setup(), Ok(CgroupSetup::Legacy | CgroupSetup::Hybrid)) {
            return guest;
        }
        let own = fs::read_to_string("/proc/self/cgroup").unwrap_or_default();
        for mount in list_subsystem_mount_points().unwrap_or_default() {
            let Some(home) = home(&mount, &own) else {
                continue;
            };
            let away = mount.join(cgroup.strip_prefix("/").unwrap_or(cgroup));
            // Where it may not be had, the container is still built, as libcontainer would do it.
            if fs::create_dir_all(&away).is_ok() && enter(&away).is_ok() {
                guest.homes.push(home);
            }
        }
        guest
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        for home in &self.homes {
            let _ = enter(home);
        }
    }
}

fn enter(directory: &Path) -> std::io::Result<()> {
    fs::write(directory.join("cgroup.procs"), "0")
}

/// Where this process is in the hierarchy mounted at `mount`, if libcontainer does not manage it.
fn home(mount: &Path, own: &str) -> Option<PathBuf> {
    let name = mount.file_name()?.to_str()?;
    let managed = |part: &str| MANAGED.iter().any(|controller| controller.as_ref() == part);
    if name.split(',').any(managed) {
        return None;
    }
    own.lines().find_map(|line| {
        let mut fields = line.splitn(3, ':').skip(1);
        let controllers = fields.next()?;
        let path = fields.next()?;
        let matches = controllers == name || controllers.strip_prefix("name=") == Some(name);
        matches.then(|| mount.join(path.trim_start_matches('/')))
    })
}

/// A cgroup mount of the spec, and the options it must have.
#[derive(Debug, Clone)]
pub struct Restricted {
    destination: PathBuf,
    attributes: u64,
}

/// The cgroup mounts whose options libcontainer forgets.
pub fn restricted(spec: &Spec) -> Vec<Restricted> {
    if !matches!(get_cgroup_setup(), Ok(CgroupSetup::Legacy | CgroupSetup::Hybrid)) {
        return Vec::new();
    }
    spec.mounts()
        .iter()
        .flatten()
        .filter(|mount| mount.typ().as_deref() == Some("cgroup"))
        .map(|mount| Restricted {
            destination: mount.destination().clone(),
            attributes: attributes(mount),
        })
        .collect()
}

fn attributes(mount: &Mount) -> u64 {
    mount
        .options()
        .iter()
        .flatten()
        .map(|option| match option.as_str() {
            "ro" => MOUNT_ATTR_RDONLY,
            "nosuid" => MOUNT_ATTR_NOSUID,
            "nodev" => MOUNT_ATTR_NODEV,
            "noexec" => MOUNT_ATTR_NOEXEC,
            _ => 0,
        })
        .fold(0, |all, one| all | one)
}

impl Restricted {
    /// In the container, once its root is mounted.
    pub fn apply(&self, syscall: &dyn Syscall) -> Result<(), Failure> {
        let failed = |why: String| format!("cgroup mount {}: {why}", self.destination.display());
        let place = File::options()
            .read(true)
            .custom_flags(libc::O_PATH | libc::O_CLOEXEC)
            .open(&self.destination)
            .map_err(|error| failed(reason(&error)))?;
        let attributes = MountAttr {
            attr_set: self.attributes,
            attr_clr: 0,
            propagation: 0,
            userns_fd: 0,
        };
        syscall
            .mount_setattr(
                place.as_fd(),
                Path::new(""),
                AT_EMPTY_PATH | AT_RECURSIVE,
                &attributes,
                mem::size_of::<MountAttr>(),
            )
            .map_err(|error| failed(lower(&error.to_string())))
    }
}

#[cfg(test)]
mod tests {
    use std::path::{Path, PathBuf};

    use super::home;

    #[test]
    fn only_unmanaged_hierarchies_are_visited() {
        let own = "9:name=systemd:/user.slice\n4:memory:/a\n2:cpu,cpuacct:/b\n0::/\n";
        let at = |mount: &str| home(Path::new(mount), own);
        assert_eq!(at("/sys/fs/cgroup/memory"), None);
        assert_eq!(at("/sys/fs/cgroup/cpu,cpuacct"), None);
        assert_eq!(
            at("/sys/fs/cgroup/systemd"),
            Some(PathBuf::from("/sys/fs/cgroup/systemd/user.slice"))
        );
    }
}
