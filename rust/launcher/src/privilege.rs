//! Turns the all-powerful init process into the user that the spec asks for.
//!
//! Order matters: a filter can only be loaded with CAP_SYS_ADMIN or no_new_privs; groups must change before the user
//! does; capabilities go last, but before the program could use them.

use std::collections::HashSet;
use std::fs::File;
use std::io::Write;
use std::path::Path;

use caps::{CapSet, Capability, CapsHashSet};
use libcontainer::capabilities::CapabilityExt;
use libcontainer::oci_spec::runtime::{Capabilities, LinuxSeccomp, Process};
use libcontainer::syscall::{Syscall, SyscallError};
use libcontainer::{apparmor, seccomp};
use nix::errno::Errno;
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Gid, Uid};

use crate::causes::lower;
use crate::error::one_line;
use crate::program::Failure;

/// What a container gets that does not ask for another, whatever the mask of our caller.
const DEFAULT_UMASK: u32 = 0o022;

/// Becomes the process of the spec in all but the program it runs. `retry` is done with the user's own rights.
pub fn become_process(
    process: &Process,
    filter: Option<&LinuxSeccomp>,
    syscall: &dyn Syscall,
    retry: impl FnOnce() -> Result<(), Failure>,
) -> Result<(), Failure> {
    let no_new_privileges = process.no_new_privileges().unwrap_or(false);
    set_labels(process)?;
    umask(Mode::from_bits_truncate(
        process.user().umask().unwrap_or(DEFAULT_UMASK),
    ));
    set_groups(process, syscall)?;
    let user = process.user();
    syscall
        .set_id(Uid::from_raw(user.uid()), Gid::from_raw(user.gid()))
        .map_err(|error| {
            let cause = one_line(&error);
            format!("become user {}:{}: {cause}", user.uid(), user.gid())
        })?;
    // Without no_new_privs only CAP_SYS_ADMIN may load a filter.
    if !no_new_privileges {
        load(filter)?;
    }
    set_capabilities(process, syscall)?;
    retry()?;
    if no_new_privileges {
        nix::sys::prctl::set_no_new_privs().map_err(|errno| format!("set no_new_privs: {}", lower(errno.desc())))?;
        load(filter)?;
    }
    Ok(())
}

fn load(filter: Option<&LinuxSeccomp>) -> Result<(), Failure> {
    match filter {
        Some(filter) => seccomp::initialize_seccomp(filter)
            .map(|_| ())
            .map_err(|error| format!("load the seccomp filter: {}", one_line(&error))),
        None => Ok(()),
    }
}

fn set_labels(process: &Process) -> Result<(), Failure> {
    if let Some(profile) = process.apparmor_profile() {
        apparmor::apply_profile(profile)
            .map_err(|error| format!("set AppArmor profile {profile:?}: {}", one_line(&error)))?;
    }
    if let Some(label) = process.selinux_label().as_deref().filter(|l| !l.is_empty())
        && Path::new("/sys/fs/selinux/enforce").exists()
    {
        File::options()
            .write(true)
            .open("/proc/thread-self/attr/exec")
            .and_then(|mut file| file.write_all(label.as_bytes()))
            .map_err(|error| format!("set SELinux label {label:?}: {error}"))?;
    }
    Ok(())
}

/// Always set, also to none: the groups we have are those of whoever called us.
fn set_groups(process: &Process, syscall: &dyn Syscall) -> Result<(), Failure> {
    let groups: Vec<Gid> = process
        .user()
        .additional_gids()
        .iter()
        .flatten()
        .map(|gid| Gid::from_raw(*gid))
        .collect();
    match syscall.set_groups(&groups) {
        Ok(()) => Ok(()),
        // A user namespace made by an unprivileged user forbids it; then there is nothing to drop.
        Err(SyscallError::Nix(Errno::EPERM)) if groups.is_empty() => Ok(()),
        Err(error) => Err(format!("set supplementary groups: {}", one_line(&error))),
    }
}

/// A set the spec leaves out is empty. libcontainer's drop_privileges would keep ours then, which is everything; it also
/// lowers the permitted set before it sets the inheritable one, which fails for sets the kernel allows.
fn set_capabilities(process: &Process, syscall: &dyn Syscall) -> Result<(), Failure> {
    let wanted = Sets::of(process);
    for (set, value) in [
        (CapSet::Bounding, &wanted.bounding),
        (CapSet::Inheritable, &wanted.inheritable),
        (CapSet::Effective, &wanted.effective),
        (CapSet::Permitted, &wanted.permitted),
        (CapSet::Ambient, &wanted.ambient),
    ] {
        syscall
            .set_capability(set, value)
            .map_err(|error| format!("set {set:?} capabilities: {}", one_line(&error)))?;
    }
    Ok(())
}

struct Sets {
    bounding: CapsHashSet,
    inheritable: CapsHashSet,
    effective: CapsHashSet,
    permitted: CapsHashSet,
    ambient: CapsHashSet,
}

impl Sets {
    fn of(process: &Process) -> Self {
        let spec = process.capabilities().as_ref();
        // What nobody can have is not asked for; `missing` says so when the container is created.
        let available = caps::read(None, CapSet::Permitted).unwrap_or_default();
        let set = |chosen: Option<&Capabilities>| -> CapsHashSet {
            to_caps(chosen).intersection(&available).copied().collect()
        };
        Self {
            bounding: set(spec.and_then(|c| c.bounding().as_ref())),
            inheritable: set(spec.and_then(|c| c.inheritable().as_ref())),
            effective: set(spec.and_then(|c| c.effective().as_ref())),
            permitted: set(spec.and_then(|c| c.permitted().as_ref())),
            ambient: set(spec.and_then(|c| c.ambient().as_ref())),
        }
    }
}

fn to_caps(spec: Option<&Capabilities>) -> CapsHashSet {
    spec.into_iter().flatten().map(CapabilityExt::to_cap).collect()
}

/// The capabilities of the spec that are not in `available`, sorted.
pub fn missing(process: &Process, available: &HashSet<Capability>) -> Vec<String> {
    let Some(spec) = process.capabilities() else {
        return Vec::new();
    };
    let asked = [spec.bounding(), spec.effective(), spec.permitted()]
        .into_iter()
        .flat_map(|set| to_caps(set.as_ref()));
    let mut names: Vec<String> = asked
        .filter(|capability| !available.contains(capability))
        .map(|capability| capability.to_string())
        .collect();
    names.sort();
    names.dedup();
    names
}
