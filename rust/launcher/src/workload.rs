//! The executor that libcontainer runs inside the finished container: it waits at the gate with all privileges, and only
//! when the container is started does it become the process of the spec.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::fs;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::Path;
use std::rc::Rc;

use libcontainer::container::State;
use libcontainer::hooks::run_hooks;
use libcontainer::oci_spec::runtime::{Hook, LinuxSeccomp, Process, Spec};
use libcontainer::syscall::syscall::create_syscall;
use libcontainer::utils::parse_env;
use libcontainer::workload::{Executor, ExecutorError, ExecutorSetEnvsError, ExecutorValidationError};
use nix::errno::Errno;
use nix::sched::{CloneFlags, setns};
use nix::sys::stat::{FileStat, SFlag, fstat, makedev};
use nix::unistd::{Gid, Uid, chdir, close, dup2, execve, fchown, getcwd, getpid};
use torpor_sys::start;

use crate::causes::{Cause, Sink, lower};
use crate::cgroup_mounts::Restricted;
use crate::copy_up::CopyUp;
use crate::error::{one_line, reason};
use crate::privilege::become_process;
use crate::program::{self, Failure};

/// What `ps` shows while the container is created but not started.
const NAME: &CStr = c"torpor-init";

/// A process as its spec wants it, and how to say that it could not be.
#[derive(Debug)]
pub struct Plan {
    pub process: Process,
    pub seccomp: Option<LinuxSeccomp>,
    /// What only the first process of a container does.
    pub first: Option<First>,
    /// The session keyring to join; without one the container would see its caller's keys.
    pub keyring: Option<CString>,
    /// libcontainer joins every namespace of a running container but this one.
    pub user_namespace: Option<OwnedFd>,
    /// Who gets the pipes or the terminal that the process is given; as numbered where `validate` runs.
    pub stdio_owner: Option<u32>,
    /// Hears failures before the process is ready, and after.
    pub before: Sink,
    pub after: Sink,
    /// Descriptors of the launcher that must not stay open in a process that waits to be started: their other ends
    /// would not see the launcher go.
    pub close_when_ready: Vec<RawFd>,
}

#[derive(Debug)]
pub struct First {
    pub restricted: Vec<Restricted>,
    pub copy_ups: Vec<CopyUp>,
    /// Whether the network namespace is a new one, in which even the loopback is down.
    pub loopback: bool,
    pub hooks: Vec<Hook>,
    pub state: State,
}

#[derive(Debug, Clone)]
pub struct Workload {
    plan: Rc<Plan>,
    /// Variables that libcontainer adds for socket activation.
    activation: RefCell<Vec<String>>,
}

impl Workload {
    pub fn new(plan: Plan) -> Self {
        Self {
            plan: Rc::new(plan),
            activation: RefCell::default(),
        }
    }

    /// Finds what can be found wrong before the container is started, so that `create` fails as it does in runc.
    fn check(&self) -> Result<(), Failure> {
        let process = &self.plan.process;
        if let Some(name) = &self.plan.keyring {
            start::join_session_keyring(name).map_err(|error| format!("join session keyring: {}", one_line(&error)))?;
        }
        if let Some(first) = &self.plan.first {
            let syscall = create_syscall();
            for mount in &first.restricted {
                mount.apply(syscall.as_ref())?;
            }
            for mount in &first.copy_ups {
                mount.run(syscall.as_ref())?;
            }
            if first.loopback {
                start::bring_up_loopback().map_err(|error| format!("bring up the loopback: {}", one_line(&error)))?;
            }
            make_directory(process.cwd())?;
        }
        reopen_null();
        program::locate(process)?;
        program::arguments(process)?;
        program::environment(process, &[])?;
        if let Some(owner) = self.plan.stdio_owner {
            own_stdio(process, owner);
        }
        Ok(())
    }

