//! From a running container to an image: freeze -> collect -> capture -> write -> finish.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use torpor_image::{Compression, HeaderInfo, Reader, Writer};
use torpor_sys::sched::Urgent;

use crate::advance::Advance;
use crate::base::{Base, MEMORY, Spaces};
use crate::capture::Captured;
use crate::collect::Collected;
use crate::error::{Error, Result};
use crate::kinds::inet::connection::Policy;
use crate::kinds::memory::Area;
use crate::stage::{Cancel, Run, Stage, Timing};
use crate::track::{AllKnown, Armed, Tracker, Tracking};
use crate::{bounds, capture, collect, freeze, guards, huge, twin};

/// What to do.
#[derive(Debug, Deserialize)]
pub struct Request {
    /// The container's init, in our pid namespace.
    pub pid: i32,
    /// The directory of the image.
    pub image_path: PathBuf,
    /// Whether the container goes on.
    #[serde(default)]
    pub leave_running: bool,
    /// Connections to the outside are kept; else they are closed in the image.
    #[serde(default)]
    pub tcp_established: bool,
    /// Connections that nobody accepted may be left out.
    #[serde(default)]
    pub tcp_skip_in_flight: bool,
    /// How memory is captured: "stop" or "background"; by default in the background when the container goes on.
    #[serde(default)]
    pub capture: Option<Capture>,
    /// The directory of the image to go on from, relative to that of the new one.
    #[serde(default)]
    pub parent_path: Option<PathBuf>,
    /// Only memory, for another checkpoint to go on from; the container goes on.
    #[serde(default)]
    pub pre_dump: bool,
    /// From now on keep track of what is written to.
    #[serde(default)]
    pub track: bool,
    /// Where a tracker leaves its note.
    #[serde(default)]
    pub tracker: PathBuf,
    /// How the image is compressed.
    #[serde(default)]
    pub compression: Compression,
    /// The container's config.json, kept in the image.
    #[serde(default)]
    pub spec: Value,
    /// What the runtime wants to know again at restore, kept in the image.
    #[serde(default)]
    pub container: Value,
}

/// How memory is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Capture {
    /// Copied while the container stands still.
    Stop,
    /// Copied from twins while it runs on.
    Background,
}

impl Request {
    fn policy(&self) -> Policy {
        Policy {
            keep: self.tcp_established,
            ends: !self.leave_running && !self.pre_dump,
            skip_waiting: self.tcp_skip_in_flight,
        }
    }

    /// A container that is to end, that is paused or must not be visited later, has nothing to gain from running on; and little is copied before
    /// a twin is made.
    fn mode(&self, stop: bool, little: bool) -> Capture {
        match self.capture {
            _ if !self.leave_running || stop => Capture::Stop,
            None if little => Capture::Stop,
            wanted => wanted.unwrap_or(Capture::Background),
        }
    }

    /// What is read before the container stops. A watch shows in the flags of a mapping and not in those of its twin, so a
    /// twin confirms nothing of what is tracked.
    fn advance(&self, tracking: &Tracking, may_assume: bool) -> Advance {
        if self.leave_running && (self.track || tracking.is_at_work()) {
            Advance::prove(self.pid)
        } else if may_assume && self.mode(false, false) == Capture::Background {
            Advance::assume(self.pid)
        } else {
            Advance::default()
        }
    }

    fn writer(&self) -> Result<Writer> {
        let mut writer = match &self.parent_path {
            Some(parent) => Writer::create_child(&self.image_path, header(), parent)?,
            None => Writer::create(&self.image_path, header())?,
        };
        writer.compress(self.compression)?;
        Ok(writer)
    }
}

/// Up to so many bytes are copied while the container stands still, rather than a twin made.
const LITTLE: u64 = 32 << 20;

