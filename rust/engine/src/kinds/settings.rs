//! Limits and switches of a process, and what the C library registered for each thread.

use serde::{Deserialize, Serialize};
use torpor_sys::proc::{self, Limits};
use torpor_sys::ptrace;
use torpor_sys::remote::{Batch, Data, Results};
use torpor_sys::{Pid, RemoteAddr};

use crate::error::{About, Error, Result};

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
    /// Written to /proc/PID/oom_score_adj.
    pub oom_score_adj: i32,
    /// Signal mask of /proc/PID/coredump_filter.
    pub coredump_filter: String,
    /// Execution domain (personality(2)).
    pub personality: String,
}

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
    /// Nice value.
    pub nice: i32,
    /// Scheduling policy and real-time priority.
    pub scheduling: (i32, i32),
    /// CPUs the thread may run on, as a mask.
    pub affinity: Vec<u64>,
    /// PR_GET_TIMERSLACK.
    pub timer_slack: i64,
}

/// Places of answers.
#[derive(Debug)]
pub struct AskedProcess {
    dumpable: usize,
    subreaper: Data,
    no_huge_pages: usize,
}

/// Places of answers.
#[derive(Debug)]
pub struct AskedThread {
    clear_tid: Data,
    death: Data,
    nice: usize,
    policy: usize,
    priority: Data,
    affinity: (usize, Data),
    slack: usize,
}

/// Asks for the settings of a process.
pub fn ask_process(batch: &mut Batch) -> AskedProcess {
    let prctl = libc::SYS_prctl;
    let subreaper = batch.room(8);
    let get = libc::PR_GET_CHILD_SUBREAPER;
    batch.must("PR_GET_CHILD_SUBREAPER", prctl, [get.into(), subreaper.into()]);
    AskedProcess {
        dumpable: batch.must("PR_GET_DUMPABLE", prctl, [libc::PR_GET_DUMPABLE.into()]),
        subreaper,
        no_huge_pages: batch.may("PR_GET_THP_DISABLE", prctl, [libc::PR_GET_THP_DISABLE.into()]),
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
pub fn answer_process(pid: Pid, asked: &AskedProcess, results: &Results) -> Result<ProcessState> {
    Ok(ProcessState {
        limits: proc::limits(pid).about(pid, "limits")?,
        dumpable: results.raw(asked.dumpable),
        subreaper: results.i32(asked.subreaper),
        no_huge_pages: results.raw(asked.no_huge_pages).max(0),
        oom_score_adj: small_file(pid, "oom_score_adj")?.parse().unwrap_or(0),
        coredump_filter: small_file(pid, "coredump_filter")?,
        personality: small_file(pid, "personality")?,
    })
}

/// Asks for the settings of a thread.
pub fn ask_thread(batch: &mut Batch) -> AskedThread {
    let prctl = libc::SYS_prctl;
    let (clear_tid, death, priority, cpus) = (batch.room(8), batch.room(8), batch.room(8), batch.room(128));
    batch.may(
        "PR_GET_TID_ADDRESS",
        prctl,
        [libc::PR_GET_TID_ADDRESS.into(), clear_tid.into()],
    );
    batch.must("PR_GET_PDEATHSIG", prctl, [libc::PR_GET_PDEATHSIG.into(), death.into()]);
    batch.must("sched_getparam", libc::SYS_sched_getparam, [0.into(), priority.into()]);
    AskedThread {
        clear_tid,
        death,
        nice: batch.must("getpriority", libc::SYS_getpriority, [0.into(), 0.into()]),
        policy: batch.must("sched_getscheduler", libc::SYS_sched_getscheduler, [0.into()]),
        priority,
        affinity: (
            batch.must(
                "sched_getaffinity",
                libc::SYS_sched_getaffinity,
                [0.into(), 128.into(), cpus.into()],
            ),
            cpus,
        ),
        slack: batch.may("PR_GET_TIMERSLACK", prctl, [libc::PR_GET_TIMERSLACK.into()]),
    }
}

/// The settings of a thread.
pub fn answer_thread(
    tid: Pid,
    rseq: Option<ptrace::Rseq>,
    asked: &AskedThread,
    results: &Results,
) -> Result<ThreadState> {
    let words = usize::try_from(results.raw(asked.affinity.0)).unwrap_or(0).div_ceil(8);
    Ok(ThreadState {
        name: proc::stat(tid).about(tid, "stat")?.comm,
        robust_list: ptrace::robust_list(tid).about(tid, "robust futex list")?,
        clear_tid: results.u64(asked.clear_tid),
        rseq: rseq.map(|r| (r.address, r.length, r.signature)),
        parent_death_signal: results.i32(asked.death),
        // The raw call returns 20 - nice (getpriority(2), "C library/kernel differences").
        nice: 20 - results.raw(asked.nice) as i32,
        scheduling: (results.raw(asked.policy) as i32, results.i32(asked.priority)),
        affinity: (0..words).map(|i| results.u64(asked.affinity.1.skip(i * 8))).collect(),
        timer_slack: results.raw(asked.slack),
    })
}

/// Switches of the process that must be set before its ids are.
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
/// Refused when a hard limit of the image is above what the new container may have and cannot be raised.
pub fn plan_limits(pid: i32, wanted: &Limits, here: &Limits) -> Result<()> {
    for (which, (want, have)) in wanted.iter().zip(here).enumerate() {
        if want.1 > have.1 && !torpor_sys::probe::may_raise_limits() {
            let why = format!(
                "the image has a hard limit of {}, here it is {} and cannot be raised",
                want.1, have.1
            );
            return Err(Error::refused(pid, format!("resource limit {which}"), why));
        }
    }
    Ok(())
}

/// What a changed id clears, so it comes after the credentials.
pub fn rebuild_after_creds(batch: &mut Batch, process: Option<&ProcessState>, thread: &ThreadState) {
    let prctl = libc::SYS_prctl;
    let death = thread.parent_death_signal;
    batch.must("PR_SET_PDEATHSIG", prctl, [libc::PR_SET_PDEATHSIG.into(), death.into()]);
    // 2 (suid_dumpable) cannot be set by prctl; the kernel gives it by itself where it applies.
    if let Some(state) = process.filter(|s| s.dumpable < 2) {
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
    scheduling(batch, state);
}

fn scheduling(batch: &mut Batch, state: &ThreadState) {
    let (policy, priority) = state.scheduling;
    if policy != 0 {
        let param = batch.data(&i64::from(priority).to_le_bytes());
        let args = [0.into(), policy.into(), param.into()];
        batch.must("sched_setscheduler", libc::SYS_sched_setscheduler, args);
    }
    if state.nice != 0 {
        batch.must(
            "setpriority",
            libc::SYS_setpriority,
            [0.into(), 0.into(), state.nice.into()],
        );
    }
    let bytes: Vec<u8> = state.affinity.iter().flat_map(|w| w.to_le_bytes()).collect();
    let mask = batch.data(&bytes);
    // Another machine may have other CPUs: then the thread may run where its cgroup lets it.
    batch.may(
        "sched_setaffinity",
        libc::SYS_sched_setaffinity,
        [0.into(), bytes.len().into(), mask.into()],
    );
}
