//! The tracer: a forked process that does the work, so that killing the caller never leaves a stopped container.
//!
//! Caller and tracer are joined by a socket. Its end tells each that the other is gone: the tracer undoes what it
//! did; the caller thaws what the tracer may have left frozen. Messages are lines of JSON.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use pyo3::prelude::*;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use torpor_engine::pager::Pager;
use torpor_engine::stage::{Cancel, Stage};
use torpor_engine::track::Tracker;
use torpor_sys::cgroup::Freezer;
use torpor_sys::{Pid, fork, wait};

use crate::errors::Failure;

/// How long a tracer may take to undo its work when its caller is gone.
const GRACE: Duration = Duration::from_secs(15);

/// What the tracer tells.
#[derive(Debug, Serialize, Deserialize)]
enum Message {
    /// Restored and stopped: may it run?
    Loaded,
    /// Saved so far that the container runs again, after so many microseconds; the caller need not wait for the rest.
    Running(u64),
    /// How far a stage is: bytes that are done, and bytes in all.
    Progress(Stage, u64, u64),
    Done(Value),
    Failed(Failure),
}

/// What the tracer does when its caller was killed in the middle of a restore.
#[derive(Debug, Default, Deserialize)]
struct Orphan {
    #[serde(default)]
    argv0_path: PathBuf,
    #[serde(default)]
    argv: Vec<String>,
    #[serde(default)]
    remove: Vec<PathBuf>,
}

/// The tracer's end of the socket.
struct Caller {
    socket: File,
    /// The work that the caller asked for is done: it may go.
    settled: Arc<AtomicBool>,
}

/// What a tracer has to tell, and what it still has to do when it has been told.
struct Ending {
    message: Message,
    after: Option<Box<dyn FnOnce()>>,
}

impl From<Message> for Ending {
    fn from(message: Message) -> Ending {
        Ending { message, after: None }
    }
}

impl Caller {
    fn tell(&mut self, message: &Message) -> std::io::Result<()> {
        let mut line = serde_json::to_vec(message).map_err(std::io::Error::other)?;
        line.push(b'\n');
        self.socket.write_all(&line)
    }

    /// Tells how far the work is, to a caller that wants to know. One that does not read misses some of it: nobody waits.
    fn report_progress(&self, cancel: &Cancel) {
        // Without a second descriptor nothing is told, and the work is done.
        let Ok(socket) = self.socket.try_clone() else { return };
        cancel.progress.listen(Box::new(move |stage, done, total| {
            if let Ok(mut line) = serde_json::to_vec(&Message::Progress(stage, done, total)) {
                line.push(b'\n');
                // A line this short goes as one buffer or not at all (net/unix/af_unix.c: unix_stream_sendmsg). A caller
                // that is gone is noticed elsewhere.
                let _ = torpor_sys::socket::send(&socket, &line, None);
            }
        }));
    }

    /// Waits for the caller's word. Anything but "go" is a no.
    fn allows(&mut self) -> bool {
        let mut word = [0; 1];
        self.socket.read_exact(&mut word).is_ok() && word == *b"g"
    }
}

/// The caller's end, and the process behind it.
struct Tracer {
    pid: Pid,
    socket: File,
    pending: Vec<u8>,
}

/// Forks a process that runs `work`. `work` gets the line to us and a flag that rises when we are gone.
/// It keeps `lock` open, when there is one, until it ends.
fn start(lock: Option<i32>, work: impl FnOnce(&mut Caller, &Cancel) -> Ending) -> Result<Tracer, Failure> {
    let failed = |e: torpor_sys::Error| Failure::new("kernel", e.to_string());
    let (ours, theirs) = fork::socket_pair().map_err(failed)?;
    let pid = fork::fork(|| in_tracer(theirs, lock, work)).map_err(failed)?;
    Ok(Tracer {
        pid,
        socket: File::from(ours),
        pending: Vec::new(),
    })
}

