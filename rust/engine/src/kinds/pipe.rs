//! Pipes with what is in them.

use std::io::Write;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::{Pid, fd};

use crate::error::{About, Error, Result};

/// A pipe.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Inode number, for people.
    pub ino: u64,
    /// Capacity in bytes (F_GETPIPE_SZ).
    pub size: i32,
    /// Unread bytes.
    pub content: BlobRef,
}

/// Reads a pipe without emptying it, through any of its ends. The `end` is a descriptor of ours for the
/// program's own description, so its flags must not be touched: a second one is opened for reading.
pub fn collect(
    pid: Pid,
    ino: u64,
    end: &OwnedFd,
    blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>,
) -> Result<State> {
    let object = || format!("pipe {ino}");
    let flags = fd::fcntl(end, libc::F_GETFL, 0).about(pid, object())?;
    if flags & libc::O_DIRECT != 0 {
        return Err(Error::unsupported(pid, object(), "packet mode is not carried yet", ""));
    }
    let reader = fd::reopen(end, libc::O_RDONLY | libc::O_NONBLOCK).about(pid, object())?;
    let content = fd::pipe_content(&reader).about(pid, object())?;
    let size = fd::fcntl(end, libc::F_GETPIPE_SZ, 0).about(pid, object())?;
    Ok(State { ino, size, content: blob(&content)? })
}

/// A new pipe with the same content, with both ends open.
pub fn rebuild(state: &State, content: &[u8]) -> Result<(OwnedFd, OwnedFd)> {
    let object = || format!("pipe {}", state.ino);
    let (reader, writer) = fd::pipe().about(1, object())?;
    fd::fcntl(&writer, libc::F_SETPIPE_SZ, state.size.into()).about(1, object())?;
    fd::fcntl(&writer, libc::F_SETFL, libc::O_NONBLOCK.into()).about(1, object())?;
    let mut file = std::fs::File::from(writer.try_clone().map_err(|e| torpor_sys::Error::io("dup", "pipe", &e))?);
    file.write_all(content).map_err(|e| torpor_sys::Error::io("write", "pipe", &e)).about(1, object())?;
    Ok((reader, writer))
}
