//! The bytes of memory, from the image's page cache into the processes: one copy.

use torpor_image::Reader;
use torpor_sys::PAGE_SIZE;
use torpor_sys::mem::{Mapping, Memory};

use crate::build::Skeleton;
use crate::error::{About, Result};
use crate::model::{Body, Inventory};
use crate::stage::Cancel;

/// How much of the image is mapped at once.
const PIECE: u64 = 64 << 20;

/// Fills the private memory of every process.
pub fn fill(skeleton: &Skeleton, inventory: &Inventory, image: &Reader, cancel: &Cancel) -> Result<u64> {
    let mut bytes = 0;
    for (index, process) in inventory.processes.iter().enumerate() {
        let Some(body) = &process.body else { continue };
        let memory = skeleton.site(process.pid)?.memory();
        for run in image.runs_of(index as u32).iter().filter(|r| !r.is_zero()) {
            let total = run.pages * PAGE_SIZE;
            let mut at = 0;
            while at < total {
                cancel.check()?;
                let len = PIECE.min(total - at);
                let data = Mapping::of(image.file(), run.offset + at, len as usize).about(process.pid, "image")?;
                put(memory, body, run.start + at, data.bytes()).about(process.pid, "memory")?;
                at += len;
            }
            bytes += total;
        }
    }
    Ok(bytes)
}

/// Writes to memory that may lie in several areas, some of which are not writable.
fn put(memory: &Memory, body: &Body, start: u64, data: &[u8]) -> torpor_sys::Result<()> {
    let end = start + data.len() as u64;
    let areas = &body.memory.areas;
    let first = areas.partition_point(|a| a.end <= start);
    for area in areas[first..].iter().take_while(|a| a.start < end) {
        let (from, to) = (start.max(area.start), end.min(area.end));
        let part = &data[(from - start) as usize..(to - start) as usize];
        if area.is_opened() {
            memory.scatter(from, part)?;
        } else {
            memory.write(from, part)?;
        }
    }
    Ok(())
}
