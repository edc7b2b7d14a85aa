//! Sockets that show their whole queues for a moment: SO_PEEK_OFF lets one message be looked at after another, and other
//! options show who sent them and where to. All are the program's, and are put back also when the tracer is killed
//! meanwhile: by a process that waits for that.

use std::io::Read;
use std::os::fd::{AsRawFd, OwnedFd};

use torpor_sys::socket::options;
use torpor_sys::{Pid, fd, fork};

type Made<T> = torpor_sys::Result<T>;

/// An option that shows more: level, number, name.
pub(super) type Extra = (i32, i32, &'static str);

/// A socket and what its options were.
struct Before<'a> {
    socket: &'a OwnedFd,
    options: Vec<(Extra, i32)>,
}

const PEEK_OFFSET: Extra = (libc::SOL_SOCKET, libc::SO_PEEK_OFF, "SO_PEEK_OFF");

fn set(socket: &OwnedFd, (level, number, name): Extra, value: i32) -> Made<()> {
    options::set(socket, level, number, &value.to_ne_bytes(), name)
}

impl<'a> Before<'a> {
    fn of(socket: &'a OwnedFd, extra: &[Extra]) -> Made<Before<'a>> {
        let mut found = Vec::new();
        for option in [PEEK_OFFSET].iter().chain(extra) {
            let value = options::int_at_level(socket, option.0, option.1)?;
            found.extend(value.map(|value| (*option, value)));
        }
        Ok(Before { socket, options: found })
    }

    fn open(&self) -> Made<()> {
        for (option, _) in &self.options {
            set(self.socket, *option, if *option == PEEK_OFFSET { 0 } else { 1 })?;
        }
        Ok(())
    }

    fn put_back(&self) -> Made<()> {
        let put = |(option, value): &(Extra, i32)| set(self.socket, *option, *value);
        self.options.iter().try_for_each(put)
    }
}

/// Sockets that show their queues until this is dropped.
pub(super) struct Ajar<'a> {
    before: Vec<Before<'a>>,
    /// The process that waits, and the pipe whose end it waits for.
    guard: Option<(Pid, OwnedFd)>,
}

impl<'a> Ajar<'a> {
    /// `extra` are options that are on meanwhile, of those sockets that have them.
    pub(super) fn open(sockets: &[&'a OwnedFd], extra: &[Extra]) -> Made<Ajar<'a>> {
        let before = sockets.iter().map(|socket| Before::of(socket, extra));
        let before = before.collect::<Made<Vec<_>>>()?;
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
        ajar.before.iter().try_for_each(Before::open)?;
        Ok(ajar)
    }

    /// Where the next look at a socket begins.
    pub(super) fn from(&self, socket: &OwnedFd, offset: i32) -> Made<()> {
        set(socket, PEEK_OFFSET, offset)
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
            let _ajar = Ajar::open(&[&b], &[(libc::SOL_SOCKET, libc::SO_PASSCRED, "SO_PASSCRED")]);
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