fn in_tracer(socket: OwnedFd, lock: Option<i32>, work: impl FnOnce(&mut Caller, &Cancel) -> Ending) -> i32 {
    let keep: Vec<i32> = lock.into_iter().chain([socket.as_raw_fd()]).collect();
    if fork::become_independent(c"torpor-tracer", &keep).is_err() {
        return 1;
    }
    wait::block_sigchld();
    let cancel = Arc::new(Cancel::default());
    let settled = Arc::new(AtomicBool::new(false));
    if let (Ok(watched), flag, settled) = (socket.try_clone(), Arc::clone(&cancel), Arc::clone(&settled)) {
        // Ends with the process.
        std::thread::spawn(move || {
            fork::wait_hangup(&watched);
            if settled.load(Ordering::Acquire) {
                return;
            }
            flag.cancel();
            // Undoing takes milliseconds. If it hangs, the kernel is the better one to undo: it lets go of all tasks
            // of a tracer that ends.
            std::thread::sleep(GRACE);
            fork::exit_now(2);
        });
    }
    let mut caller = Caller {
        socket: File::from(socket),
        settled,
    };
    let ending = work(&mut caller, &cancel);
    caller.settled.store(true, Ordering::Release);
    let _ = caller.tell(&ending.message);
    drop(caller);
    if let Some(after) = ending.after {
        after();
    }
    0
}

impl Tracer {
    /// The next message; `None` when the tracer is gone. Looks after Python's signals while it waits.
    fn next(&mut self, py: Python<'_>) -> PyResult<Option<Message>> {
        loop {
            if let Some(at) = self.pending.iter().position(|b| *b == b'\n') {
                let line: Vec<u8> = self.pending.drain(..=at).collect();
                return Ok(serde_json::from_slice(&line).ok());
            }
            py.check_signals()?;
            let got = py.detach(|| fork::read_for(&self.socket, 100));
            match got {
                Ok(Some(bytes)) if bytes.is_empty() => return Ok(None),
                Ok(Some(bytes)) => self.pending.extend_from_slice(&bytes),
                Ok(None) => {}
                Err(_) => return Ok(None),
            }
        }
    }

    fn answer(&mut self, word: &[u8]) {
        // A tracer that is gone is noticed by the next read.
        let _ = self.socket.write_all(word);
    }

    /// Hangs up and waits for the process; one that works on is waited for beside.
    fn end(self, py: Python<'_>, works_on: bool) {
        let Tracer { pid, socket, .. } = self;
        drop(socket);
        // Somebody else in this program may have waited for it already.
        let wait = move || drop(fork::wait_child(pid));
        if works_on {
            std::thread::spawn(wait);
        } else {
            py.detach(wait);
        }
    }
}

/// What the caller puts right when the tracer was killed.
struct Aftermath {
    init: Pid,
    was_frozen: bool,
    new_dirs: Vec<PathBuf>,
}

impl Aftermath {
    fn of(init: Pid, image: Option<&Path>) -> Aftermath {
        let was_frozen = Freezer::of(init)
            .ok()
            .flatten()
            .is_some_and(|f| f.is_frozen().unwrap_or(false));
        let mut new_dirs = Vec::new();
        let mut dir = image;
        while let Some(d) = dir.filter(|d| !d.as_os_str().is_empty() && !d.exists()) {
            new_dirs.push(d.to_path_buf());
            dir = d.parent();
        }
        Aftermath {
            init,
            was_frozen,
            new_dirs,
        }
    }

    fn put_right(&self) {
        if let Ok(Some(freezer)) = Freezer::of(self.init) {
            let _ = if self.was_frozen {
                freezer.freeze(Duration::from_secs(10))
            } else {
                freezer.thaw()
            };
        }
        // Twins ended with their tracer; their zombies need another one.
        let init = self.init;
        let reaper = start(None, move |_, _| {
            conclude(torpor_engine::twin::reap_orphans(init)).into()
        });
        if let Ok(Tracer { pid, socket, .. }) = reaper {
            while matches!(fork::read_for(&socket, 10_000), Ok(Some(bytes)) if !bytes.is_empty()) {}
            let _ = fork::wait_child(pid);
        }
        for dir in &self.new_dirs {
            // Only what is empty goes.
            let _ = std::fs::remove_dir(dir);
        }
    }
}

