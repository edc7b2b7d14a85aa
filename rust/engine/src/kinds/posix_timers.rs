//! Timers made by timer_create(2): their ids, whom they signal, and the time that was left.
//!
//! A timer whose signal is pending is made to expire again instead of queueing the signal by hand: only a signal of
//! its own counts expirations that were missed, starts the next period, and goes away with the timer.

use serde::{Deserialize, Serialize};
use torpor_sys::remote::{Arg, Batch, Data, Results};
use torpor_sys::{Pid, proc};

use super::signals::Info;
use crate::bounds::CAP_WAKE_ALARM;
use crate::error::{About, Error, Result};

const PR_TIMER_CREATE_RESTORE_IDS: i32 = 77;
const NONE: i32 = 1;
const THREAD_ID: i32 = 4;
/// More ids than this are not counted through where the kernel cannot be told one.
const MAX_ID: i32 = 200_000;
/// How many timers are asked for or made in one stop.
const AT_ONCE: usize = 200;

/// A timer. Times are in nanoseconds of its clock.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Its id.
    pub id: i32,
    /// Its clock, as the kernel keeps it: negative for those that count processor time.
    pub clock: i32,
    /// SIGEV_*.
    pub notify: i32,
    /// The thread that is signalled, with SIGEV_THREAD_ID.
    #[serde(default)]
    pub thread: i32,
    /// The signal.
    pub signal: i32,
    /// sigev_value.
    pub value: u64,
    /// Time until it expires; 0 when it does not.
    pub left: u64,
    /// Time between expirations; 0 for a single one.
    pub interval: u64,
    /// It has expired and its signal has not been taken yet.
    #[serde(default)]
    pub pending: bool,
}

impl State {
    fn counts_processor_time(&self) -> bool {
        self.clock < 0
    }
}

/// The four lines of one timer in /proc/PID/timers, the task still in our numbering.
fn parse(lines: &[&str]) -> Option<State> {
    let get = |key: &str| lines.iter().find_map(|l| l.strip_prefix(key)?.strip_prefix(": "));
    let (signal, value) = get("signal")?.split_once('/')?;
    let (how, whom) = get("notify")?.split_once('/')?;
    let (kind, task) = whom.split_once('.')?;
    let how = match how {
        "signal" => 0,
        "none" => NONE,
        "thread" => 2,
        _ => return None,
    };
    let to_thread = kind == "tid";
    Some(State {
        id: get("ID")?.parse().ok()?,
        clock: get("ClockID")?.parse().ok()?,
        notify: if to_thread { how | THREAD_ID } else { how },
        thread: if to_thread { task.parse().ok()? } else { 0 },
        signal: signal.parse().ok()?,
        value: u64::from_str_radix(value, 16).ok()?,
        left: 0,
        interval: 0,
        pending: false,
    })
}

fn list(pid: Pid) -> Result<Vec<State>> {
    let path = format!("/proc/{pid}/timers");
    let text = std::fs::read_to_string(&path)
        .map_err(|e| torpor_sys::Error::io("read", &path, &e))
        .about(pid, "POSIX timers")?;
    let lines: Vec<&str> = text.lines().collect();
    let unknown = || Error::unsupported(pid, "POSIX timers", "/proc/PID/timers has an unknown form", "");
    let mut all = Vec::new();
    for one in lines.chunk_by(|_, next| !next.starts_with("ID: ")) {
        all.push(parse(one).ok_or_else(unknown)?);
    }
    all.sort_by_key(|t| t.id);
    Ok(all)
}

/// Asks inside the process. `run` runs a batch there; `can_wake` says whether it has CAP_WAKE_ALARM.
///
/// # Errors
/// Refused: a timer of the processor time of one of several threads, as nobody can tell of which.
pub fn collect(
    pid: Pid,
    capabilities: u64,
    run: &mut dyn FnMut(&Batch) -> Result<Results>,
    warnings: &mut Vec<String>,
) -> Result<Vec<State>> {
    let mut all = list(pid)?;
    for timer in &mut all {
        check_clock(pid, timer, capabilities)?;
        name_thread(timer);
    }
    for group in all.chunks_mut(AT_ONCE) {
        let mut batch = Batch::new();
        let asked: Vec<(Data, usize)> = group.iter().map(|t| ask(&mut batch, t)).collect();
        let results = run(&batch)?;
        for (timer, (room, overrun)) in group.iter_mut().zip(asked) {
            let word = |at: usize| results.u64(room.skip(at));
            timer.interval = word(0) * 1_000_000_000 + word(8);
            timer.left = word(16) * 1_000_000_000 + word(24);
            if results.raw(overrun) > 0 {
                let id = timer.id;
                warnings.push(format!(
                    "process {pid}: POSIX timer {id}: timer_getoverrun(2) of its last signal tells 0 after a restore"
                ));
            }
        }
    }
    Ok(all)
}

fn ask(batch: &mut Batch, timer: &State) -> (Data, usize) {
    let room = batch.room(32);
    let args = [timer.id.into(), room.into()];
    batch.must("timer_gettime", libc::SYS_timer_gettime, args);
    let overrun = batch.may("timer_getoverrun", libc::SYS_timer_getoverrun, [timer.id.into()]);
    (room, overrun)
}