/// What was done.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The image.
    pub image: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Pages with data.
    pub pages: u64,
    /// Pages that held only zeroes.
    pub zero_pages: u64,
    /// Pages that a process has in common with another: they are stored once.
    pub shared_pages: u64,
    /// Pages with data that are those of the parent.
    pub inherited_pages: u64,
    /// What is written to from now on is kept track of.
    pub tracked: bool,
    /// Threads.
    pub tasks: usize,
    /// How long the container stood still, in microseconds.
    pub pause_us: u64,
    /// Time of each stage.
    pub stages: Vec<Timing>,
    /// What was left out, in words.
    pub warnings: Vec<String>,
}

/// A container that was saved.
#[derive(Debug)]
pub struct Saved {
    /// What was done.
    pub report: Report,
    /// To be held by the caller, in this process, from now on.
    pub tracker: Option<Tracker>,
}

/// Saves a container. When this returns an error the container runs on and no image exists. `on_running` is called when
/// one that goes on does so, with how long it stood still: what is left then is done beside it.
pub fn checkpoint(request: &Request, cancel: &Cancel, on_running: &mut dyn FnMut(Duration)) -> Result<Saved> {
    match attempt(request, true, cancel, on_running)? {
        Some(saved) => Ok(saved),
        // What was assumed before the pause was not true in it: now it is read in the pause.
        None => attempt(request, false, cancel, on_running)?.ok_or_else(|| Error::nonsense("nothing was assumed")),
    }
}

