//! Background restore: processes run before their memory is there. Faults are served first, the rest is filled beside.
//!
//! A pager holds a userfaultfd of each address space. Every page that it puts into place comes from a block of the image
//! whose checksum was right; a block that cannot be read, or is wrong, becomes poison: the program gets SIGBUS, not old
//! bytes or zeroes, and never hangs. What the program does to its mappings meanwhile arrives as events: one thread does
//! nothing but read and note them, because until one is read the kernel lets nobody put a page. So memory that was given
//! up does not come back. Others put pages, and one of those does nothing but serve faults.

mod blocks;
mod order;
mod queue;
mod segments;
mod space;

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use serde::Serialize;
use torpor_image::Reader;
use torpor_sys::guard::Guard;
use torpor_sys::uffd::{self, Uffd};
use torpor_sys::{PAGE_SIZE, Pid, fd, pidfd};

use crate::error::{About, Error, Result};
use crate::huge;
use crate::stage::{Cancel, Stage, failpoint};

use blocks::Blocks;
pub use blocks::verify_until;
use queue::{Job, Queue};
use space::{Space, Taken};

/// More threads than this do not make it faster: the kernel's page allocator and the disk are the limit.
const MAX_FILLERS: usize = 4;
/// How much of the order in which blocks were brought is reported.
const REPORTED: usize = 64;

/// What a pager has done.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Outcome {
    /// Faults that were served.
    pub faults: usize,
    /// Bytes that were put into place.
    pub bytes: u64,
    /// Blocks that were brought first because the last run touched them first.
    pub prefetched: usize,
    /// The blocks that were brought first without being waited for: address space and address of a page in each.
    pub first: Vec<order::Page>,
    /// Blocks whose first touch was recorded.
    pub recorded: usize,
    /// Bytes that are huge pages again.
    pub huge: u64,
    /// What was left out, in words.
    pub warnings: Vec<String>,
    /// Why pages were poisoned; empty when all is well.
    pub error: String,
}

/// An address space to be filled.
#[derive(Debug)]
pub struct Missing {
    /// Made inside the process.
    pub uffd: Uffd,
    /// The process, in our pid namespace.
    pub pid: Pid,
    /// Number in the image.
    pub number: u32,
    /// What is missing: (start, end), sorted.
    pub ranges: Vec<(u64, u64)>,
    /// What was in huge pages: (start, end), sorted.
    pub huge: Vec<(u64, u64)>,
}

#[derive(Debug)]
struct Shared {
    image: Arc<Reader>,
    /// By number of the address space.
    blocks: HashMap<u32, Blocks>,
    queue: Queue,
    bytes: AtomicU64,
    faults: AtomicUsize,
    prefetched: AtomicUsize,
    /// By turn.
    first: Mutex<BTreeMap<usize, order::Page>>,
    /// Pages whose touch claimed a block, when they are recorded.
    touched: Option<Mutex<Vec<order::Page>>>,
    /// The first error, kept for the report.
    error: Mutex<String>,
    /// For tests: nothing can be read.
    unreadable: AtomicBool,
    /// The container's init.
    init: OwnedFd,
    /// Rises when init has ended.
    ended: Cancel,
    /// Its other end is closed when all is done: the thread that reads events goes.
    over: OwnedFd,
}

/// A pager at work.
#[derive(Debug)]
pub struct Pager {
    shared: Arc<Shared>,
    events: JoinHandle<()>,
    workers: Vec<JoinHandle<()>>,
    huge: Vec<(OwnedFd, Vec<(u64, u64)>)>,
    guard: Guard,
    /// Closed when all is done.
    line: OwnedFd,
}

