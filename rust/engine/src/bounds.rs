//! What a container may do at most, from its spec: an image is data from outside and cannot give it more.

use std::collections::BTreeSet;

use serde_json::Value;

/// What the new container's spec grants at most.
#[derive(Debug, Clone)]
pub struct Bounds {
    /// Capabilities as a bit mask: those that any program of the container could ever have.
    pub capabilities: u64,
    /// The bounding set: more than `capabilities` where process.noNewPrivileges keeps programs from gaining them.
    pub bounding: u64,
    /// process.noNewPrivileges.
    pub no_new_privs: bool,
    /// The user id that processes are confined to: they cannot change it without CAP_SETUID.
    pub only_uid: Option<u32>,
    /// The group ids that processes are confined to, without CAP_SETGID. The first is the primary one.
    pub only_gids: Option<Vec<u32>>,
    /// The RLIMIT_* numbers that process.rlimits sets.
    pub limits: Vec<usize>,
    /// Whether linux.namespaces has an IPC namespace that is made for the container.
    pub has_own_ipc: bool,
    /// What linux.sysctl sets, as paths under /proc/sys.
    pub sysctls: BTreeSet<String>,
}

const CAP_SETGID: u64 = 6;
const CAP_SETUID: u64 = 7;
const CAP_SYS_ADMIN: u64 = 21;
/// For timers that wake a machine from sleep (timer_create(2), timerfd_create(2)).
pub const CAP_WAKE_ALARM: u64 = 35;

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

/// Names of resource limits by number (asm-generic/resource.h).
const LIMITS: [&str; 16] = [
    "CPU",
    "FSIZE",
    "DATA",
    "STACK",
    "CORE",
    "RSS",
    "NPROC",
    "NOFILE",
    "MEMLOCK",
    "AS",
    "LOCKS",
    "SIGPENDING",
    "MSGQUEUE",
    "NICE",
    "RTPRIO",
    "RTTIME",
];

fn limit(entry: &Value) -> Option<usize> {
    let name = entry["type"].as_str()?.strip_prefix("RLIMIT_")?;
    LIMITS.iter().position(|l| *l == name)
}

/// Whether a config.json has a namespace of a kind made for the container; an empty one tells nothing against it.
pub fn has_own_namespace(spec: &Value, kind: &str) -> bool {
    let Some(all) = spec["linux"]["namespaces"].as_array() else {
        return spec["linux"].is_null();
    };
    let is_made = |n: &&Value| n["path"].as_str().unwrap_or_default().is_empty();
    all.iter().filter(is_made).any(|n| n["type"] == kind)
}

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
        let no_new_privs = process["noNewPrivileges"].as_bool().unwrap_or(false);
        let sets = &process["capabilities"];
        let bounding = if process.is_null() {
            u64::MAX
        } else {
            mask(&sets["bounding"])
        };
        // A program that cannot gain privileges has what it was started with at most (execve(2), capabilities(7)).
        let capabilities = match no_new_privs {
            true => bounding & mask(&sets["permitted"]),
            false => bounding,
        };
        let lacks = |capability: u64| capabilities >> capability & 1 == 0;
        let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok()).unwrap_or(0);
        let user = &process["user"];
        let more = user["additionalGids"].as_array().into_iter().flatten();
        Bounds {
            capabilities,
            bounding,
            no_new_privs,
            only_uid: lacks(CAP_SETUID).then(|| id(&user["uid"])),
            only_gids: lacks(CAP_SETGID).then(|| [&user["gid"]].into_iter().chain(more).map(id).collect()),
            limits: process["rlimits"]
                .as_array()
                .into_iter()
                .flatten()
                .filter_map(limit)
                .collect(),
            has_own_ipc: has_own_namespace(spec, "ipc"),
            sysctls: spec["linux"]["sysctl"]
                .as_object()
                .into_iter()
                .flat_map(|all| all.keys().map(|name| name.replace('.', "/")))
                .collect(),
        }
    }

    /// Whether the container may set the limits of its own IPC namespace (ipc_permissions in ipc/ipc_sysctl.c: only the
    /// root user of the namespace that it belongs to, where /proc/sys can be written, which takes a mount).
    pub fn may_change_limits(&self) -> bool {
        self.has_own_ipc && self.grants(CAP_SYS_ADMIN)
    }

    /// Whether a program of the container may have this capability.
    pub fn grants(&self, capability: u64) -> bool {
        self.capabilities >> capability & 1 == 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bounds(more: &Value) -> Bounds {
        let mut spec = serde_json::json!({"process": {"user": {"uid": 7, "gid": 8, "additionalGids": [9]},
            "capabilities": {"bounding": ["CAP_CHOWN", "CAP_KILL", "CAP_SETGID"], "permitted": ["CAP_KILL"]}}});
        for (key, value) in more.as_object().into_iter().flatten() {
            spec["process"][key] = value.clone();
        }
        Bounds::of(&spec)
    }

    #[test]
    fn bounds_come_from_the_spec() {
        let of = bounds(&Value::Null);
        assert_eq!(
            (of.capabilities, of.bounding, of.no_new_privs),
            (0b110_0001, 0b110_0001, false)
        );
        assert_eq!((of.only_uid, of.only_gids.clone()), (Some(7), None));
        assert!(of.grants(0) && !of.grants(1));
    }

    #[test]
    fn who_cannot_gain_privileges_has_what_it_was_started_with() {
        let of = bounds(&serde_json::json!({"noNewPrivileges": true}));
        assert_eq!((of.capabilities, of.bounding), (0b10_0000, 0b110_0001));
        assert_eq!((of.only_uid, of.only_gids), (Some(7), Some(vec![8, 9])));
    }

    #[test]
    fn a_namespace_with_a_path_is_somebody_elses() {
        let spec = |one: Value| serde_json::json!({"linux": {"namespaces": [{"type": "pid"}, one]}});
        let is_own = |spec: &Value| Bounds::of(spec).has_own_ipc;
        assert!(is_own(&spec(serde_json::json!({"type": "ipc"}))));
        assert!(!is_own(&spec(
            serde_json::json!({"type": "ipc", "path": "/proc/1/ns/ipc"})
        )));
        assert!(!is_own(&spec(serde_json::json!({"type": "uts"}))));
        assert!(is_own(&Value::Null));
    }

    #[test]
    fn a_spec_without_capabilities_grants_none_and_no_spec_grants_all() {
        assert_eq!(bounds(&serde_json::json!({"capabilities": null})).capabilities, 0);
        let all = Bounds::of(&Value::Null);
        assert_eq!((all.capabilities, all.only_uid, all.only_gids), (u64::MAX, None, None));
    }
}