/// `None` when what was assumed has turned out to be wrong.
fn attempt(
    request: &Request,
    may_assume: bool,
    cancel: &Cancel,
    on_running: &mut dyn FnMut(Duration),
) -> Result<Option<Saved>> {
    let mut run = Run::new(cancel);
    torpor_sys::fd::raise_limit();
    // Before anything is stopped: a directory that cannot take an image is the commonest mistake.
    let mut writer = run.stage(Stage::Write, || request.writer())?;
    let tracking = Tracking::find(&request.tracker)?;
    let mut advance = request.advance(&tracking, may_assume);
    // On a busy machine most of a pause is waiting for a processor.
    let urgent = request.leave_running.then(Urgent::begin);
    let frozen = run.stage(Stage::Freeze, || freeze::freeze(request.pid))?;
    if request.mode(frozen.was_paused(), false) == Capture::Stop {
        // Without a twin nothing can be confirmed.
        advance.believe_only_proof();
    }
    let mut collected = run.stage(Stage::Collect, || {
        collect::collect(
            &frozen,
            advance,
            &tracking,
            request.pre_dump,
            bounds::has_own_namespace(&request.spec, "ipc"),
            request.policy(),
            &mut |bytes| {
                cancel.check()?;
                Ok(writer.append_blob(bytes)?)
            },
        )
    })?;
    // A visit to a thread that runs beside others must not touch what decides on their calls.
    let stop = frozen.was_paused() || collected.inventory.dispatches();
    if stop && collected.sources.iter().any(|s| s.is_assumed) {
        return Ok(None);
    }
    let since = frozen.since;
    let mut pause = Duration::ZERO;
    let mut confirmed = true;
    let (frozen, captured, tracking) = run.stage(Stage::Capture, || {
        let (tracking, known) = watch(request, tracking, writer.parent().map(AsRef::as_ref), &mut collected)?;
        let base = writer
            .parent()
            .map_or_else(Base::default, |p| Base::of(p, known, &collected));
        let little = base.changed(&collected).is_some_and(|bytes| bytes <= LITTLE);
        let mut captured = Captured::default();
        let frozen = match request.mode(stop, little) {
            Capture::Stop if request.leave_running && little => {
                captured.add(&capture::in_pause(&collected, &base, &mut writer, cancel)?);
                base.note(&mut collected)?;
                let kept = capture::keep(&collected, &base, cancel)?;
                frozen.release()?;
                drop(urgent);
                pause = since.elapsed();
                on_running(pause);
                captured.add(&kept.store(&base, &mut writer)?);
                None
            }
            Capture::Stop => {
                captured.add(&capture::capture(&collected, &base, &mut writer, cancel)?);
                huge::collect(&mut collected, Some)?;
                guards::collect(&mut collected, Some, |_| true)?;
                // Memory is in the file now: a container that goes on need not wait for the disk.
                let frozen = if request.leave_running {
                    frozen.release().map(|()| None)?
                } else {
                    Some(frozen)
                };
                drop(urgent);
                pause = since.elapsed();
                if frozen.is_none() {
                    on_running(pause);
                }
                frozen
            }
            Capture::Background => {
                captured.add(&capture::in_pause(&collected, &base, &mut writer, cancel)?);
                guards::collect(&mut collected, Some, |area| !area.is_inherited())?;
                let twins = twin::make(&collected.sources)?;
                frozen.release()?;
                drop(urgent);
                pause = since.elapsed();
                let twin = |pid| twins.of(pid);
                confirmed = twins.confirm(&collected.sources)?;
                if confirmed {
                    on_running(pause);
                    let read = capture::from(&collected, &base, twin, &mut writer, cancel);
                    // That a twin is dead says more than that it cannot be read.
                    twins.check()?;
                    captured.add(&read?);
                    huge::collect(&mut collected, twin)?;
                    guards::collect(&mut collected, twin, Area::is_inherited)?;
                }
                twins.check()?;
                twins.dismiss()?;
                None
            }
        };
        captured.inherited += base.inherit(&mut writer)?;
        // When every page that one may have in common with another is there, those of the parent too.
        writer.share(&captured.shares);
        if let (Some(parent), count @ 1..) = (writer.parent(), base.untracked(&collected)) {
            let text = format!(
                "{count} of {} processes were not tracked since {} was made: all of their memory was compared with it",
                collected.sources.len(),
                parent.path().display()
            );
            collected.inventory.warnings.push(text);
        }
        Ok((frozen, captured, tracking))
    })?;
    if !confirmed {
        return Ok(None);
    }
    let committed = run.stage(Stage::Write, || {
        if request.pre_dump {
            writer.add_section(MEMORY, &Spaces::of(&collected.inventory))?;
        } else {
            writer.add_section("metadata", &collected.inventory)?;
            for word in collected.inventory.requires() {
                writer.require(word)?;
            }
        }
        writer.add_section("spec", &request.spec)?;
        writer.add_section("container", &request.container)?;
        Ok(writer)
    });
    let committed = run.stage(Stage::Finish, || Ok(committed?.commit()?))?;
    if let Some(frozen) = frozen {
        frozen.kill(request.pid)?;
        if let Some(hold) = collected.hold.take() {
            hold.bury();
        }
        pause = since.elapsed();
    }
    let mut warnings = collected.inventory.warnings.clone();
    let tracker = tracking.and_then(|t| t.hold(&committed.digest, request.pid, &request.tracker, &mut warnings));
    let report = Report {
        image: committed.path,
        bytes: committed.bytes,
        pages: captured.pages,
        zero_pages: captured.zeroes,
        shared_pages: captured.shared(),
        inherited_pages: captured.inherited,
        tracked: tracker.is_some(),
        tasks: collected.inventory.tasks(),
        pause_us: pause.as_micros().try_into().unwrap_or(u64::MAX),
        stages: run.timings(),
        warnings,
    };
    Ok(Some(Saved { report, tracker }))
}

/// What was written to since the parent was made. Begins to track, or goes on with it, if that is asked for. All threads
/// stand still, and what is captured is what their memory holds now.
fn watch(
    request: &Request,
    tracking: Tracking,
    parent: Option<&Reader>,
    collected: &mut Collected,
) -> Result<(Option<Tracking>, AllKnown)> {
    let is_known = parent.is_some_and(|parent| tracking.is_since(&parent.digest()));
    if !request.track {
        let known = if is_known {
            tracking.known(collected)?
        } else {
            AllKnown::new()
        };
        return Ok((None, known));
    }
    let Armed {
        tracking,
        known,
        warnings,
    } = tracking.arm(collected)?;
    collected.inventory.warnings.extend(warnings);
    Ok((Some(tracking), if is_known { known } else { AllKnown::new() }))
}

fn header() -> HeaderInfo {
    HeaderInfo::new(env!("CARGO_PKG_VERSION"))
}
