//! One address space that is not complete yet, and how pages are put into it.

use std::os::fd::{AsFd, BorrowedFd};
use std::sync::RwLock;
use std::sync::atomic::{AtomicBool, AtomicU8, Ordering};

use torpor_sys::PAGE_SIZE;
use torpor_sys::uffd::{Event, Put, Uffd};

use super::segments::{self, Segment};
use crate::error::{About, Result};

const CLAIMED: u8 = 1;
const FINISHED: u8 = 2;

/// Its userfaultfd and what is known of it.
#[derive(Debug)]
pub struct Space {
    uffd: Uffd,
    /// Its number in the image.
    pub number: u32,
    /// By address. Reading one and putting pages under it excludes changing it.
    segments: RwLock<Vec<Segment>>,
    /// What became of each block of the image that holds a part of it.
    blocks: Vec<AtomicU8>,
    /// The process is gone.
    ended: AtomicBool,
}

/// What an event asks for.
#[derive(Debug)]
pub enum Taken {
    /// There was none.
    Nothing,
    /// It was noted.
    Noted,
    /// A thread waits for this page.
    Fault(u64),
    /// A child that has the same memory.
    Child(Space),
}

impl Space {
    /// Registers ranges, all of them missing. `blocks` is how many blocks of the image hold a part of them.
    pub fn new(uffd: Uffd, number: u32, ranges: &[(u64, u64)], blocks: usize) -> Result<Space> {
        for &(start, end) in ranges {
            uffd.register(start, end - start).about(1, "userfaultfd")?;
        }
        let segments = ranges
            .iter()
            .map(|&(start, end)| Segment { start, end, was: start })
            .collect();
        Ok(Space {
            uffd,
            number,
            segments: RwLock::new(segments),
            blocks: (0..blocks).map(|_| AtomicU8::new(0)).collect(),
            ended: AtomicBool::new(false),
        })
    }

    /// Whether the process is gone.
    pub fn is_over(&self) -> bool {
        self.ended.load(Ordering::Relaxed)
    }

    /// To wait for its events.
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.uffd.as_fd()
    }

    /// How many blocks of the image hold a part of it.
    pub fn block_count(&self) -> usize {
        self.blocks.len()
    }

    /// True for the first who asks for a block.
    pub fn claim(&self, block: usize) -> bool {
        let state = &self.blocks[block];
        state
            .compare_exchange(0, CLAIMED, Ordering::Relaxed, Ordering::Relaxed)
            .is_ok()
    }

    /// Everything of a block has been put.
    pub fn finish(&self, block: usize) {
        self.blocks[block].store(FINISHED, Ordering::Release);
    }

    /// Takes an event and notes what it says.
    pub fn take_event(&self) -> Taken {
        // Nobody puts a page between the reading of an event and the noting of what it says.
        let Ok(mut segments) = self.segments.write() else {
            return Taken::Nothing;
        };
        match self.uffd.read() {
            Ok(Some(Event::Fault(address))) => Taken::Fault(address),
            Ok(Some(Event::Remove(start, end) | Event::Unmap(start, end))) => {
                segments::cut(&mut segments, start, end);
                Taken::Noted
            }
            Ok(Some(Event::Remap(from, to, len))) => {
                segments::remap(&mut segments, from, to, len);
                Taken::Noted
            }
            Ok(Some(Event::Fork(uffd))) => Taken::Child(self.child(uffd, &segments)),
            Ok(None) => Taken::Nothing,
            Err(_) => {
                self.ended.store(true, Ordering::Relaxed);
                Taken::Nothing
            }
        }
    }

    /// While the event of a fork waits nothing is put, so a block that is finished now was so when the child was made.
    fn child(&self, uffd: Uffd, segments: &[Segment]) -> Space {
        let inherited = |state: &AtomicU8| match state.load(Ordering::Acquire) {
            FINISHED => FINISHED,
            _ => 0,
        };
        Space {
            uffd,
            number: self.number,
            segments: RwLock::new(segments.to_vec()),
            blocks: self.blocks.iter().map(|b| AtomicU8::new(inherited(b))).collect(),
            ended: AtomicBool::new(self.is_over()),
        }
    }

    /// Where a page was that is at this address now; `None` when nothing from the image is there.
    pub fn origin(&self, address: u64) -> Option<u64> {
        segments::locate(self.segments.read().ok()?.as_slice(), address)
    }

    /// Puts data that was at `was` wherever the program has it now.
    ///
    /// # Errors
    /// The kernel has no room for it.
    pub fn put(&self, was: u64, data: &[u8]) -> Result<()> {
        self.each_place(was, data.len() as u64, |now, done, len| {
            self.uffd.copy(now, &data[done as usize..(done + len) as usize])
        })
    }

    /// What was there is lost: whoever touches it gets SIGBUS.
    ///
    /// # Errors
    /// EINVAL from a kernel before 6.6.
    pub fn poison(&self, was: u64, len: u64) -> Result<()> {
        self.each_place(was, len, |now, _, len| {
            let put = self.uffd.poison(now, len);
            self.uffd.wake(now, len);
            put
        })
    }

    /// Puts a page of zeroes, if what is at this address still comes from `was`.
    pub fn zero(&self, address: u64, was: Option<u64>) {
        loop {
            let Ok(segments) = self.segments.read() else { return };
            if segments::locate(&segments, address) != was || !matches!(self.uffd.zero(address), Ok(Put::Busy)) {
                return;
            }
            drop(segments);
            std::thread::yield_now();
        }
    }

    /// Lets whoever waits for a page look again.
    pub fn wake(&self, address: u64) {
        self.uffd.wake(address, PAGE_SIZE);
    }

    /// Calls `put` with (address now, bytes done, length) for each piece of a range that the program still has.
    fn each_place(
        &self,
        was: u64,
        len: u64,
        mut put: impl FnMut(u64, u64, u64) -> torpor_sys::error::Result<Put>,
    ) -> Result<()> {
        let mut done = 0u64;
        while done < len && !self.is_over() {
            let Ok(segments) = self.segments.read() else { break };
            let Some((now, len)) = segments::place_of(&segments, was + done, len - done) else {
                break;
            };
            let Some(now) = now else {
                done += len;
                continue;
            };
            match put(now, done, len).about(1, "userfaultfd")? {
                Put::Bytes(bytes) => done += bytes,
                Put::Exists | Put::Gone => done += PAGE_SIZE,
                Put::Busy => {
                    // Its events are taken under the write lock.
                    drop(segments);
                    std::thread::yield_now();
                }
                Put::Ended => self.ended.store(true, Ordering::Relaxed),
            }
        }
        Ok(())
    }
}
