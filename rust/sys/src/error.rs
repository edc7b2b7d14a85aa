//! What a kernel call says when it fails.

use nix::errno::Errno;

/// Result of every function of this crate.
pub type Result<T> = std::result::Result<T, Error>;

/// A failed kernel call, or text of the kernel that could not be understood.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A system call failed; `object` says on what (a path, a pid, a descriptor).
    #[error("{call}({object}): {}", errno.desc())]
    Call {
        /// Name of the system call.
        call: &'static str,
        /// What it was applied to.
        object: String,
        /// Its error number.
        errno: Errno,
    },
    /// A file of /proc does not read as documented in proc(5).
    #[error("{file}: cannot understand {text:?}")]
    Parse {
        /// The file.
        file: String,
        /// The text that was not understood.
        text: String,
    },
    /// The task ended while we worked on it.
    #[error("task {pid} ended ({how})")]
    Died {
        /// Its id.
        pid: i32,
        /// How it ended.
        how: String,
    },
    /// A task did not stop in time.
    #[error("task {pid} did not stop within {ms} ms (state {state}, in {wchan}, system call {call})")]
    Timeout {
        /// Its id.
        pid: i32,
        /// How long we waited, in milliseconds.
        ms: u64,
        /// Its state letter in /proc/PID/stat.
        state: char,
        /// The kernel function it sleeps in.
        wchan: String,
        /// The number of the call that it is in, or `running`.
        call: String,
    },
    /// A call run inside another process failed.
    #[error("{call} inside task {pid}: {}", errno.desc())]
    Remote {
        /// The process.
        pid: i32,
        /// What the call was for.
        call: String,
        /// Its error number.
        errno: Errno,
    },
    /// Something about the task makes the operation impossible.
    #[error("task {pid}: {why}")]
    Unsuitable {
        /// The process.
        pid: i32,
        /// The reason.
        why: String,
    },
}

impl Error {
    /// The error of the call that just failed on this thread.
    pub fn last(call: &'static str, object: impl ToString) -> Error {
        Error::Call {
            call,
            object: object.to_string(),
            errno: Errno::last(),
        }
    }

    /// Wraps an [`std::io::Error`] of a file operation.
    pub fn io(call: &'static str, object: impl ToString, error: &std::io::Error) -> Error {
        let errno = Errno::from_raw(error.raw_os_error().unwrap_or(libc::EIO));
        Error::Call {
            call,
            object: object.to_string(),
            errno,
        }
    }

    /// The error number, where a kernel call failed.
    pub fn errno(&self) -> Option<Errno> {
        match self {
            Error::Call { errno, .. } | Error::Remote { errno, .. } => Some(*errno),
            Error::Died { .. } => Some(Errno::ESRCH),
            _ => None,
        }
    }

    /// The task that the error is about, where it is known.
    pub fn pid(&self) -> Option<i32> {
        match self {
            Error::Died { pid, .. }
            | Error::Timeout { pid, .. }
            | Error::Remote { pid, .. }
            | Error::Unsuitable { pid, .. } => Some(*pid),
            _ => None,
        }
    }
}

/// Turns the -1 convention of libc into a result.
pub(crate) fn check(ret: i64, call: &'static str, object: impl ToString) -> Result<i64> {
    if ret < 0 {
        Err(Error::last(call, object))
    } else {
        Ok(ret)
    }
}
