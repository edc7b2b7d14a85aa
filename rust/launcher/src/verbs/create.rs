//! `create`: builds the container; its init process then waits to be started, or to be filled by a restore.

use std::fs::{self, File};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::fs::{DirBuilderExt, OpenOptionsExt};
use std::path::Path;

use libcontainer::container::ContainerStatus;
use libcontainer::container::builder::ContainerBuilder;
use libcontainer::oci_spec::runtime::{Hook, Process, Spec};
use libcontainer::syscall::syscall::SyscallType;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::stat::{Mode, umask};
use nix::unistd::{Pid, close, mkfifo};
use serde_json::json;
use torpor_sys::start;

use crate::causes::{Causes, Sink};
use crate::cgroup::Cgroup;
use crate::cgroup_mounts::{self, Guest};
use crate::copy_up;
use crate::error::Error;
use crate::flags::Flags;
use crate::layout::Layout;
use crate::record::{Init, Record, replace, save};
use crate::report::Report;
use crate::spec;
use crate::supervise;
use crate::verbs::delete::destroy;
use crate::workload::{First, Plan, Workload};

pub fn run(flags: &Flags, report: &mut Report) -> Result<i32, Error> {
    let layout = flags.layout()?;
    let bundle = flags.needed_path("bundle")?;
    let bundle = bundle
        .canonicalize()
        .map_err(|error| Error::BadSpec(format!("bundle {}: {error}", bundle.display())))?;
    let preserve = preserved(flags, report)?;
    let mut spec = spec::load(&flags.needed_path("spec")?, &bundle)?;
    check_console(spec.process().as_ref(), flags)?;
    let given = spec.linux().as_ref().and_then(|linux| linux.cgroups_path().clone());
    let cgroup = Cgroup::choose(given.as_deref(), flags.has("systemd-cgroup"), &layout)?;

    // Mount points and the like are made with this mask; the caller's may be anything.
    umask(Mode::from_bits_truncate(0o022));
    claim(&layout)?;
    if flags.has("supervise") {
        supervise::adopt_orphans()?;
    }
    let built = prepare(&layout, &mut spec, &bundle, &cgroup, flags, report)
        .and_then(|site| build(&layout, site, &cgroup, flags, preserve));
    let created = built.and_then(|built| announce(&layout, built, flags, preserve, report));
    match created {
        Ok(init) if flags.has("supervise") => Ok(supervise::wait(init)),
        Ok(_) => Ok(0),
        Err(error) => {
            // The error that made us give up is the one to tell; what is left over, `delete` will find again.
            let _ = destroy(&layout);
            Err(error)
        }
    }
}

/// Makes our directory, which only one `create` can.
fn claim(layout: &Layout) -> Result<(), Error> {
    fs::DirBuilder::new()
        .recursive(true)
        .mode(0o700)
        .create(layout.root())
        .map_err(Error::io("create", layout.root()))?;
    let bundle = layout.bundle();
    match fs::DirBuilder::new().mode(0o700).create(&bundle) {
        Ok(()) if !layout.state().exists() => Ok(()),
        Ok(()) => {
            let _ = fs::remove_dir(&bundle);
            Err(Error::Exists(layout.id().to_owned()))
        }
        Err(error) if error.kind() == std::io::ErrorKind::AlreadyExists => Err(Error::Exists(layout.id().to_owned())),
        Err(error) => Err(Error::io("create", &bundle)(error)),
    }
}

/// Everything that must exist before the first process does.
struct Site {
    workload: Workload,
    causes: Causes,
    warnings: Vec<String>,
    lock: OwnedFd,
    gate: Sink,
}

fn prepare(
    layout: &Layout,
    spec: &mut Spec,
    bundle: &Path,
    cgroup: &Cgroup,
    flags: &Flags,
    report: &Report,
) -> Result<Site, Error> {
    cgroup.check_unused()?;
    let lock = lock(&layout.lock())?;
    let ground = spec::ground(spec);
    let mut warnings = Vec::new();
    if let Some(process) = spec.process_mut() {
        warnings = ground.adapt(process);
    }
    if flags.has("systemd-cgroup") && !cgroup.systemd {
        warnings.push(format!(
            "systemd is not told of the container: its cgroup {:?} is made without it",
            cgroup.path
        ));
    }
    let record = Record {
        bundle: bundle.to_owned(),
        cgroup: cgroup.path.clone(),
        systemd_cgroup: cgroup.systemd,
        keyring: !flags.has("no-new-keyring"),
        spec: spec.clone(),
    };
    record.save(layout)?;
    let mut effective = spec::effective(spec, bundle, cgroup);
    let copy_ups = copy_up::take(&mut effective);
    save(&layout.effective_spec(), &effective)?;

    let (causes, sink) = Causes::listen(flags.has("debug"))?;
    let gate = Sink::new(gate(&layout.gate())?);
    let mut close_when_ready: Vec<RawFd> = report.raw_fd().into_iter().collect();
    close_when_ready.extend([lock.as_raw_fd(), causes.raw_fd()]);
    let plan = Plan {
        process: spec.process().clone().unwrap_or_default(),
        seccomp: spec::own_filter(spec),
        first: Some(First {
            restricted: cgroup_mounts::restricted(spec),
            copy_ups,
            loopback: spec::has_new_network(spec),
            hooks: start_hooks(&record),
            state: record.state(layout, ContainerStatus::Created, None),
        }),
        keyring: record.keyring(layout),
        user_namespace: None,
        stdio_owner: spec.process().as_ref().map(|process| process.user().uid()),
        before: sink,
        after: gate.clone(),
        close_when_ready,
    };
    Ok(Site {
        workload: Workload::new(plan),
        causes,
        warnings,
        lock,
        gate,
    })
}

