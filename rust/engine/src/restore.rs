//! From an image to a running container: read -> plan -> build -> fill -> resume.

use std::path::PathBuf;
use std::sync::Arc;

use serde::{Deserialize, Serialize};
use serde_json::Value;
use torpor_image::Reader;
use torpor_sys::fork;
use torpor_sys::ptrace::{self, Options};

use crate::base;
use crate::bounds::Bounds;
use crate::build::{self, Late, Objects, Skeleton};
use crate::error::{About, Result};
use crate::fill;
use crate::huge;
use crate::kinds::memory::Area;
use crate::kinds::unchanged::Unchanged;
use crate::kinds::{seccomp, shared, tmpfs, vdso, xstate};
use crate::model::Inventory;
use crate::pager::{self, Pager};
use crate::plan;
use crate::stage::{Cancel, Run, Stage, Timing};
use crate::track::{self, Tracker};

/// What to do.
#[derive(Debug, Deserialize)]
pub struct Request {
    /// The init of the new container, waiting in the launcher, in our pid namespace.
    pub pid: i32,
    /// The directory of the image.
    pub image_path: PathBuf,
    /// Let the programs run before their memory is there.
    #[serde(default)]
    pub background: bool,
    /// Note beside the image what the programs touch first.
    #[serde(default)]
    pub record_working_set: bool,
    /// From now on keep track of what is written to.
    #[serde(default)]
    pub track: bool,
    /// Where a tracker leaves its note.
    #[serde(default)]
    pub tracker: PathBuf,
    /// Connections to the outside are closed, also those that the image keeps.
    #[serde(default)]
    pub tcp_close: bool,
    /// What files that the image does not hold must still be.
    #[serde(default)]
    pub files: Unchanged,
    /// The new container's config.json: what it grants at most.
    #[serde(default)]
    pub spec: Value,
    /// The seccomp filter of that spec, as the kernel holds it.
    #[serde(default)]
    pub filter: Option<seccomp::State>,
}

/// What was done.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The container's init.
    pub pid: i32,
    /// Threads.
    pub tasks: usize,
    /// Bytes of memory that were filled before it ran.
    pub bytes: u64,
    /// Whether the rest is being filled while it runs.
    pub background: bool,
    /// What is written to from now on is kept track of.
    pub tracked: bool,
    /// Time of each stage.
    pub stages: Vec<Timing>,
    /// What the image's report said, in words.
    pub warnings: Vec<String>,
}

/// A container that runs, and who brings the rest of its memory.
#[derive(Debug)]
pub struct Restored {
    /// What was done so far.
    pub report: Report,
    /// To be finished by the caller, in this process.
    pub pager: Option<Pager>,
    /// To be held by the caller, in this process, from now on.
    pub tracker: Option<Tracker>,
}

/// Restores an image into a waiting container. `on_loaded` is called when all is there and nothing runs yet; an
/// error from it undoes everything. When this returns an error, the container's processes are gone.
pub fn restore(request: &Request, cancel: &Cancel, on_loaded: &mut dyn FnMut() -> Result<()>) -> Result<Restored> {
    let mut run = Run::new(cancel);
    torpor_sys::fd::raise_limit();
    let image = run.stage(Stage::Read, || {
        let image = Arc::new(Reader::open(&request.image_path)?);
        if request.background {
            // The pages are checked block by block, when they are needed.
            // Blobs lie before the pages: they are read while the processes are built.
            pager::verify_until(&image, image.first_page())?;
        } else {
            // What is compressed is checked again when it is unpacked.
            cancel.progress.expect(Stage::Read, image.stored_len());
            image.verify_stored(|bytes| cancel.progress.advance(bytes))?;
        }
        Ok(image)
    })?;
    let bounds = Bounds::of(&request.spec);
    let (inventory, old_vdso) = run.stage(Stage::Plan, || {
        base::check_whole(&image)?;
        let mut inventory: Inventory = image.section("metadata")?;
        if let Some(filter) = &request.filter {
            seccomp::impose(&mut inventory, filter)?;
        }
        if request.tcp_close {
            inventory.close_outside();
        }
        plan::plan(&inventory, request.pid, &bounds)?;
        xstate::plan(&inventory, &image)?;
        plan::lower(&mut inventory, request.pid, &bounds)?;
        tmpfs::plan(&inventory.tmpfs, &image, request.pid, &bounds, cancel)?;
        let old_vdso = vdso::plan(&mut inventory, &image)?;
        Ok((inventory, old_vdso))
    })?;
    let (skeleton, objects, shares) = run.stage(Stage::Build, || {
        build::build(
            &inventory,
            &image,
            request.pid,
            &bounds,
            request.files,
            request.background,
            cancel,
        )
    })?;
    let mut warnings = inventory.warnings.clone();
    let (bytes, pager, tracking) = run.stage(Stage::Fill, || {
        for process in inventory.processes.iter().filter(|p| p.body.is_some()) {
            old_vdso.rebuild(process.pid, skeleton.site(process.pid)?.memory())?;
        }
        let waits = |area: &Area| request.background && area.can_wait();
        let bytes = fill::fill(&skeleton, &inventory, &shares, &image, cancel, |area| !waits(area))?;
        let pager = if request.background {
            let missing = skeleton.missing(&inventory, &image)?;
            let record = request.record_working_set;
            Some(Pager::start(request.pid, image.clone(), missing, record)?)
        } else {
            huge::rebuild(&skeleton, &inventory, &shares)?;
            None
        };
        let tracking = if request.track {
            let (tracking, untracked) = track::begin(&skeleton, &inventory);
            warnings.extend(untracked);
            Some(tracking)
        } else {
            None
        };
        Ok((bytes, pager, tracking))
    })?;
    run.stage(Stage::Resume, || {
        let (mut skeleton, mut objects) = (skeleton, objects);
        warnings.extend(skeleton.enter_time(&inventory)?);
        for process in &inventory.processes {
            skeleton.grow_threads(process)?;
        }
        objects.open_pidfds(&skeleton, &inventory)?;
        objects.deliver(&skeleton, &inventory, &image)?;
        resume(skeleton, objects, &inventory, &image, on_loaded)
    })?;
    let tracker = tracking.and_then(|t| t.hold(&image.digest(), request.pid, &request.tracker, &mut warnings));
    let report = Report {
        pid: request.pid,
        tasks: inventory.tasks(),
        bytes,
        background: pager.is_some(),
        tracked: tracker.is_some(),
        stages: run.timings(),
        warnings,
    };
    Ok(Restored { report, pager, tracker })
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
    for (state, file) in inventory.objects.shared.iter().zip(&objects.files.shared) {
        shared::rebuild_seals(state, file)?;
    }
    skeleton.set_semaphores(inventory)?;
    let late = Late::keep(inventory, &objects)?;
    drop(objects);
    late.watch(&skeleton)?;
    for process in &inventory.processes {
        skeleton.dress_threads(process, inventory)?;
    }
    late.start(&skeleton, inventory)?;
    for process in inventory.processes.iter().rev() {
        skeleton.arm(process, inventory, image)?;
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