    fn run(&self) -> Result<(), Failure> {
        let plan = &self.plan;
        let process = &plan.process;
        let syscall = create_syscall();
        if let Some(namespace) = &plan.user_namespace {
            setns(namespace, CloneFlags::CLONE_NEWUSER)
                .map_err(|errno| format!("join the user namespace: {}", lower(errno.desc())))?;
        }
        // With our rights first: the user may not be able to search the way there; then with the user's, for directories
        // that root cannot enter (NFS).
        let entered = match chdir(process.cwd()) {
            Ok(()) => true,
            Err(Errno::EACCES | Errno::EPERM) => false,
            Err(errno) => return Err(cwd_failure(process.cwd(), errno)),
        };
        become_process(process, plan.seccomp.as_ref(), syscall.as_ref(), || {
            if !entered {
                chdir(process.cwd()).map_err(|errno| cwd_failure(process.cwd(), errno))?;
            }
            check_cwd()
        })?;
        // With the rights of the program and no more: the path of a startContainer hook is the container's.
        if let Some(first) = &plan.first {
            first.run_hooks(process)?;
        }
        let file = program::locate(process)?;
        let arguments = program::arguments(process)?;
        let environment = program::environment(process, &self.activation.borrow())?;
        let path = CString::new(file.into_os_string().into_encoded_bytes())
            .map_err(|_| "process.args holds a zero byte".to_owned())?;
        start::reset_signals();
        match execve(&path, &arguments, &environment) {
            Ok(never) => match never {},
            Err(errno) => Err(format!("exec: {path:?}: {}", lower(errno.desc()))),
        }
    }
}

impl Executor for Workload {
    fn validate(&self, _: &Spec) -> Result<(), ExecutorValidationError> {
        self.check().map_err(|message| {
            self.plan.before.tell(Cause::ours(&message));
            ExecutorValidationError::ArgValidationError(message)
        })
    }

    fn setup_envs(&self, envs: HashMap<String, String>) -> Result<(), ExecutorSetEnvsError> {
        // Our own environment is not touched: it is not the one that the program gets.
        *self.activation.borrow_mut() = envs
            .into_iter()
            .filter(|(name, _)| name == "LISTEN_FDS" || name == "LISTEN_PID")
            .map(|(name, value)| format!("{name}={value}"))
            .collect();
        for fd in &self.plan.close_when_ready {
            let _ = close(*fd);
        }
        let _ = nix::sys::prctl::set_name(NAME);
        Ok(())
    }

    fn exec(&self, _: &Spec) -> Result<(), ExecutorError> {
        self.run().map_err(|message| {
            self.plan.after.tell(Cause::ours(&message));
            ExecutorError::Other(message)
        })
    }
}

impl First {
    fn run_hooks(&self, process: &Process) -> Result<(), Failure> {
        let environment = parse_env(process.env().as_deref().unwrap_or_default());
        run_hooks(
            Some(&self.hooks),
            Some(&self.state),
            None,
            Some(getpid()),
            Some(&environment),
        )
        .map_err(|error| format!("startContainer hook: {}", one_line(&error)))
    }
}

fn make_directory(path: &Path) -> Result<(), Failure> {
    match fs::create_dir_all(path) {
        Ok(()) => Ok(()),
        // What may be in the way only shows when the user enters it.
        Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => Ok(()),
        Err(error) => Err(format!("process.cwd {}: {}", path.display(), reason(&error))),
    }
}

fn cwd_failure(path: &Path, errno: Errno) -> Failure {
    format!("process.cwd {}: {}", path.display(), lower(errno.desc()))
}

/// A directory outside of the root has no path in it (CVE-2024-21626).
fn check_cwd() -> Result<(), Failure> {
    match getcwd() {
        Ok(path) if path.is_absolute() => Ok(()),
        _ => Err("the working directory is outside of the container".to_owned()),
    }
}

/// libcontainer has opened the container's /dev/null for reading only and put that on every standard stream that was
/// /dev/null outside: a program could not write to it.
fn reopen_null() {
    let null = |status: &FileStat| {
        let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
        kind == SFlag::S_IFCHR && status.st_rdev == makedev(1, 3)
    };
    for fd in 0..=2 {
        if !fstat(fd).is_ok_and(|status| null(&status)) {
            continue;
        }
        // A container without /dev/null keeps what it has.
        let Ok(file) = fs::OpenOptions::new().read(true).write(true).open("/dev/null") else {
            return;
        };
        let _ = dup2(file.as_raw_fd(), fd);
    }
}

/// Makes the user the owner of the pipes or the terminal it was given, so that it can open /dev/stdout, as runc does. Not
/// of files and of terminals outside: those belong to whoever redirected the output.
fn own_stdio(process: &Process, owner: u32) {
    let terminal = process.terminal().unwrap_or(false);
    for fd in 0..=2 {
        let Ok(status) = fstat(fd) else { continue };
        let kind = SFlag::from_bits_truncate(status.st_mode) & SFlag::S_IFMT;
        if kind == SFlag::S_IFIFO || (terminal && kind == SFlag::S_IFCHR) {
            // Not ours to give away: then the user just cannot open it again.
            let _ = fchown(fd, Some(Uid::from_raw(owner)), None::<Gid>);
        }
    }
}
