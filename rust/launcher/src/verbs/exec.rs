//! `exec`: one more process in a running container.

use std::fmt::Display;
use std::fs::{self, File};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use libcontainer::container::builder::ContainerBuilder;
use libcontainer::container::{ContainerStatus, State};
use libcontainer::oci_spec::runtime::{LinuxNamespaceType, Process};
use libcontainer::seccomp::is_notify;
use libcontainer::syscall::syscall::SyscallType;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{Mode, umask};
use nix::unistd::Pid;
use serde_json::json;

use crate::causes::{Causes, Sink};
use crate::cgroup::Cgroup;
use crate::cgroup_mounts::Guest;
use crate::error::{Error, one_line, reason};
use crate::flags::Flags;
use crate::layout::Layout;
use crate::limits::Ground;
use crate::record::{Init, Record, save};
use crate::report::Report;
use crate::spec;
use crate::supervise;
use crate::verbs::create::{check_console, close_preserved, preserved, write_pid};
use crate::workload::{Plan, Workload};

pub fn run(flags: &Flags, report: &mut Report) -> Result<i32, Error> {
    let layout = flags.layout()?;
    let record = Record::load(&layout)?;
    let init = running(&layout)?;
    let cgroup = Cgroup::at(record.cgroup.clone(), record.systemd_cgroup, layout.id());
    if cgroup.is_frozen() {
        return Err(Error::BadState("container is paused".to_owned()));
    }
    let preserve = preserved(flags, report)?;
    let mut process = load(&flags.needed_path("process")?)?;
    check_console(Some(&process), flags)?;
    // The process has the host's rights until it joins the container's user namespace.
    let outside = Ground { user_namespace: false };
    let mut warnings = Vec::new();
    if record
        .spec
        .linux()
        .as_ref()
        .and_then(|linux| linux.seccomp().as_ref())
        .is_some_and(is_notify)
    {
        return Err(Error::BadSpec(
            "exec into a container whose seccomp filter has a listener is not possible".to_owned(),
        ));
    }
    warnings.extend(outside.adapt(&mut process));

    umask(Mode::from_bits_truncate(0o022));
    if flags.has("supervise") {
        supervise::adopt_orphans()?;
    }
    let (causes, sink) = Causes::listen(flags.has("debug"))?;
    let plan = plan(&layout, &record, init, &process, sink)?;
    let desk = Desk::set_up(&layout, init, &spec::all_powerful(&process, outside))?;
    let guest = Guest::of(&record.cgroup);
    join_time(init)?;
    let built = ContainerBuilder::new(layout.id().to_owned(), SyscallType::default())
        .with_executor(Workload::new(plan))
        .with_preserved_fds(preserve)
        .with_console_socket(flags.path("console-socket"))
        .with_root_path(desk.root.as_path())
        .and_then(|builder| {
            builder
                .as_tenant()
                .with_detach(true)
                .with_process(Some(desk.process()))
                .with_sub_cgroup(flags.text("cgroup").unwrap_or_default())
                .build()
        });
    drop((guest, desk));
    let pid = built.map_err(|error| causes.explain(&error))?;
    if let Some(path) = flags.path("pid-file") {
        write_pid(&path, pid)?;
    }
    announce(pid, &warnings, flags, preserve, report);
    if flags.has("supervise") {
        return Ok(supervise::wait(pid));
    }
    Ok(0)
}

/// A restored container has clocks of its own, which its spec does not tell: whoever is made from here on has them too.
fn join_time(init: Init) -> Result<(), Error> {
    let own = fs::read_link("/proc/self/ns/time");
    let path = format!("/proc/{}/ns/time", init.pid);
    if fs::read_link(&path).ok() == own.ok() {
        return Ok(());
    }
    let failed = |error: &dyn Display| Error::Container(format!("joining the container's time namespace: {error}"));
    let namespace = File::open(&path).map_err(|error| failed(&error))?;
    setns(namespace, CloneFlags::from_bits_retain(libc::CLONE_NEWTIME)).map_err(|error| failed(&error))
}

