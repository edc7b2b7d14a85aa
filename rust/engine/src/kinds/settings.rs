//! Limits and switches of a process, and what the C library registered for each thread.

use serde::{Deserialize, Serialize};
use torpor_sys::proc::{self, Limits};
use torpor_sys::ptrace;
use torpor_sys::remote::{Batch, Data, Results};
use torpor_sys::{Pid, RemoteAddr};

use crate::bounds::Bounds;
use crate::error::{About, Error, Result};
use crate::kinds::{numa, scheduling, xstate};

const CAP_SYS_RESOURCE: u64 = 24;

/// Settings of a process.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ProcessState {
    /// Soft and hard limits by RLIMIT_* number.
    pub limits: Limits,
    /// prctl(2) PR_GET_DUMPABLE.
    pub dumpable: i64,
    /// PR_GET_CHILD_SUBREAPER.
    pub subreaper: i32,
    /// PR_GET_THP_DISABLE.
    pub no_huge_pages: i64,
    /// PR_GET_MDWE: whether memory may not become executable.
    #[serde(default)]
    pub deny_exec: i64,
    /// PR_GET_MEMORY_MERGE: whether equal pages are looked for in all of its memory.
    #[serde(default)]
    pub memory_merge: i64,
    /// Written to /proc/PID/oom_score_adj.
    pub oom_score_adj: i32,
    /// Signal mask of /proc/PID/coredump_filter.
    pub coredump_filter: String,
    /// Execution domain (personality(2)).
    pub personality: String,
    /// membarrier(2) commands that the process registered for, as a mask.
    #[serde(default)]
    pub membarrier: i64,
    /// PR_MCE_KILL_GET.
    #[serde(default = "by_default")]
    pub memory_errors: i64,
    /// PR_GET_IO_FLUSHER.
    #[serde(default)]
    pub io_flusher: i64,
    /// Nice value of the session's autogroup (sched(7)), told by its leader.
    #[serde(default)]
    pub autogroup_nice: i32,
    /// /proc/PID/loginuid where it is not that of the container's init.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub login_uid: Option<u32>,
}

const fn allowed() -> i64 {
    1
}

const PR_MCE_KILL_DEFAULT: i64 = 2;

const fn by_default() -> i64 {
    PR_MCE_KILL_DEFAULT
}

const PR_SET_MDWE: i32 = 65;
const PR_GET_MDWE: i32 = 66;
const PR_SET_MEMORY_MERGE: i32 = 67;
const PR_GET_MEMORY_MERGE: i32 = 68;
const PR_SET_IO_FLUSHER: i32 = 57;
const PR_GET_IO_FLUSHER: i32 = 58;
const MEMBARRIER_GET_REGISTRATIONS: u64 = 1 << 9;
const ARCH_GET_CPUID: u64 = 0x1011;
const ARCH_SET_CPUID: u64 = 0x1012;
const ARCH_GET_XCOMP_PERM: u64 = 0x1022;
/// Of PR_GET_SPECULATION_CTRL: it can be set; it is as it would be without us. For the flush of the L1 cache the
/// usual state is the other one, and told by neither bit.
const PR_SPEC_PRCTL: i64 = 1;
const PR_SPEC_ENABLE: i64 = 1 << 1;
/// PR_SPEC_STORE_BYPASS, PR_SPEC_INDIRECT_BRANCH, PR_SPEC_L1D_FLUSH.
const SPECULATION_KINDS: [u64; 3] = [0, 1, 2];

