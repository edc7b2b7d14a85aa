//! What the integration tests share. Each test binary uses a part of it.
#![allow(dead_code, reason = "each test binary uses a part")]

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};

use serde::{Deserialize, Serialize};
use torpor_image::{BlobRef, Committed, Compression, HeaderInfo, PageRun, Writer};

pub struct Scratch(PathBuf);

impl Scratch {
    pub fn new() -> Scratch {
        static NEXT: AtomicU32 = AtomicU32::new(0);
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let path = std::env::temp_dir().join(format!("torpor-image-test-{}-{number}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Scratch(path)
    }

    pub fn path(&self) -> &Path {
        &self.0
    }

    pub fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    pub fn is_empty(&self) -> bool {
        fs::read_dir(&self.0).unwrap().next().is_none()
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

/// The metadata of the small image.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
pub struct Notes {
    pub text: String,
    pub blob: BlobRef,
}

pub const BLOB: &[u8] = b"thirteen byte";

pub fn page(seed: u8) -> Vec<u8> {
    (0..4096_usize)
        .map(|at| (at * 7) as u8 ^ (at >> 8) as u8 ^ seed)
        .collect()
}

/// An image with everything in it: a page, a blob that leaves padding, another page, zero pages, two sections.
pub fn small(dir: &Path, info: HeaderInfo) -> Committed {
    fill(Writer::create(dir, info).unwrap())
}

/// The same, compressed and with a parent in the directory `parent` beside it.
pub fn small_child(dir: &Path, info: HeaderInfo, parent: &str, how: Compression) -> Committed {
    let mut writer = Writer::create_child(dir, info, parent.as_ref()).unwrap();
    writer.compress(how).unwrap();
    writer.inherit((2, 0x7000_0000), (2, 0x7000_1000), 1).unwrap();
    fill(writer)
}

fn fill(mut writer: Writer) -> Committed {
    let first = writer.append_pages(&page(1)).unwrap();
    let blob = writer.append_blob(BLOB).unwrap();
    writer.push_run(PageRun::data(2, 0x7000_0000, first, 1));
    writer.push_run(PageRun::zero(1, 0x40_0000, 16));
    writer
        .add_section(
            "metadata",
            &Notes {
                text: "small".to_owned(),
                blob,
            },
        )
        .unwrap();
    writer
        .add_section("container", &serde_json::json!({"id": "x"}))
        .unwrap();
    writer.commit().unwrap()
}
