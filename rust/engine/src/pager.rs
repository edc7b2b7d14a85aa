//! Background restore: processes run before their memory is there. Faults are served first, the rest is filled beside.
//!
//! A pager holds a userfaultfd of each address space. Every page that it puts into place comes from a block of the image
//! whose checksum was right; a block that cannot be read, or is wrong, becomes poison: the program gets SIGBUS, not old
//! bytes or zeroes, and never hangs. What the program does to its mappings meanwhile arrives as events: they are read and
//! noted before any further page is put, so that memory that was given up does not come back.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, RwLock};
use std::thread::JoinHandle;

use serde::Serialize;
use torpor_image::Reader;
use torpor_sys::uffd::{self, Event, Put, Uffd};
use torpor_sys::{PAGE_SIZE, Pid, fd, fork, pidfd};

use crate::error::{About, Result};
use crate::stage::{Cancel, Stage, failpoint};

/// A part of an address space that came from the image: where it is now, and where it was.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Segment {
    start: u64,
    end: u64,
    was: u64,
}

/// One address space that is not complete yet.
#[derive(Debug)]
struct Space {
    uffd: Uffd,
    /// Its number in the image.
    number: u32,
    /// By address. Reading one and putting pages under it excludes changing it.
    segments: RwLock<Vec<Segment>>,
    /// The process is gone.
    ended: AtomicBool,
}

/// What a pager has done.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Outcome {
    /// Faults that were served.
    pub faults: usize,
    /// Why pages were poisoned; empty when all is well.
    pub error: String,
}

#[derive(Debug)]
struct Shared {
    image: Reader,
    spaces: RwLock<Vec<Arc<Space>>>,
    faults: AtomicUsize,
    /// The first error, kept for the report.
    error: Mutex<String>,
    /// Filling is over: the event loop ends.
    complete: AtomicBool,
}

/// A pager at work.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    events: Option<JoinHandle<()>>,
    guard: Guard,
}

/// A process that holds the same descriptors as the pager. Were they closed while pages are missing, the kernel would
/// give zeroes for them; so as long as the guard lives nobody gets any, and when the pager has died it ends the
/// container.
#[derive(Debug)]
pub struct Guard {
    /// Tells the guard that all is well.
    line: OwnedFd,
}

impl Guard {
    /// Forks it. Called while this process has no threads that matter.
    pub fn start(init: Pid, missing: &[Missing]) -> Result<Guard> {
        let target = pidfd::open(init).about(init, "pidfd")?;
        let (listen, line) = fd::pipe().about(init, "guard")?;
        let mut keep: Vec<i32> = missing.iter().map(|m| m.uffd.as_fd().as_raw_fd()).collect();
        keep.extend([target.as_raw_fd(), listen.as_raw_fd()]);
        let pid = fork::fork(|| {
            if fork::become_independent(c"torpor-guard", &keep).is_ok() && fork::read_byte(&listen).is_none() {
                let _ = pidfd::send_signal(&target, libc::SIGKILL);
            }
            0
        });
        pid.about(init, "guard")?;
        Ok(Guard { line })
    }

    fn dismiss(self) {
        // A guard that is gone needs no word.
        let _ = fork::write_byte(&self.line);
    }
}

/// An address space to be filled: its userfaultfd, its number in the image, and its ranges that are missing.
#[derive(Debug)]
pub struct Missing {
    /// Made inside the process.
    pub uffd: Uffd,
    /// Number in the image.
    pub number: u32,
    /// (start, end), sorted.
    pub ranges: Vec<(u64, u64)>,
}

impl Pager {
    /// Registers everything and begins to serve faults.
    pub fn start(image: Reader, missing: Vec<Missing>, guard: Guard) -> Result<Pager> {
        let mut spaces = Vec::new();
        for one in missing {
            for &(start, end) in &one.ranges {
                one.uffd.register(start, end - start).about(1, "userfaultfd")?;
            }
            let segments = one
                .ranges
                .iter()
                .map(|&(start, end)| Segment { start, end, was: start })
                .collect();
            spaces.push(Arc::new(Space {
                uffd: one.uffd,
                number: one.number,
                segments: RwLock::new(segments),
                ended: AtomicBool::new(false),
            }));
        }
        let shared = Arc::new(Shared {
            image,
            spaces: RwLock::new(spaces),
            faults: AtomicUsize::new(0),
            error: Mutex::new(String::new()),
            complete: AtomicBool::new(false),
        });
        let serving = Arc::clone(&shared);
        let events = std::thread::spawn(move || serving.serve());
        Ok(Pager {
            shared,
            events: Some(events),
            guard,
        })
    }