/// A request of Python.
pub fn parse<T: for<'d> Deserialize<'d>>(py: Python<'_>, request: &str) -> PyResult<T> {
    serde_json::from_str(request).map_err(|e| Failure::new("internal", format!("request: {e}")).raise(py))
}

fn conclude(result: Result<impl Serialize, torpor_engine::Error>) -> Message {
    match result {
        Ok(report) => Message::Done(serde_json::to_value(report).unwrap_or(Value::Null)),
        Err(error) => Message::Failed(error.into()),
    }
}

/// Runs a tracer to its end. `on_loaded` is asked when it wants to know whether to go on.
fn attend(
    py: Python<'_>,
    mut tracer: Tracer,
    aftermath: &Aftermath,
    on_loaded: &mut dyn FnMut(Python<'_>) -> PyResult<()>,
    on_progress: Option<&Py<PyAny>>,
) -> PyResult<String> {
    let mut refused = None;
    let outcome = loop {
        match tracer.next(py) {
            Ok(Some(Message::Loaded)) => match on_loaded(py) {
                Ok(()) => tracer.answer(b"g"),
                Err(e) => {
                    refused = Some(e);
                    tracer.answer(b"n");
                }
            },
            Ok(Some(Message::Progress(stage, done, total))) => {
                // An error from it undoes the work, as Ctrl-C does.
                if let Some(Err(e)) = on_progress.map(|f| f.call1(py, (stage.name(), done, total))) {
                    break Err(e);
                }
            }
            other => break other,
        }
    };
    let works_on = match &outcome {
        Ok(Some(Message::Done(report))) => report["background"] == true || report["tracked"] == true,
        Ok(Some(Message::Running(_))) => true,
        _ => false,
    };
    let pager = tracer.pid;
    tracer.end(py, works_on);
    if let Some(e) = refused {
        return Err(e);
    }
    match outcome? {
        Some(Message::Done(mut report)) => {
            if report["background"] == true {
                report["pager"] = pager.into();
            }
            Ok(report.to_string())
        }
        Some(Message::Running(us)) => Ok(serde_json::json!({"pause_us": us, "tracer": pager}).to_string()),
        Some(Message::Failed(failure)) => Err(failure.raise(py)),
        Some(Message::Loaded | Message::Progress(..)) | None => {
            py.detach(|| aftermath.put_right());
            let text = "the tracer process was killed; the container was left as it was";
            Err(Failure::new("tracer-died", text).raise(py))
        }
    }
}

/// A checkpoint whose caller goes when the container runs again.
#[derive(Debug, Deserialize)]
struct Detached {
    /// Where the result is left.
    report: PathBuf,
    /// A descriptor that holds the container's lock: it is held until all is done.
    lock: i32,
    /// Directories made for the image, innermost first: they go when it comes to nothing.
    made: Vec<PathBuf>,
}

#[derive(Debug, Deserialize)]
struct AsDetached {
    #[serde(default)]
    detached: Option<Detached>,
}

impl Detached {
    fn leave_word(&self, message: &Message) {
        if matches!(message, Message::Failed(_)) {
            for directory in &self.made {
                // Only what is empty goes.
                let _ = std::fs::remove_dir(directory);
            }
        }
        leave(&self.report, message);
    }
}

pub fn checkpoint(py: Python<'_>, request: &str, on_progress: Option<&Py<PyAny>>) -> PyResult<String> {
    let detached: Option<Detached> = parse::<AsDetached>(py, request)?.detached;
    let request: torpor_engine::checkpoint::Request = parse(py, request)?;
    let aftermath = Aftermath::of(request.pid, Some(&request.image_path));
    let work = |caller: &mut Caller, cancel: &Cancel| {
        let mut told = false;
        if on_progress.is_some() {
            caller.report_progress(cancel);
        }
        let result = torpor_engine::checkpoint(&request, cancel, &mut |pause| {
            if detached.is_some() {
                let us = pause.as_micros().try_into().unwrap_or(u64::MAX);
                caller.settled.store(true, Ordering::Release);
                told = caller.tell(&Message::Running(us)).is_ok();
                if !told {
                    cancel.cancel();
                }
            }
        });
        let (message, tracker) = match result {
            Err(error) => (Message::Failed(error.into()), None),
            Ok(saved) => (conclude(Ok(saved.report)), saved.tracker),
        };
        if let (Some(detached), true) = (&detached, told) {
            detached.leave_word(&message);
        }
        Ending {
            message,
            after: tracker.map(hold),
        }
    };
    let tracer = start(detached.as_ref().map(|d| d.lock), work).map_err(|f| f.raise(py))?;
    attend(py, tracer, &aftermath, &mut |_| Ok(()), on_progress)
}

pub fn restore(
    py: Python<'_>,
    request: &str,
    on_loaded: &Py<PyAny>,
    on_progress: Option<&Py<PyAny>>,
) -> PyResult<String> {
    #[derive(Deserialize)]
    struct Rest {
        #[serde(default)]
        orphan: Orphan,
        #[serde(default)]
        pager_report: Option<PathBuf>,
    }
    let rest: Rest = parse(py, request)?;
    let request: torpor_engine::restore::Request = parse(py, request)?;
    let aftermath = Aftermath::of(request.pid, None);
    let work = |caller: &mut Caller, cancel: &Cancel| {
        if on_progress.is_some() {
            caller.report_progress(cancel);
        }
        let result = torpor_engine::restore(&request, cancel, &mut || {
            let told = caller.tell(&Message::Loaded).is_ok();
            if told && caller.allows() {
                return Ok(());
            }
            Err(torpor_engine::Error::Cancelled { stage: None })
        });
        if result.is_err() && cancel.check().is_err() {
            clean_up(&rest.orphan);
        }
        match result {
            Err(error) => Message::Failed(error.into()).into(),
            Ok(restored) => {
                let message = conclude(Ok(restored.report));
                let page = restored.pager.map(|pager| {
                    let report = rest.pager_report.clone();
                    Box::new(move || page_in(pager, report)) as Box<dyn FnOnce()>
                });
                let after = page.or_else(|| restored.tracker.map(hold));
                Ending { message, after }
            }
        }
    };
    let tracer = start(None, work).map_err(|f| f.raise(py))?;
    attend(
        py,
        tracer,
        &aftermath,
        &mut |py| on_loaded.call0(py).map(drop),
        on_progress,
    )
}

/// The tracer goes on as the tracker.
fn hold(tracker: Tracker) -> Box<dyn FnOnce()> {
    Box::new(move || tracker.hold())
}

/// Brings the rest of a container's memory and leaves word of how it went.
fn page_in(pager: Pager, report: Option<PathBuf>) {
    let outcome = pager.finish();
    if let Some(path) = report {
        leave(&path, &outcome);
    }
}

/// Writes a report in one step.
fn leave(path: &Path, report: &impl Serialize) {
    let partial = path.with_extension("partial");
    // Whoever waits sees that we are gone, in any case.
    let written = serde_json::to_vec(report).is_ok_and(|json| std::fs::write(&partial, json).is_ok());
    if written {
        let _ = std::fs::rename(&partial, path);
    }
}

/// Puts right what a tracer has left that was killed when its caller was gone already.
pub fn put_right(init: Pid) {
    Aftermath::of(init, None).put_right();
}

/// Removes a half restored container whose owner is gone.
fn clean_up(orphan: &Orphan) {
    if !orphan.argv.is_empty() {
        let _ = std::process::Command::new(&orphan.argv0_path)
            .args(&orphan.argv[1..])
            .status();
    }
    for path in &orphan.remove {
        let _ = std::fs::remove_dir_all(path);
    }
}
