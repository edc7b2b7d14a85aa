//! The file format of a checkpoint and nothing else.
//!
//! One file, `checkpoint.img`, in a directory of its own. [`Writer`] streams it front to back and makes it appear only when it is
//! complete and on disk; [`Reader`] refuses whatever is not exactly what a writer wrote. What the bytes mean is the engine's business:
//! this crate knows pages, blobs, named JSON sections and the index that says which page belongs where.
//!
//! `docs/image-format.md` describes every byte and the rules by which the format may grow.
#![forbid(unsafe_code)]
#![cfg_attr(
    test,
    allow(
        clippy::unwrap_used,
        clippy::expect_used,
        reason = "a test that panics has failed, as it should"
    )
)]

mod checksum;
mod error;
mod header;
mod layout;
mod place;
mod read;
#[cfg(test)]
mod testing;
mod write;
mod writeback;

pub use error::Error;
pub use header::HeaderInfo;
pub use layout::{
    BLOCK_SIZE, BlobRef, FILE_NAME, MAJOR, MAX_DATA, MAX_JSON, MAX_NAME, MAX_RUNS, MAX_SECTIONS, MINOR, PAGE_SIZE,
    PageRun, SectionInfo, SectionKind,
};
pub use read::{BlobReader, MAX_BLOB_IN_MEMORY, Reader};
pub use write::{Committed, Writer};
