//! From a running container to an image: freeze -> collect -> capture -> write -> finish.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use torpor_image::{HeaderInfo, Writer};

use crate::error::Result;
use crate::stage::{Cancel, Run, Stage, Timing};
use crate::{capture, collect, freeze};

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
    /// The container's config.json, kept in the image.
    #[serde(default)]
    pub spec: Value,
    /// What the runtime wants to know again at restore, kept in the image.
    #[serde(default)]
    pub container: Value,
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
    let mut run = Run::new(cancel);
    torpor_sys::fd::raise_limit();
    // Before anything is stopped: a directory that cannot take an image is the commonest mistake.
    let mut writer = run.stage(Stage::Write, || Ok(Writer::create(&request.image_path, header())?))?;
    let frozen = run.stage(Stage::Freeze, || freeze::freeze(request.pid))?;
    let collected = run.stage(Stage::Collect, || {
        collect::collect(&frozen, &mut |bytes| Ok(writer.append_blob(bytes)?))
    })?;
    let captured = run.stage(Stage::Capture, || capture::capture(&collected, &mut writer, cancel))?;
    // Memory is in the file now: a container that goes on need not wait for the disk.
    let since = frozen.since;
    let (frozen, mut pause) = match request.leave_running {
        true => {
            frozen.release()?;
            (None, since.elapsed())
        }
        false => (Some(frozen), since.elapsed()),
    };
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
    Ok(Report {
        image: committed.path,
        bytes: committed.bytes,
        pages: captured.pages,
        zero_pages: captured.zeroes,
        tasks: collected.inventory.tasks(),
        pause_us: pause.as_micros().try_into().unwrap_or(u64::MAX),
        stages: run.timings(),
        warnings: collected.inventory.warnings,
    })
}

fn header() -> HeaderInfo {
    HeaderInfo::new(env!("CARGO_PKG_VERSION"))
}
