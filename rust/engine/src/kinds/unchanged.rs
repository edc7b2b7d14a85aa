//! Files that an image leaves where they are: what they must still be when it is restored (`restore --files`).

use serde::Deserialize;
use torpor_sys::fd::FileId;

use crate::error::{Error, Result};

/// What is asked of a file that was mapped or open for reading. A file that was open for writing may be anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Unchanged {
    /// Of the same size, and not written to since.
    Strict,
    /// Of the same size.
    #[default]
    Size,
    /// Nothing.
    Ignore,
}

impl Unchanged {
    /// Compares a file with its `size` in bytes and its `mtime`, in nanoseconds after the epoch, of the checkpoint.
    ///
    /// # Errors
    /// Refused: it is not what it was.
    pub fn check(self, path: &str, size: u64, mtime: i64, now: &FileId) -> Result<()> {
        let why = if self != Unchanged::Ignore && now.size != size {
            format!("it had {size} bytes when the image was made and has {} now", now.size)
        } else if self == Unchanged::Strict && now.mtime != mtime {
            "it was written to since the image was made (--files=strict)".into()
        } else {
            return Ok(());
        };
        let remedy = "restore with the files of the checkpoint, or with --files=ignore if they will do";
        Err(Error::unsupported(1, format!("file {path}"), why, remedy))
    }
}
