//! Tracking: what was written to since an image was made, so that the next one holds only that.
//!
//! Each address space has a watch (see `torpor_sys::track`), made inside its process and taken out. Pages are protected
//! while all threads stand still and what is being captured is known, so no write falls between. The watches live as
//! long as somebody holds them: a process named `torpor-tracker`, which notes in the container's directory which image
//! they belong to. The next checkpoint takes them over from it. When the tracker is gone the kernel forgets the
//! protection, every page counts as written, and nothing else happens to the program.
//!
//! Nothing is believed that the kernel does not say at that time: memory that was mapped again, moved or given up, an
//! address space left by execve(2) and one inherited by fork(2) are not protected, so they count as written.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use torpor_sys::pagemap::{Pagemap, Written};
use torpor_sys::remote::{Arg, Batch};
use torpor_sys::track::{self, Registered, Watch};
use torpor_sys::{Pid, fork, pidfd, proc};

use crate::build::Skeleton;
use crate::collect::Collected;
use crate::error::{About, Error, Result};
use crate::kinds::memory::{Area, Source};
use crate::model::Inventory;
use crate::twin;

/// One address space that is watched.
#[derive(Debug)]
struct Space {
    pid: Pid,
    /// Its number in the image.
    number: u32,
    watch: Watch,
}

/// The watches over a container since an image was made.
#[derive(Debug, Default)]
pub struct Tracking {
    /// The digest of that image.
    image: String,
    spaces: Vec<Space>,
    /// Who holds the same watches, and the note that says so.
    tracker: Option<(OwnedFd, PathBuf)>,
    /// Who held them before, and has been told to end.
    former: Option<OwnedFd>,
}

/// Tracking that has just begun anew.
#[derive(Debug)]
pub struct Armed {
    /// The watches.
    pub tracking: Tracking,
    /// What those that there were before have seen.
    pub known: AllKnown,
    /// What cannot be watched, in words.
    pub warnings: Vec<String>,
}

/// What is known of the address spaces, by their numbers in the new image.
pub type AllKnown = BTreeMap<u32, Known>;

/// What a tracker leaves in the container's directory.
#[derive(Debug, Serialize, Deserialize)]
struct Note {
    pid: Pid,
    start_time: u64,
    image: String,
    spaces: Vec<Noted>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Noted {
    pid: Pid,
    number: u32,
    /// In the tracker.
    fd: i32,
}

/// What is known of an address space since it was last captured.
#[derive(Debug, Default)]
pub struct Known {
    /// Its number in the image of that time.
    pub number: u32,
    /// Its pages: those that are unchanged are those of that image.
    pub pages: Written,
}

impl Tracking {
    /// Takes over what the tracker holds that left this note; nothing when there is none or it is gone.
    pub fn find(note: &Path) -> Result<Tracking> {
        let path = note;
        let Some(note) = std::fs::read(path).ok().and_then(|json| read(&json)) else {
            return Ok(Tracking::default());
        };
        let Ok(tracker) = pidfd::open(note.pid) else {
            return Ok(Tracking::default());
        };
        if proc::stat(note.pid).map_or(true, |s| s.start_time != note.start_time || s.state == 'Z') {
            return Ok(Tracking::default());
        }
        let mut spaces = Vec::new();
        for Noted { pid, number, fd } in note.spaces {
            let watch = pidfd::get_fd(&tracker, fd).about(note.pid, "tracker")?;
            spaces.push(Space {
                pid,
                number,
                watch: Watch::adopt(watch),
            });
        }
        Ok(Tracking {
            image: note.image,
            spaces,
            tracker: Some((tracker, path.into())),
            former: None,
        })
    }

    /// Whether it tells what was written since the image with this digest was made.
    pub fn is_since(&self, digest: &str) -> bool {
        !self.spaces.is_empty() && self.image == digest
    }

    /// Whether anything is watched.
    pub fn is_at_work(&self) -> bool {
        !self.spaces.is_empty()
    }

    /// Whether a mapping is watched by us, and not by the program.
    pub fn owns(&self, pid: Pid, start: u64, end: u64) -> bool {
        let mut own = self.spaces.iter().filter(|s| s.pid == pid);
        own.any(|s| matches!(s.watch.register(start, end - start), Ok(Registered::Yes)))
    }