impl Pager {
    /// Registers everything and begins to serve faults. `init` is the container's, which ends when we are killed: a
    /// program would find zeroes where pages are missing. With `record` what is touched first is noted beside the image.
    pub fn start(init: Pid, image: Arc<Reader>, missing: Vec<Missing>, record: bool) -> Result<Pager> {
        let target = pidfd::open(init).about(init, "pidfd")?;
        let (over, line) = fd::pipe().about(init, "pager")?;
        let mut blocks = HashMap::new();
        let mut spaces = Vec::new();
        let mut huge = Vec::new();
        for one in missing {
            let known = Blocks::of(image.runs_of(one.number));
            let space = Space::new(one.uffd, one.number, &one.ranges, known.0.len())?;
            spaces.push(Arc::new(space));
            blocks.insert(one.number, known);
            if !one.huge.is_empty() {
                huge.push((pidfd::open(one.pid).about(one.pid, "pidfd")?, one.huge));
            }
        }
        let early = order::read(&image);
        let shared = Arc::new(Shared {
            image,
            blocks,
            queue: Queue::new(spaces, early, record),
            bytes: AtomicU64::new(0),
            faults: AtomicUsize::new(0),
            prefetched: AtomicUsize::new(0),
            first: Mutex::default(),
            touched: record.then(Mutex::default),
            error: Mutex::default(),
            unreadable: AtomicBool::new(false),
            init: target
                .try_clone()
                .map_err(|e| torpor_sys::Error::io("dup", "pidfd", &e))
                .about(init, "pidfd")?,
            ended: Cancel::default(),
            over,
        });
        let guard = Guard::over(target).about(init, "guard")?;
        let serving = Arc::clone(&shared);
        let events = std::thread::spawn(move || serving.read_events());
        let fillers = std::thread::available_parallelism()
            .map_or(1, usize::from)
            .min(MAX_FILLERS);
        let workers = (0..=fillers).map(|n| {
            let shared = Arc::clone(&shared);
            std::thread::spawn(move || shared.work(n == 0))
        });
        let workers = workers.collect();
        Ok(Pager {
            shared,
            events,
            workers,
            huge,
            guard,
            line,
        })
    }

    /// Fills all that is still missing, then lets go. Called when the processes run.
    pub fn finish(self) -> Outcome {
        let Pager {
            shared,
            events,
            workers,
            huge,
            guard,
            line,
        } = self;
        // For tests: what is missing then stays missing until it is touched, or cannot be read.
        if let Err(Error::Failpoint { .. }) = failpoint(Stage::Page, &shared.ended) {
            shared.unreadable.store(true, Ordering::Relaxed);
        }
        shared.queue.start_filling();
        for worker in workers {
            let _ = worker.join();
        }
        let mut outcome = shared.outcome();
        for (process, ranges) in huge {
            outcome.huge += huge::collapse(&process, &ranges);
        }
        drop(line);
        let _ = events.join();
        // Closing the descriptors ends every watch.
        drop(shared);
        guard.dismiss();
        outcome
    }
}

/// The last block that a thread has read.
#[derive(Debug, Default)]
struct Buffer {
    start: Option<u64>,
    bytes: Vec<u8>,
}

impl Shared {
    fn outcome(&self) -> Outcome {
        let mut outcome = Outcome {
            faults: self.faults.load(Ordering::Relaxed),
            bytes: self.bytes.load(Ordering::Relaxed),
            prefetched: self.prefetched.load(Ordering::Relaxed),
            first: copy_of(&self.first).into_values().collect(),
            error: copy_of(&self.error),
            ..Outcome::default()
        };
        if let Some(touched) = &self.touched {
            let pages = copy_of(touched);
            outcome.recorded = pages.len();
            outcome.warnings.extend(order::write(&self.image, pages).err());
        }
        outcome
    }

    /// Reads and notes what the programs do. This thread never waits for another one.
    fn read_events(&self) {
        let mut init_runs = true;
        loop {
            let spaces: Vec<Arc<Space>> = self.queue.spaces().into_iter().filter(|s| !s.is_over()).collect();
            let mut fds: Vec<_> = vec![self.over.as_fd()];
            fds.extend(spaces.iter().map(|s| s.fd()));
            if init_runs {
                fds.push(self.init.as_fd());
            }
            for at in uffd::wait_any(&fds) {
                match at.checked_sub(1) {
                    None => return,
                    Some(at) if at < spaces.len() => while self.take_event(&spaces[at]) {},
                    Some(_) => {
                        init_runs = false;
                        self.ended.cancel();
                    }
                }
            }
        }
    }

    /// Takes one event of a space; false when there is none.
    fn take_event(&self, space: &Arc<Space>) -> bool {
        match space.take_event() {
            Taken::Nothing => return false,
            Taken::Noted => {}
            Taken::Fault(address) => self.queue.add_fault(space, address),
            Taken::Child(child) => self.queue.add_space(child),
        }
        true
    }