/// Settings of a thread.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ThreadState {
    /// /proc/PID/comm.
    pub name: String,
    /// Head and length (set_robust_list(2)).
    pub robust_list: (RemoteAddr, u64),
    /// set_tid_address(2).
    pub clear_tid: RemoteAddr,
    /// Address, length, signature (rseq(2)).
    pub rseq: Option<(RemoteAddr, u32, u32)>,
    /// PR_GET_PDEATHSIG.
    pub parent_death_signal: i32,
    /// Its share of processors and disks.
    #[serde(flatten)]
    pub scheduling: scheduling::State,
    /// PR_GET_TIMERSLACK.
    pub timer_slack: i64,
    /// On which nodes its new pages are put.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory_policy: Option<numa::Policy>,
    /// PR_GET_TSC: PR_TSC_SIGSEGV when reading the time stamp counter is forbidden.
    #[serde(default)]
    pub time_stamp: i32,
    /// arch_prctl(2) ARCH_GET_CPUID: 0 when the instruction is forbidden.
    #[serde(default = "allowed")]
    pub cpuid: i64,
    /// PR_GET_SPECULATION_CTRL of each kind that was switched from what is usual: (kind, state).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub speculation: Vec<(u64, i64)>,
}

/// Places of answers.
#[derive(Debug)]
pub struct AskedProcess {
    dumpable: usize,
    subreaper: Data,
    no_huge_pages: usize,
    deny_exec: usize,
    memory_merge: usize,
    membarrier: usize,
    memory_errors: usize,
    io_flusher: usize,
    registers: Data,
}

/// Places of answers.
#[derive(Debug)]
pub struct AskedThread {
    clear_tid: Data,
    death: Data,
    slack: usize,
    policy: numa::Asked,
    time_stamp: Data,
    cpuid: usize,
    speculation: [usize; 3],
}

/// Asks for the settings of a process.
pub fn ask_process(batch: &mut Batch) -> AskedProcess {
    let prctl = libc::SYS_prctl;
    let (subreaper, registers) = (batch.room(8), batch.room(8));
    // Before 5.16 there are none that have to be asked for.
    let args = [ARCH_GET_XCOMP_PERM.into(), registers.into()];
    batch.may("ARCH_GET_XCOMP_PERM", libc::SYS_arch_prctl, args);
    let get = libc::PR_GET_CHILD_SUBREAPER;
    batch.must("PR_GET_CHILD_SUBREAPER", prctl, [get.into(), subreaper.into()]);
    AskedProcess {
        dumpable: batch.must("PR_GET_DUMPABLE", prctl, [libc::PR_GET_DUMPABLE.into()]),
        subreaper,
        no_huge_pages: batch.may("PR_GET_THP_DISABLE", prctl, [libc::PR_GET_THP_DISABLE.into()]),
        deny_exec: batch.may("PR_GET_MDWE", prctl, [PR_GET_MDWE.into()]),
        memory_merge: batch.may("PR_GET_MEMORY_MERGE", prctl, [PR_GET_MEMORY_MERGE.into()]),
        membarrier: batch.may(
            "membarrier",
            libc::SYS_membarrier,
            [MEMBARRIER_GET_REGISTRATIONS.into(), 0.into()],
        ),
        memory_errors: batch.may("PR_MCE_KILL_GET", prctl, [libc::PR_MCE_KILL_GET.into()]),
        io_flusher: batch.may("PR_GET_IO_FLUSHER", prctl, [PR_GET_IO_FLUSHER.into()]),
        registers,
    }
}

fn small_file(pid: Pid, name: &str) -> Result<String> {
    let path = format!("/proc/{pid}/{name}");
    std::fs::read_to_string(&path)
        .map(|s| s.trim().to_string())
        .map_err(|e| torpor_sys::Error::io("read", &path, &e))
        .about(pid, name)
}

/// The settings of a process.
pub fn answer_process(pid: Pid, init: Pid, asked: &AskedProcess, results: &Results) -> Result<ProcessState> {
    xstate::check_permission(pid, results.u64(asked.registers))?;
    Ok(ProcessState {
        limits: proc::limits(pid).about(pid, "limits")?,
        dumpable: results.raw(asked.dumpable),
        subreaper: results.i32(asked.subreaper),
        no_huge_pages: results.raw(asked.no_huge_pages).max(0),
        deny_exec: results.raw(asked.deny_exec).max(0),
        memory_merge: results.raw(asked.memory_merge).max(0),
        oom_score_adj: small_file(pid, "oom_score_adj")?.parse().unwrap_or(0),
        coredump_filter: small_file(pid, "coredump_filter")?,
        personality: small_file(pid, "personality")?,
        membarrier: results.raw(asked.membarrier).max(0),
        memory_errors: match results.raw(asked.memory_errors) {
            value @ 0.. => value,
            _ => PR_MCE_KILL_DEFAULT,
        },
        io_flusher: results.raw(asked.io_flusher).max(0),
        autogroup_nice: autogroup_nice(pid),
        login_uid: login_uid(pid, init),
    })
}

