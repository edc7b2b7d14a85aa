//! The spec as the user wrote it, and the *effective* one that libcontainer builds the container by: the same container,
//! but its first process is root with every capability, as a restore needs it. The [`crate::workload`] takes the rest.

use std::fs;
use std::path::{Path, PathBuf};

use libcontainer::capabilities::CapabilityExt;
use libcontainer::oci_spec::runtime::{
    Capabilities, Capability, Hook, Hooks, Linux, LinuxCapabilities, LinuxNamespaceType, LinuxSeccomp, Process, Spec,
    User,
};
use libcontainer::{apparmor, seccomp};

use crate::cgroup::Cgroup;
use crate::error::Error;
use crate::limits::Ground;
use crate::verbs::hook::wrap;

/// Reads and checks the spec; its root path becomes absolute.
pub fn load(path: &Path, bundle: &Path) -> Result<Spec, Error> {
    let text = fs::read(path)
        .map_err(|error| Error::BadSpec(format!("read {}: {}", path.display(), crate::error::reason(&error))))?;
    let mut spec: Spec = serde_json::from_slice(&text)
        .map_err(|error| Error::BadSpec(format!("{} is not valid: {error}", path.display())))?;
    let process = spec.process().as_ref().ok_or_else(|| missing("process"))?;
    check_process(process)?;
    check_linux(spec.linux().as_ref().ok_or_else(|| missing("linux"))?)?;
    if let Some(hooks) = spec.hooks() {
        check_hooks(hooks)?;
    }
    let mut root = spec.root().clone().ok_or_else(|| missing("root"))?;
    let directory = bundle.join(root.path());
    let directory = directory.canonicalize().map_err(|error| {
        let why = crate::error::reason(&error);
        Error::BadSpec(format!("root.path {}: {why}", directory.display()))
    })?;
    root.set_path(directory);
    spec.set_root(Some(root));
    Ok(spec)
}

fn missing(what: &str) -> Error {
    Error::BadSpec(format!("config.json lacks {what:?}"))
}

pub fn check_process(process: &Process) -> Result<(), Error> {
    if process.args().iter().flatten().next().is_none_or(String::is_empty) {
        return Err(missing("process.args"));
    }
    if !process.cwd().is_absolute() {
        return Err(Error::BadSpec("process.cwd must be an absolute path".to_owned()));
    }
    let profile = process.apparmor_profile().as_deref().unwrap_or_default();
    if !profile.is_empty() && !apparmor::is_enabled().unwrap_or(false) {
        return Err(Error::BadSpec(
            "process.apparmorProfile is set, but this machine has no AppArmor".to_owned(),
        ));
    }
    Ok(())
}

fn check_linux(linux: &Linux) -> Result<(), Error> {
    // Without it the mounts of the container would be made on the host, and stay there.
    if !has_namespace(linux, LinuxNamespaceType::Mount) {
        return Err(Error::BadSpec(
            "linux.namespaces must contain a mount namespace".to_owned(),
        ));
    }
    match linux.seccomp() {
        Some(filter) if seccomp::is_notify(filter) && filter.listener_path().is_none() => Err(Error::BadSpec(
            "linux.seccomp uses SCMP_ACT_NOTIFY but has no listenerPath".to_owned(),
        )),
        _ => Ok(()),
    }
}

fn has_namespace(linux: &Linux, kind: LinuxNamespaceType) -> bool {
    linux
        .namespaces()
        .iter()
        .flatten()
        .any(|namespace| namespace.typ() == kind)
}

/// Whether the container gets a network namespace that nobody has set up yet.
pub fn has_new_network(spec: &Spec) -> bool {
    let namespaces = spec.linux().as_ref().and_then(|linux| linux.namespaces().as_ref());
    namespaces
        .into_iter()
        .flatten()
        .any(|namespace| namespace.typ() == LinuxNamespaceType::Network && namespace.path().is_none())
}

pub fn ground(spec: &Spec) -> Ground {
    let user_namespace = spec
        .linux()
        .as_ref()
        .is_some_and(|linux| has_namespace(linux, LinuxNamespaceType::User));
    Ground { user_namespace }
}

/// The filter our executor loads. One with a listener is libcontainer's: its descriptor goes through the launcher.
pub fn own_filter(spec: &Spec) -> Option<LinuxSeccomp> {
    let filter = spec.linux().as_ref()?.seccomp().clone()?;
    (!seccomp::is_notify(&filter)).then_some(filter)
}

pub fn effective(spec: &Spec, bundle: &Path, cgroup: &Cgroup) -> Spec {
    let mut effective = spec.clone();
    if let Some(process) = spec.process() {
        effective.set_process(Some(all_powerful(process, ground(spec))));
    }
    if let Some(linux) = effective.linux_mut() {
        linux.set_cgroups_path(Some(cgroup.path.clone()));
        if linux.seccomp().as_ref().is_some_and(|f| !seccomp::is_notify(f)) {
            linux.set_seccomp(None);
        }
    }
    if let Some(hooks) = effective.hooks_mut() {
        hooks.set_start_container(None);
        wrap_hooks(hooks, bundle);
    }
    effective
}

#[allow(deprecated, reason = "Docker up to 27 attaches the network in a prestart hook")]
fn wrap_hooks(hooks: &mut Hooks, bundle: &Path) {
    let wrapped = |list: &Option<Vec<Hook>>| {
        let list = list.as_ref()?;
        Some(list.iter().filter_map(|hook| wrap(hook, bundle)).collect())
    };
    hooks.set_prestart(wrapped(hooks.prestart()));
    hooks.set_create_runtime(wrapped(hooks.create_runtime()));
    hooks.set_create_container(wrapped(hooks.create_container()));
}

/// Found here, a missing hook has a name in the error; libcontainer only tells that some hook failed.
#[allow(deprecated, reason = "as above")]
fn check_hooks(hooks: &Hooks) -> Result<(), Error> {
    let lists = [hooks.prestart(), hooks.create_runtime(), hooks.create_container()];
    for hook in lists.into_iter().flatten().flatten() {
        let path = hook.path();
        if !path.is_absolute() || !path.is_file() {
            return Err(Error::BadSpec(format!("hook {path:?} is not a file")));
        }
    }
    Ok(())
}

/// The process with all rights, and nothing yet that the program's user decides.
pub fn all_powerful(process: &Process, ground: Ground) -> Process {
    let mut powerful = process.clone();
    powerful.set_capabilities(Some(every(ground)));
    powerful.set_user(User::default());
    powerful.set_no_new_privileges(None);
    powerful.set_apparmor_profile(None);
    powerful.set_selinux_label(None);
    powerful.set_cwd(PathBuf::from("/"));
    let mut environment = process.env().clone().unwrap_or_default();
    // libcontainer must find a home: it would ask NSS, and a static binary loads its libraries from the container.
    if !environment.iter().any(|entry| entry.starts_with("HOME=/")) {
        environment.retain(|entry| !entry.starts_with("HOME="));
        environment.push("HOME=/".to_owned());
    }
    powerful.set_env(Some(environment));
    powerful
}

fn every(ground: Ground) -> LinuxCapabilities {
    let all: Capabilities = ground.capabilities().into_iter().map(Capability::from_cap).collect();
    let mut sets = LinuxCapabilities::default();
    sets.set_bounding(Some(all.clone()));
    sets.set_effective(Some(all.clone()));
    sets.set_permitted(Some(all));
    // Ambient and inheritable ones would outlive the exec that we prepare.
    sets.set_inheritable(None);
    sets.set_ambient(None);
    sets
}
