//! Bytes of an image on their way into memory: mapped where they lie in the file as they are, unpacked where they do not.

use torpor_image::Reader;
use torpor_sys::Pid;
use torpor_sys::mem::Mapping;

use crate::error::{About, Result};

/// How much of the image is mapped at once.
const PIECE: u64 = 64 << 20;

/// Hands the `len` bytes at `offset` of the image to `take`, piece by piece, each with its distance from the first. `pid` is whom they
/// are for.
pub fn each(
    image: &Reader,
    pid: Pid,
    offset: u64,
    len: u64,
    mut take: impl FnMut(u64, &[u8]) -> Result<()>,
) -> Result<()> {
    let mut done = 0;
    let Some((file, at)) = image.stored(offset)? else {
        return image.unpack(offset, len, |bytes| {
            take(done, bytes)?;
            done += bytes.len() as u64;
            Ok(())
        });
    };
    while done < len {
        let piece = PIECE.min(len - done);
        let data = Mapping::of(file, at + done, piece as usize).about(pid, "image")?;
        take(done, data.bytes())?;
        done += piece;
    }
    Ok(())
}