/// Asks for the settings of a thread.
pub fn ask_thread(batch: &mut Batch) -> AskedThread {
    let prctl = libc::SYS_prctl;
    let (clear_tid, death, time_stamp) = (batch.room(8), batch.room(8), batch.room(8));
    batch.may(
        "PR_GET_TID_ADDRESS",
        prctl,
        [libc::PR_GET_TID_ADDRESS.into(), clear_tid.into()],
    );
    batch.must("PR_GET_PDEATHSIG", prctl, [libc::PR_GET_PDEATHSIG.into(), death.into()]);
    batch.may("PR_GET_TSC", prctl, [libc::PR_GET_TSC.into(), time_stamp.into()]);
    let get = libc::PR_GET_SPECULATION_CTRL;
    AskedThread {
        clear_tid,
        death,
        policy: numa::ask_thread(batch),
        slack: batch.may("PR_GET_TIMERSLACK", prctl, [libc::PR_GET_TIMERSLACK.into()]),
        time_stamp,
        cpuid: batch.may("ARCH_GET_CPUID", libc::SYS_arch_prctl, [ARCH_GET_CPUID.into()]),
        speculation: SPECULATION_KINDS
            .map(|kind| batch.may("PR_GET_SPECULATION_CTRL", prctl, [get.into(), kind.into()])),
    }
}

/// Sessions share the processor fairly; where the kernel does that there is a file.
fn autogroup_nice(pid: Pid) -> i32 {
    let text = small_file(pid, "autogroup").unwrap_or_default();
    text.rsplit(' ').next().and_then(|nice| nice.parse().ok()).unwrap_or(0)
}

/// The settings of a thread.
pub fn answer_thread(
    tid: Pid,
    rseq: Option<ptrace::Rseq>,
    asked: &AskedThread,
    results: &Results,
) -> Result<ThreadState> {
    let switched = |(kind, asked): (u64, usize)| {
        let state = results.raw(asked);
        let is_usual = state <= 0 || state & PR_SPEC_PRCTL == 0 || state & PR_SPEC_ENABLE != 0;
        (!is_usual).then_some((kind, state & !PR_SPEC_PRCTL))
    };
    Ok(ThreadState {
        name: proc::stat(tid).about(tid, "stat")?.comm,
        robust_list: ptrace::robust_list(tid).about(tid, "robust futex list")?,
        clear_tid: results.u64(asked.clear_tid),
        rseq: rseq.map(|r| (r.address, r.length, r.signature)),
        parent_death_signal: results.i32(asked.death),
        scheduling: scheduling::collect(tid).about(tid, "scheduling")?,
        timer_slack: results.raw(asked.slack),
        memory_policy: asked.policy.answer(results),
        time_stamp: results.i32(asked.time_stamp),
        cpuid: results.raw(asked.cpuid),
        speculation: SPECULATION_KINDS
            .into_iter()
            .zip(asked.speculation)
            .filter_map(switched)
            .collect(),
    })
}

