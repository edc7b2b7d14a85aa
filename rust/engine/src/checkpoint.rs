//! From a running container to an image: freeze -> collect -> capture -> write -> finish.

use std::path::PathBuf;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use torpor_image::{HeaderInfo, Writer};

use crate::advance::Advance;
use crate::error::{Error, Result};
use crate::stage::{Cancel, Run, Stage, Timing};
use crate::{capture, collect, freeze, huge, twin};

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
    /// How memory is captured: "stop" or "background"; by default in the background when the container goes on.
    #[serde(default)]
    pub capture: Option<Capture>,
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
    /// A container that is to end, or that is paused, has nothing to gain from running on.
    fn mode(&self, paused: bool) -> Capture {
        match self.capture {
            _ if !self.leave_running || paused => Capture::Stop,
            wanted => wanted.unwrap_or(Capture::Background),
        }
    }
}

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
    /// Threads.
    pub tasks: usize,
    /// How long the container stood still, in microseconds.
    pub pause_us: u64,
    /// Time of each stage.
    pub stages: Vec<Timing>,
    /// What was left out, in words.
    pub warnings: Vec<String>,
}

/// Saves a container. When this returns an error the container runs on and no image exists.
pub fn checkpoint(request: &Request, cancel: &Cancel) -> Result<Report> {
    let in_advance = request.mode(false) == Capture::Background;
    match attempt(request, in_advance, cancel)? {
        Some(report) => Ok(report),
        // What was read before the pause was not true in it: now it is read in the pause.
        None => attempt(request, false, cancel)?.ok_or_else(|| Error::nonsense("nothing was assumed")),
    }
}

/// `None` when what was read in advance has turned out to be wrong.
fn attempt(request: &Request, in_advance: bool, cancel: &Cancel) -> Result<Option<Report>> {
    let mut run = Run::new(cancel);
    torpor_sys::fd::raise_limit();
    // Before anything is stopped: a directory that cannot take an image is the commonest mistake.
    let mut writer = run.stage(Stage::Write, || Ok(Writer::create(&request.image_path, header())?))?;
    let mut advance = match in_advance {
        true => Advance::read(request.pid),
        false => Advance::default(),
    };
    let frozen = run.stage(Stage::Freeze, || freeze::freeze(request.pid))?;
    if request.mode(frozen.was_paused()) == Capture::Stop {
        // Without a twin nothing can be confirmed.
        advance = Advance::default();
    }
    let mut collected = run.stage(Stage::Collect, || {
        collect::collect(&frozen, advance, &mut |bytes| {
            cancel.check()?;
            Ok(writer.append_blob(bytes)?)
        })
    })?;
    let since = frozen.since;
    let mut pause = Duration::ZERO;
    let mut confirmed = true;
    let (frozen, captured) = run.stage(Stage::Capture, || match request.mode(frozen.was_paused()) {
        Capture::Stop => {
            let captured = capture::capture(&collected, &mut writer, cancel)?;
            huge::collect(&mut collected, Some)?;
            // Memory is in the file now: a container that goes on need not wait for the disk.
            let frozen = if request.leave_running {
                frozen.release().map(|()| None)?
            } else {
                Some(frozen)
            };
            pause = since.elapsed();
            Ok((frozen, captured))
        }
        Capture::Background => {
            let mut captured = capture::in_pause(&collected, &mut writer, cancel)?;
            let twins = twin::make(&collected.sources)?;
            frozen.release()?;
            pause = since.elapsed();
            confirmed = twins.confirm(&collected.sources)?;
            if confirmed {
                captured.add(&capture::from(&collected, |pid| twins.of(pid), &mut writer, cancel)?);
                huge::collect(&mut collected, |pid| twins.of(pid))?;
            }
            twins.check()?;
            twins.dismiss()?;
            Ok((None, captured))
        }
    })?;
    if !confirmed {
        return Ok(None);
    }
    let committed = run.stage(Stage::Write, || {
        writer.add_section("metadata", &collected.inventory)?;
        writer.add_section("spec", &request.spec)?;
        writer.add_section("container", &request.container)?;
        Ok(writer)
    });
    let committed = run.stage(Stage::Finish, || Ok(committed?.commit()?))?;
    if let Some(frozen) = frozen {
        frozen.kill(request.pid)?;
        pause = since.elapsed();
    }
    Ok(Some(Report {
        image: committed.path,
        bytes: committed.bytes,
        pages: captured.pages,
        zero_pages: captured.zeroes,
        tasks: collected.inventory.tasks(),
        pause_us: pause.as_micros().try_into().unwrap_or(u64::MAX),
        stages: run.timings(),
        warnings: collected.inventory.warnings,
    }))
}

fn header() -> HeaderInfo {
    HeaderInfo::new(env!("CARGO_PKG_VERSION"))
}