/// The process runs already and cannot be taken back, so a report that nobody reads changes nothing.
fn announce(pid: Pid, warnings: &[String], flags: &Flags, preserve: i32, report: &mut Report) {
    if flags.has("supervise") {
        supervise::step_back();
        close_preserved(preserve);
    }
    let mut fields = json!({"pid": pid.as_raw()});
    if !warnings.is_empty() {
        fields["warnings"] = json!(warnings);
    }
    let _ = report.success(fields);
}

fn running(layout: &Layout) -> Result<Init, Error> {
    let state = State::load(&layout.state()).map_err(|error| Error::Container(one_line(&error)))?;
    match Init::load(layout).filter(Init::is_alive) {
        // In a created one init waits, and everything else is there already.
        Some(init) if matches!(state.status, ContainerStatus::Running | ContainerStatus::Created) => Ok(init),
        _ => Err(Error::BadState("container is not running".to_owned())),
    }
}

fn load(path: &Path) -> Result<Process, Error> {
    let text = fs::read(path).map_err(Error::io("read", path))?;
    let process =
        serde_json::from_slice(&text).map_err(|error| Error::BadSpec(format!("the process is not valid: {error}")))?;
    spec::check_process(&process)?;
    Ok(process)
}

fn plan(layout: &Layout, record: &Record, init: Init, process: &Process, sink: Sink) -> Result<Plan, Error> {
    let user_namespace = spec::ground(&record.spec).user_namespace;
    Ok(Plan {
        process: process.clone(),
        seccomp: spec::own_filter(&record.spec),
        first: None,
        keyring: record.keyring(layout),
        user_namespace: user_namespace.then(|| namespace(init)).transpose()?,
        stdio_owner: outside_uid(init, process.user().uid()),
        before: sink.clone(),
        after: sink,
        close_when_ready: Vec::new(),
    })
}

/// libcontainer joins the namespaces of the spec, but leaves this one out.
fn namespace(init: Init) -> Result<OwnedFd, Error> {
    let kind = LinuxNamespaceType::User;
    let path = PathBuf::from(format!("/proc/{}/ns/{kind}", init.pid));
    File::open(&path).map(OwnedFd::from).map_err(Error::io("open", &path))
}

/// The number that user `uid` of the container has on the host.
fn outside_uid(init: Init, uid: u32) -> Option<u32> {
    let map = fs::read_to_string(format!("/proc/{}/uid_map", init.pid)).ok()?;
    map.lines().find_map(|line| {
        let mut numbers = line.split_whitespace().map(|word| word.parse::<u32>().ok());
        let (inside, outside, count) = (numbers.next()??, numbers.next()??, numbers.next()??);
        let offset = uid.checked_sub(inside)?;
        (offset < count).then(|| outside.checked_add(offset))?
    })
}

/// A directory of our own for libcontainer to work in: it leaves sockets behind where the container's state is.
struct Desk {
    root: PathBuf,
}

impl Desk {
    fn set_up(layout: &Layout, init: Init, process: &Process) -> Result<Self, Error> {
        let root = layout.bundle().join(format!("exec-{}", std::process::id()));
        let desk = Self { root };
        // What a killed exec of the same number has left.
        let _ = fs::remove_dir_all(&desk.root);
        let directory = desk.root.join(layout.id());
        fs::create_dir_all(&directory).map_err(Error::io("create", &directory))?;
        let mut state = State::load(&layout.state()).map_err(|e| Error::Container(one_line(&e)))?;
        state.pid = Some(init.pid);
        state.status = ContainerStatus::Running;
        state
            .save(&directory)
            .map_err(|error| Error::Container(one_line(&error)))?;
        save(&desk.process(), process)?;
        Ok(desk)
    }

    fn process(&self) -> PathBuf {
        self.root.join("process.json")
    }
}

impl Drop for Desk {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.root) {
            tracing::debug!("remove {}: {}", self.root.display(), reason(&error));
        }
    }
}
