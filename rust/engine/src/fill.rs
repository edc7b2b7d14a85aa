//! The bytes of memory, from the image's page cache into the processes: one copy.

use std::sync::atomic::{AtomicUsize, Ordering};

use torpor_image::{PageRun, Reader};
use torpor_sys::mem::Memory;

use crate::build::{Shares, Skeleton, pages};
use crate::error::{About, Error, Result};
use crate::kinds::memory::Area;
use crate::model::{Body, Inventory};
use crate::source;
use crate::stage::{Cancel, Stage};

/// How much of the image is mapped at once, by each thread.
const PIECE: u64 = 8 << 20;

/// More threads only wait for each other: a copy is bound by memory.
const THREADS: usize = 4;

/// A part of a run that goes to one process.
struct Piece<'a> {
    memory: &'a Memory,
    area: &'a Area,
    /// Where it goes.
    address: u64,
    /// Where it comes from in the image.
    offset: u64,
    len: u64,
}

/// Fills the private memory of every process, as far as `wanted` says.
pub fn fill(
    skeleton: &Skeleton,
    inventory: &Inventory,
    shares: &Shares,
    image: &Reader,
    cancel: &Cancel,
    wanted: impl Fn(&Area) -> bool,
) -> Result<u64> {
    let mut pieces = Vec::new();
    for (index, process) in inventory.processes.iter().enumerate() {
        let Some(body) = &process.body else { continue };
        let memory = skeleton.site(process.pid)?.memory();
        let runs = pages::without(image.runs_of(index as u32), &shares.get(index).present);
        cut_all(memory, body, &runs, &wanted, &mut pieces);
    }
    copy_pieces(pieces, image, cancel)
}

/// Fills pages of one process.
pub fn put(memory: &Memory, body: &Body, runs: &[PageRun], image: &Reader, cancel: &Cancel) -> Result<u64> {
    let mut pieces = Vec::new();
    cut_all(memory, body, runs, |_| true, &mut pieces);
    copy_pieces(pieces, image, cancel)
}

fn cut_all<'a>(
    memory: &'a Memory,
    body: &'a Body,
    runs: &[PageRun],
    wanted: impl Fn(&Area) -> bool,
    pieces: &mut Vec<Piece<'a>>,
) {
    for run in runs.iter().filter(|r| !r.is_zero()) {
        for (area, start, end) in parts(body, run).filter(|(area, ..)| wanted(area)) {
            cut(memory, area, run, start..end, pieces);
        }
    }
}

fn copy_pieces(pieces: Vec<Piece<'_>>, image: &Reader, cancel: &Cancel) -> Result<u64> {
    // Writing past a protection may be the tracer's right alone, and the tracer is a thread (proc_mem.force_override).
    let total: u64 = pieces.iter().map(|p| p.len).sum();
    cancel.progress.expect(Stage::Fill, total);
    let (opened, forced): (Vec<_>, Vec<_>) = pieces.into_iter().partition(|p| p.area.is_opened());
    copy_all(&forced, 1, image, cancel)?;
    let cpus = std::thread::available_parallelism().map_or(1, usize::from);
    let useful = (opened.iter().map(|p| p.len).sum::<u64>() / PIECE) as usize;
    copy_all(&opened, cpus.min(THREADS).min(useful), image, cancel)?;
    Ok(total)
}

fn cut<'a>(
    memory: &'a Memory,
    area: &'a Area,
    run: &PageRun,
    range: std::ops::Range<u64>,
    pieces: &mut Vec<Piece<'a>>,
) {
    let mut address = range.start;
    while address < range.end {
        let len = PIECE.min(range.end - address);
        let offset = run.offset + (address - run.start);
        pieces.push(Piece {
            memory,
            area,
            address,
            offset,
            len,
        });
        address += len;
    }
}

/// Copies by the calling thread and as many others as make `threads`.
fn copy_all(pieces: &[Piece<'_>], threads: usize, image: &Reader, cancel: &Cancel) -> Result<()> {
    let next = AtomicUsize::new(0);
    let work = || -> Result<()> {
        while let Some(piece) = pieces.get(next.fetch_add(1, Ordering::Relaxed)) {
            if let Err(e) = cancel.check().and_then(|()| copy(piece, image)) {
                // Nobody need go on.
                next.store(pieces.len(), Ordering::Relaxed);
                return Err(e);
            }
            cancel.progress.advance(piece.len);
        }
        Ok(())
    };
    std::thread::scope(|scope| {
        let others: Vec<_> = (1..threads).map(|_| scope.spawn(work)).collect();
        let panicked = |_| Err(Error::nonsense("a thread that fills memory panicked"));
        let joined = others.into_iter().map(|t| t.join().unwrap_or_else(panicked));
        std::iter::once(work()).chain(joined).fold(Ok(()), Result::and)
    })
}

/// A run of pages may lie in several areas: each with the addresses of the run in it.
pub fn parts<'b>(body: &'b Body, run: &PageRun) -> impl Iterator<Item = (&'b Area, u64, u64)> {
    let (start, end) = (run.start, run.end());
    let areas = &body.memory.areas;
    let first = areas.partition_point(|a| a.end <= start);
    let touched = areas[first..].iter().take_while(move |a| a.start < end);
    touched.map(move |a| (a, start.max(a.start), end.min(a.end)))
}

fn copy(piece: &Piece<'_>, image: &Reader) -> Result<()> {
    let pid = piece.memory.pid();
    source::each(image, pid, piece.offset, piece.len, |at, bytes| {
        // An area that never was writable is written to from outside.
        let done = if piece.area.is_opened() {
            piece.memory.scatter(piece.address + at, bytes)
        } else {
            piece.memory.write(piece.address + at, bytes)
        };
        done.about(pid, "memory")
    })
}
