//! File locks. Those of flock(2) and F_OFD_SETLK belong to the open file description, and are taken on it; those of
//! F_SETLK belong to the process, which takes them itself once it opens and closes nothing more. Whoever waits for
//! a lock makes its call again.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_sys::proc::FdInfo;
use torpor_sys::remote::Batch;
use torpor_sys::{Pid, lock};

use crate::error::{About, Error, Result};

/// A range of bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Range {
    /// Nobody else may have one there.
    pub exclusive: bool,
    /// Its first byte.
    pub start: i64,
    /// How many; 0 for all.
    pub len: i64,
}

/// What a description holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "lock", rename_all = "kebab-case")]
pub enum Lock {
    /// flock(2).
    Flock {
        /// LOCK_EX.
        exclusive: bool,
    },
    /// F_OFD_SETLK.
    Range(Range),
}

/// What a process holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Posix {
    /// A descriptor of the file.
    pub fd: i32,
    /// Where.
    #[serde(flatten)]
    pub range: Range,
}

/// One line of fdinfo.
#[derive(Debug, PartialEq, Eq)]
enum Line {
    OfDescription(Lock),
    OfProcess(Range),
    Other(String),
}

/// `lock: 1: POSIX  ADVISORY  WRITE 12289 fe:00:10010676 5 11` (fs/locks.c, lock_get_status).
fn parse(line: &str) -> Option<Line> {
    let words: Vec<&str> = line.strip_prefix("lock:")?.split_ascii_whitespace().collect();
    let [_, kind, mode, access, _, _, start, end] = *words.as_slice() else {
        return None;
    };
    let exclusive = match access {
        "WRITE" => true,
        "READ" => false,
        _ => return None,
    };
    let range = || {
        let start: i64 = start.parse().ok()?;
        let len = match end {
            "EOF" => 0,
            end => end.parse::<i64>().ok()?.checked_sub(start)?.checked_add(1)?,
        };
        Some(Range { exclusive, start, len })
    };
    Some(match (kind, mode) {
        ("FLOCK", "ADVISORY") => Line::OfDescription(Lock::Flock { exclusive }),
        ("OFDLCK", "ADVISORY") => Line::OfDescription(Lock::Range(range()?)),
        ("POSIX", "ADVISORY") => Line::OfProcess(range()?),
        _ => Line::Other(kind.to_lowercase()),
    })
}

/// The locks that fdinfo of one descriptor shows: those of the description, and those of the process.
///
/// # Errors
/// Refused: leases.
pub fn collect(pid: Pid, number: i32, info: &FdInfo) -> Result<(Vec<Lock>, Vec<Posix>)> {
    let (mut of_description, mut of_process) = (Vec::new(), Vec::new());
    for line in info.lines.iter().filter(|l| l.starts_with("lock:")) {
        match parse(line) {
            Some(Line::OfDescription(lock)) => of_description.push(lock),
            Some(Line::OfProcess(range)) => of_process.push(Posix { fd: number, range }),
            other => {
                let what = match other {
                    Some(Line::Other(kind)) => format!("a {kind} on it"),
                    _ => format!("a lock of unknown form ({})", line.trim()),
                };
                let why = format!("{what} is not carried");
                return Err(Error::unsupported(pid, format!("fd {number}"), why, "give it up"));
            }
        }
    }
    Ok((of_description, of_process))
}

fn taken(pid: i32, object: &str) -> Error {
    let why = "its lock is held by someone else now";
    Error::unsupported(pid, object, why, "stop whoever works on the same files")
}

/// Takes the locks of a description.
pub fn rebuild(description: &OwnedFd, locks: &[Lock], object: &str) -> Result<()> {
    for lock in locks {
        let got = match *lock {
            Lock::Flock { exclusive } => lock::flock(description, exclusive),
            Lock::Range(r) => lock::range(description, r.exclusive, r.start, r.len),
        };
        match got {
            Err(e) if is_taken(&e) => return Err(taken(1, object)),
            other => other.about(1, object)?,
        }
    }
    Ok(())
}

fn is_taken(error: &torpor_sys::Error) -> bool {
    // EWOULDBLOCK is the same; fcntl(2) may say EACCES.
    error
        .errno()
        .is_some_and(|e| [libc::EAGAIN, libc::EACCES].contains(&(e as i32)))
}

/// Takes the locks of the process that runs the batch.
pub fn rebuild_process(batch: &mut Batch, locks: &[Posix]) {
    for Posix { fd, range } in locks {
        let kind = if range.exclusive { libc::F_WRLCK } else { libc::F_RDLCK };
        // struct flock: type and whence (SEEK_SET is 0), start, length, process.
        let words = [kind as u64, range.start as u64, range.len as u64, 0];
        let bytes: Vec<u8> = words.iter().flat_map(|w| w.to_le_bytes()).collect();
        let lock = batch.data(&bytes);
        let args = [(*fd).into(), libc::F_SETLK.into(), lock.into()];
        batch.must(format!("the lock on fd {fd}"), libc::SYS_fcntl, args);
    }
}

/// Says of a failed batch of [`rebuild_process`] what it means.
pub fn explain(pid: i32, error: torpor_sys::Error) -> Error {
    if is_taken(&error) {
        taken(pid, "POSIX lock")
    } else {
        Error::from(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_of_fdinfo() {
        let range = |exclusive, start, len| Range { exclusive, start, len };
        let all = [
            (
                "lock:\t1: FLOCK  ADVISORY  WRITE 12289 fe:00:10010676 0 EOF",
                Some(Line::OfDescription(Lock::Flock { exclusive: true })),
            ),
            (
                "lock:\t2: POSIX  ADVISORY  WRITE 12289 fe:00:10010676 5 11",
                Some(Line::OfProcess(range(true, 5, 7))),
            ),
            (
                "lock:\t1: OFDLCK ADVISORY  READ -1 fe:00:10010676 100 EOF",
                Some(Line::OfDescription(Lock::Range(range(false, 100, 0)))),
            ),
            (
                "lock:\t1: LEASE  ACTIVE    READ 12289 fe:00:10010692 0 EOF",
                Some(Line::Other("lease".into())),
            ),
            ("lock:\t1: POSIX  *NOINODE*", None),
        ];
        for (line, expected) in all {
            assert_eq!(parse(line), expected, "{line}");
        }
    }
}
