//! Cgroups that a container makes below its own: not carried. A restore puts all of its tasks into the group of the new
//! container, with the limits of its spec.

use torpor_sys::proc::{self, CgroupEntry};
use torpor_sys::{Pid, cgroup};

use crate::error::{About, Error, Result};
use crate::freeze::FrozenProcess;

/// What is compared with.
#[derive(Debug)]
pub struct Watch {
    of_init: Vec<CgroupEntry>,
    /// A thread may be in another group than its process (cgroup v1).
    has_below: bool,
}

impl Watch {
    /// Looks at the container's init.
    pub fn of(init: Pid) -> Result<Watch> {
        Ok(Watch {
            of_init: proc::cgroup(init).about(init, "cgroup")?,
            has_below: cgroup::has_groups_below(init).about(init, "cgroup")?,
        })
    }

    /// # Errors
    /// Refused: a task that is in another group than init.
    pub fn check(&self, process: &FrozenProcess) -> Result<()> {
        let count = if self.has_below { process.threads.len() } else { 1 };
        for &tid in process.threads.iter().take(count) {
            let all = proc::cgroup(tid).about(tid, "cgroup")?;
            let Some(other) = all.iter().find(|e| !self.of_init.contains(e)) else {
                continue;
            };
            let named = if other.controllers.is_empty() {
                "cgroup".to_owned()
            } else {
                format!("cgroup ({})", other.controllers.join(","))
            };
            let why = format!(
                "it is in {}, which is not the group of the container's init",
                other.path
            );
            let remedy = "move it to that before the checkpoint";
            return Err(Error::unsupported(tid, named, why, remedy));
        }
        Ok(())
    }
}
