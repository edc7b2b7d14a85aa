//! Guard regions: pages without memory that end whoever touches them (madvise(2), MADV_GUARD_INSTALL, kernel 6.13). They are
//! entries of page tables, not mappings.

use torpor_sys::Pid;
use torpor_sys::pagemap::Pagemap;

use crate::collect::Collected;
use crate::error::{About, Result};
use crate::kinds::memory::Area;

/// Notes which pages of the areas that are `wanted` are guards. `reader` says who has the memory of a process: itself while it
/// stands still, or its twin, which has them too.
pub fn collect(
    collected: &mut Collected,
    reader: impl Fn(Pid) -> Option<Pid>,
    wanted: impl Fn(&Area) -> bool,
) -> Result<()> {
    for source in &collected.sources {
        let (Some(pid), Some(body)) = (
            reader(source.pid),
            &mut collected.inventory.processes[source.index].body,
        ) else {
            continue;
        };
        let pagemap = Pagemap::open(pid).about(pid, "pagemap")?;
        let mut found = Vec::new();
        for area in body.memory.areas.iter().filter(|a| wanted(a)) {
            pagemap.guards(area.start, area.end, &mut found).about(pid, "pagemap")?;
        }
        note(&mut body.memory.areas, &found, &wanted);
    }
    Ok(())
}

/// Gives ranges of guards to the areas that they are in, of those that are `wanted`.
pub fn note(areas: &mut [Area], found: &[(u64, u64)], wanted: impl Fn(&Area) -> bool) {
    for area in areas.iter_mut().filter(|a| wanted(a)) {
        let touched = found.iter().filter(|g| g.0 < area.end && area.start < g.1);
        area.guards = touched.map(|g| (g.0.max(area.start), g.1.min(area.end))).collect();
    }
}
