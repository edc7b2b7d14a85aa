//! Whether an image can become this container, decided before anything is changed.

use std::collections::BTreeSet;

use serde_json::Value;
use torpor_sys::Pid;
use torpor_sys::mem::Memory;
use torpor_sys::proc::{self, Limits};

use crate::error::{About, Error, Result};
use crate::kinds::files::Object;
use crate::kinds::{clocks, creds, mounts, settings, timerfd, vdso};
use crate::model::{Body, Inventory, Process};

/// What the new container's spec grants at most.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Capabilities as a bit mask.
    pub capabilities: u64,
    /// process.noNewPrivileges.
    pub no_new_privs: bool,
    /// The user id that processes are confined to: they cannot change it without CAP_SETUID.
    pub only_uid: Option<u32>,
    /// linux.seccomp is there: every thread must have a filter.
    pub seccomp: bool,
}

const CAP_SETUID: u64 = 7;

/// Names of capabilities by number (linux/capability.h).
const CAPABILITIES: [&str; 41] = [
    "CHOWN",
    "DAC_OVERRIDE",
    "DAC_READ_SEARCH",
    "FOWNER",
    "FSETID",
    "KILL",
    "SETGID",
    "SETUID",
    "SETPCAP",
    "LINUX_IMMUTABLE",
    "NET_BIND_SERVICE",
    "NET_BROADCAST",
    "NET_ADMIN",
    "NET_RAW",
    "IPC_LOCK",
    "IPC_OWNER",
    "SYS_MODULE",
    "SYS_RAWIO",
    "SYS_CHROOT",
    "SYS_PTRACE",
    "SYS_PACCT",
    "SYS_ADMIN",
    "SYS_BOOT",
    "SYS_NICE",
    "SYS_RESOURCE",
    "SYS_TIME",
    "SYS_TTY_CONFIG",
    "MKNOD",
    "LEASE",
    "AUDIT_WRITE",
    "AUDIT_CONTROL",
    "SETFCAP",
    "MAC_OVERRIDE",
    "MAC_ADMIN",
    "SYSLOG",
    "WAKE_ALARM",
    "BLOCK_SUSPEND",
    "AUDIT_READ",
    "PERFMON",
    "BPF",
    "CHECKPOINT_RESTORE",
];

fn mask(names: &Value) -> u64 {
    let number = |name: &Value| {
        let name = name.as_str()?.strip_prefix("CAP_")?;
        CAPABILITIES.iter().position(|c| *c == name)
    };
    names
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(number)
        .fold(0, |all, n| all | 1 << n)
}

impl Bounds {
    /// What a config.json grants (OCI runtime specification, process). An empty value grants everything.
    pub fn of(spec: &Value) -> Bounds {
        let process = &spec["process"];
        let sets = &process["capabilities"];
        let capabilities = if sets.is_null() {
            u64::MAX
        } else {
            mask(&sets["bounding"])
        };
        let uid = process["user"]["uid"].as_u64().and_then(|u| u32::try_from(u).ok());
        Bounds {
            capabilities,
            no_new_privs: process["noNewPrivileges"].as_bool().unwrap_or(false),
            only_uid: uid.filter(|_| capabilities >> CAP_SETUID & 1 == 0),
            seccomp: !spec["linux"]["seccomp"].is_null(),
        }
    }
}

/// # Errors
/// The first reason why the image cannot be restored into the waiting process `init`.
pub fn plan(inventory: &Inventory, init: Pid, bounds: &Bounds) -> Result<()> {
    shape(inventory)?;
    inventory.clocks.as_ref().map_or(Ok(()), clocks::plan)?;
    mounts::plan(&inventory.mounts, init)?;
    let me = std::process::id() as Pid;
    let memory = Memory::open(me).about(me, "own memory")?;
    let own = proc::maps(me).about(me, "own maps")?;
    vdso::plan(&inventory.vdso, &vdso::collect(&memory, &own)?)?;
    let limits = proc::limits(init).about(init, "limits")?;
    for process in &inventory.processes {
        if let Some(body) = &process.body {
            vdso::plan_parts(process.pid, &inventory.vdso, &body.memory.kernel)?;
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

fn living(process: &Process, body: &Body, bounds: &Bounds, limits: &Limits) -> Result<()> {
    settings::plan_limits(process.pid, &body.settings.limits, limits)?;
    for thread in &body.threads {
        creds::plan(thread.tid, &thread.creds, bounds)?;
        if bounds.seccomp && thread.seccomp.is_empty() {
            let why = "the container has a seccomp filter, this thread of the image has none";
            return Err(Error::refused(thread.tid, "seccomp", why));
        }
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
        if body
            .fds
            .iter()
            .any(|d| d.description >= inventory.descriptions.len() || d.fd < 0)
        {
            return Err(Error::nonsense(format!(
                "process {} has a descriptor of nothing",
                process.pid
            )));
        }
    }
    if inventory.processes.first().is_none_or(|p| p.body.is_none()) {
        return Err(Error::nonsense("it holds no process"));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_come_from_the_spec() {
        let spec = serde_json::json!({"process": {"user": {"uid": 7}, "noNewPrivileges": true,
            "capabilities": {"bounding": ["CAP_CHOWN", "CAP_KILL"]}}});
        let bounds = Bounds::of(&spec);
        assert_eq!(
            (bounds.capabilities, bounds.no_new_privs, bounds.only_uid),
            (0b10_0001, true, Some(7))
        );
        assert!(!bounds.seccomp);
        assert_eq!(Bounds::of(&Value::Null).capabilities, u64::MAX);
    }
}
