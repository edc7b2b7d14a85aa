//! `delete`: ends what still runs and removes every trace, from any state, however often it is called.

use std::fs::{self, File};
use std::io::ErrorKind;
use std::path::Path;
use std::thread::sleep;
use std::time::{Duration, Instant};

use libcontainer::container::{ContainerStatus, State};
use libcontainer::hooks::run_hooks;
use libcontainer::process::intel_rdt::cleanup_intel_rdt;
use nix::fcntl::{Flock, FlockArg};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::json;

use crate::cgroup::Cgroup;
use crate::error::{Error, one_line};
use crate::flags::Flags;
use crate::layout::Layout;
use crate::record::{Init, Record};
use crate::report::Report;

/// How long processes that build the container may take to notice that their launcher is gone.
const BUILDERS_TIMEOUT: Duration = Duration::from_secs(10);
const PAUSE: Duration = Duration::from_millis(2);

pub fn run(flags: &Flags, report: &mut Report) -> Result<i32, Error> {
    let warnings = destroy(&flags.layout()?)?;
    let mut fields = json!({});
    if !warnings.is_empty() {
        fields["warnings"] = json!(warnings);
    }
    report.success(fields).map_err(Error::call("report"))?;
    Ok(0)
}

/// The directories go last: whatever fails before can be tried again.
pub fn destroy(layout: &Layout) -> Result<Vec<String>, Error> {
    let mut warnings = Vec::new();
    // Without a record nothing had been built yet.
    if let Ok(record) = Record::load(layout) {
        let cgroup = Cgroup::at(record.cgroup.clone(), record.systemd_cgroup, layout.id());
        cgroup.kill()?;
        // A process that was being forked when its launcher died joins the cgroup only now.
        wait_for_builders(&layout.lock())?;
        cgroup.kill()?;
        end_init(layout)?;
        cgroup.remove()?;
        cgroup.release()?;
        release_rdt(layout, &mut warnings);
        poststop(layout, &record, &mut warnings);
    }
    remove_dir(&layout.state())?;
    remove_dir(&layout.bundle())?;
    Ok(warnings)
}

fn wait_for_builders(path: &Path) -> Result<(), Error> {
    let deadline = Instant::now() + BUILDERS_TIMEOUT;
    loop {
        // Gone already: a `delete` at the same time has done our work.
        let Ok(file) = File::open(path) else {
            return Ok(());
        };
        match Flock::lock(file, FlockArg::LockExclusiveNonblock) {
            Ok(_) => return Ok(()),
            Err(_) if Instant::now() < deadline => sleep(PAUSE),
            Err(_) => {
                return Err(Error::BadState("the container is still being created".to_owned()));
            }
        }
    }
}

/// For an init that is not in its cgroup: somebody moved it, or this machine has none.
fn end_init(layout: &Layout) -> Result<(), Error> {
    let deadline = Instant::now() + BUILDERS_TIMEOUT;
    while let Some(init) = Init::load(layout).filter(Init::is_alive) {
        let _ = kill(Pid::from_raw(init.pid), Signal::SIGKILL);
        if Instant::now() > deadline {
            return Err(Error::Container(format!("init process {} does not die", init.pid)));
        }
        sleep(PAUSE);
    }
    Ok(())
}

fn release_rdt(layout: &Layout, warnings: &mut Vec<String>) {
    let Ok(state) = State::load(&layout.state()) else {
        return;
    };
    let released = cleanup_intel_rdt(
        state.intel_rdt_dir.as_deref(),
        state.intel_rdt_monitoring_dir.as_deref(),
        state.clean_up_intel_rdt_subdirectory,
        layout.id(),
    );
    if let Err(error) = released {
        warnings.push(format!("Intel RDT: {}", one_line(&error)));
    }
}

/// A hook that fails does not keep the container: the OCI specification wants a warning.
fn poststop(layout: &Layout, record: &Record, warnings: &mut Vec<String>) {
    let Some(hooks) = record.spec.hooks() else {
        return;
    };
    let state = record.state(layout, ContainerStatus::Stopped, None);
    if let Err(error) = run_hooks(hooks.poststop().as_ref(), Some(&state), None, None, None) {
        warnings.push(format!("poststop hook: {}", one_line(&error)));
    }
}

fn remove_dir(path: &Path) -> Result<(), Error> {
    match fs::remove_dir_all(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(Error::io("remove", path)(error)),
        _ => Ok(()),
    }
}
