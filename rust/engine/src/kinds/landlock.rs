//! Landlock domains (landlock(7)). No interface shows them, so none can be rebuilt, and a restore without would let a
//! sandbox out: a thread in a domain is refused.
//!
//! What tells is the one thing that every domain forbids whatever its rules are: to look at a task that is not in it
//! (security/landlock/task.c, hook_ptrace_access_check). A stranger is made, a blank process with the ids of the thread
//! and no capabilities, which the thread may look at by all other rules (ptrace(2), PTRACE_MODE_READ_REALCREDS), and is
//! compared with by kcmp(2).

use std::collections::BTreeMap;

use serde_json::Value;
use torpor_sys::proc::{self, Status};
use torpor_sys::remote::{Batch, Results};
use torpor_sys::{Pid, fork, namespace, probe};

use super::creds::{self, IdMaps};
use crate::bounds::Bounds;
use crate::build::Skeleton;
use crate::error::{About, Error, Result};
use crate::model::{Inventory, Process};

const CAP_SYS_ADMIN: u64 = 21;
const KCMP_VM: i32 = 1;

/// Strangers, by user and group.
#[derive(Debug)]
pub struct Watch<'a> {
    init: Pid,
    maps: &'a IdMaps,
    enabled: bool,
    strangers: BTreeMap<(u32, u32), (i32, Skeleton)>,
}

impl<'a> Watch<'a> {
    /// For the container of `init`.
    pub fn new(init: Pid, maps: &'a IdMaps) -> Watch<'a> {
        Watch {
            init,
            maps,
            enabled: probe::has_landlock(),
            strangers: BTreeMap::new(),
        }
    }

    /// Asks in a thread whether it may look at a stranger; nothing if it cannot be in a domain: entering one takes
    /// no_new_privs or CAP_SYS_ADMIN.
    pub fn ask(&mut self, batch: &mut Batch, tid: i32, status: &Status) -> Result<Option<usize>> {
        let possible = status.no_new_privs || status.cap_bounding >> CAP_SYS_ADMIN & 1 == 1;
        if !self.enabled || !possible {
            return Ok(None);
        }
        let stranger = self.stranger(status)?;
        let args = [tid.into(), stranger.into(), KCMP_VM.into(), 0.into(), 0.into()];
        Ok(Some(batch.may("kcmp", libc::SYS_kcmp, args)))
    }

    fn stranger(&mut self, status: &Status) -> Result<i32> {
        let (uid, gid) = self.maps.inner(status.uids[0], status.gids[0]);
        if let Some((inner, _)) = self.strangers.get(&(uid, gid)) {
            return Ok(*inner);
        }
        let (inner, skeleton) = blank(self.init)?;
        let mut batch = Batch::new();
        creds::become_plain(&mut batch, uid, gid);
        skeleton.site(inner)?.run(&batch).about(self.init, "stranger")?;
        self.strangers.insert((uid, gid), (inner, skeleton));
        Ok(inner)
    }
}

/// A process of ours in the container's namespaces of users and processes, with nothing in its memory, stopped; its id
/// there. It dies with us.
fn blank(init: Pid) -> Result<(i32, Skeleton)> {
    let own = proc::namespace(std::process::id() as Pid, "user").about(init, "user namespace")?;
    let kinds: &[&str] = if proc::namespace(init, "user").about(init, "user namespace")? == own {
        &["pid"]
    } else {
        &["user", "pid"]
    };
    let (line, listen) = fork::socket_pair().about(init, "stranger")?;
    let wait = || {
        use std::os::fd::AsRawFd;
        let keep = [listen.as_raw_fd()];
        if fork::become_independent(c"torpor-stranger", &keep).is_ok() {
            fork::read_byte(&listen);
        }
        0
    };
    let pid = namespace::within(init, kinds, || fork::fork(wait)).about(init, "stranger")?;
    let inner = proc::status(pid)
        .about(pid, "status")?
        .ns_pids
        .last()
        .copied()
        .unwrap_or(pid);
    let inventory = Inventory {
        processes: vec![Process::without_body(inner)],
        ..Inventory::default()
    };
    let skeleton = Skeleton::blank(&inventory, pid, &Bounds::of(&Value::Null))?;
    // It waits for us no more: it is stopped, and ends when it is let go.
    drop(line);
    Ok((inner, skeleton))
}

/// # Errors
/// Refused: the thread may not look at one who is like itself.
pub fn check(tid: Pid, asked: Option<usize>, results: &Results) -> Result<()> {
    // Other security modules say EACCES.
    if asked.is_some_and(|call| results.raw(call) == -i64::from(libc::EPERM)) {
        let why = "it is in one, which nothing can read back: a restored thread would be free of it";
        return Err(Error::unsupported(
            tid,
            "Landlock domain",
            why,
            "start the program without its sandbox",
        ));
    }
    Ok(())
}