    /// Fills all that is still missing, then lets go. Called when the processes run.
    pub fn finish(mut self) -> Outcome {
        let shared = Arc::clone(&self.shared);
        // For tests: what is missing then stays missing until it is touched.
        let _ = failpoint(Stage::Page, &Cancel::default());
        let mut at = 0;
        // Forks add address spaces at the end.
        while let Some(space) = shared.space(at) {
            shared.fill(&space);
            at += 1;
        }
        shared.complete.store(true, Ordering::Release);
        if let Some(events) = self.events.take() {
            // Closing the descriptors ends every watch, also if it has panicked.
            let _ = events.join();
        }
        self.guard.dismiss();
        let error = shared.error.lock().map(|e| e.clone()).unwrap_or_default();
        Outcome {
            faults: shared.faults.load(Ordering::Relaxed),
            error,
        }
    }
}

impl Shared {
    fn space(&self, at: usize) -> Option<Arc<Space>> {
        self.spaces.read().ok()?.get(at).cloned()
    }

    fn all(&self) -> Vec<Arc<Space>> {
        self.spaces.read().map(|s| s.clone()).unwrap_or_default()
    }

    /// The event loop.
    fn serve(&self) {
        let mut buffer = Vec::new();
        while !self.complete.load(Ordering::Acquire) {
            let spaces: Vec<Arc<Space>> = self
                .all()
                .into_iter()
                .filter(|s| !s.ended.load(Ordering::Relaxed))
                .collect();
            let fds: Vec<_> = spaces.iter().map(|s| s.uffd.as_fd()).collect();
            let (ready, hung_up) = uffd::wait_any(&fds, 20);
            for at in ready {
                while self.take_event(&spaces[at], &mut buffer) {}
            }
            for at in hung_up {
                spaces[at].ended.store(true, Ordering::Relaxed);
            }
        }
    }

    /// Takes one event of a space; false when there is none.
    fn take_event(&self, space: &Arc<Space>, buffer: &mut Vec<u8>) -> bool {
        let fault = {
            // Nobody puts a page between the reading of an event and the noting of what it says.
            let Ok(mut segments) = space.segments.write() else {
                return false;
            };
            match space.uffd.read() {
                Ok(Some(Event::Fault(address))) => Some(address),
                Ok(Some(Event::Remove(start, end) | Event::Unmap(start, end))) => {
                    cut(&mut segments, start, end);
                    None
                }
                Ok(Some(Event::Remap(from, to, len))) => {
                    remap(&mut segments, from, to, len);
                    None
                }
                Ok(Some(Event::Fork(uffd))) => {
                    self.add_child(space, uffd, segments.clone());
                    None
                }
                Ok(None) | Err(_) => return false,
            }
        };
        if let Some(address) = fault {
            self.faults.fetch_add(1, Ordering::Relaxed);
            self.serve_fault(space, address, buffer);
        }
        true
    }

    fn add_child(&self, parent: &Space, uffd: Uffd, segments: Vec<Segment>) {
        let child = Space {
            uffd,
            number: parent.number,
            segments: RwLock::new(segments),
            ended: AtomicBool::new(false),
        };
        if let Ok(mut spaces) = self.spaces.write() {
            spaces.push(Arc::new(child));
        }
    }

    /// The page that a thread waits for, then its neighbours in the same block of the image.
    fn serve_fault(&self, space: &Space, address: u64, buffer: &mut Vec<u8>) {
        let was = space.segments.read().ok().and_then(|s| locate(&s, address));
        let stored = was.and_then(|was| self.stored_at(space.number, was));
        let Some(offset) = stored else {
            // It never held anything, or was given up.
            while matches!(space.uffd.zero(address), Ok(Put::Busy)) {
                std::thread::yield_now();
            }
            space.uffd.wake(address, PAGE_SIZE);
            return;
        };
        match self.image.read_block(offset, buffer) {
            Ok(block) => {
                let at = (offset - block) as usize;
                self.put(space, address, &buffer[at..at + PAGE_SIZE as usize]);
                self.put_block(space, block, buffer);
            }
            Err(error) => self.poison(space, offset, &error.to_string()),
        }
        space.uffd.wake(address, PAGE_SIZE);
    }