/// A negative clock is of a process or thread: its id, inverted, above three bits that say what is counted.
fn check_clock(pid: Pid, timer: &State, capabilities: u64) -> Result<()> {
    const PER_THREAD: i32 = 4;
    let refuse = |why: &str| {
        let object = format!("POSIX timer {}", timer.id);
        Err(Error::unsupported(pid, object, why, "delete the timer"))
    };
    let threads = || proc::threads(pid).about(pid, "threads");
    if !timer.counts_processor_time() {
        let wakes = [8, 9].contains(&timer.clock);
        if wakes && capabilities >> CAP_WAKE_ALARM & 1 == 0 {
            return refuse("it can wake the machine, which the process may not any more (CAP_WAKE_ALARM)");
        }
        return Ok(());
    }
    let whose = !(timer.clock >> 3);
    if whose == 0 {
        if timer.clock & PER_THREAD != 0 && threads()?.len() > 1 {
            return refuse("it counts the processor time of one of several threads, and the kernel does not say which");
        }
        return Ok(());
    }
    let inner = |tid: &Pid| proc::status(*tid).ok()?.ns_pids.last().copied();
    if threads()?.iter().any(|tid| inner(tid) == Some(whose)) {
        return Ok(());
    }
    refuse("it counts the processor time of another process")
}

/// Turns the thread into the container's number for it. One that has ended gets no signals.
fn name_thread(timer: &mut State) {
    if timer.notify & THREAD_ID == 0 {
        return;
    }
    match proc::status(timer.thread) {
        Ok(status) => timer.thread = status.ns_pids.last().copied().unwrap_or(0),
        Err(_) => (timer.notify, timer.thread) = (NONE, 0),
    }
}

/// The timer that queued a signal (siginfo with si_code SI_TIMER).
fn timer_of(info: &Info) -> Option<i32> {
    const SI_TIMER: i32 = -2;
    let code = info.0[1] as u32 as i32;
    (code == SI_TIMER).then_some(info.0[2] as u32 as i32)
}

/// Takes the signals of timers out of a queue: the timers will send them again.
pub fn take_pending(timers: &mut [State], queue: &mut Vec<Info>) {
    queue.retain(|info| {
        let timer = timer_of(info).and_then(|id| timers.iter_mut().find(|t| t.id == id && t.notify != NONE));
        if let Some(timer) = timer {
            timer.pending = true;
            return false;
        }
        true
    });
}

/// Makes the timers, none of them started. `run` runs a batch in a thread of the process, as the user that it is.
pub fn rebuild(pid: i32, timers: &[State], run: &dyn Fn(&Batch) -> Result<Results>) -> Result<()> {
    if timers.is_empty() {
        return Ok(());
    }
    let can_be_told = choose_ids(true, run)?;
    for group in timers.chunks(AT_ONCE) {
        if can_be_told {
            create(pid, group, run)?;
        } else {
            group.iter().try_for_each(|timer| count_to(pid, timer, run))?;
        }
    }
    choose_ids(false, run).map(drop)
}

/// Since Linux 6.15 a process can choose the ids of its timers.
fn choose_ids(on: bool, run: &dyn Fn(&Batch) -> Result<Results>) -> Result<bool> {
    let mut batch = Batch::new();
    let args = [
        PR_TIMER_CREATE_RESTORE_IDS.into(),
        i32::from(on).into(),
        0.into(),
        0.into(),
        0.into(),
    ];
    let call = batch.may("PR_TIMER_CREATE_RESTORE_IDS", libc::SYS_prctl, args);
    Ok(run(&batch)?.raw(call) == 0)
}

/// Adds the call; its id will be in the piece of data that is returned.
fn timer_create(batch: &mut Batch, timer: &State) -> Data {
    let id = batch.data(&(timer.id as u32 as u64).to_le_bytes());
    // struct sigevent: value, signal, how, thread; 64 bytes.
    let mut event = timer.value.to_le_bytes().to_vec();
    event.extend_from_slice(&timer.signal.to_le_bytes());
    event.extend_from_slice(&timer.notify.to_le_bytes());
    event.extend_from_slice(&timer.thread.to_le_bytes());
    event.resize(64, 0);
    let event = batch.data(&event);
    let args = [timer.clock.into(), event.into(), id.into()];
    batch.must(
        format!("timer_create of timer {}", timer.id),
        libc::SYS_timer_create,
        args,
    );
    id
}

fn create(pid: i32, timers: &[State], run: &dyn Fn(&Batch) -> Result<Results>) -> Result<()> {
    let mut batch = Batch::new();
    let ids: Vec<Data> = timers.iter().map(|t| timer_create(&mut batch, t)).collect();
    let results = run(&batch)?;
    match timers.iter().zip(ids).find(|(t, id)| results.i32(*id) != t.id) {
        Some((timer, _)) => Err(wrong_id(pid, timer)),
        None => Ok(()),
    }
}