    fn work(&self, only_faults: bool) {
        let mut buffer = Buffer::default();
        while let Some(taken) = self.queue.take(only_faults) {
            match &taken.job {
                Job::Fault(space, address) => self.serve_fault(space, *address, &mut buffer),
                Job::Early(space, was) => {
                    let block = self.block_of(space.number, *was);
                    if let Some(block) = block.filter(|b| space.claim(*b)) {
                        self.prefetched.fetch_add(1, Ordering::Relaxed);
                        self.note(taken.turn, (space.number, *was));
                        self.bring(space, block, &mut buffer);
                    }
                }
                Job::Block(space, block) => {
                    if space.claim(*block) {
                        let parts = &self.blocks[&space.number].0[*block].parts;
                        self.note(taken.turn, (space.number, parts.first().map_or(0, |p| p.was)));
                        self.bring(space, *block, &mut buffer);
                    }
                }
            }
        }
    }

    /// The page that a thread waits for, then its neighbours in the same block of the image.
    fn serve_fault(&self, space: &Space, address: u64, buffer: &mut Buffer) {
        self.faults.fetch_add(1, Ordering::Relaxed);
        let was = space.origin(address);
        let stored = was.and_then(|was| Some((was, self.block_of(space.number, was)?)));
        match stored {
            Some((was, block)) => {
                let first = space.claim(block);
                if first && let Some(touched) = &self.touched {
                    touched
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .push((space.number, was));
                }
                self.bring_page(space, block, was, buffer);
                space.wake(address);
                if first {
                    self.bring(space, block, buffer);
                }
            }
            // What was not stored held only zeroes; what did not come from the image was given up, or is new.
            None => space.zero(address, was),
        }
        // Whoever finds nothing there asks again.
        space.wake(address);
    }

    /// Notes which blocks were brought first.
    fn note(&self, turn: usize, page: order::Page) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        first.insert(turn, page);
        if first.len() > REPORTED {
            first.pop_last();
        }
    }

    fn block_of(&self, number: u32, was: u64) -> Option<usize> {
        let offset = blocks::stored_at(self.image.runs_of(number), was)?;
        self.blocks.get(&number)?.find(offset)
    }

    /// Puts one page of a block.
    fn bring_page(&self, space: &Space, block: usize, was: u64, buffer: &mut Buffer) {
        let parts = &self.blocks[&space.number].0[block].parts;
        let Some(part) = parts.iter().find(|p| (p.was..p.was + p.len).contains(&was)) else {
            return;
        };
        let page = blocks::Part {
            was,
            offset: part.offset + (was - part.was),
            len: PAGE_SIZE,
        };
        self.put(space, block, &[page], buffer);
    }

    /// Puts every page of a space that is stored in this block. It was claimed for us.
    fn bring(&self, space: &Space, block: usize, buffer: &mut Buffer) {
        let parts = &self.blocks[&space.number].0[block].parts;
        self.put(space, block, parts, buffer);
        space.finish(block);
    }

    fn put(&self, space: &Space, block: usize, parts: &[blocks::Part], buffer: &mut Buffer) {
        let offset = self.blocks[&space.number].0[block].offset;
        let start = match self.read(offset, buffer) {
            Ok(start) => start,
            Err(error) => return self.lose(space, parts, &error),
        };
        for part in parts {
            let from = (part.offset - start) as usize;
            match space.put(part.was, &buffer.bytes[from..from + part.len as usize]) {
                Ok(()) => drop(self.bytes.fetch_add(part.len, Ordering::Relaxed)),
                Err(error) => self.lose(space, &[*part], &error),
            }
        }
    }

    /// Reads and checks a block, unless it is there already. The offset of its first byte.
    fn read(&self, offset: u64, buffer: &mut Buffer) -> Result<u64> {
        if let Some(start) = buffer.start.filter(|s| *s == offset) {
            return Ok(start);
        }
        buffer.start = None;
        if self.unreadable.load(Ordering::Relaxed) {
            return Err(Error::Failpoint {
                stage: Some(Stage::Page),
            });
        }
        let start = self.image.read_block(offset, &mut buffer.bytes)?;
        buffer.start = Some(start);
        Ok(start)
    }

    /// These parts are lost.
    fn lose(&self, space: &Space, parts: &[blocks::Part], why: &Error) {
        let mut error = self.error.lock().unwrap_or_else(PoisonError::into_inner);
        if error.is_empty() {
            *error = why.to_string();
        }
        drop(error);
        for part in parts {
            if space.poison(part.was, part.len).is_err() {
                // A kernel before 6.6: the program must not wait for ever for what will not come.
                let _ = pidfd::send_signal(&self.init, libc::SIGKILL);
            }
        }
    }
}

fn copy_of<T: Clone>(value: &Mutex<T>) -> T {
    value.lock().unwrap_or_else(PoisonError::into_inner).clone()
}