fn start_hooks(record: &Record) -> Vec<Hook> {
    let hooks = record.spec.hooks().as_ref();
    hooks
        .and_then(|hooks| hooks.start_container().clone())
        .unwrap_or_default()
}

/// Held by this process and every one it forks, so that `delete` can wait for those that outlive a killed launcher.
fn lock(path: &Path) -> Result<OwnedFd, Error> {
    let file = File::create(path).map_err(Error::io("create", path))?;
    let held = Flock::lock(file, FlockArg::LockExclusiveNonblock)
        .map_err(|(_, errno)| Error::call("lock the container")(errno))?;
    // Dropping `held` would unlock it for the children too; the lock must end when the last copy is closed.
    let fd = held.as_raw_fd();
    std::mem::forget(held);
    start::adopt(fd).map_err(|error| Error::Container(error.to_string()))
}

/// Open for reading too, so that opening does not wait for `start`.
fn gate(path: &Path) -> Result<OwnedFd, Error> {
    mkfifo(path, Mode::from_bits_truncate(0o600)).map_err(Error::call("make the start gate"))?;
    File::options()
        .read(true)
        .write(true)
        .custom_flags(libc::O_CLOEXEC)
        .open(path)
        .map(OwnedFd::from)
        .map_err(Error::io("open", path))
}

struct Built {
    init: Pid,
    warnings: Vec<String>,
}

fn build(layout: &Layout, site: Site, cgroup: &Cgroup, flags: &Flags, preserve: i32) -> Result<Built, Error> {
    let guest = Guest::of(&cgroup.path);
    let builder = ContainerBuilder::new(layout.id().to_owned(), SyscallType::default())
        .with_executor(site.workload)
        .with_preserved_fds(preserve)
        .with_console_socket(flags.path("console-socket"))
        .with_root_path(layout.root());
    let built = builder.and_then(|builder| {
        builder
            .as_init(layout.bundle())
            .with_systemd(cgroup.systemd)
            .with_no_pivot(flags.has("no-pivot"))
            .build()
    });
    // Ours only: init has its own, and the end of the gate must be its end.
    drop((guest, site.gate, site.lock));
    let container = built.map_err(|error| site.causes.explain(&error))?;
    let init = container
        .pid()
        .ok_or_else(|| Error::Container("libcontainer reports no init process".to_owned()))?;
    Ok(Built {
        init,
        warnings: site.warnings,
    })
}

/// Tells the world about init. Fails, so that the container goes again, when there is nobody left to tell.
fn announce(layout: &Layout, built: Built, flags: &Flags, preserve: i32, report: &mut Report) -> Result<Pid, Error> {
    Init::of(built.init)?.save(layout)?;
    if let Some(path) = flags.path("pid-file") {
        write_pid(&path, built.init)?;
    }
    if flags.has("supervise") {
        supervise::step_back();
        close_preserved(preserve);
    }
    let mut fields = json!({"pid": built.init.as_raw()});
    if !built.warnings.is_empty() {
        fields["warnings"] = json!(built.warnings);
    }
    report
        .success(fields)
        .map_err(|_| Error::Container("nobody reads the report".to_owned()))?;
    Ok(built.init)
}

/// Digits only, and at once: clients take the file's appearance for the end of `create`.
pub fn write_pid(path: &Path, pid: Pid) -> Result<(), Error> {
    replace(path, pid.to_string().as_bytes())
}

/// A terminal needs somebody to hold its other end, who gets it through the socket.
pub fn check_console(process: Option<&Process>, flags: &Flags) -> Result<(), Error> {
    let terminal = process.and_then(Process::terminal).unwrap_or(false);
    match (terminal, flags.has("console-socket")) {
        (true, false) => Err(Error::BadSpec(
            "process.terminal is set: it needs --console-socket".to_owned(),
        )),
        (false, true) => Err(Error::BadSpec(
            "--console-socket is given, but process.terminal is not set".to_owned(),
        )),
        _ => Ok(()),
    }
}

/// The descriptors 3.. that go to the program. All must be open: else libcontainer's own would land among them.
pub fn preserved(flags: &Flags, report: &Report) -> Result<i32, Error> {
    let count: i32 = flags.number("preserve-fds")?.unwrap_or(0);
    for fd in 3..count.saturating_add(3) {
        if !start::is_open(fd) || report.raw_fd() == Some(fd) {
            return Err(Error::Usage(format!(
                "--preserve-fds {count}: descriptor {fd} is not one of the container's"
            )));
        }
    }
    Ok(count)
}

/// A supervisor must not hold them open for the program's readers.
pub fn close_preserved(count: i32) {
    for fd in 3..count.saturating_add(3) {
        let _ = close(fd);
    }
}