fn wrong_id(pid: i32, timer: &State) -> Error {
    let object = format!("POSIX timer {}", timer.id);
    let why = "this kernel does not give it the id that it had";
    Error::unsupported(pid, object, why, "restore on Linux 6.15 or newer")
}

/// Older kernels count up: other timers are made and deleted until it is this one's turn.
fn count_to(pid: i32, timer: &State, run: &dyn Fn(&Batch) -> Result<Results>) -> Result<()> {
    let mut batch = Batch::new();
    let id = timer_create(&mut batch, timer);
    let got = run(&batch)?.i32(id);
    if got == timer.id {
        return Ok(());
    }
    if got > timer.id || timer.id > MAX_ID {
        return Err(wrong_id(pid, timer));
    }
    let mut batch = Batch::new();
    batch.must("timer_delete", libc::SYS_timer_delete, [got.into()]);
    run(&batch)?;
    let between: Vec<i32> = (got + 1..timer.id).collect();
    for group in between.chunks(AT_ONCE) {
        let mut batch = Batch::new();
        for _ in group {
            let id = timer_create(&mut batch, timer);
            batch.must("timer_delete", libc::SYS_timer_delete, [Arg::Word(id)]);
        }
        run(&batch)?;
    }
    create(pid, std::slice::from_ref(timer), run)
}

/// Starts them with the time that was left.
pub fn start(timers: &[State], run: &dyn Fn(&Batch) -> Result<Results>) -> Result<()> {
    for group in timers.chunks(AT_ONCE) {
        let now = clocks(group, run)?;
        let mut batch = Batch::new();
        for (timer, now) in group.iter().zip(now) {
            if timer.left > 0 || timer.pending {
                set(&mut batch, timer, now);
            }
        }
        run(&batch)?;
    }
    Ok(())
}

/// Has expired, and goes on.
fn is_between_periods(timer: &State) -> bool {
    timer.pending && timer.interval > 0 && timer.left > 0 && !timer.counts_processor_time()
}

/// What the clocks of those timers say that [`is_between_periods`] is true of.
fn clocks(timers: &[State], run: &dyn Fn(&Batch) -> Result<Results>) -> Result<Vec<Option<u64>>> {
    let mut batch = Batch::new();
    let ask = |timer: &State| {
        is_between_periods(timer).then(|| {
            let room = batch.room(16);
            let clock = match timer.clock {
                8 => libc::CLOCK_REALTIME,
                9 => libc::CLOCK_BOOTTIME,
                clock => clock,
            };
            batch.must("clock_gettime", libc::SYS_clock_gettime, [clock.into(), room.into()]);
            room
        })
    };
    let asked: Vec<Option<Data>> = timers.iter().map(ask).collect();
    if batch.is_empty() {
        return Ok(vec![None; timers.len()]);
    }
    let results = run(&batch)?;
    let time = |room: Data| results.u64(room) * 1_000_000_000 + results.u64(room.skip(8));
    Ok(asked.into_iter().map(|room| room.map(time)).collect())
}

/// One whose signal is pending expires at once. If it goes on, it is told that it did so one period before it will
/// again, so that it keeps its beat.
fn set(batch: &mut Batch, timer: &State, now: Option<u64>) {
    let last = now
        .and_then(|now| now.saturating_add(timer.left).checked_sub(timer.interval))
        .filter(|last| *last > 0);
    let (flags, first) = match (timer.pending, last) {
        (true, Some(last)) => (libc::TIMER_ABSTIME, last),
        (true, None) => (0, 1),
        (false, _) => (0, timer.left),
    };
    let words = [timer.interval, first].map(|t| [t / 1_000_000_000, t % 1_000_000_000]);
    let bytes: Vec<u8> = words.as_flattened().iter().flat_map(|w| w.to_le_bytes()).collect();
    let value = batch.data(&bytes);
    let args = [timer.id.into(), flags.into(), value.into(), 0.into()];
    batch.must(
        format!("timer_settime of timer {}", timer.id),
        libc::SYS_timer_settime,
        args,
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_proc() {
        let text = [
            "ID: 7",
            "signal: 44/000000000000004d",
            "notify: signal/tid.12",
            "ClockID: -6",
        ];
        let expected = State {
            id: 7,
            clock: -6,
            notify: THREAD_ID,
            thread: 12,
            signal: 44,
            value: 77,
            left: 0,
            interval: 0,
            pending: false,
        };
        assert_eq!(parse(&text), Some(expected));
    }

    #[test]
    fn signals_of_timers_are_told_from_others() {
        let text = ["ID: 7", "signal: 44/0", "notify: signal/pid.1", "ClockID: 1"];
        let mut timers: Vec<State> = parse(&text).into_iter().collect();
        let info = |code: i32, id: u64| {
            let mut words = [0; 16];
            (words[0], words[1], words[2]) = (44, u64::from(code as u32), id);
            Info(words)
        };
        let mut queue = vec![info(-2, 7), info(-2, 8), info(-1, 7)];
        take_pending(&mut timers, &mut queue);
        assert_eq!(queue, vec![info(-2, 8), info(-1, 7)]);
        assert!(timers[0].pending);
    }
}
