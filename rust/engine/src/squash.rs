//! From a chain of images to one that needs no other.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use torpor_image::{Compression, HeaderInfo, Reader};

use crate::error::Result;

/// What to do.
#[derive(Debug, Deserialize)]
pub struct Request {
    /// The last image of the chain, or its directory.
    pub image_path: PathBuf,
    /// The directory of the new image.
    pub new_path: PathBuf,
    /// How the new image is compressed.
    #[serde(default)]
    pub compression: Compression,
}

/// What was done.
#[derive(Debug, Serialize)]
pub struct Report {
    /// The new image.
    pub image: PathBuf,
    /// Its size.
    pub bytes: u64,
    /// Names its content.
    pub digest: String,
    /// How many images were folded into it.
    pub images: usize,
}

/// Writes an image with the state of another and all that this one's ancestors hold of it. Nothing else is changed.
pub fn squash(request: &Request) -> Result<Report> {
    let image = Reader::open_foreign(&request.image_path)?;
    let info = HeaderInfo::new(env!("CARGO_PKG_VERSION"));
    let made = torpor_image::squash(&image, &request.new_path, info, request.compression)?;
    Ok(Report {
        image: made.path,
        bytes: made.bytes,
        digest: made.digest,
        images: image.chain().len(),
    })
}