    /// What is known of all address spaces.
    pub fn known(&self, collected: &Collected) -> Result<AllKnown> {
        let mut all = AllKnown::new();
        for source in &collected.sources {
            let body = &collected.inventory.processes[source.index].body;
            let space = self.spaces.iter().find(|s| s.pid == source.pid);
            if let (Some(body), Some(space)) = (body, space) {
                let known = Known {
                    number: space.number,
                    pages: written(source.pid, &body.memory.areas)?,
                };
                all.insert(source.index as u32, known);
            }
        }
        Ok(all)
    }

    /// Watches everything that is private in all processes, from this moment on; they are stopped by us. What is
    /// captured now is what the next image goes on from. Tells also what is known up to now, which is one look at
    /// the pages for both.
    ///
    /// From here on the watches say nothing about the image before: the note that says they do is removed first, so
    /// that nobody takes them for that if we are killed.
    pub fn arm(mut self, collected: &Collected) -> Result<Armed> {
        self.dismiss();
        let mut old = std::mem::take(&mut self.spaces);
        let mut warnings = Vec::new();
        let mut known = AllKnown::new();
        for source in &collected.sources {
            let Some(body) = &collected.inventory.processes[source.index].body else {
                continue;
            };
            let at = old.iter().position(|s| s.pid == source.pid);
            let existing = at.map(|at| old.swap_remove(at));
            let number = source.index as u32;
            match arm_one(source.pid, existing, &body.memory.areas) {
                Ok((watch, seen)) => {
                    known.extend(seen.map(|seen| (number, seen)));
                    self.spaces.push(Space {
                        pid: source.pid,
                        number,
                        watch,
                    });
                }
                Err(why) => warnings.push(not_tracked(source.pid, &why)),
            }
        }
        self.image.clear();
        Ok(Armed {
            tracking: self,
            known,
            warnings,
        })
    }

    /// Ends the tracker that we have taken the watches from. Without its note it stands for nothing, so nobody
    /// waits for its end here, where all stand still.
    fn dismiss(&mut self) {
        if let Some((tracker, note)) = self.tracker.take() {
            let _ = std::fs::remove_file(note);
            let _ = pidfd::send_signal(&tracker, libc::SIGKILL);
            self.former = Some(tracker);
        }
    }

    /// Makes the calling process the tracker of a container since the image with this digest, and leaves the note.
    /// From then on, [`Tracker::hold`] is all that it may do. When that fails, which is added to `warnings`, the next
    /// image compares all pages: no reason to give up what was done.
    pub fn hold(self, digest: &str, init: Pid, note: &Path, warnings: &mut Vec<String>) -> Option<Tracker> {
        if self.spaces.is_empty() {
            return None;
        }
        let held = self.try_hold(digest, init, note);
        held.map_err(|e| warnings.push(format!("memory is not tracked: {e}")))
            .ok()
    }

