//! Transparent huge pages: what was in huge pages is in huge pages again.

use std::os::fd::AsFd;

use torpor_sys::mem;
use torpor_sys::pagemap::Pagemap;
use torpor_sys::{Pid, pidfd};

use crate::build::{Shares, Skeleton};
use crate::collect::Collected;
use crate::error::{About, Result};
use crate::model::Inventory;

/// Of x86-64, and of other machines with pages of 4 KiB.
const SIZE: u64 = 2 << 20;

/// Notes which memory is in huge pages. `reader` says who has the memory of a process: itself while it stands still, or its
/// twin.
pub fn collect(collected: &mut Collected, reader: impl Fn(Pid) -> Option<Pid>) -> Result<()> {
    for source in &collected.sources {
        let (Some(pid), Some(body)) = (
            reader(source.pid),
            &mut collected.inventory.processes[source.index].body,
        ) else {
            continue;
        };
        let pagemap = Pagemap::open(pid).about(pid, "pagemap")?;
        let mut huge = Vec::new();
        let large = |start: u64, end: u64| start.next_multiple_of(SIZE) + SIZE <= end;
        for area in &body.memory.areas {
            if area.is_private() && area.is_inherited() && large(area.start, area.end) {
                pagemap.huge(area.start, area.end, &mut huge).about(pid, "pagemap")?;
            }
        }
        body.memory.huge = whole(huge);
    }
    Ok(())
}

/// Those of ranges that are whole huge pages.
pub fn whole(mut ranges: Vec<(u64, u64)>) -> Vec<(u64, u64)> {
    ranges.retain(|&(start, end)| start % SIZE == 0 && end % SIZE == 0);
    ranges
}

/// Puts what was in huge pages into huge pages, in processes that are filled: where the kernel did so by itself, this only
/// looks.
pub fn rebuild(skeleton: &Skeleton, inventory: &Inventory, shares: &Shares) -> Result<()> {
    for (index, process) in inventory.processes.iter().enumerate() {
        let Some(body) = process.body.as_ref().filter(|b| !b.memory.huge.is_empty()) else {
            continue;
        };
        let tid = skeleton.site(process.pid)?.tid();
        // One that is shared was made before the children were: another would be a copy.
        let mut own = body.memory.huge.clone();
        own.retain(|range| !shares.get(index).is_shared(*range));
        collapse(pidfd::open(tid).about(tid, "pidfd")?, &own);
    }
    Ok(())
}

/// Makes huge pages of these ranges, as far as the kernel has any; how many bytes. A machine whose owner has switched them
/// off gets none.
pub fn collapse(process: impl AsFd, ranges: &[(u64, u64)]) -> u64 {
    let switch = std::fs::read_to_string("/sys/kernel/mm/transparent_hugepage/enabled");
    if !switch.is_ok_and(|s| !s.contains("[never]")) {
        return 0;
    }
    let pieces = ranges
        .iter()
        .flat_map(|&(start, end)| (start..end).step_by(SIZE as usize));
    let made = pieces.filter(|at| mem::collapse(&process, *at, SIZE).is_ok()).count();
    made as u64 * SIZE
}
