//! A process that stands behind another: when that one dies without a word, it ends a third.
//!
//! It shares the table of descriptors with the process that makes it (clone(2), CLONE_FILES), so that none of them is
//! closed when that one is killed, also not one that was opened later.

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, OwnedFd};

use crate::error::{Result, check};
use crate::{fd, pidfd};

/// The word that says that all is well, and what the guard looks at. None of it is ever closed: the guard goes by the
/// numbers, and another file at one of them would mislead it.
#[derive(Debug)]
pub struct Guard {
    word: ManuallyDrop<OwnedFd>,
}

impl Guard {
    /// Makes the guard of the calling process: it kills `target` unless [`Guard::dismiss`] comes first.
    ///
    /// # Errors
    /// EAGAIN or ENOMEM (clone(2)), EMFILE.
    pub fn over(target: OwnedFd) -> Result<Guard> {
        let target = ManuallyDrop::new(target);
        let word = ManuallyDrop::new(fd::eventfd(0, 0)?);
        let ward = ManuallyDrop::new(pidfd::open(std::process::id() as i32)?);
        let fds = [word.as_raw_fd(), ward.as_raw_fd(), target.as_raw_fd()];
        let flags = libc::CLONE_FILES | libc::SIGCHLD;
        // SAFETY: as fork(2), with a copy of our memory. The child calls nothing that takes a lock, and never returns.
        let pid = unsafe { libc::syscall(libc::SYS_clone, flags, 0, 0, 0, 0) };
        if check(pid, "clone", "guard")? == 0 {
            stand(fds);
        }
        Ok(Guard { word })
    }

    /// All is well: the guard goes.
    pub fn dismiss(self) {
        let one = 1u64.to_ne_bytes();
        // SAFETY: eight bytes to read. A guard that is gone needs no word.
        unsafe { libc::write(self.word.as_raw_fd(), one.as_ptr().cast(), one.len()) };
    }
}

/// The guard itself.
fn stand([word, ward, target]: [i32; 3]) -> ! {
    let watch = |fd| libc::pollfd {
        fd,
        events: libc::POLLIN,
        revents: 0,
    };
    let mut polls = [watch(word), watch(ward)];
    // SAFETY: plain calls with numbers, a C string and an array of two; the last one does not return.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, c"torpor-guard".as_ptr());
        while libc::poll(polls.as_mut_ptr(), 2, -1) <= 0 {}
        if polls[0].revents == 0 {
            libc::syscall(libc::SYS_pidfd_send_signal, target, libc::SIGKILL, 0, 0);
        }
        libc::_exit(0)
    }
}
