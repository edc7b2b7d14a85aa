//! From an image to a running container: read -> plan -> build -> fill -> resume.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use torpor_image::Reader;
use torpor_sys::fork;
use torpor_sys::ptrace::{self, Options};

use crate::build::{self, Objects, Skeleton};
use crate::error::{About, Result};
use crate::fill;
use crate::kinds::{shared, tmpfs};
use crate::model::Inventory;
use crate::plan::{self, Bounds};
use crate::stage::{Cancel, Run, Stage, Timing};

/// What to do.
#[derive(Debug, Deserialize)]
pub struct Request {
    /// The init of the new container, waiting in the launcher, in our pid namespace.
    pub pid: i32,
    /// The directory of the image.
    pub image_path: PathBuf,
    /// The new container's config.json: what it grants at most.
    #[serde(default)]
    pub spec: Value,
}

/// What was done.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The container's init.
    pub pid: i32,
    /// Threads.
    pub tasks: usize,
    /// Bytes of memory that were filled.
    pub bytes: u64,
    /// Time of each stage.
    pub stages: Vec<Timing>,
    /// What the image's report said, in words.
    pub warnings: Vec<String>,
}

/// Restores an image into a waiting container. `on_loaded` is called when all is there and nothing runs yet; an
/// error from it undoes everything. When this returns an error, the container's processes are gone.
pub fn restore(request: &Request, cancel: &Cancel, on_loaded: &mut dyn FnMut() -> Result<()>) -> Result<Report> {
    let mut run = Run::new(cancel);
    torpor_sys::fd::raise_limit();
    let image = run.stage(Stage::Read, || {
        let image = Reader::open(&request.image_path)?;
        image.verify()?;
        Ok(image)
    })?;
    let bounds = Bounds::of(&request.spec);
    let inventory: Inventory = run.stage(Stage::Plan, || {
        let inventory: Inventory = image.section("metadata")?;
        plan::plan(&inventory, request.pid, &bounds)?;
        tmpfs::plan(&inventory.tmpfs, &image, request.pid, &bounds, cancel)?;
        Ok(inventory)
    })?;
    let (skeleton, objects) = run.stage(Stage::Build, || {
        build::build(&inventory, &image, request.pid, &bounds, cancel)
    })?;
    let bytes = run.stage(Stage::Fill, || fill::fill(&skeleton, &inventory, &image, cancel))?;
    run.stage(Stage::Resume, || {
        resume(skeleton, objects, &inventory, &image, on_loaded)
    })?;
    Ok(Report {
        pid: request.pid,
        tasks: inventory.tasks(),
        bytes,
        stages: run.timings(),
        warnings: inventory.warnings,
    })
}

/// Completes every process, and lets all go at once: only when nothing can fail any more.
fn resume(
    skeleton: Skeleton,
    objects: Objects,
    inventory: &Inventory,
    image: &Reader,
    on_loaded: &mut dyn FnMut() -> Result<()>,
) -> Result<()> {
    for process in &inventory.processes {
        skeleton.dress(process, inventory, &objects)?;
    }
    for (state, file) in inventory.objects.shared.iter().zip(&objects.shared) {
        shared::rebuild_seals(state, file)?;
    }
    drop(objects);
    for process in &inventory.processes {
        skeleton.dress_threads(process, inventory)?;
    }
    for process in &inventory.processes {
        skeleton.arm(process, image)?;
    }
    on_loaded()?;
    let tids = skeleton.tids().to_vec();
    for tid in &tids {
        ptrace::set_options(*tid, Options::NONE).about(*tid, "thread")?;
    }
    stop_again(&skeleton, inventory)?;
    skeleton.finish();
    for tid in tids {
        // One that was killed meanwhile is no reason to stop half way.
        let _ = ptrace::detach(tid, 0);
    }
    Ok(())
}

/// Processes that were stopped by a signal stop again before they run.
fn stop_again(skeleton: &Skeleton, inventory: &Inventory) -> Result<()> {
    for process in &inventory.processes {
        let stopped = process
            .body
            .as_ref()
            .is_some_and(|b| b.threads.iter().any(|t| t.signals.stopped));
        if stopped {
            fork::kill(skeleton.site(process.pid)?.tid(), libc::SIGSTOP).about(process.pid, "SIGSTOP")?;
        }
    }
    Ok(())
}
