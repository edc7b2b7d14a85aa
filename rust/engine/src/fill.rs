//! The bytes of memory, from the image's page cache into the processes: one copy.

use torpor_image::{PageRun, Reader};
use torpor_sys::PAGE_SIZE;
use torpor_sys::mem::{Mapping, Memory};

use crate::build::Skeleton;
use crate::error::{About, Result};
use crate::kinds::memory::Area;
use crate::model::{Body, Inventory};
use crate::stage::Cancel;

/// How much of the image is mapped at once.
const PIECE: u64 = 64 << 20;

/// Fills the private memory of every process, as far as `wanted` says.
pub fn fill(
    skeleton: &Skeleton,
    inventory: &Inventory,
    image: &Reader,
    cancel: &Cancel,
    wanted: impl Fn(&Area) -> bool,
) -> Result<u64> {
    let mut bytes = 0;
    for (index, process) in inventory.processes.iter().enumerate() {
        let Some(body) = &process.body else { continue };
        let memory = skeleton.site(process.pid)?.memory();
        for run in image.runs_of(index as u32).iter().filter(|r| !r.is_zero()) {
            for (area, start, end) in parts(body, run).filter(|(area, ..)| wanted(area)) {
                bytes += copy(memory, area, run, start..end, image, cancel)?;
            }
        }
    }
    Ok(bytes)
}

/// A run of pages may lie in several areas: each with the addresses of the run in it.
pub fn parts<'b>(body: &'b Body, run: &PageRun) -> impl Iterator<Item = (&'b Area, u64, u64)> {
    let (start, end) = (run.start, run.end());
    let areas = &body.memory.areas;
    let first = areas.partition_point(|a| a.end <= start);
    let touched = areas[first..].iter().take_while(move |a| a.start < end);
    touched.map(move |a| (a, start.max(a.start), end.min(a.end)))
}

fn copy(
    memory: &Memory,
    area: &Area,
    run: &PageRun,
    range: std::ops::Range<u64>,
    image: &Reader,
    cancel: &Cancel,
) -> Result<u64> {
    let pid = memory.pid();
    let mut at = range.start;
    while at < range.end {
        cancel.check()?;
        let len = PIECE.min(range.end - at);
        let (file, offset) = image.stored(run.offset + (at - run.start))?;
        let data = Mapping::of(file, offset, len as usize).about(pid, "image")?;
        // An area that never was writable is written to from outside.
        let done = if area.is_opened() {
            memory.scatter(at, data.bytes())
        } else {
            memory.write(at, data.bytes())
        };
        done.about(pid, "memory")?;
        at += len;
    }
    Ok((range.end - range.start) / PAGE_SIZE * PAGE_SIZE)
}
