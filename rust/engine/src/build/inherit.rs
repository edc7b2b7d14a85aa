//! What processes get from their parents by being cloned from them: pages that they had in common are common again.
//!
//! A process that is to have children with pages in common is laid out before they are made, and holds those pages then
//! (its *seed*). A child keeps the areas that they are in, drops what it has no data for, and the filling of memory
//! writes what differs, which the kernel copies then as it did when the program wrote it. Nothing else brings pages of
//! private memory into two address spaces.

use std::collections::BTreeSet;

use torpor_image::{PageRun, Reader};

use super::pages::{self, Ranges};
use super::tree::Lineage;
use crate::kinds::memory::{Area, Source};
use crate::model::{Body, Inventory, Process};

/// What one process gets and gives.
#[derive(Debug, Default, Clone)]
pub struct Share {
    /// It is laid out before its children are made, since they get pages from it.
    pub is_early: bool,
    /// What has to be in it by then and is not.
    pub seed: Vec<PageRun>,
    /// Pages that it has only for its children.
    pub lent: Ranges,
    /// Areas of its own that are its parent's when it is made, and stay.
    pub kept: Ranges,
    /// Pages in them that it has no data for.
    pub stale: Ranges,
    /// Where the right bytes are in the end, without being filled.
    pub present: Ranges,
    /// All that it holds when its children are made.
    holds: Vec<PageRun>,
}

impl Share {
    /// Whether some of a range is shared with the parent or with children.
    pub fn is_shared(&self, (start, end): (u64, u64)) -> bool {
        let in_place = self.present.iter().any(|r| r.0 < end && start < r.1);
        in_place || self.holds.iter().any(|r| r.start < end && start < r.end())
    }

    /// Whether all of a range is in place when the children are made.
    pub fn holds_all_of(&self, (start, end): (u64, u64)) -> bool {
        let whole = |r: &(u64, u64)| r.0 <= start && end <= r.1;
        pages::ranges(&self.holds).iter().any(whole)
    }
}

/// The shares of all processes, by their indices in the inventory.
#[derive(Debug, Default)]
pub struct Shares(Vec<Share>);

impl Shares {
    /// Nothing is common: memory that comes later cannot be.
    pub fn none(inventory: &Inventory) -> Shares {
        Shares(vec![Share::default(); inventory.processes.len()])
    }

    /// Finds what may be common.
    pub fn of(inventory: &Inventory, image: &Reader) -> Shares {
        let mut shares = Shares::none(inventory);
        let data: Vec<Vec<PageRun>> = (0..inventory.processes.len() as u32)
            .map(|at| image.runs_of(at).iter().filter(|r| !r.is_zero()).copied().collect())
            .collect();
        let orphans = Lineage::of(inventory).orphans;
        for at in 0..inventory.processes.len() {
            shares.add_family(inventory, &data, at, &orphans);
        }
        shares
    }

    /// That of one process.
    pub fn get(&self, index: usize) -> &Share {
        &self.0[index]
    }

    /// A parent and its children; parents come before.
    fn add_family(&mut self, inventory: &Inventory, data: &[Vec<PageRun>], at: usize, orphans: &BTreeSet<i32>) {
        let parent = &inventory.processes[at];
        let Some(body) = &parent.body else { return };
        let holds = |pid| inventory.memory_holder(pid) == pid;
        let is_child = |child: &Process| inventory.memory_holder(child.ppid) == parent.pid && holds(child.pid);
        let children: Vec<Child<'_>> = (at + 1..data.len())
            .filter(|c| is_child(&inventory.processes[*c]))
            .filter(|c| !orphans.contains(&inventory.processes[*c].pid))
            .filter_map(|c| Child::of(c, inventory.processes[c].body.as_ref()?, body, &data[c]))
            .collect();
        let own = &data[at];
        let seed = seed(own, &children);
        if seed.is_empty() {
            return;
        }
        let share = &mut self.0[at];
        let seeded = pages::ranges(&seed);
        share.holds = pages::join(pages::without(&share.holds, &seeded), seed.clone());
        let inherited = pages::clip(own, &share.present);
        share.is_early = true;
        share.lent = pages::ranges(&pages::without(&seed, &pages::ranges(own)));
        share.present = pages::ranges(&pages::join(
            pages::without(&inherited, &seeded),
            pages::equal(&seed, own),
        ));
        share.seed = pages::without(&seed, &pages::ranges(&pages::equal(&seed, &inherited)));
        let holds = share.holds.clone();
        for child in &children {
            child.settle(&holds, &mut self.0[child.index]);
        }
    }
}

/// A process that may have pages of its parent.
struct Child<'d> {
    index: usize,
    /// Areas that it can keep.
    areas: Ranges,
    /// All of its pages that have data.
    data: &'d [PageRun],
    /// Those that are in these areas.
    within: Vec<PageRun>,
}