    fn try_hold(self, digest: &str, init: Pid, note: &Path) -> Result<Tracker> {
        if let Some(former) = &self.former {
            pidfd::wait_end(former, 10_000);
        }
        let container = pidfd::open(init).about(init, "pidfd")?;
        let own = std::process::id() as Pid;
        let start_time = proc::stat(own).about(own, "tracker")?.start_time;
        let noted = |s: &Space| Noted {
            pid: s.pid,
            number: s.number,
            fd: s.watch.as_fd().as_raw_fd(),
        };
        let text = Note {
            pid: own,
            start_time,
            image: digest.into(),
            spaces: self.spaces.iter().map(noted).collect(),
        };
        write(note, &text).about(own, "tracker")?;
        Ok(Tracker {
            container,
            spaces: self.spaces,
        })
    }
}

/// Watches the memory of processes that are being built and that have been filled. Returns also what cannot be watched,
/// in words.
pub fn begin(skeleton: &Skeleton, inventory: &Inventory) -> (Tracking, Vec<String>) {
    let mut tracking = Tracking::default();
    let mut warnings = Vec::new();
    for (number, process) in inventory.processes.iter().enumerate() {
        let Some(body) = process.body.as_ref().filter(|b| b.sharing.memory.is_none()) else {
            continue;
        };
        let watched = skeleton.site(process.pid).and_then(|site| {
            let watch = skeleton.write_watch(process.pid)?;
            protect(site.tid(), &watch, &body.memory.areas, &mut Written::default())?;
            Ok((site.tid(), watch))
        });
        match watched {
            Ok((pid, watch)) => tracking.spaces.push(Space {
                pid,
                number: number as u32,
                watch,
            }),
            Err(why) => warnings.push(not_tracked(process.pid, &why)),
        }
    }
    (tracking, warnings)
}

fn not_tracked(pid: Pid, why: &Error) -> String {
    format!("process {pid}: its memory is not tracked, so the next image compares all of it: {why}")
}

/// Watches and nothing else.
#[derive(Debug)]
pub struct Tracker {
    container: OwnedFd,
    spaces: Vec<Space>,
}

impl Tracker {
    /// Holds them until the container ends; who takes over ends us.
    pub fn hold(self) {
        fork::settle(c"torpor-tracker");
        while !pidfd::wait_end(&self.container, -1) {}
        drop(self.spaces);
    }
}

fn read(json: &[u8]) -> Option<Note> {
    serde_json::from_slice(json).ok()
}

fn write(path: &Path, note: &Note) -> torpor_sys::Result<()> {
    let failed = |e: &std::io::Error| torpor_sys::Error::io("write", path.display().to_string(), e);
    let json = serde_json::to_vec(note).map_err(|e| failed(&e.into()))?;
    let partial: PathBuf = path.with_extension("partial");
    std::fs::write(&partial, json).map_err(|e| failed(&e))?;
    std::fs::rename(&partial, path).map_err(|e| failed(&e))
}

/// Watches one address space, with the watch that it has or with a new one.
fn arm_one(pid: Pid, existing: Option<Space>, areas: &[Area]) -> Result<(Watch, Option<Known>)> {
    let mut pages = Written::default();
    if let Some(Space { number, watch, .. }) = existing
        && protect(pid, &watch, areas, &mut pages)?
    {
        return Ok((watch, Some(Known { number, pages })));
    }
    let watch = make(pid)?;
    if protect(pid, &watch, areas, &mut Written::default())? {
        return Ok((watch, None));
    }
    Err(Error::nonsense("the address space of a stopped process is gone"))
}

/// What was written to in an address space that is watched.
fn written(pid: Pid, areas: &[Area]) -> Result<Written> {
    let mut pages = Pagemap::open(pid).about(pid, "pagemap")?;
    let mut out = Written::default();
    for area in areas.iter().filter(|a| a.is_private()) {
        pages.only_anonymous(area.source == Source::Nothing);
        pages.written(area.start, area.end, &mut out).about(pid, "pagemap")?;
    }
    Ok(out)
}

/// Protects all pages that hold data, and tells which were written to before. False when the address space of the watch
/// is gone.
fn protect(pid: Pid, watch: &Watch, areas: &[Area], out: &mut Written) -> Result<bool> {
    let mut pages = Pagemap::open(pid).about(pid, "pagemap")?;
    for area in areas.iter().filter(|a| a.is_private()) {
        pages.only_anonymous(area.source == Source::Nothing);
        let registered = watch.register(area.start, area.end - area.start);
        match registered.about(pid, "userfaultfd")? {
            Registered::Yes => pages.protect(area.start, area.end, out).about(pid, "pagemap")?,
            // Its pages always count as written.
            Registered::No => pages.written(area.start, area.end, out).about(pid, "pagemap")?,
            Registered::Gone => return Ok(false),
        }
    }
    Ok(true)
}

/// Has a stopped process make a userfaultfd, of which it keeps nothing.
fn make(pid: Pid) -> Result<Watch> {
    let target = pidfd::open(pid).about(pid, "pidfd")?;
    let fd = twin::visit_anew(pid, |_, visit| {
        let mut batch = Batch::new();
        let call = batch.must("userfaultfd", libc::SYS_userfaultfd, [track::FLAGS.into()]);
        let halt = visit.halt(&mut batch);
        batch.must("close", libc::SYS_close, [Arg::Result(call)]);
        let take = |number: i64| pidfd::get_fd(&target, number as i32);
        let (_, taken) = visit.run_around(&batch, call, halt, take).about(pid, "userfaultfd")?;
        taken
            .ok_or_else(|| Error::nonsense("no userfaultfd"))?
            .about(pid, "userfaultfd")
    })?;
    Watch::enable(fd).about(pid, "userfaultfd")
}
