//! Staying behind a container as its parent, for callers that want its exit status from a child of theirs.

use std::fs::File;
use std::os::fd::AsRawFd;

use nix::errno::Errno;
use nix::sys::signal::{SigSet, Signal};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::{Pid, chdir, dup2};

use crate::error::Error;

/// Before anything is forked: orphans of the container come to us, as they would to a shell that runs it.
pub fn adopt_orphans() -> Result<(), Error> {
    nix::sys::prctl::set_child_subreaper(true).map_err(Error::call("become a subreaper"))
}

/// Lets go of everything the container or its user could notice us by: its pipes (whose other end waits for them to be
/// closed), directories, and the keys pressed for it.
pub fn step_back() {
    SigSet::all().thread_block().unwrap_or_default();
    let _ = chdir("/");
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        for fd in 0..=2 {
            let _ = dup2(null.as_raw_fd(), fd);
        }
    }
}

/// Waits for `init`, reaping whatever else ends; the exit code to end with.
pub fn wait(init: Pid) -> i32 {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid == init => return code,
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid == init => return killed_by(signal),
            Ok(_) | Err(Errno::EINTR) => {}
            // Not our child any more: somebody else has waited for it.
            Err(_) => return killed_by(Signal::SIGKILL),
        }
    }
}

fn killed_by(signal: Signal) -> i32 {
    128 + signal as i32
}