    /// Where in the file a page is that was at this address.
    fn stored_at(&self, number: u32, was: u64) -> Option<u64> {
        let runs = self.image.runs_of(number);
        let at = runs.partition_point(|r| r.end() <= was);
        let run = runs.get(at).filter(|r| r.start <= was && !r.is_zero())?;
        Some(run.offset + (was - run.start))
    }

    /// Everything of one address space, block by block.
    fn fill(&self, space: &Space) {
        let runs = self.image.runs_of(space.number).iter().filter(|r| !r.is_zero());
        let blocks: BTreeSet<u64> = runs
            .flat_map(|r| block_of(r.offset)..=block_of(r.offset + r.bytes() - 1))
            .collect();
        let mut buffer = Vec::new();
        for block in blocks {
            if space.ended.load(Ordering::Relaxed) {
                return;
            }
            let offset = start_of(block);
            match self.image.read_block(offset, &mut buffer) {
                Ok(start) => self.put_block(space, start, &buffer),
                Err(error) => self.poison(space, offset, &error.to_string()),
            }
        }
    }

    /// Puts every page of a space that is stored in this block.
    fn put_block(&self, space: &Space, block: u64, bytes: &[u8]) {
        let end = block + bytes.len() as u64;
        let runs = self.image.runs_of(space.number).iter();
        for run in runs.filter(|r| !r.is_zero() && r.offset < end && r.offset + r.bytes() > block) {
            let (from, to) = (run.offset.max(block), (run.offset + run.bytes()).min(end));
            let data = &bytes[(from - block) as usize..(to - block) as usize];
            self.put_where_it_is(space, run.start + (from - run.offset), data);
        }
    }

    /// Puts data that was at `was` wherever the program has it now.
    fn put_where_it_is(&self, space: &Space, was: u64, data: &[u8]) {
        let mut done = 0u64;
        while done < data.len() as u64 {
            let Ok(segments) = space.segments.read() else { return };
            let Some((now, len)) = place_of(&segments, was + done, data.len() as u64 - done) else {
                return;
            };
            let Some(now) = now else {
                done += len;
                continue;
            };
            let part = &data[done as usize..(done + len) as usize];
            match space.uffd.copy(now, part) {
                Ok(Put::Bytes(bytes)) => done += bytes,
                Ok(Put::Exists | Put::Gone) => done += PAGE_SIZE,
                Ok(Put::Busy) => {
                    // Its events are taken under the write lock.
                    drop(segments);
                    std::thread::yield_now();
                }
                Ok(Put::Ended) | Err(_) => {
                    space.ended.store(true, Ordering::Relaxed);
                    return;
                }
            }
        }
    }

    fn put(&self, space: &Space, page: u64, data: &[u8]) {
        while matches!(space.uffd.copy(page, data), Ok(Put::Busy)) {
            std::thread::yield_now();
        }
    }

    /// Everything stored in the block at `offset` is lost.
    fn poison(&self, space: &Space, offset: u64, why: &str) {
        if let Ok(mut error) = self.error.lock()
            && error.is_empty()
        {
            *error = why.into();
        }
        let Ok(segments) = space.segments.read() else { return };
        let (from, to) = (start_of(block_of(offset)), start_of(block_of(offset) + 1));
        for run in self
            .image
            .runs_of(space.number)
            .iter()
            .filter(|r| r.offset < to && r.offset + r.bytes() > from)
        {
            let mut was = run.start;
            while was < run.end() {
                let at = run.offset + (was - run.start);
                if (from..to).contains(&at)
                    && let Some((Some(now), _)) = place_of(&segments, was, PAGE_SIZE)
                {
                    let _ = space.uffd.poison(now, PAGE_SIZE);
                    space.uffd.wake(now, PAGE_SIZE);
                }
                was += PAGE_SIZE;
            }
        }
    }
}

const BLOCK: u64 = torpor_image::BLOCK_SIZE as u64;
/// Where the data of an image begins: after its header page.
const DATA_START: u64 = PAGE_SIZE;

