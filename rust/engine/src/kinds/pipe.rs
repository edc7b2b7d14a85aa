//! Pipes and FIFOs with what is in them.

use std::io::Write;
use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;
use torpor_sys::{Pid, fd};

use crate::error::{About, Result};

/// A pipe.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// Inode number, for people.
    pub ino: u64,
    /// Where it is, when it has a name (fifo(7)).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path: Option<String>,
    /// Capacity in bytes (F_GETPIPE_SZ).
    pub size: i32,
    /// Unread bytes.
    pub content: BlobRef,
    /// Lengths of the packets that the content is made of, in packet mode (pipe(2), O_DIRECT).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub packets: Vec<usize>,
}

/// Reads a pipe without emptying it, through any of its ends. The `end` is a descriptor of ours for the
/// program's own description, so its flags must not be touched: a second one is opened for reading.
pub fn collect(
    pid: Pid,
    ino: u64,
    end: &OwnedFd,
    packets: bool,
    blob: &mut dyn FnMut(&[u8]) -> Result<BlobRef>,
) -> Result<State> {
    let object = || format!("pipe {ino}");
    let reader = fd::reopen(end, libc::O_RDONLY | libc::O_NONBLOCK).about(pid, object())?;
    let pieces = fd::pipe_content(&reader).about(pid, object())?;
    let size = fd::fcntl(end, libc::F_GETPIPE_SZ, 0).about(pid, object())?;
    let lengths = pieces.iter().map(Vec::len).filter(|_| packets).collect();
    Ok(State {
        ino,
        path: None,
        size,
        content: blob(&pieces.concat())?,
        packets: lengths,
    })
}

/// Fills a new pipe, whose end for writing is `writer`, as the old one was.
pub fn fill(state: &State, writer: &OwnedFd, content: &[u8]) -> Result<()> {
    let object = || format!("pipe {}", state.ino);
    fd::fcntl(writer, libc::F_SETPIPE_SZ, state.size.into()).about(1, object())?;
    let mode = if state.packets.is_empty() { 0 } else { libc::O_DIRECT };
    fd::fcntl(writer, libc::F_SETFL, (libc::O_NONBLOCK | mode).into()).about(1, object())?;
    let copy = writer
        .try_clone()
        .map_err(|e| torpor_sys::Error::io("dup", "pipe", &e))
        .about(1, object())?;
    let mut file = std::fs::File::from(copy);
    let mut rest = content;
    let lengths = if state.packets.is_empty() {
        vec![content.len()]
    } else {
        state.packets.clone()
    };
    for length in lengths {
        let (piece, after) = rest.split_at(length.min(rest.len()));
        file.write_all(piece)
            .map_err(|e| torpor_sys::Error::io("write", "pipe", &e))
            .about(1, object())?;
        rest = after;
    }
    Ok(())
}