/// Switches of the process that must be set before its ids are. Its memory has its final protection.
pub fn rebuild_process(batch: &mut Batch, state: &ProcessState) {
    let prctl = libc::SYS_prctl;
    batch.must(
        "PR_SET_CHILD_SUBREAPER",
        prctl,
        [libc::PR_SET_CHILD_SUBREAPER.into(), state.subreaper.into()],
    );
    batch.may(
        "PR_SET_THP_DISABLE",
        prctl,
        [libc::PR_SET_THP_DISABLE.into(), state.no_huge_pages.into()],
    );
    if state.memory_merge != 0 {
        batch.must("PR_SET_MEMORY_MERGE", prctl, [PR_SET_MEMORY_MERGE.into(), 1.into()]);
    }
    if state.deny_exec != 0 {
        batch.must("PR_SET_MDWE", prctl, [PR_SET_MDWE.into(), state.deny_exec.into()]);
    }
    for command in (0..63)
        .map(|bit| 1u64 << bit)
        .filter(|c| state.membarrier as u64 & c != 0)
    {
        let what = format!("membarrier registration {command:#x}");
        batch.must(what, libc::SYS_membarrier, [command.into(), 0.into()]);
    }
    if state.memory_errors != PR_MCE_KILL_DEFAULT {
        let set = libc::PR_MCE_KILL_SET;
        batch.must(
            "PR_MCE_KILL",
            prctl,
            [libc::PR_MCE_KILL.into(), set.into(), state.memory_errors.into()],
        );
    }
    if state.io_flusher != 0 {
        batch.must("PR_SET_IO_FLUSHER", prctl, [PR_SET_IO_FLUSHER.into(), 1.into()]);
    }
    if let Ok(persona) = u64::from_str_radix(&state.personality, 16) {
        batch.must("personality", libc::SYS_personality, [persona.into()]);
    }
}

/// Limits: late, since a small one may forbid what a restore does. Lowering needs no privilege.
pub fn rebuild_limits(batch: &mut Batch, state: &ProcessState) {
    for (which, (soft, hard)) in state.limits.iter().enumerate() {
        let mut bytes = soft.to_le_bytes().to_vec();
        bytes.extend_from_slice(&hard.to_le_bytes());
        let limit = batch.data(&bytes);
        let what = format!("prlimit64 of limit {which} to {soft}, {hard}");
        batch.must(
            what,
            libc::SYS_prlimit64,
            [0.into(), which.into(), limit.into(), 0.into()],
        );
    }
}

/// # Errors
/// Refused when a hard limit of the image is above what the new container has, and it may not or cannot be raised.
pub fn plan_limits(pid: i32, wanted: &Limits, here: &Limits, bounds: &Bounds) -> Result<()> {
    for (which, (want, have)) in wanted.iter().zip(here).enumerate() {
        if want.1 <= have.1 {
            continue;
        }
        let why = if bounds.limits.contains(&which) && !bounds.grants(CAP_SYS_RESOURCE) {
            "the container's spec sets it and does not grant CAP_SYS_RESOURCE"
        } else if !torpor_sys::probe::may_raise_limits() {
            "torpor has no CAP_SYS_RESOURCE here"
        } else {
            continue;
        };
        let why = format!(
            "the image has a hard limit of {}, here it is {} and cannot be raised: {why}",
            want.1, have.1
        );
        return Err(Error::refused(pid, format!("resource limit {which}"), why));
    }
    Ok(())
}

/// Sets what is a file of /proc, from outside: `tid` is the process as we number it. Only what differs, since some of it
/// takes rights that torpor may lack.
pub fn rebuild_outside(tid: Pid, state: &ProcessState) -> Result<()> {
    let filter = u64::from_str_radix(&state.coredump_filter, 16).unwrap_or(0);
    let mut wanted = vec![
        ("coredump_filter", state.coredump_filter.clone(), format!("{filter:#x}")),
        (
            "oom_score_adj",
            state.oom_score_adj.to_string(),
            state.oom_score_adj.to_string(),
        ),
    ];
    if let Some(uid) = state.login_uid {
        wanted.push(("loginuid", uid.to_string(), uid.to_string()));
    }
    for (name, value, text) in wanted {
        if small_file(tid, name)? != value {
            write_file(tid, name, &text)?;
        }
    }
    if autogroup_nice(tid) != state.autogroup_nice {
        write_file(tid, "autogroup", &state.autogroup_nice.to_string())?;
    }
    Ok(())
}

fn write_file(pid: Pid, name: &str, text: &str) -> Result<()> {
    let path = format!("/proc/{pid}/{name}");
    let failed = |e: std::io::Error| torpor_sys::Error::io("write", format!("{path} ({text})"), &e);
    std::fs::write(&path, text).map_err(failed).about(pid, name)
}