/// The block of the image that holds an offset of the file.
fn block_of(offset: u64) -> u64 {
    offset.saturating_sub(DATA_START) / BLOCK
}

fn start_of(block: u64) -> u64 {
    DATA_START + block * BLOCK
}

/// Reads and checks every block up to an offset: what a restore needs before memory is filled.
pub fn verify_until(image: &Reader, offset: u64) -> Result<()> {
    let mut buffer = Vec::new();
    for block in 0..offset.saturating_sub(DATA_START).div_ceil(BLOCK) {
        image.read_block(start_of(block), &mut buffer)?;
    }
    Ok(())
}

/// Takes a range out.
fn cut(segments: &mut Vec<Segment>, start: u64, end: u64) {
    let mut rest = Vec::with_capacity(segments.len() + 1);
    for s in segments.drain(..) {
        if s.start < start.min(s.end) {
            rest.push(Segment {
                end: s.end.min(start),
                ..s
            });
        }
        if s.end > end.max(s.start) {
            let from = s.start.max(end);
            rest.push(Segment {
                start: from,
                was: s.was + (from - s.start),
                ..s
            });
        }
    }
    *segments = rest;
}

/// Moves a range.
fn remap(segments: &mut Vec<Segment>, from: u64, to: u64, len: u64) {
    let moved: Vec<Segment> = segments
        .iter()
        .filter(|s| s.start < from + len && s.end > from)
        .map(|s| {
            let (start, end) = (s.start.max(from), s.end.min(from + len));
            Segment {
                start: start - from + to,
                end: end - from + to,
                was: s.was + (start - s.start),
            }
        })
        .collect();
    cut(segments, from, from + len);
    cut(segments, to, to + len);
    segments.extend(moved);
    segments.sort_unstable_by_key(|s| s.start);
}

/// Where a page was that is at this address now.
fn locate(segments: &[Segment], address: u64) -> Option<u64> {
    let at = segments.partition_point(|s| s.end <= address);
    segments
        .get(at)
        .filter(|s| s.start <= address)
        .map(|s| s.was + (address - s.start))
}

/// Where data that was at `was` is now, and how much of `len` bytes is in one piece; no place when it was given up.
fn place_of(segments: &[Segment], was: u64, len: u64) -> Option<(Option<u64>, u64)> {
    let holds = |s: &&Segment| s.was <= was && was < s.was + (s.end - s.start);
    if let Some(s) = segments.iter().find(holds) {
        return Some((Some(s.start + (was - s.was)), len.min(s.was + (s.end - s.start) - was)));
    }
    let next = segments
        .iter()
        .map(|s| s.was)
        .filter(|w| *w > was)
        .min()
        .unwrap_or(u64::MAX);
    Some((None, len.min(next - was)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn segment(start: u64, end: u64, was: u64) -> Segment {
        Segment { start, end, was }
    }

    #[test]
    fn a_range_that_is_given_up_leaves_what_is_around_it() {
        let mut s = vec![segment(0x1000, 0x9000, 0x1000)];
        cut(&mut s, 0x3000, 0x5000);
        assert_eq!(s, [segment(0x1000, 0x3000, 0x1000), segment(0x5000, 0x9000, 0x5000)]);
        assert_eq!(locate(&s, 0x4000), None);
        assert_eq!(locate(&s, 0x5000), Some(0x5000));
        cut(&mut s, 0, 0x10000);
        assert!(s.is_empty());
    }

    #[test]
    fn what_is_moved_is_found_at_its_new_place() {
        let mut s = vec![segment(0x1000, 0x9000, 0x1000)];
        remap(&mut s, 0x2000, 0x20000, 0x2000);
        assert_eq!(locate(&s, 0x21000), Some(0x3000));
        assert_eq!(locate(&s, 0x2000), None);
        assert_eq!(place_of(&s, 0x3000, 0x4000), Some((Some(0x21000), 0x1000)));
        assert_eq!(place_of(&s, 0x1000, 0x4000), Some((Some(0x1000), 0x1000)));
        cut(&mut s, 0x20000, 0x21000);
        assert_eq!(place_of(&s, 0x2000, 0x4000), Some((None, 0x1000)));
    }
}
