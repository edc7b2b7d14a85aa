//! Limits the spec asks for and this process may not set. Kubernetes and Docker daemons run us with all rights, people
//! in restricted containers do not: what is not allowed is lowered, and said.

use std::collections::HashSet;
use std::fs;

use caps::{CapSet, Capability};
use libcontainer::oci_spec::runtime::{PosixRlimitBuilder, PosixRlimitType, Process};
use nix::sys::resource::{Resource, getrlimit};

use crate::error::reason;
use crate::privilege;

/// Where the program will run, as far as its rights go.
#[derive(Debug, Clone, Copy)]
pub struct Ground {
    /// In a user namespace of its own a process has every capability, but none over limits.
    pub user_namespace: bool,
}

impl Ground {
    pub fn capabilities(self) -> HashSet<Capability> {
        if self.user_namespace {
            return caps::runtime::thread_all_supported();
        }
        // The bounding set, because that is what a program keeps at most; root holds all of it.
        caps::read(None, CapSet::Bounding).unwrap_or_default()
    }

    fn may_raise_limits(self) -> bool {
        !self.user_namespace && caps::has_cap(None, CapSet::Effective, Capability::CAP_SYS_RESOURCE).unwrap_or(false)
    }

    /// Lowers in `process` what cannot be had; the warnings say what.
    pub fn adapt(self, process: &mut Process) -> Vec<String> {
        let mut warnings = self.adapt_rlimits(process);
        warnings.extend(adapt_oom_score(process));
        let missing = privilege::missing(process, &self.capabilities());
        if !missing.is_empty() {
            warnings.push(format!("capabilities not available here: {}", missing.join(", ")));
        }
        warnings
    }

    fn adapt_rlimits(self, process: &mut Process) -> Vec<String> {
        if self.may_raise_limits() {
            return Vec::new();
        }
        let mut warnings = Vec::new();
        let mut limits = process.rlimits().clone().unwrap_or_default();
        for limit in &mut limits {
            let Some(most) = hard_limit(limit.typ()).filter(|most| *most < limit.hard()) else {
                continue;
            };
            warnings.push(format!(
                "{} lowered to {most}: raising it needs CAP_SYS_RESOURCE",
                limit.typ()
            ));
            let lowered = PosixRlimitBuilder::default()
                .typ(limit.typ())
                .hard(most)
                .soft(limit.soft().min(most))
                .build();
            if let Ok(lowered) = lowered {
                *limit = lowered;
            }
        }
        if !warnings.is_empty() {
            process.set_rlimits(Some(limits));
        }
        warnings
    }
}

fn hard_limit(kind: PosixRlimitType) -> Option<u64> {
    getrlimit(resource(kind)?).ok().map(|(_, hard)| hard)
}

fn resource(kind: PosixRlimitType) -> Option<Resource> {
    Some(match kind {
        PosixRlimitType::RlimitCpu => Resource::RLIMIT_CPU,
        PosixRlimitType::RlimitFsize => Resource::RLIMIT_FSIZE,
        PosixRlimitType::RlimitData => Resource::RLIMIT_DATA,
        PosixRlimitType::RlimitStack => Resource::RLIMIT_STACK,
        PosixRlimitType::RlimitCore => Resource::RLIMIT_CORE,
        PosixRlimitType::RlimitRss => Resource::RLIMIT_RSS,
        PosixRlimitType::RlimitNproc => Resource::RLIMIT_NPROC,
        PosixRlimitType::RlimitNofile => Resource::RLIMIT_NOFILE,
        PosixRlimitType::RlimitMemlock => Resource::RLIMIT_MEMLOCK,
        PosixRlimitType::RlimitAs => Resource::RLIMIT_AS,
        PosixRlimitType::RlimitLocks => Resource::RLIMIT_LOCKS,
        PosixRlimitType::RlimitSigpending => Resource::RLIMIT_SIGPENDING,
        PosixRlimitType::RlimitMsgqueue => Resource::RLIMIT_MSGQUEUE,
        PosixRlimitType::RlimitNice => Resource::RLIMIT_NICE,
        PosixRlimitType::RlimitRtprio => Resource::RLIMIT_RTPRIO,
        PosixRlimitType::RlimitRttime => Resource::RLIMIT_RTTIME,
    })
}

/// libcontainer sets the score on this process before it forks; doing so now tells whether we may.
fn adapt_oom_score(process: &mut Process) -> Option<String> {
    let wanted = process.oom_score_adj()?;
    let error = fs::write("/proc/self/oom_score_adj", wanted.to_string()).err()?;
    process.set_oom_score_adj(None);
    Some(format!("oomScoreAdj {wanted} not set: {}", reason(&error)))
}

#[cfg(test)]
mod tests {
    use libcontainer::oci_spec::runtime::{PosixRlimitBuilder, PosixRlimitType, Process};

    use super::Ground;

    #[test]
    fn hard_limits_are_lowered_where_they_cannot_be_raised() {
        let mut process = Process::default();
        let limit = PosixRlimitBuilder::default()
            .typ(PosixRlimitType::RlimitNofile)
            .hard(u64::MAX)
            .soft(100u64)
            .build();
        process.set_rlimits(limit.ok().map(|limit| vec![limit]));
        let inside = Ground { user_namespace: true };
        assert_eq!(inside.adapt_rlimits(&mut process).len(), 1);
        let limits = process.rlimits().clone().unwrap_or_default();
        assert!(limits[0].hard() < u64::MAX);
        assert_eq!(limits[0].soft(), 100);
    }
}
