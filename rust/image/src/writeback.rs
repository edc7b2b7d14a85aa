//! Asks the kernel early to bring the file to disk, so that the fsync at the end finds little left to do.
//!
//! Left alone the kernel begins only at the fsync, and writing and syncing take the sum of both times instead of the longer one (here
//! 0.45 s instead of 0.27 s per GiB). A thread of its own asks, since asking blocks when the disk is slow, and the writer may be holding
//! a stopped container.

use std::fs::File;
use std::sync::mpsc::{Receiver, Sender, TryRecvError, channel};
use std::thread::{Builder, JoinHandle};

use nix::fcntl::{PosixFadviseAdvice, posix_fadvise};

/// Images smaller than this need no help.
const STEP: u64 = 8 << 20;

#[derive(Debug)]
pub(crate) struct Writeback {
    announced: u64,
    helper: Helper,
}

#[derive(Debug)]
enum Helper {
    NotNeededYet,
    Works(Sender<u64>, JoinHandle<()>),
    None,
}

impl Writeback {
    pub(crate) fn new() -> Writeback {
        Writeback {
            announced: 0,
            helper: Helper::NotNeededYet,
        }
    }

    /// Says that `file` is written up to `position`.
    pub(crate) fn reached(&mut self, file: &File, position: u64) {
        if position - self.announced < STEP {
            return;
        }
        self.announced = position;
        if let Helper::NotNeededYet = self.helper {
            self.helper = start(file);
        }
        if let Helper::Works(progress, _) = &self.helper {
            let _ = progress.send(position);
        }
    }

    /// Stops asking; what was asked for goes on in the kernel.
    pub(crate) fn stop(&mut self) {
        if let Helper::Works(progress, thread) = std::mem::replace(&mut self.helper, Helper::None) {
            drop(progress);
            let _ = thread.join();
        }
    }
}

impl Drop for Writeback {
    fn drop(&mut self) {
        self.stop();
    }
}

/// Without a thread to spare the fsync does it all.
fn start(file: &File) -> Helper {
    let Ok(file) = file.try_clone() else {
        return Helper::None;
    };
    let (progress, positions) = channel();
    let thread = Builder::new()
        .name("torpor-writeback".to_owned())
        .spawn(move || ask(&file, &positions));
    thread.map_or(Helper::None, |thread| Helper::Works(progress, thread))
}

fn ask(file: &File, positions: &Receiver<u64>) {
    let mut asked = 0;
    while let Ok(mut position) = positions.recv() {
        // In steps, so that stopping never waits for long.
        while asked + STEP <= position {
            // "Not needed" starts writeback of dirty pages and drops clean ones. Pages written a moment ago are dirty: they stay in the
            // cache for the restore that may follow. sync_file_range would say it better, but nix has no safe call of it.
            let _ = posix_fadvise(file, asked as i64, STEP as i64, PosixFadviseAdvice::POSIX_FADV_DONTNEED);
            asked += STEP;
            match positions.try_recv() {
                Ok(newer) => position = newer,
                Err(TryRecvError::Empty) => {}
                Err(TryRecvError::Disconnected) => return,
            }
        }
    }
}
