//! The stages of a checkpoint and of a restore: one list, used by errors, reports, failpoints and benches.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::error::{Error, Result};
use crate::progress::Progress;

/// A stage.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs)]
pub enum Stage {
    Freeze,
    Collect,
    Capture,
    Write,
    Finish,
    Read,
    Plan,
    Build,
    Fill,
    Resume,
    Page,
}

impl Stage {
    /// Its name in messages and failpoints.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Freeze => "freeze",
            Stage::Collect => "collect",
            Stage::Capture => "capture",
            Stage::Write => "write",
            Stage::Finish => "finish",
            Stage::Read => "read",
            Stage::Plan => "plan",
            Stage::Build => "build",
            Stage::Fill => "fill",
            Stage::Resume => "resume",
            Stage::Page => "page",
        }
    }
}

/// How long a stage took.
#[derive(Debug, Clone, Serialize)]
pub struct Timing {
    /// Which.
    pub name: Stage,
    /// Microseconds.
    pub us: u64,
}

/// What the work and whoever asked for it tell each other: whether it is still wanted, looked at between steps, and how
/// far it is.
#[derive(Debug, Default)]
pub struct Cancel {
    raised: AtomicBool,
    /// How far it is.
    pub progress: Progress,
}

impl Cancel {
    /// Asks for the work to be undone.
    pub fn cancel(&self) {
        self.raised.store(true, Ordering::Release);
    }

    /// # Errors
    /// [`Error::Cancelled`] once asked for.
    pub fn check(&self) -> Result<()> {
        if self.raised.load(Ordering::Acquire) {
            Err(Error::Cancelled { stage: None })
        } else {
            Ok(())
        }
    }
}

/// Runs stages one after another, keeping their times.
#[derive(Debug)]
pub struct Run<'c> {
    /// Whether to go on.
    pub cancel: &'c Cancel,
    timings: Vec<Timing>,
}

impl<'c> Run<'c> {
    /// Nothing run yet.
    pub fn new(cancel: &'c Cancel) -> Run<'c> {
        Run {
            cancel,
            timings: Vec::new(),
        }
    }

    /// Runs one stage: its errors carry its name.
    pub fn stage<T>(&mut self, stage: Stage, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = Instant::now();
        // The last stages have a point of no return inside: a failure is tried before it, not after.
        let last = matches!(stage, Stage::Finish | Stage::Resume);
        let before = || if last { failpoint(stage, self.cancel) } else { Ok(()) };
        let after = || if last { Ok(()) } else { failpoint(stage, self.cancel) };
        let result = self.cancel.check().and_then(|()| before()).and_then(|()| work());
        let result = result.and_then(|value| after().map(|()| value));
        let us = start.elapsed().as_micros().try_into().unwrap_or(u64::MAX);
        self.timings.push(Timing { name: stage, us });
        result.map_err(|e| e.in_stage(stage))
    }

    /// The times so far.
    pub fn timings(&self) -> Vec<Timing> {
        self.timings.clone()
    }
}

/// What `TORPOR_FAILPOINT=name[:error|kill|late|hang]` asks for at the point `name`.
fn wanted(name: &str) -> Option<&'static str> {
    static WANTED: OnceLock<String> = OnceLock::new();
    let wanted = WANTED.get_or_init(|| std::env::var("TORPOR_FAILPOINT").unwrap_or_default());
    let (point, action) = wanted.split_once(':').unwrap_or((wanted, "error"));
    (point == name).then_some(action)
}

/// A point inside a stage, where a tracee is in a state of its own: tests kill us there, or let it fail.
pub fn point(name: &str) -> Result<()> {
    match wanted(name) {
        None => Ok(()),
        Some("kill") => Ok(torpor_sys::fork::kill(std::process::id() as i32, 9)?),
        // The tracee has time to come to its next stop, which nobody looks at any more.
        Some("late") => {
            std::thread::sleep(std::time::Duration::from_millis(200));
            Ok(torpor_sys::fork::kill(std::process::id() as i32, 9)?)
        }
        Some(_) => Err(Error::Failpoint { stage: None }),
    }
}

/// What tests use to stop us at the end of a stage, while what it made still stands.
pub fn failpoint(stage: Stage, cancel: &Cancel) -> Result<()> {
    let Some(action) = wanted(stage.name()) else {
        return Ok(());
    };
    match action {
        "kill" => {
            torpor_sys::fork::kill(std::process::id() as i32, 9)?;
            Ok(())
        }
        "hang" => loop {
            std::thread::sleep(std::time::Duration::from_millis(20));
            cancel.check()?;
        },
        _ => Err(Error::Failpoint { stage: Some(stage) }),
    }
}
