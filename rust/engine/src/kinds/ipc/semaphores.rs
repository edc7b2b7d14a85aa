//! System V semaphores (semop(2)): values, who changed each last, and what happens to them when a process ends (SEM_UNDO).
//!
//! Nothing shows the latter. But a process can be made to ask: an operation with SEM_UNDO fails with ERANGE if what is
//! to be undone would leave the range of a short, and that is looked at before the operation is found to have to
//! wait (perform_atomic_semop in ipc/sem.c). One that fails in both cases changes nothing, and its error is the answer.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};
use torpor_sys::fork::Idler;
use torpor_sys::remote::{Batch, Results};
use torpor_sys::sysv::{self, Kind};
use torpor_sys::{Pid, kcmp};

use super::limits::{Values, number};
use super::{IdMaps, Owner, Scene, name};
use crate::error::{About, Error, Result};

/// A set of semaphores.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Its id.
    pub id: i32,
    /// Whose it is.
    #[serde(flatten)]
    pub owner: Owner,
    /// The value of each.
    pub values: Vec<u16>,
    /// The process that changed each last: 0 for none, and for one that has ended or is not saved.
    pub pids: Vec<i32>,
    /// Whether it was ever used by semop(2): programs tell by that (sem_otime) whether somebody has initialised it.
    pub was_used: bool,
}

/// What is done to a semaphore when a process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Undo {
    /// The set.
    pub set: i32,
    /// Which of it.
    pub number: u16,
    /// What is added.
    pub adjust: i32,
}

/// The greatest value of a semaphore (linux/sem.h).
const SEMVMX: i32 = 32767;

/// # Errors
/// Refused: a set that could not be made again.
pub(super) fn collect(scene: &Scene<'_>, id: i32, set: &sysv::Set, pids: &[Pid], limits: &Values) -> Result<State> {
    let (count, most) = (set.values.len() as u64, number(limits, "kernel/sem", 0));
    if count > most {
        let object = name(Kind::Sem, id, set.owner.key);
        let why = format!("there are {count}, and kernel.sem was lowered to {most} since");
        return Err(Error::unsupported(scene.init, object, why, "raise it again"));
    }
    Ok(State {
        id,
        owner: Owner::of(&set.owner, scene.maps),
        values: set.values.clone(),
        pids: pids
            .iter()
            .map(|pid| scene.inner.get(pid).copied().unwrap_or(0))
            .collect(),
        was_used: set.was_used,
    })
}

// ---- what is to be undone

/// Finds out what processes have to undo.
#[derive(Debug)]
pub struct Watch {
    sets: Vec<State>,
    /// A process that has never undone anything.
    blank: Option<Idler>,
    /// Processes seen that have a list of their own.
    seen: Vec<Pid>,
}

impl Watch {
    /// For a container that has these.
    pub fn new(sets: &[State]) -> Result<Watch> {
        let blank = if sets.is_empty() {
            None
        } else {
            Some(Idler::start().about(0, "a process to compare with")?)
        };
        Ok(Watch {
            sets: sets.to_vec(),
            blank,
            seen: Vec::new(),
        })
    }

    fn has_list(&self, tid: Pid) -> Result<bool> {
        let Some(blank) = &self.blank else { return Ok(false) };
        let same = kcmp::same(tid, blank.pid(), kcmp::Kind::SysvSem).about(tid, "kcmp")?;
        Ok(!same)
    }

    /// What a visited process has to undo. `run` runs calls in its main thread.
    ///
    /// # Errors
    /// Refused: a list that is shared by others than the threads of one process.
    pub fn ask(
        &mut self,
        pid: Pid,
        threads: &[Pid],
        run: &mut dyn FnMut(&Batch) -> Result<Results>,
        warnings: &mut Vec<String>,
    ) -> Result<Vec<Undo>> {
        const KIND: kcmp::Kind = kcmp::Kind::SysvSem;
        for &tid in threads {
            let is_other = tid != pid && self.has_list(tid)? && !kcmp::same(pid, tid, KIND).about(tid, "kcmp")?;
            if is_other {
                let why = format!("it is a thread of process {pid} and has some of its own");
                return Err(Error::unsupported(
                    tid,
                    "semaphore adjustments (CLONE_SYSVSEM)",
                    why,
                    "",
                ));
            }
        }
        if !self.has_list(pid)? {
            return Ok(Vec::new());
        }
        for &other in &self.seen {
            if kcmp::same(pid, other, KIND).about(pid, "kcmp")? {
                let why = format!("it shares them with process {other}, which is not carried yet");
                return Err(Error::unsupported(
                    pid,
                    "semaphore adjustments (CLONE_SYSVSEM)",
                    why,
                    "",
                ));
            }
        }
        self.seen.push(pid);
        search(pid, &self.sets, run, warnings)
    }
}

/// One operation: number, by how much, whether to be undone.
type Operation = (u16, i16, bool);

