//! What a new image goes on from: its parent, and which pages of it are still right.
//!
//! Pages are right when the tracker says so (see track.rs). Where nobody tracks, and always in shared objects, whose
//! writes are not all seen, each page is compared with what the parent has at the same place.

use std::cell::OnceCell;
use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};
use torpor_image::{PageRun, Reader, Writer};
use torpor_sys::PAGE_SIZE;

use crate::collect::Collected;
use crate::error::{Error, Result};
use crate::kinds::memory::Area;
use crate::model::Inventory;
use crate::track::{AllKnown, Known};
use crate::{guards, huge};

/// The name of the section that an image without metadata has: one that holds only memory.
pub const MEMORY: &str = "memory";

/// Which process has which number in an image that holds only memory.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Spaces {
    /// By number; pids as the container sees them.
    pub processes: Vec<i32>,
}

/// What is known of every address space of the new image, by its number there.
#[derive(Debug, Default)]
pub struct Base {
    known: AllKnown,
    same: BTreeMap<u32, u32>,
    /// There is a parent.
    compares: bool,
}

impl Spaces {
    /// Those of an inventory.
    pub fn of(inventory: &Inventory) -> Spaces {
        Spaces {
            processes: inventory.processes.iter().map(|p| p.pid).collect(),
        }
    }

    fn in_image(image: &Reader) -> Spaces {
        // What cannot be read is only not compared with.
        image
            .section::<Inventory>("metadata")
            .map(|i| Spaces::of(&i))
            .or_else(|_| image.section(MEMORY))
            .unwrap_or_default()
    }

    fn number(&self, pid: i32) -> Option<u32> {
        self.processes.iter().position(|p| *p == pid).map(|at| at as u32)
    }
}

/// Whether an image holds only memory.
pub fn is_memory_only(image: &Reader) -> bool {
    image.sections().any(|s| s.name == MEMORY)
}

/// # Errors
/// Refused: an image that holds only memory.
pub fn check_whole(image: &Reader) -> Result<()> {
    if is_memory_only(image) {
        return Err(Error::Unsupported {
            stage: None,
            pid: None,
            object: image.path().display().to_string(),
            why: "it holds only memory (checkpoint --pre-dump)".into(),
            remedy: "restore the image that was made after it with --parent-path".into(),
        });
    }
    Ok(())
}

impl Base {
    /// `known` is what is known since the parent was made.
    pub fn of(parent: &Reader, known: AllKnown, collected: &Collected) -> Base {
        let mut base = Base {
            known,
            compares: true,
            ..Base::default()
        };
        // Only read when it is needed: everything stands still.
        let spaces = OnceCell::new();
        for source in &collected.sources {
            let process = &collected.inventory.processes[source.index];
            let number = source.index as u32;
            if base.known.contains_key(&number) {
                continue;
            }
            if let Some(same) = spaces.get_or_init(|| Spaces::in_image(parent)).number(process.pid) {
                base.same.insert(number, same);
            }
        }
        base
    }

    /// What is known of an address space.
    pub fn known(&self, number: u32) -> Option<&Known> {
        self.known.get(&number)
    }

    /// How many bytes were written to since, when that is known of everything.
    pub fn changed(&self, collected: &Collected) -> Option<u64> {
        let mut all = 0;
        for source in &collected.sources {
            let known = self.known.get(&(source.index as u32))?;
            all += known.pages.changed.iter().map(|(start, end)| end - start).sum::<u64>();
        }
        Some(all)
    }

    /// Notes what the look at the pages has told besides (see huge.rs, guards.rs), of processes that stand still. Areas that
    /// are not private were not looked at.
    pub fn note(&self, collected: &mut Collected) -> Result<()> {
        for source in &collected.sources {
            let (Some(known), Some(body)) = (
                self.known(source.index as u32),
                &mut collected.inventory.processes[source.index].body,
            ) else {
                continue;
            };
            body.memory.huge = huge::whole(known.pages.huge.clone());
            guards::note(&mut body.memory.areas, &known.pages.guards, Area::is_private);
        }
        guards::collect(collected, Some, |area| !area.is_private())
    }

    /// Takes over from the parent what is still right. Returns how many pages with data that are.
    pub fn inherit(&self, writer: &mut Writer) -> Result<u64> {
        let mut pages = 0;
        for (number, known) in &self.known {
            for &(start, end) in &known.pages.unchanged {
                pages += writer.inherit((known.number, start), (*number, start), (end - start) / PAGE_SIZE)?;
            }
        }
        Ok(pages)
    }

    /// The space of the parent to compare with.
    pub fn compared_with(&self, number: u32) -> Option<u32> {
        if number >= crate::capture::SHARED {
            return self.compares.then_some(number);
        }
        self.same.get(&number).copied()
    }

    /// Processes that nobody has tracked since the parent was made.
    pub fn untracked(&self, collected: &Collected) -> usize {
        let known = |index: usize| self.known.contains_key(&(index as u32));
        collected.sources.iter().filter(|s| !known(s.index)).count()
    }
}

/// Tells pages that are those of `parent` in the space `number` at `start` from others: (same?, first, count).
pub fn compare(parent: &Reader, number: u32, start: u64, pages: &[u8]) -> Result<Vec<(bool, usize, usize)>> {
    let count = pages.len() as u64 / PAGE_SIZE;
    let mut all: Vec<(bool, usize, usize)> = Vec::new();
    let mut next = 0usize;
    let mut add = |same: bool, first: usize, count: usize| match all.last_mut() {
        _ if count == 0 => {}
        Some(last) if last.0 == same && last.1 + last.2 == first => last.2 += count,
        _ => all.push((same, first, count)),
    };
    let mut buffer = Vec::new();
    for run in parent.runs_in(number, start, count).filter(|r| !r.is_zero()) {
        let first = ((run.start - start) / PAGE_SIZE) as usize;
        add(false, next, first - next);
        let old = read(parent, &run, &mut buffer)?;
        let new = &pages[first * PAGE_SIZE as usize..][..old.len()];
        let pairs = new
            .chunks_exact(PAGE_SIZE as usize)
            .zip(old.chunks_exact(PAGE_SIZE as usize));
        for (i, (new, old)) in pairs.enumerate() {
            add(new == old, first + i, 1);
        }
        next = first + run.pages as usize;
    }
    add(false, next, count as usize - next);
    Ok(all)
}

fn read<'b>(parent: &Reader, run: &PageRun, buffer: &'b mut Vec<u8>) -> Result<&'b [u8]> {
    buffer.resize(run.bytes() as usize, 0);
    parent.read_at(run.offset, buffer)?;
    Ok(buffer)
}
