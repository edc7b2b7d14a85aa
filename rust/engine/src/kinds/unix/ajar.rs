//! Sockets that show their whole queues for a moment: SO_PEEK_OFF lets one message be looked at after another, and
//! SO_PASSCRED shows who sent them. Both are the program's, and are put back also when the tracer is killed meanwhile:
//! by a process that waits for that.

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

use torpor_sys::socket::options;
use torpor_sys::{Pid, fd, fork};

type Made<T> = torpor_sys::Result<T>;

/// A socket and what its options were.
struct Before<'a> {
    socket: &'a OwnedFd,
    peek_offset: i32,
    pass_credentials: i32,
}

impl<'a> Before<'a> {
    fn of(socket: &&'a OwnedFd) -> Made<Before<'a>> {
        Ok(Before {
            socket,
            peek_offset: options::int(*socket, libc::SO_PEEK_OFF)?,
            pass_credentials: options::int(*socket, libc::SO_PASSCRED)?,
        })
    }

    fn set(&self, peek_offset: i32, pass_credentials: i32) -> Made<()> {
        options::set_int(self.socket, libc::SO_PEEK_OFF, peek_offset, "SO_PEEK_OFF")?;
        options::set_int(self.socket, libc::SO_PASSCRED, pass_credentials, "SO_PASSCRED")
    }

    fn put_back(&self) -> Made<()> {
        self.set(self.peek_offset, self.pass_credentials)
    }
}

/// Sockets that show their queues until this is dropped.
pub(super) struct Ajar<'a> {
    before: Vec<Before<'a>>,
    /// The process that waits, and the pipe whose end it waits for.
    guard: Option<(Pid, OwnedFd)>,
}

impl<'a> Ajar<'a> {
    pub(super) fn open(sockets: &[&'a OwnedFd]) -> Made<Ajar<'a>> {
        let before = sockets.iter().map(Before::of).collect::<Made<Vec<_>>>()?;
        let mut ajar = Ajar { before, guard: None };
        if ajar.before.is_empty() {
            return Ok(ajar);
        }
        let (reader, writer) = fd::pipe()?;
        let mut keep: Vec<i32> = sockets.iter().map(|s| s.as_raw_fd()).collect();
        keep.push(reader.as_raw_fd());
        let child = fork::fork(|| {
            if fork::become_independent(c"torpor-ajar", &keep).is_ok() {
                // Nothing is ever written: this is the end of the tracer, or of the look.
                let _ = std::fs::File::from(reader).read(&mut [0]);
            }
            let all = ajar.before.iter().all(|b| b.put_back().is_ok());
            i32::from(!all)
        })?;
        ajar.guard = Some((child, writer));
        ajar.before.iter().try_for_each(|b| b.set(0, 1))?;
        Ok(ajar)
    }

    /// Where the next look at a socket begins.
    pub(super) fn from(&self, socket: &OwnedFd, offset: i32) -> Made<()> {
        options::set_int(socket, libc::SO_PEEK_OFF, offset, "SO_PEEK_OFF")
    }
}

impl Drop for Ajar<'_> {
    fn drop(&mut self) {
        for before in &self.before {
            // The guard does the same once more.
            let _ = before.put_back();
        }
        if let Some((child, writer)) = self.guard.take() {
            drop(writer);
            let _ = fork::wait_child(child);
        }
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use torpor_sys::socket;

    use super::*;

    #[test]
    fn a_tracer_that_is_killed_leaves_no_trace() {
        let _alone = crate::tests::alone();
        let (_a, b) = socket::pair(libc::SOCK_DGRAM).unwrap();
        options::set_int(&b, libc::SO_PEEK_OFF, 5, "test").unwrap();
        let (reader, writer) = fd::pipe().unwrap();
        let tracer = fork::fork(|| {
            let _ajar = Ajar::open(&[&b]);
            drop(writer);
            drop(reader);
            std::thread::sleep(std::time::Duration::from_secs(600));
            0
        })
        .unwrap();
        let offset = || options::int(&b, libc::SO_PEEK_OFF).unwrap();
        let wait = |wanted: i32| {
            let mut tries = 0;
            while offset() != wanted {
                std::thread::sleep(std::time::Duration::from_millis(5));
                tries += 1;
                assert!(tries < 4000, "SO_PEEK_OFF is {}, not {wanted}", offset());
            }
        };
        wait(0);
        fork::kill(tracer, libc::SIGKILL).unwrap();
        let _ = fork::wait_child(tracer);
        wait(5);
        let mut tries = 0;
        while options::int(&b, libc::SO_PASSCRED).unwrap() != 0 {
            std::thread::sleep(std::time::Duration::from_millis(5));
            tries += 1;
            assert!(tries < 4000, "SO_PASSCRED stays");
        }
    }
}
