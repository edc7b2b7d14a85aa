//! Compresses blocks of the data area beside the writer, by several threads, and gives them back in order.

use std::collections::VecDeque;
use std::fmt;
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread::{self, Builder, JoinHandle};

use crate::checksum;
use crate::codec::{Compression, Encoder};
use crate::layout::BLOCK_SIZE;

/// More threads would need more memory than an engine may take: each has two blocks, as they are and packed, and its tables.
const THREADS: usize = 4;
/// Blocks that wait for a thread or for the writer, for each thread.
const QUEUE: usize = 2;

/// A block, ready to be written.
pub(crate) struct Packed {
    raw: Vec<u8>,
    packed: Vec<u8>,
    is_smaller: bool,
    pub raw_len: u32,
    pub raw_sum: u64,
    pub stored_sum: u64,
}

impl Packed {
    /// The bytes that go into the file.
    pub(crate) fn stored(&self) -> &[u8] {
        if self.is_smaller { &self.packed } else { &self.raw }
    }

    fn of(raw: Vec<u8>, mut packed: Vec<u8>, encoder: &mut Encoder) -> Packed {
        let is_smaller = encoder.pack(&raw, &mut packed);
        let raw_sum = checksum::of(&raw);
        Packed {
            is_smaller,
            raw_len: raw.len() as u32,
            raw_sum,
            stored_sum: if is_smaller { checksum::of(&packed) } else { raw_sum },
            raw,
            packed,
        }
    }
}

struct Worker {
    jobs: SyncSender<(Vec<u8>, Vec<u8>)>,
    done: Receiver<Packed>,
    thread: JoinHandle<()>,
}

/// Takes bytes, gives frames.
pub(crate) struct Packer {
    workers: Vec<Worker>,
    filling: Vec<u8>,
    /// Buffers that were used before.
    spare: Vec<(Vec<u8>, Vec<u8>)>,
    /// Which worker has each block that was not taken back yet, in order.
    waiting: VecDeque<usize>,
    next: usize,
}

/// A thread is gone.
#[derive(Debug)]
pub(crate) struct Gone;

impl Packer {
    /// `None` if it cannot be had: no memory, no threads.
    pub(crate) fn new(how: Compression) -> Option<Packer> {
        let threads = thread::available_parallelism()
            .map_or(1, |count| count.get())
            .min(THREADS);
        let workers: Option<Vec<Worker>> = (0..threads).map(|_| start(Encoder::new(how)?)).collect();
        Some(Packer {
            workers: workers?,
            filling: Vec::with_capacity(BLOCK_SIZE),
            spare: Vec::new(),
            waiting: VecDeque::new(),
            next: 0,
        })
    }

    /// Takes as many of the next bytes as fit into the block that is being filled, and says how many. The caller then asks for
    /// [`Packer::ready`].
    pub(crate) fn take(&mut self, data: &[u8]) -> usize {
        let count = data.len().min(BLOCK_SIZE - self.filling.len());
        self.filling.extend_from_slice(&data[..count]);
        count
    }

    /// Hands a full block to a thread. Returns a block that is done if the queue is full.
    pub(crate) fn ready(&mut self) -> Result<Option<Packed>, Gone> {
        if self.filling.len() < BLOCK_SIZE {
            return Ok(None);
        }
        self.submit()?;
        if self.waiting.len() < self.workers.len() * QUEUE {
            return Ok(None);
        }
        self.finished()
    }

    /// The blocks that are left, one after another, the last one short; then `None`.
    pub(crate) fn drain(&mut self) -> Result<Option<Packed>, Gone> {
        if !self.filling.is_empty() {
            self.submit()?;
        }
        self.finished()
    }

    /// Takes the buffers of a block back.
    pub(crate) fn recycle(&mut self, done: Packed) {
        self.spare.push((done.raw, done.packed));
    }

    fn submit(&mut self) -> Result<(), Gone> {
        let (mut next, packed) = self.spare.pop().unwrap_or_default();
        next.clear();
        next.reserve_exact(BLOCK_SIZE);
        let full = std::mem::replace(&mut self.filling, next);
        let worker = self.next;
        self.next = (worker + 1) % self.workers.len();
        self.waiting.push_back(worker);
        self.workers[worker].jobs.send((full, packed)).map_err(|_| Gone)
    }

    fn finished(&mut self) -> Result<Option<Packed>, Gone> {
        let Some(worker) = self.waiting.pop_front() else {
            return Ok(None);
        };
        self.workers[worker].done.recv().map(Some).map_err(|_| Gone)
    }
}

fn start(mut encoder: Encoder) -> Option<Worker> {
    let (jobs, todo) = sync_channel::<(Vec<u8>, Vec<u8>)>(QUEUE);
    let (finished, done) = sync_channel(QUEUE);
    let work = move || {
        for (raw, packed) in todo {
            if finished.send(Packed::of(raw, packed, &mut encoder)).is_err() {
                return;
            }
        }
    };
    let thread = Builder::new().name("torpor-packer".to_owned()).spawn(work).ok()?;
    Some(Worker { jobs, done, thread })
}

impl Drop for Packer {
    fn drop(&mut self) {
        for Worker { jobs, done, thread } in self.workers.drain(..) {
            drop((jobs, done));
            let _ = thread.join();
        }
    }
}

impl fmt::Debug for Packer {
    fn fmt(&self, out: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(out, "Packer with {} threads", self.workers.len())
    }
}
