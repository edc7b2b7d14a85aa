//! Folds a chain into one image: the data of the last as it is, so that what refers to it stays right, then the pages of its ancestors.

use std::path::Path;

use crate::codec::Compression;
use crate::error::Error;
use crate::header::HeaderInfo;
use crate::layout::{DATA_START, PageRun, SectionKind};
use crate::read::Reader;
use crate::write::{Committed, Writer};

/// Writes an image into `dir` that has what `image` has and no parent: the same sections, blobs and pages. `info` gives its uuid and time;
/// what the header says of the machine is taken over. Every byte that is read is checked. Pages that have one place in the chain have one
/// in the new image.
///
/// # Errors
/// As [`Writer::create`]; [`Error::Corrupt`] if `image` or an ancestor is damaged; [`Error::Feature`] if it has a section of a newer
/// version, which cannot be carried over.
pub fn squash(image: &Reader, dir: &Path, info: HeaderInfo, how: Compression) -> Result<Committed, Error> {
    let old = image.header();
    let info = HeaderInfo {
        arch: old.arch.clone(),
        page_size: old.page_size,
        extra: old.extra.clone(),
        requires: old.of_content(),
        ..info
    };
    let mut writer = Writer::create(dir, info)?;
    writer.compress(how)?;
    sections(image, &mut writer)?;
    let mut buffer = Vec::new();
    let mut offset = DATA_START;
    while offset < DATA_START + image.data_len() {
        image.read_block(offset, &mut buffer)?;
        writer.put_data(&buffer)?;
        offset += buffer.len() as u64;
    }
    let moved = ancestors(image, &mut writer)?;
    for run in image.runs() {
        writer.push_run(PageRun {
            offset: place(&moved, run),
            ..*run
        });
    }
    writer.commit()
}

fn sections(image: &Reader, writer: &mut Writer) -> Result<(), Error> {
    for section in image.sections() {
        match section.kind {
            SectionKind::Json => writer.add_raw_section(&section.name, image.section_bytes(&section.name)?)?,
            SectionKind::Index | SectionKind::Frames => {}
            SectionKind::Unknown(kind) => {
                return Err(Error::Feature {
                    path: image.path().to_path_buf(),
                    section: format!("section {:?}", section.name),
                    feature: format!("kind {kind}"),
                });
            }
        }
    }
    Ok(())
}

/// Copies the pages that ancestors hold, each once: where they were (begin, end), by place, and where they are now.
fn ancestors(image: &Reader, writer: &mut Writer) -> Result<Vec<(u64, u64, u64)>, Error> {
    let inherited = image.runs().iter().filter(|run| !run.is_zero() && run.link() > 0);
    let mut extents: Vec<(u64, u64)> = inherited.map(|run| (run.offset, run.offset + run.bytes())).collect();
    extents.sort_unstable();
    extents.dedup_by(|next, last| {
        let joined = next.0 <= last.1;
        if joined {
            last.1 = last.1.max(next.1);
        }
        joined
    });
    let mut moved = Vec::with_capacity(extents.len());
    for (begin, end) in extents {
        let mut now = None;
        image.unpack(begin, end - begin, |piece| {
            let at = writer.append_pages(piece)?;
            now.get_or_insert(at);
            Ok::<(), Error>(())
        })?;
        moved.extend(now.map(|now| (begin, end, now)));
    }
    Ok(moved)
}

/// Where the pages of a run are in the new image.
fn place(moved: &[(u64, u64, u64)], run: &PageRun) -> u64 {
    let at = moved.partition_point(|(_, end, _)| *end <= run.offset);
    match moved.get(at) {
        Some((begin, _, now)) if !run.is_zero() && run.link() > 0 => now + (run.offset - begin),
        _ => run.offset,
    }
}
