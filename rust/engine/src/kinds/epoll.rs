//! epoll(7) instances: which descriptors they watch. Adding has to happen inside a process that has the watched
//! file at the same number, since epoll keys on both.

use serde::{Deserialize, Serialize};
use torpor_sys::Pid;
use torpor_sys::proc::FdInfo;
use torpor_sys::remote::Batch;

use crate::error::{Error, Result};

/// One watched descriptor.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Watch {
    /// Its number when it was added.
    pub fd: i32,
    /// EPOLL* bits; EPOLLONESHOT ones that have fired have none left but the flag.
    pub events: u32,
    /// What the program gets back.
    pub data: u64,
    /// Inode number of the file.
    pub ino: u64,
}

/// An epoll instance.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// What it watches, in the order of the kernel.
    pub watches: Vec<Watch>,
}

/// `tfd:        5 events:       19 data:                5  pos:0 ino:61af sdev:7` (proc(5)); ino is hexadecimal.
fn parse(line: &str) -> Option<Watch> {
    let words: Vec<&str> = line.split_ascii_whitespace().collect();
    let after = |key: &str| {
        let at = words.iter().position(|w| w.starts_with(key))?;
        let glued = words[at].strip_prefix(key)?;
        if glued.is_empty() {
            words.get(at + 1).copied()
        } else {
            Some(glued)
        }
    };
    Some(Watch {
        fd: after("tfd:")?.parse().ok()?,
        events: u32::from_str_radix(after("events:")?, 16).ok()?,
        data: u64::from_str_radix(after("data:")?, 16).ok()?,
        ino: u64::from_str_radix(after("ino:")?, 16).ok()?,
    })
}

/// From fdinfo. `has` tells whether the process has that file at that number.
pub fn collect(pid: Pid, number: i32, info: &FdInfo, has: impl Fn(i32, u64) -> bool) -> Result<State> {
    let mut watches = Vec::new();
    for line in info.lines.iter().filter(|l| l.starts_with("tfd:")) {
        let watch = parse(line).ok_or_else(|| Error::unsupported(pid, format!("fd {number}"), "unknown fdinfo", ""))?;
        if !has(watch.fd, watch.ino) {
            let why = format!(
                "it watches descriptor {}, which was closed or used again since",
                watch.fd
            );
            return Err(Error::unsupported(pid, format!("fd {number} (epoll)"), why, ""));
        }
        watches.push(watch);
    }
    Ok(State { watches })
}

/// Watches again what was watched, in a process that has everything at its place.
///
/// A one-shot watch that has fired has nothing left but its private bits, which cannot be asked for: so it is made
/// to fire again, alone, before there are others. That needs its file to be ready for something.
pub fn rebuild(batch: &mut Batch, epoll: i32, state: &State) {
    const READY: u32 = (libc::EPOLLIN | libc::EPOLLOUT | libc::EPOLLPRI | libc::EPOLLRDHUP) as u32;
    let (fired, waiting): (Vec<&Watch>, Vec<&Watch>) = state.watches.iter().partition(|w| w.has_fired());
    for watch in fired {
        control(batch, epoll, libc::EPOLL_CTL_ADD, watch, watch.events | READY);
        let room = batch.room(12);
        let args = [epoll.into(), room.into(), 1.into(), 0.into()];
        batch.may("epoll_wait", libc::SYS_epoll_wait, args);
    }
    // The kernel lists the newest first in no promised order; the order is not visible to programs.
    for watch in waiting {
        control(batch, epoll, libc::EPOLL_CTL_ADD, watch, watch.events);
    }
}

impl Watch {
    /// The kernel adds EPOLLERR and EPOLLHUP to every watch, and takes all but private bits from a fired one.
    fn has_fired(&self) -> bool {
        let always = (libc::EPOLLERR | libc::EPOLLHUP) as u32;
        self.events & libc::EPOLLONESHOT as u32 != 0 && self.events & always == 0
    }
}

fn control(batch: &mut Batch, epoll: i32, operation: i32, watch: &Watch, events: u32) {
    let mut event = events.to_le_bytes().to_vec();
    event.extend_from_slice(&watch.data.to_le_bytes());
    let event = batch.data(&event);
    let what = format!("epoll_ctl: fd {epoll} watching fd {}", watch.fd);
    batch.must(
        what,
        libc::SYS_epoll_ctl,
        [epoll.into(), operation.into(), watch.fd.into(), event.into()],
    );
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_fdinfo() {
        let line = "tfd:        5 events:       19 data:      ff00000005  pos:0 ino:61af sdev:7";
        assert_eq!(
            parse(line),
            Some(Watch {
                fd: 5,
                events: 0x19,
                data: 0xff_0000_0005,
                ino: 0x61af
            })
        );
    }
}
