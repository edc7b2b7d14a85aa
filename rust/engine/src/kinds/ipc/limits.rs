//! The limits of an IPC namespace: files under /proc/sys that show those of whoever opens them.

use std::collections::BTreeMap;
use std::fs;

use torpor_sys::{Error, Pid, namespace};

use crate::error::{About, Result};

/// All of them, but for those that are about the next object.
const NAMES: [&str; 13] = [
    "kernel/shmmax",
    "kernel/shmall",
    "kernel/shmmni",
    RMID_FORCED,
    "kernel/msgmax",
    "kernel/msgmnb",
    "kernel/msgmni",
    "kernel/sem",
    "fs/mqueue/queues_max",
    "fs/mqueue/msg_max",
    "fs/mqueue/msgsize_max",
    "fs/mqueue/msg_default",
    "fs/mqueue/msgsize_default",
];

/// Removes segments that nobody has attached: set when they are.
pub const RMID_FORCED: &str = "kernel/shm_rmid_forced";

/// By name.
pub type Values = BTreeMap<String, String>;

/// What was found.
#[derive(Debug)]
pub struct Limits {
    /// All.
    pub now: Values,
    /// Those that a new namespace has otherwise.
    pub changed: Values,
}

/// The limits of the namespace of a process.
pub fn collect(init: Pid) -> Result<Limits> {
    let now = namespace::within(init, &["ipc"], read).about(init, "limits of System V IPC")?;
    let new = namespace::in_fresh_ipc(read).about(init, "limits of System V IPC")?;
    let mut changed = now.clone();
    changed.retain(|name, value| new.get(name) != Some(value));
    Ok(Limits { now, changed })
}

/// Whether a name is that of a limit.
pub fn is_known(name: &str) -> bool {
    NAMES.contains(&name)
}

/// The number at `place` of a limit; without it everything is allowed.
pub fn number(limits: &Values, name: &str, place: usize) -> u64 {
    let value = limits.get(name).and_then(|v| v.split_ascii_whitespace().nth(place));
    value.and_then(|v| v.parse().ok()).unwrap_or(u64::MAX)
}

fn read() -> torpor_sys::Result<Values> {
    let mut values = Values::new();
    for name in NAMES {
        let path = format!("/proc/sys/{name}");
        match fs::read_to_string(&path) {
            Ok(text) => values.insert(name.into(), text.trim_end().into()),
            // A kernel without it.
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => None,
            Err(e) => return Err(Error::io("read", path, &e)),
        };
    }
    Ok(values)
}

fn write(name: &str, value: &str) -> torpor_sys::Result<()> {
    let path = format!("/proc/sys/{name}");
    fs::write(&path, value).map_err(|e| Error::io("write", path, &e))
}

/// Sets those that objects are made under, in the namespace of the calling thread.
pub fn rebuild(limits: &Values) -> torpor_sys::Result<()> {
    let first = limits.iter().filter(|(name, _)| *name != RMID_FORCED);
    first.into_iter().try_for_each(|(name, value)| write(name, value))
}

/// Sets the rest.
pub fn finish(limits: &Values) -> torpor_sys::Result<()> {
    limits
        .get(RMID_FORCED)
        .map_or(Ok(()), |value| write(RMID_FORCED, value))
}

/// A limit of the namespace of the calling thread that is higher while this lives.
#[derive(Debug)]
pub struct Raised {
    name: &'static str,
    before: String,
}

impl Raised {
    /// Raises a limit to `least` where it is lower.
    pub fn to(name: &'static str, least: u64) -> torpor_sys::Result<Option<Raised>> {
        let path = format!("/proc/sys/{name}");
        let before = fs::read_to_string(&path).map_err(|e| Error::io("read", path, &e))?;
        if before.trim_end().parse().is_ok_and(|now: u64| now >= least) {
            return Ok(None);
        }
        write(name, &least.to_string())?;
        Ok(Some(Raised { name, before }))
    }
}

impl Drop for Raised {
    fn drop(&mut self) {
        // What cannot be put back was put there by us a moment ago.
        let _ = write(self.name, self.before.trim_end());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_limit_may_be_several_numbers() {
        let limits = Values::from([("kernel/sem".into(), "32000\t1024000000\t500\t32000".into())]);
        assert_eq!(number(&limits, "kernel/sem", 2), 500);
        assert_eq!(number(&limits, "kernel/msgmax", 0), u64::MAX);
    }
}