/// The audit user of a process, where it differs from that of the container's init: all others are whoever started
/// the container, and will be again.
fn login_uid(pid: Pid, init: Pid) -> Option<u32> {
    let of = |pid| small_file(pid, "loginuid").ok()?.parse::<u32>().ok();
    of(pid).filter(|uid| of(init) != Some(*uid))
}

/// Lowers what would favour a process over what the container's init may have; says what was lowered.
pub fn lower(pid: i32, state: &mut ProcessState, init: Pid, bounds: &Bounds) -> Result<Option<String>> {
    let least: i32 = small_file(init, "oom_score_adj")?.parse().unwrap_or(0);
    if bounds.grants(CAP_SYS_RESOURCE) && torpor_sys::probe::may_raise_limits() || state.oom_score_adj >= least {
        return Ok(None);
    }
    let said = format!(
        "process {pid}: its oom_score_adj is {least} now, it was {}: the container does not grant less",
        state.oom_score_adj
    );
    state.oom_score_adj = least;
    Ok(Some(said))
}

/// What a changed id clears, so it comes after the credentials.
pub fn rebuild_after_creds(batch: &mut Batch, thread: &ThreadState) {
    let prctl = libc::SYS_prctl;
    let death = thread.parent_death_signal;
    batch.must("PR_SET_PDEATHSIG", prctl, [libc::PR_SET_PDEATHSIG.into(), death.into()]);
}

/// Whether others may look into its memory: what a changed id of any of its threads clears (commit_creds() of the kernel),
/// so it comes after the credentials of the last.
pub fn rebuild_dumpable(batch: &mut Batch, state: &ProcessState) {
    let prctl = libc::SYS_prctl;
    // 2 (suid_dumpable) cannot be set by prctl; the kernel gives it by itself where it applies.
    if state.dumpable < 2 {
        batch.must(
            "PR_SET_DUMPABLE",
            prctl,
            [libc::PR_SET_DUMPABLE.into(), state.dumpable.into()],
        );
    }
}

/// What a thread registered with the kernel. The process's memory must be complete.
pub fn rebuild_thread(batch: &mut Batch, state: &ThreadState) {
    let (head, len) = state.robust_list;
    batch.must(
        "set_robust_list",
        libc::SYS_set_robust_list,
        [head.into(), len.max(24).into()],
    );
    batch.must("set_tid_address", libc::SYS_set_tid_address, [state.clear_tid.into()]);
    if let Some((address, length, signature)) = state.rseq {
        let args = [address.into(), length.into(), 0.into(), signature.into()];
        batch.must("rseq", libc::SYS_rseq, args);
    }
    let name = batch.string(&state.name);
    batch.must("PR_SET_NAME", libc::SYS_prctl, [libc::PR_SET_NAME.into(), name.into()]);
    if state.timer_slack > 0 {
        let args = [libc::PR_SET_TIMERSLACK.into(), state.timer_slack.into()];
        batch.may("PR_SET_TIMERSLACK", libc::SYS_prctl, args);
    }
    scheduling::rebuild(batch, &state.scheduling);
    numa::rebuild_thread(batch, state.memory_policy.as_ref());
    for (kind, value) in &state.speculation {
        let args = [libc::PR_SET_SPECULATION_CTRL.into(), (*kind).into(), (*value).into()];
        batch.must(format!("PR_SET_SPECULATION_CTRL of {kind}"), libc::SYS_prctl, args);
    }
    if state.time_stamp == libc::PR_TSC_SIGSEGV {
        batch.must(
            "PR_SET_TSC",
            libc::SYS_prctl,
            [libc::PR_SET_TSC.into(), state.time_stamp.into()],
        );
    }
    if state.cpuid == 0 {
        batch.must(
            "ARCH_SET_CPUID",
            libc::SYS_arch_prctl,
            [ARCH_SET_CPUID.into(), 0.into()],
        );
    }
}
