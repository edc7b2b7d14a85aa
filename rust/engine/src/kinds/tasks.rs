//! The container's tasks by the names that the kernel gives us for them.

use std::collections::BTreeSet;

use torpor_sys::{Pid, proc};

/// The living processes that are saved.
#[derive(Debug)]
pub struct Tasks {
    members: BTreeSet<Pid>,
}

impl Tasks {
    /// `members` in our numbering.
    pub fn of(members: impl IntoIterator<Item = Pid>) -> Tasks {
        Tasks {
            members: members.into_iter().collect(),
        }
    }

    /// The living processes.
    pub fn members(&self) -> impl Iterator<Item = Pid> {
        self.members.iter().copied()
    }

    /// The container's number for one of its processes, threads or zombies; `None` for any other task.
    pub fn inner(&self, pid: Pid) -> Option<i32> {
        if pid <= 0 {
            return None;
        }
        let status = proc::status(pid).ok()?;
        let is_zombie = || proc::stat(pid).is_ok_and(|s| s.state == 'Z' && self.members.contains(&s.ppid));
        let is_ours = self.members.contains(&status.tgid) || is_zombie();
        status.ns_pids.last().copied().filter(|_| is_ours)
    }

    /// The container's number for a process group with a living member.
    pub fn inner_group(&self, group: Pid) -> Option<i32> {
        let of_member = |pid: &Pid| {
            let groups = proc::status(*pid).ok()?.ns_pgids;
            (groups.first() == Some(&group)).then(|| groups.last().copied())?
        };
        self.members.iter().find_map(of_member)
    }
}
