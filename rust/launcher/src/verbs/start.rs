//! `start`: lets init become the program.

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;

use libcontainer::container::{Container, ContainerStatus};
use libcontainer::hooks::run_hooks;
use libcontainer::notify_socket::{NOTIFY_FILE, NotifySocket};
use serde_json::json;

use crate::causes::{blocking, ours};
use crate::error::{Error, one_line};
use crate::flags::Flags;
use crate::layout::Layout;
use crate::record::{Init, Record};
use crate::report::Report;

pub fn run(flags: &Flags, report: &mut Report) -> Result<i32, Error> {
    let layout = flags.layout()?;
    let record = Record::load(&layout)?;
    let mut container = created(&layout)?;
    // Opened before init is released: it would wait for nobody if it failed at once.
    let mut gate = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open(layout.gate())
        .map_err(Error::io("open", &layout.gate()))?;
    NotifySocket::new(layout.state().join(NOTIFY_FILE))
        .notify_container_start()
        .map_err(|error| Error::Container(one_line(&error)))?;
    // Init has the only other end, which closes itself when the program is executed.
    blocking(&gate, true)?;
    if let Some(error) = ours(&mut gate) {
        return Err(error);
    }
    mark_running(&mut container)?;
    let warnings = poststart(&layout, &record, &container);
    let mut fields = json!({});
    if !warnings.is_empty() {
        fields["warnings"] = json!(warnings);
    }
    report.success(fields).map_err(Error::call("report"))?;
    Ok(0)
}

/// The container, if it waits to be started.
pub fn created(layout: &Layout) -> Result<Container, Error> {
    let container = Container::load(layout.state()).map_err(|error| Error::Container(one_line(&error)))?;
    let alive = Init::load(layout).is_some_and(|init| init.is_alive());
    match container.status() {
        ContainerStatus::Created if alive => Ok(container),
        ContainerStatus::Running if alive => Err(Error::BadState("container is already running".to_owned())),
        _ => Err(Error::BadState("container is not waiting to be started".to_owned())),
    }
}

pub fn mark_running(container: &mut Container) -> Result<(), Error> {
    container
        .set_status(ContainerStatus::Running)
        .save()
        .map_err(|error| Error::Container(one_line(&error)))
}

/// The container runs already, so a hook that fails is only told, as the OCI specification has it.
pub fn poststart(layout: &Layout, record: &Record, container: &Container) -> Vec<String> {
    let Some(hooks) = record.spec.hooks() else {
        return Vec::new();
    };
    let state = record.state(layout, ContainerStatus::Running, container.pid());
    run_hooks(hooks.poststart().as_ref(), Some(&state), None, None, None)
        .err()
        .map(|error| format!("poststart hook: {}", one_line(&error)))
        .into_iter()
        .collect()
}