fn encode(operations: &[Operation]) -> Vec<u8> {
    const SEM_UNDO: i16 = 0x1000;
    let mut bytes = Vec::new();
    for &(number, by, undo) in operations {
        let flags = libc::IPC_NOWAIT as i16 | if undo { SEM_UNDO } else { 0 };
        bytes.extend_from_slice(&number.to_le_bytes());
        bytes.extend_from_slice(&by.to_le_bytes());
        bytes.extend_from_slice(&flags.to_le_bytes());
    }
    bytes
}

fn add(batch: &mut Batch, what: String, set: i32, operations: &[Operation], must: bool) -> usize {
    let bytes = encode(operations);
    let data = batch.data(&bytes);
    let args = [set.into(), data.into(), operations.len().into()];
    match must {
        true => batch.must(what, libc::SYS_semop, args),
        false => batch.may(what, libc::SYS_semop, args),
    }
}

/// Operations that fail in any case: with ERANGE if at least `most` (more than 0) is to be added at the end, or, when that is
/// negative, at most that. `value` is that of the semaphore.
fn question(number: u16, value: u16, most: i32) -> Vec<Operation> {
    let mut all = Vec::new();
    let mut value = i32::from(value);
    let mut bring = |all: &mut Vec<Operation>, to: i32, undo: bool| {
        if to != value {
            all.push((number, (to - value) as i16, undo));
        }
        value = to;
    };
    if most > 0 {
        // Taking away what is added again at the end.
        bring(&mut all, SEMVMX + 1 - most, false);
        bring(&mut all, 0, true);
    } else {
        // The last one that does not fit in a short is asked for in two steps.
        let more = SEMVMX + 2 + most;
        for by in [more.min(SEMVMX), more - more.min(SEMVMX)]
            .into_iter()
            .filter(|by| *by > 0)
        {
            bring(&mut all, 0, false);
            bring(&mut all, by, true);
        }
        bring(&mut all, 0, false);
    }
    all.push((number, -1, false));
    all
}

/// One semaphore that is adjusted: by at least `low` and less than `high`, upwards or downwards.
struct Range {
    set: i32,
    number: u16,
    value: u16,
    sign: i32,
    low: i32,
    high: i32,
}

impl Range {
    fn middle(&self) -> i32 {
        self.low + (self.high - self.low) / 2
    }
}

/// How many calls are made in one stop.
const AT_ONCE: usize = 200;

fn search(
    pid: Pid,
    sets: &[State],
    run: &mut dyn FnMut(&Batch) -> Result<Results>,
    warnings: &mut Vec<String>,
) -> Result<Vec<Undo>> {
    let of_set = |set: &State| {
        let one = |(number, value): (usize, &u16)| (set.id, number as u16, *value);
        set.values.iter().enumerate().map(one).collect::<Vec<_>>()
    };
    // Of a set that was never used nothing is to be undone; and asking would make the end of the process count as its
    // first use (exit_sem in ipc/sem.c).
    let used = sets.iter().filter(|set| set.was_used);
    let all: Vec<(i32, u16, u16)> = used.flat_map(of_set).collect();
    let mut open = Vec::new();
    let mut hidden = BTreeSet::new();
    for group in all.chunks(AT_ONCE / 2) {
        let both = |&(set, number, value): &(i32, u16, u16)| [1, -1].map(|most| (set, question(number, value, most)));
        let questions: Vec<(i32, Vec<Operation>)> = group.iter().flat_map(both).collect();
        let answers = ask(pid, &questions, run)?;
        for (&(set, number, value), answers) in group.iter().zip(answers.chunks(2)) {
            let sign = match (answers[0], answers[1]) {
                (Some(false), Some(false)) => continue,
                (Some(true), _) => 1,
                (_, Some(true)) => -1,
                _ => {
                    hidden.insert(set);
                    continue;
                }
            };
            let high = if sign > 0 { SEMVMX + 1 } else { SEMVMX + 2 };
            open.push(Range {
                set,
                number,
                value,
                sign,
                low: 1,
                high,
            });
        }
    }
    warnings.extend(hidden.iter().map(|set| {
        format!(
            "process {pid} may not use System V semaphores {set}: what it would undo at its end, if anything, is lost"
        )
    }));
    open.chunks_mut(AT_ONCE).try_for_each(|group| narrow(pid, group, run))?;
    let undo = |r: &Range| Undo {
        set: r.set,
        number: r.number,
        adjust: r.sign * r.low,
    };
    Ok(open.iter().map(undo).collect())
}

/// Halves ranges until each has one number in it.
fn narrow(pid: Pid, group: &mut [Range], run: &mut dyn FnMut(&Batch) -> Result<Results>) -> Result<()> {
    while group.iter().any(|r| r.high - r.low > 1) {
        let of = |r: &Range| (r.set, question(r.number, r.value, r.sign * r.middle()));
        let questions: Vec<(i32, Vec<Operation>)> = group.iter().map(of).collect();
        let answers = ask(pid, &questions, run)?;
        for (range, answer) in group.iter_mut().zip(answers) {
            let middle = range.middle();
            match answer {
                Some(true) => range.low = middle,
                _ => range.high = middle.max(range.low + 1),
            }
        }
    }
    Ok(())
}

