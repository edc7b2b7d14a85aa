//! Whether an image can become this container, decided before anything is changed.

use std::collections::BTreeSet;

use torpor_sys::Pid;
use torpor_sys::proc::{self, Limits};
use torpor_sys::socket::message;

use crate::bounds::Bounds;
use crate::build::Lineage;
use crate::error::{About, Error, Result};
use crate::kinds::files::{Descriptor, Object};
use crate::kinds::{clocks, creds, ipc, mounts, scheduling, settings, sharing, timerfd, unix, vdso};
use crate::model::{Body, Inventory, Process, Thread};

const CAP_SYS_NICE: u64 = 23;

/// # Errors
/// The first reason why the image cannot be restored into the waiting process `init`.
pub fn plan(inventory: &Inventory, init: Pid, bounds: &Bounds) -> Result<()> {
    shape(inventory)?;
    sharing::plan(inventory, &Lineage::of(inventory))?;
    inventory.clocks.as_ref().map_or(Ok(()), clocks::plan)?;
    mounts::plan(&inventory.mounts, init)?;
    if let Some(ipc) = &inventory.ipc {
        ipc::plan(ipc, &inventory.objects.shared, init, bounds)?;
    }
    let limits = proc::limits(init).about(init, "limits")?;
    for process in &inventory.processes {
        if let Some(body) = &process.body {
            vdso::plan_parts(process.pid, &inventory.vdso, &inventory.memory_of(body).kernel)?;
            living(process, body, bounds, &limits)?;
        }
    }
    for description in &inventory.descriptions {
        if let Object::Timerfd(state) = &description.object {
            timerfd::plan(state, bounds)?;
        }
    }
    let inner = proc::status(init).about(init, "status")?.ns_pids.last().copied();
    let wanted = inventory.processes.first().map(|p| p.pid);
    if inner != wanted {
        let (inner, wanted) = (inner.unwrap_or(0), wanted.unwrap_or(0));
        let why = format!("the image's first process has id {wanted}, in the container it has {inner}");
        return Err(Error::unsupported(
            wanted,
            "pid",
            why,
            "give the container a pid namespace of its own",
        ));
    }
    Ok(())
}

/// Lowers what would put the image's processes ahead of others on this machine, by more than the container grants. Each
/// is a line in the report.
pub fn lower(inventory: &mut Inventory, init: Pid, bounds: &Bounds) -> Result<()> {
    let limits = proc::limits(init).about(init, "limits")?;
    let most = scheduling::Most::of(init, &limits, bounds.grants(CAP_SYS_NICE)).about(init, "scheduling")?;
    let mut said = Vec::new();
    for process in &mut inventory.processes {
        let Some(body) = &mut process.body else { continue };
        said.extend(settings::lower(process.pid, &mut body.settings, init, bounds)?);
        let lowered = |t: &mut Thread| most.lower(t.tid, &mut t.settings.scheduling);
        said.extend(body.threads.iter_mut().filter_map(lowered));
        body.settings.autogroup_nice = body.settings.autogroup_nice.max(most.least_nice());
    }
    said.extend(inventory.ipc.iter_mut().flat_map(|state| ipc::lower(state, bounds)));
    inventory.warnings.append(&mut said);
    Ok(())
}

fn living(process: &Process, body: &Body, bounds: &Bounds, limits: &Limits) -> Result<()> {
    settings::plan_limits(process.pid, &body.settings.limits, limits, bounds)?;
    for thread in &body.threads {
        creds::plan(thread.tid, &thread.creds, bounds)?;
    }
    Ok(())
}

/// # Errors
/// An image that contradicts itself: its checksums are right, so it was made to.
fn shape(inventory: &Inventory) -> Result<()> {
    let mut known = BTreeSet::new();
    let mut tids = BTreeSet::new();
    for (at, process) in inventory.processes.iter().enumerate() {
        let orphan = at > 0 && !known.contains(&process.ppid);
        if orphan || process.pid <= 0 || !known.insert(process.pid) {
            return Err(Error::nonsense(format!(
                "process {} has no place in the tree",
                process.pid
            )));
        }
        let Some(body) = &process.body else { continue };
        if body.threads.first().map(|t| t.tid) != Some(process.pid) {
            return Err(Error::nonsense(format!("process {} has no main thread", process.pid)));
        }
        if !body.threads.iter().all(|t| tids.insert(t.tid)) {
            return Err(Error::nonsense(format!("process {} shares a thread id", process.pid)));
        }
        let sorted = body.memory.areas.windows(2).all(|w| w[0].end <= w[1].start);
        if !sorted || body.memory.areas.iter().any(|a| a.start >= a.end) {
            return Err(Error::nonsense(format!(
                "process {} has mappings that overlap",
                process.pid
            )));
        }
        let is_nothing = |d: &Descriptor| d.description >= inventory.descriptions.len() || d.fd < 0;
        if body.tables().flatten().any(is_nothing) {
            return Err(Error::nonsense(format!(
                "process {} has a descriptor of nothing",
                process.pid
            )));
        }
    }
    for description in &inventory.descriptions {
        if let Object::Unix(state) = &description.object {
            in_flight(state, inventory)?;
        }
    }
    if inventory.processes.first().is_none_or(|p| p.body.is_none()) {
        return Err(Error::nonsense("it holds no process"));
    }
    Ok(())
}

/// # Errors
/// A message that brings what is not there, or more than the kernel lets one bring.
fn in_flight(state: &unix::State, inventory: &Inventory) -> Result<()> {
    let is_known = |pid: i32| inventory.processes.iter().any(|p| p.pid == pid && p.body.is_some());
    let fits = state
        .queue
        .iter()
        .all(|m| m.rights.len() <= message::MOST_RIGHTS && m.credentials.is_none_or(|sender| is_known(sender.pid)));
    if fits && state.rights().all(|d| d < inventory.descriptions.len()) {
        return Ok(());
    }
    Err(Error::nonsense(format!("what waits in unix socket {}", state.ino)))
}
