//! The file format of a checkpoint and nothing else.
//!
//! One file, `checkpoint.img`, in a directory of its own. [`Writer`] streams it front to back and makes it appear only when it is
//! complete and on disk; [`Reader`] refuses whatever is not exactly what a writer wrote. What the bytes mean is the engine's business:
//! this crate knows pages, blobs, named JSON sections and the index that says which page belongs where.
//!
//! An image can go on from another, its parent: it then holds only what is new, and its index names the pages of the parent that are
//! still right. [`Writer::create_child`] makes one, [`Writer::inherit`] takes pages over, and [`Reader`] reads a chain as one image.
//!
//! The data of an image can be compressed ([`Writer::compress`]). Nobody but this crate sees that: offsets are those of the data as it was
//! before, and [`Reader::read_block`] and [`Reader::unpack`] give it back. Only who maps the file asks [`Reader::stored`] first.
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

mod chain;
mod checksum;
mod codec;
mod error;
mod frames;
mod header;
mod layout;
mod link;
mod packer;
mod place;
mod read;
mod share;
mod squash;
#[cfg(test)]
mod testing;
mod write;
mod writeback;

pub use codec::Compression;
pub use error::Error;
pub use header::{CONNECTIONS, HeaderInfo, IN_FLIGHT, Parent, SHARING, SYSTEM_V};
pub use layout::{
    BLOCK_SIZE, BlobRef, FILE_NAME, MAJOR, MAX_CHAIN, MAX_DATA, MAX_JSON, MAX_NAME, MAX_RUNS, MAX_SECTIONS, MINOR,
    PAGE_SIZE, PageRun, SectionInfo, SectionKind,
};
pub use read::{BlobReader, MAX_BLOB_IN_MEMORY, Member, Reader};
pub use share::Share;
pub use squash::squash;
pub use write::{Committed, Writer};
