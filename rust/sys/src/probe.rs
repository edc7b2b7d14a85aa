//! What this kernel and our own rights allow, asked once.

use std::collections::BTreeMap;

use crate::{fd, marks, mem, pagemap, pidfd, proc, track};

/// One answer: whether, and how it was found out.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ability {
    /// Usable here.
    pub ok: bool,
    /// How it was asked.
    pub how: &'static str,
}

fn has_capability(number: u32) -> bool {
    proc::status(std::process::id() as i32).is_ok_and(|s| s.cap_effective >> number & 1 == 1)
}

/// CAP_SYS_RESOURCE, which raising hard limits needs.
pub fn may_raise_limits() -> bool {
    has_capability(24)
}

/// Whether programs can put themselves into Landlock domains here.
pub fn has_landlock() -> bool {
    const VERSION: u32 = 1;
    let none: *const libc::c_void = std::ptr::null();
    // SAFETY: asks for the version of the interface; no memory is read.
    (unsafe { libc::syscall(libc::SYS_landlock_create_ruleset, none, 0usize, VERSION) }) > 0
}

/// Everything that torpor or its tests ask about.
pub fn all() -> BTreeMap<&'static str, Ability> {
    let me = std::process::id() as i32;
    let mounts = proc::mountinfo(me).unwrap_or_default();
    let cgroup = |kind: &str, option: &str| {
        mounts
            .iter()
            .any(|m| m.fs_type == kind && (option.is_empty() || m.super_options.split(',').any(|o| o == option)))
    };
    let file = |path: &str| std::path::Path::new(path).exists();
    let table: [(&'static str, bool, &'static str); 15] = [
        ("root", has_capability(21), "CAP_SYS_ADMIN in CapEff"),
        ("ptrace", has_capability(19), "CAP_SYS_PTRACE in CapEff"),
        ("raise-limits", may_raise_limits(), "CAP_SYS_RESOURCE in CapEff"),
        ("pidfd", pidfd::open(me).is_ok(), "pidfd_open(2)"),
        ("pagemap", pagemap::Pagemap::open(me).is_ok(), "/proc/self/pagemap"),
        (
            "pagemap-scan",
            pagemap::Pagemap::open(me).is_ok_and(|p| p.can_scan()),
            "PAGEMAP_SCAN ioctl",
        ),
        (
            "track-writes",
            track::is_available(),
            "userfaultfd(2), UFFD_FEATURE_WP_ASYNC",
        ),
        (
            "mapping-marks",
            marks::is_available(),
            "bpf(2), an iterator over task_vma",
        ),
        ("proc-mem", mem::Memory::open(me).is_ok(), "/proc/self/mem"),
        ("children", file("/proc/self/task"), "/proc/PID/task/TID/children"),
        ("time-namespace", file("/proc/self/ns/time"), "/proc/self/ns/time"),
        ("user-namespace", file("/proc/self/ns/user"), "/proc/self/ns/user"),
        ("freezer-v1", cgroup("cgroup", "freezer"), "mountinfo"),
        ("cgroup-v2", cgroup("cgroup2", ""), "mountinfo"),
        ("dev-null", fd::open("/dev/null", libc::O_RDWR).is_ok(), "open(2)"),
    ];
    table
        .into_iter()
        .map(|(name, ok, how)| (name, Ability { ok, how }))
        .collect()
}