impl<'d> Child<'d> {
    fn of(index: usize, body: &Body, parent: &Body, data: &'d [PageRun]) -> Option<Child<'d>> {
        // The link to the program can only be changed while nothing of the old one is mapped.
        if body.memory.exe != parent.memory.exe {
            return None;
        }
        let can_keep = |area: &&Area| {
            let at = parent.memory.areas.partition_point(|of| of.end <= area.start);
            let of = parent.memory.areas.get(at);
            of.is_some_and(|of| of.start <= area.start && area.end <= of.end && is_inheritable(area, of))
        };
        let areas: Ranges = body
            .memory
            .areas
            .iter()
            .filter(can_keep)
            .map(|a| (a.start, a.end))
            .collect();
        let within = pages::clip(data, &areas);
        Some(Child {
            index,
            areas,
            data,
            within,
        })
    }

    /// Where something of what the parent holds is of use, the child keeps what it gets with it.
    fn settle(&self, held: &[PageRun], share: &mut Share) {
        let common = pages::equal(held, &self.within);
        let holds = |area: &(u64, u64)| {
            let at = common.partition_point(|run| run.end() <= area.0);
            common.get(at).is_some_and(|run| run.start < area.1)
        };
        share.kept = self.areas.iter().copied().filter(holds).collect();
        let got = pages::clip(held, &share.kept);
        share.stale = pages::ranges(&pages::without(&got, &pages::ranges(self.data)));
        share.holds = pages::without(&got, &share.stale);
        share.present = pages::ranges(&common);
    }
}

/// Whether an area could be what is left of the parent's, in which it lies, after fork(2): private, with the same pages
/// behind it, of the same kind. Protection, name and lock are given to both when the memory is filled.
fn is_inheritable(area: &Area, of: &Area) -> bool {
    let offset = of.offset.checked_add(area.start - of.start);
    let same_file = area.source == Source::Nothing || offset == Some(area.offset);
    let both = |is: fn(&Area) -> bool| is(area) && is(of);
    both(Area::is_opened)
        && both(Area::is_inherited)
        && (area.flags, area.source, &area.advice, &area.policy) == (of.flags, of.source, &of.advice, &of.policy)
        && same_file
}

/// The pages that a parent should hold when its children are made: those of its own that one of them has, and where it
/// has others by now, those that several of them have.
fn seed(own: &[PageRun], children: &[Child<'_>]) -> Vec<PageRun> {
    let mut seed = Vec::new();
    let mut seen = Vec::new();
    for child in children {
        let add = |seed: Vec<PageRun>, found: Vec<PageRun>| {
            let new = pages::without(&found, &pages::ranges(&seed));
            pages::join(seed, new)
        };
        seed = add(seed, pages::equal(own, &child.within));
        seed = add(seed, pages::equal(&seen, &child.within));
        seen = add(seen, child.within.clone());
    }
    seed
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(start: u64, offset: u64, pages: u64) -> PageRun {
        PageRun::data(0, start << 12, offset << 12, pages)
    }

    fn child(index: usize, data: &[PageRun]) -> Child<'_> {
        Child {
            index,
            areas: vec![(0x1000, 0x9000)],
            data,
            within: data.to_vec(),
        }
    }

    #[test]
    fn a_seed_is_what_children_share_with_the_parent_or_with_each_other() {
        // The parent has written page 3 since; the second child page 2; nobody else has page 5.
        let own = [run(1, 101, 2), run(3, 903, 1), run(5, 105, 1)];
        let (a, b) = ([run(1, 101, 3)], [run(1, 101, 1), run(2, 802, 1), run(3, 103, 1)]);
        let children = [child(1, &a), child(2, &b)];
        let seed = seed(&own, &children);
        assert_eq!(pages::ranges(&seed), [(0x1000, 0x4000)]);
        assert_eq!(pages::clip(&seed, &[(0x3000, 0x4000)]), [run(3, 103, 1)]);
        let mut share = Share::default();
        children[1].settle(&seed, &mut share);
        assert_eq!(share.present, [(0x1000, 0x2000), (0x3000, 0x4000)]);
        assert_eq!(share.kept, [(0x1000, 0x9000)]);
        assert!(share.stale.is_empty(), "page 2 is written over");
    }

    #[test]
    fn what_a_grandchild_has_given_up_is_stale_although_its_parent_was_given_it() {
        // Neither process lends page 2 to its child, but the child gets it with the others.
        let (own, child_data, grandchild_data) = ([run(1, 101, 3)], [run(1, 101, 3)], [run(1, 101, 1)]);
        let mut share = Share::default();
        child(1, &child_data).settle(&own, &mut share);
        assert_eq!(share.holds, own);
        let mut last = Share::default();
        child(2, &grandchild_data).settle(&share.holds, &mut last);
        assert_eq!(last.stale, [(0x2000, 0x4000)]);
    }

    #[test]
    fn what_a_child_has_given_up_is_stale() {
        let own = [run(1, 101, 4)];
        let data = [run(1, 101, 1)];
        let mut share = Share::default();
        child(1, &data).settle(&own, &mut share);
        assert_eq!(share.stale, [(0x2000, 0x5000)]);
        assert_eq!(share.present, [(0x1000, 0x2000)]);
    }
}
