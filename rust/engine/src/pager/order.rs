//! The working set: what a program touched first after a restore, kept beside the image for the next restore.
//!
//! It decides only in which order memory is brought, so it is believed without a checksum; entries that the image does
//! not know are passed over, and a file about another image is not read.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use torpor_image::Reader;

/// Its name in the directory of the image.
pub const FILE_NAME: &str = "checkpoint.working-set";
/// No file of ours is larger: a million touches of fifty characters.
const MAX_LEN: u64 = 64 << 20;

/// A page: number of its address space, and its address when it was saved.
pub type Page = (u32, u64);

#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    /// Digest of the image that it is about.
    image: String,
    /// In the order in which they were touched; one for each block of the image.
    pages: Vec<Page>,
}

fn path_of(image: &Reader) -> PathBuf {
    image.path().parent().unwrap_or(Path::new(".")).join(FILE_NAME)
}

/// What was touched first the last time; empty when nobody has noted it.
pub fn read(image: &Reader) -> Vec<Page> {
    let path = path_of(image);
    if !std::fs::metadata(&path).is_ok_and(|m| m.is_file() && m.len() <= MAX_LEN) {
        return Vec::new();
    }
    let stored = std::fs::read(&path)
        .ok()
        .and_then(|text| serde_json::from_slice::<Stored>(&text).ok());
    stored
        .filter(|s| s.image == image.digest())
        .map(|s| s.pages)
        .unwrap_or_default()
}

/// Replaces what is there, in one step.
///
/// # Errors
/// In words: the directory cannot be written.
pub fn write(image: &Reader, pages: Vec<Page>) -> Result<(), String> {
    let path = path_of(image);
    let stored = Stored {
        image: image.digest(),
        pages,
    };
    let partial = path.with_extension(format!("partial-{}", std::process::id()));
    let json = serde_json::to_vec(&stored).map_err(|e| e.to_string())?;
    let written = std::fs::write(&partial, json).and_then(|()| std::fs::rename(&partial, &path));
    written.map_err(|e| {
        let _ = std::fs::remove_file(&partial);
        format!("the working set cannot be kept in {}: {e}", path.display())
    })
}
