//! The images of `tests/golden`: `v1` has everything that format 1.0 has, `v1.1` is a chain of three, and compressed images, `v1.2` requires something of another kind, with the same bytes on every machine and every day.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use torpor_image::{BlobRef, CONNECTIONS, Committed, Compression, Error, HeaderInfo, PageRun, SHARING, Writer};

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Metadata {
    pub comm: String,
    pub pids: Vec<u32>,
    pub xstate: BlobRef,
    pub pipe: BlobRef,
}

#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Container {
    pub id: String,
}

pub const PIPE: &[u8] = b"bytes that were in a pipe";

pub fn header() -> HeaderInfo {
    HeaderInfo {
        arch: "x86_64".to_owned(),
        page_size: 4096,
        uuid: "6f1c2f0e-5d0c-4c55-9c3e-0d6b7f1d2a11".to_owned(),
        created: "2026-11-24T12:00:00Z".to_owned(),
        torpor: "0.1.0".to_owned(),
        requires: Vec::new(),
        parent: None,
        extra: BTreeMap::new(),
    }
}

pub fn page(seed: u8) -> Vec<u8> {
    (0..4096_u32).map(|at| (at / 16) as u8 ^ seed).collect()
}

pub fn xstate() -> Vec<u8> {
    (0..832_u32).map(|at| (at % 251) as u8).collect()
}

pub fn container() -> Container {
    Container {
        id: "golden".to_owned(),
    }
}

/// Runs in the order of the index.
pub fn runs() -> [PageRun; 4] {
    [
        PageRun::data(1, 0x40_0000, 0x1000, 2),
        PageRun::zero(1, 0x40_2000, 510),
        PageRun::data(1, 0x7fff_f000_0000, 0x4000, 1),
        // The same page as the one before: stored once.
        PageRun::data(2, 0, 0x4000, 1),
    ]
}

pub fn write(dir: &Path) -> Result<Committed, Error> {
    write_requiring(dir, None)
}

/// The image of version 1.2: what it requires is known only when the header has been written.
pub fn write_with_connections(dir: &Path) -> Result<Committed, Error> {
    write_requiring(dir, Some(CONNECTIONS))
}

/// The image of version 1.3.
pub fn write_with_sharing(dir: &Path) -> Result<Committed, Error> {
    write_requiring(dir, Some(SHARING))
}

fn write_requiring(dir: &Path, word: Option<&str>) -> Result<Committed, Error> {
    let mut writer = Writer::create(dir, header())?;
    writer.append_pages(&[page(1), page(2)].concat())?;
    let xstate = writer.append_blob(&xstate())?;
    let pipe = writer.append_blob_from(&mut &PIPE[..], Some(PIPE.len() as u64))?;
    writer.append_pages(&page(3))?;
    runs().into_iter().rev().for_each(|run| writer.push_run(run));
    let metadata = Metadata {
        comm: "golden".to_owned(),
        pids: vec![1, 7],
        xstate,
        pipe,
    };
    writer.add_section("metadata", &metadata)?;
    writer.add_section("container", &container())?;
    word.map_or(Ok(()), |word| writer.require(word))?;
    writer.commit()
}

/// The index of the last image of the chain: a page of its own, one of its parent, one of the parent's parent.
#[allow(dead_code, reason = "only the test compares it")]
pub fn chained_runs() -> [PageRun; 3] {
    [
        PageRun::data(1, 0x40_0000, 0x1000, 1),
        PageRun::data(1, 0x40_1000, 0x0001_0000_0000_1000, 1),
        PageRun::data(3, 0x7fff_f000_0000, 0x0002_0000_0000_4000, 1),
    ]
}

/// Writes the chain into the directories `first`, `middle` and `last` of `dir`, and compressed images into `lz4` and `zstd`.
pub fn write_chain(dir: &Path) -> Result<(), Error> {
    write(&dir.join("first"))?;
    let child = |name: &str, parent: &str, number: u8| {
        let info = HeaderInfo {
            uuid: format!("6f1c2f0e-5d0c-4c55-9c3e-0d6b7f1d2a1{number}"),
            ..header()
        };
        Writer::create_child(&dir.join(name), info, parent.as_ref())
    };
    let mut middle = child("middle", "../first", 2)?;
    let own = middle.append_pages(&page(4))?;
    middle.push_run(PageRun::data(1, 0x40_1000, own, 1));
    middle.inherit((1, 0x7fff_f000_0000), (1, 0x7fff_f000_0000), 16)?;
    middle.commit()?;
    let mut last = child("last", "../middle", 3)?;
    let own = last.append_pages(&page(5))?;
    last.push_run(PageRun::data(1, 0x40_0000, own, 1));
    last.inherit((1, 0x40_1000), (1, 0x40_1000), 1)?;
    last.inherit((1, 0x7fff_f000_0000), (3, 0x7fff_f000_0000), 1)?;
    last.commit()?;
    for (name, how) in [("lz4", Compression::Lz4), ("zstd", Compression::Zstd(3))] {
        let mut writer = Writer::create(&dir.join(name), header())?;
        writer.compress(how)?;
        let data = writer.append_pages(&packed_pages())?;
        writer.push_run(PageRun::data(1, 0x40_0000, data, packed_pages().len() as u64 / 4096));
        writer.commit()?;
    }
    Ok(())
}

/// Three frames: two whole ones, a short one that is stored as it is.
pub fn packed_pages() -> Vec<u8> {
    let mut pages: Vec<u8> = (0..512_u32).flat_map(|number| page((number / 64) as u8)).collect();
    let mut state = 1_u64;
    pages.extend((0..4096).map(|_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    }));
    pages
}
