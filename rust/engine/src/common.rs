//! Pages that processes have in common since a fork: they are stored once, and named by each.

use std::collections::BTreeMap;

use torpor_image::Share;
use torpor_sys::mem::Memory;
use torpor_sys::pagemap::Pagemap;
use torpor_sys::{PAGE_SIZE, Pid};

use crate::collect::Collected;
use crate::error::{About, Error, Result};
use crate::kinds::memory;
use crate::model::Process;

/// How many bytes are compared at once where frames cannot be.
const PIECE: u64 = 1 << 20;

/// Start and end of ranges of addresses, sorted.
type Ranges = Vec<(u64, u64)>;

/// One process whose memory is read.
#[derive(Debug)]
struct Member {
    /// Who is read: the process, or its twin.
    pid: Pid,
    pagemap: Pagemap,
    /// Indices of processes that are read before, and that may have pages of it.
    elders: Vec<usize>,
}

/// The processes of a container as relatives, by their indices in the inventory.
#[derive(Debug)]
pub struct Common {
    members: BTreeMap<usize, Member>,
    shares: Vec<Share>,
}

impl Common {
    /// `reader` says who is read in place of a process.
    pub fn of(collected: &Collected, reader: impl Fn(Pid) -> Option<Pid>) -> Result<Common> {
        let processes = &collected.inventory.processes;
        let mut members = BTreeMap::new();
        for source in &collected.sources {
            let pid = reader(source.pid).ok_or_else(|| Error::nonsense("a process without a twin"))?;
            let member = Member {
                pid,
                pagemap: Pagemap::open(pid).about(pid, "pagemap")?,
                elders: elders(processes, source.index),
            };
            members.insert(source.index, member);
        }
        Ok(Common {
            members,
            shares: Vec::new(),
        })
    }

    fn member(&self, index: usize) -> Result<&Member> {
        self.members
            .get(&index)
            .ok_or_else(|| Error::nonsense("a process that is not read"))
    }

    /// Who is read for the process of this index.
    pub fn reader(&self, index: usize) -> Result<Pid> {
        self.member(index).map(|m| m.pid)
    }

    /// What was found to be common, in the order of the processes.
    pub fn shares(&self) -> &[Share] {
        &self.shares
    }

    /// Notes which pages of `ranges`, the private data of a process, an elder has as well, and returns the rest.
    pub fn take(&mut self, index: usize, ranges: &[(u64, u64)]) -> Result<Ranges> {
        let mut ranges = ranges.to_vec();
        let member = self.member(index)?;
        let mut shares = Vec::new();
        for &elder in &member.elders {
            let same = same(member, self.member(elder)?, &ranges)?;
            shares.extend(same.iter().map(|&(start, end)| Share {
                from: elder as u32,
                to: index as u32,
                start,
                end,
            }));
            ranges = without(&ranges, &same);
        }
        self.shares.extend(shares);
        Ok(ranges)
    }
}

/// Who may have pages of a process: its parent, and the parent's, since they were there when it was made; the first of
/// its siblings and the one before it, for what the parent has changed or given up since.
fn elders(processes: &[Process], index: usize) -> Vec<usize> {
    let lives = |p: &Process| p.body.is_some();
    let parent_of = |at: usize| {
        processes[..at]
            .iter()
            .position(|p| p.pid == processes[at].ppid && lives(p))
    };
    let parent = parent_of(index);
    let mut siblings = (0..index).filter(|at| processes[*at].ppid == processes[index].ppid && lives(&processes[*at]));
    let (first, last) = (siblings.next(), siblings.next_back());
    let mut all: Vec<usize> = [parent, parent.and_then(parent_of), last, first]
        .into_iter()
        .flatten()
        .collect();
    // Where memory is in common, one holds it for all.
    for at in &mut all {
        let holder = processes[*at].body.as_ref().and_then(|b| b.sharing.memory);
        *at = processes.iter().position(|p| Some(p.pid) == holder).unwrap_or(*at);
    }
    // Init has no parent here, and no siblings.
    all.retain(|at| *at < index && processes[index].ppid != 0);
    all
}