/// Whether each question is answered with yes; `None` where the process may not ask.
fn ask(
    pid: Pid,
    questions: &[(i32, Vec<Operation>)],
    run: &mut dyn FnMut(&Batch) -> Result<Results>,
) -> Result<Vec<Option<bool>>> {
    let mut batch = Batch::new();
    let calls: Vec<usize> = questions
        .iter()
        .map(|(set, operations)| add(&mut batch, String::new(), *set, operations, false))
        .collect();
    let results = run(&batch)?;
    calls.iter().map(|call| answer(pid, results.raw(*call))).collect()
}

fn answer(pid: Pid, returned: i64) -> Result<Option<bool>> {
    match -returned as i32 {
        libc::ERANGE => Ok(Some(true)),
        libc::EAGAIN => Ok(Some(false)),
        libc::EACCES => Ok(None),
        other => {
            let why = format!("asking for them failed with error {other}");
            Err(Error::unsupported(pid, "semaphore adjustments (SEM_UNDO)", why, ""))
        }
    }
}

// ---- making all of it again

/// Makes a set, all 0, in the namespace of the calling thread.
pub(super) fn rebuild(state: &State, maps: &IdMaps) -> torpor_sys::Result<()> {
    let owner = state.owner.outside(maps);
    super::make(Kind::Sem, state.id, &owner, || {
        sysv::make_set(&owner, state.values.len())
    })?;
    sysv::own_set(state.id, &owner)
}

/// Gives a process what it has to undo, while all semaphores are 0: they are again afterwards.
pub fn rebuild_undo(batch: &mut Batch, undo: &Undo) {
    let Undo { set, number, adjust } = *undo;
    let mut rest = adjust;
    while rest != 0 {
        let by = rest.clamp(-SEMVMX, SEMVMX);
        // What is done with SEM_UNDO is undone, and done the other way at the end.
        let operations = if by > 0 {
            [(number, by as i16, false), (number, -by as i16, true)]
        } else {
            [(number, -by as i16, true), (number, by as i16, false)]
        };
        add(batch, format!("semop of {set} with SEM_UNDO"), set, &operations, true);
        rest -= by;
    }
}

/// Gives semaphores their values in the process that changed them last.
pub fn rebuild_values(batch: &mut Batch, sets: &[State], pid: i32) {
    const SETVAL: i32 = 16;
    for set in sets {
        for (number, (value, _)) in set.values.iter().zip(&set.pids).enumerate().filter(|s| *s.1.1 == pid) {
            let what = format!("value of semaphore {number} of {}", set.id);
            if set.was_used {
                add(batch, what, set.id, &[(number as u16, *value as i16, false)], true);
            } else {
                let args = [set.id.into(), number.into(), SETVAL.into(), u32::from(*value).into()];
                batch.must(what, libc::SYS_semctl, args);
            }
        }
    }
}

/// Gives the other ones theirs, in the namespace of the calling thread.
pub(super) fn finish(set: &State, lives: &dyn Fn(i32) -> bool) -> torpor_sys::Result<()> {
    let rest = set.values.iter().zip(&set.pids).enumerate().filter(|s| !lives(*s.1.1));
    for (number, (value, _)) in rest {
        if set.was_used {
            sysv::operate(set.id, &[(number as u16, *value as i16)])?;
        } else if *value != 0 {
            sysv::set_value(set.id, number, *value)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel does with operations on one semaphore that never wait (perform_atomic_semop_slow in ipc/sem.c).
    fn perform(operations: &[Operation], value: u16, adjust: i32) -> i32 {
        let (mut value, mut adjust) = (i32::from(value), adjust);
        for &(_, by, undo) in operations {
            if (by == 0 && value != 0) || value + i32::from(by) < 0 {
                return libc::EAGAIN;
            }
            value += i32::from(by);
            if value > SEMVMX {
                return libc::ERANGE;
            }
            if undo {
                adjust -= i32::from(by);
                if !(-SEMVMX - 1..=SEMVMX).contains(&adjust) {
                    return libc::ERANGE;
                }
            }
        }
        0
    }

    #[test]
    fn a_question_always_fails_and_its_error_is_the_answer() {
        const NUMBERS: [i32; 9] = [-32768, -32767, -300, -2, -1, 1, 2, 300, 32767];
        for value in [0u16, 1, 5, 32766, 32767] {
            for adjust in NUMBERS.into_iter().chain([0]) {
                for most in NUMBERS {
                    let yes = if most > 0 { adjust >= most } else { adjust <= most };
                    let expected = if yes { libc::ERANGE } else { libc::EAGAIN };
                    let operations = question(0, value, most);
                    assert_eq!(perform(&operations, value, adjust), expected, "{value} {adjust} {most}");
                }
            }
        }
    }

    #[test]
    fn an_adjustment_is_made_from_zero_and_leaves_zero() {
        let mut batch = Batch::new();
        for adjust in [1, -1, 32767, -32768] {
            let undo = Undo {
                set: 0,
                number: 0,
                adjust,
            };
            rebuild_undo(&mut batch, &undo);
        }
        assert_eq!(batch.size(), 5 * 64 + 5 * 16 + 16 - 4, "the last one takes two calls");
    }
}