fn same(one: &Member, other: &Member, ranges: &[(u64, u64)]) -> Result<Ranges> {
    let mut found = Ranges::new();
    let seen = one.pagemap.same_pages(&other.pagemap, ranges, &mut found);
    if seen.about(one.pid, "pagemap")? {
        return Ok(found);
    }
    let mut theirs = Ranges::new();
    for &(start, end) in ranges {
        let data = other.pagemap.private_data(start, end, &mut theirs);
        data.about(other.pid, "pagemap")?;
    }
    equal_bytes(&memory::open(one.pid)?, &memory::open(other.pid)?, &theirs)
}

/// The pages of `ranges` that hold the same bytes in both.
fn equal_bytes(one: &Memory, other: &Memory, ranges: &[(u64, u64)]) -> Result<Ranges> {
    let mut found = Ranges::new();
    for &(start, end) in ranges {
        for at in (start..end).step_by(PIECE as usize) {
            let len = PIECE.min(end - at);
            let (mut ours, mut theirs) = (vec![0; len as usize], vec![0; len as usize]);
            one.gather_common(&[(at, len)], &mut ours).about(one.pid(), "memory")?;
            other
                .gather_common(&[(at, len)], &mut theirs)
                .about(other.pid(), "memory")?;
            let page = PAGE_SIZE as usize;
            for (i, (a, b)) in ours.chunks(page).zip(theirs.chunks(page)).enumerate() {
                if a == b {
                    let start = at + i as u64 * PAGE_SIZE;
                    match found.last_mut() {
                        Some(last) if last.1 == start => last.1 += PAGE_SIZE,
                        _ => found.push((start, start + PAGE_SIZE)),
                    }
                }
            }
        }
    }
    Ok(found)
}

/// `ranges` less `taken`, which lie in them.
fn without(ranges: &[(u64, u64)], taken: &[(u64, u64)]) -> Ranges {
    let mut rest = Ranges::new();
    let mut taken = taken.iter().peekable();
    for &(mut start, end) in ranges {
        while let Some(&(from, to)) = taken.next_if(|t| t.0 < end) {
            if from > start {
                rest.push((start, from));
            }
            start = to;
        }
        if start < end {
            rest.push((start, end));
        }
    }
    rest
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use torpor_sys::{fd, fork, wait};

    use super::*;

    #[test]
    fn what_is_common_is_cut_out() {
        let ranges = [(0x1000, 0x5000), (0x7000, 0x9000), (0xb000, 0xc000)];
        let taken = [(0x2000, 0x3000), (0x7000, 0x8000), (0xb000, 0xc000)];
        assert_eq!(
            without(&ranges, &taken),
            [(0x1000, 0x2000), (0x3000, 0x5000), (0x8000, 0x9000)]
        );
        assert_eq!(without(&ranges, &[]), ranges);
    }

    /// A child of ours that has the same pages but one, until it is dismissed.
    fn with_changed_child(page: *mut u8, work: impl FnOnce(Pid)) {
        let (hold, release) = fd::pipe().unwrap();
        let (ready, tell) = fd::pipe().unwrap();
        let child = fork::fork(|| {
            // Through the kernel, since this crate has no unsafe code.
            let own = Memory::open(std::process::id() as Pid).unwrap();
            own.write(page as u64, &[1]).unwrap();
            fork::write_byte(&tell).unwrap();
            fork::read_byte(&hold);
            0
        })
        .unwrap();
        fork::read_byte(&ready).unwrap();
        work(child);
        fork::write_byte(&release).unwrap();
        wait::until(child, std::time::Duration::from_secs(10)).unwrap();
    }

    #[test]
    fn a_page_that_one_has_changed_is_not_common() {
        let mut bytes = vec![7u8; 8 * 4096];
        let start = (bytes.as_ptr() as u64).next_multiple_of(4096);
        let page = bytes
            .as_mut_ptr()
            .wrapping_add((start - bytes.as_ptr() as u64) as usize + 4096);
        let member = |pid| Member {
            pid,
            pagemap: Pagemap::open(pid).unwrap(),
            elders: Vec::new(),
        };
        let range = [(start, start + 3 * 4096)];
        let expected = [(start, start + 4096), (start + 2 * 4096, start + 3 * 4096)];
        with_changed_child(page, |child| {
            let (one, other) = (member(child), member(std::process::id() as Pid));
            assert_eq!(same(&one, &other, &range).unwrap(), expected);
            let (one, other) = (memory::open(child).unwrap(), memory::open(other.pid).unwrap());
            assert_eq!(equal_bytes(&one, &other, &range).unwrap(), expected);
        });
    }
}
