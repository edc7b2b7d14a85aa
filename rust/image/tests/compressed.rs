//! Images whose data is compressed.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, as it should")]

mod support;

use std::fs;
use std::io::Read;
use std::path::Path;

use support::{Scratch, page};
use torpor_image::{
    BLOCK_SIZE, BlobRef, Committed, Compression, Error, HeaderInfo, PageRun, Reader, SectionKind, Writer,
};

const ALL: [Compression; 4] = [
    Compression::None,
    Compression::Lz4,
    Compression::Zstd(1),
    Compression::Zstd(19),
];

fn noise(len: usize) -> Vec<u8> {
    let mut state = 7_u64;
    let bytes = std::iter::repeat_with(|| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (state >> 56) as u8
    });
    bytes.take(len).collect()
}

struct Content {
    pages: Vec<u8>,
    blob: Vec<u8>,
}

/// Five blocks that shrink, two that do not, and a piece.
fn content() -> Content {
    let mut pages: Vec<u8> = (0..5 * 256_u32).flat_map(|number| page(number as u8)).collect();
    pages.extend(noise(2 << 20));
    pages.extend(page(9));
    Content {
        pages,
        blob: b"a blob over three blocks ".repeat(100_000),
    }
}

fn write(dir: &Path, how: Compression, content: &Content) -> (Committed, u64, BlobRef) {
    let mut writer = Writer::create(dir, HeaderInfo::new("0.1.0")).unwrap();
    writer.compress(how).unwrap();
    let blob = writer.append_blob_from(&mut content.blob.as_slice(), None).unwrap();
    let pages = writer.append_pages(&content.pages).unwrap();
    writer.push_run(PageRun::data(1, 0, pages, content.pages.len() as u64 / 4096));
    writer.add_section("metadata", &blob).unwrap();
    (writer.commit().unwrap(), pages, blob)
}

#[test]
fn offsets_and_content_are_those_of_an_image_that_is_not_compressed() {
    let scratch = Scratch::new();
    let content = content();
    let mut placed = Vec::new();
    for how in ALL {
        let dir = scratch.join(&how.to_string());
        let (committed, pages, blob) = write(&dir, how, &content);
        placed.push((pages, blob, committed.bytes));
        let reader = Reader::open(&dir).unwrap();
        reader.verify().unwrap();
        reader.verify_stored(|_| ()).unwrap();
        assert_eq!(reader.version().1, u16::from(how != Compression::None));
        assert_eq!(reader.data_len(), pages - 4096 + content.pages.len() as u64);
        assert_eq!(reader.blob(blob).unwrap(), content.blob);
        let mut streamed = Vec::new();
        reader.blob_reader(blob).unwrap().read_to_end(&mut streamed).unwrap();
        assert!(streamed == content.blob);
        let mut bytes = vec![0; content.pages.len()];
        reader.read_at(pages, &mut bytes).unwrap();
        assert!(bytes == content.pages);
        let mut unpacked = Vec::new();
        let len = bytes.len() as u64;
        reader
            .unpack(pages, len, |piece| {
                unpacked.extend_from_slice(piece);
                Ok::<(), Error>(())
            })
            .unwrap();
        assert!(unpacked == content.pages);
        // Page by page from the end, through the blocks.
        let mut block = Vec::new();
        for (number, expected) in content.pages.chunks(4096).enumerate().rev().step_by(100) {
            let offset = pages + number as u64 * 4096;
            let begin = reader.read_block(offset, &mut block).unwrap();
            assert_eq!((begin - 4096) % BLOCK_SIZE as u64, 0);
            let at = (offset - begin) as usize;
            assert_eq!(&block[at..at + 4096], expected);
        }
        assert_eq!(reader.stored(pages).unwrap().is_some(), how == Compression::None);
        for (offset, len) in [(0, 1), (4095, 1), (pages, len + 1), (pages + len, 1), (u64::MAX, 2)] {
            let take = |_: &[u8]| Ok::<(), Error>(());
            assert_eq!(reader.unpack(offset, len, take).unwrap_err().code(), "image-corrupt");
        }
        let has_frames = reader.sections().any(|section| section.kind == SectionKind::Frames);
        assert_eq!(has_frames, how != Compression::None);
    }
    assert!(
        placed
            .iter()
            .all(|(pages, blob, _)| (*pages, *blob) == (placed[0].0, placed[0].1))
    );
    // Noise is stored as it is, the rest is much smaller.
    for (_, _, bytes) in &placed[1..] {
        assert!((2 << 20..3 << 20).contains(bytes), "{bytes}");
    }
}

#[test]
fn the_bytes_do_not_depend_on_the_threads() {
    let scratch = Scratch::new();
    let content = content();
    let info = HeaderInfo::new("0.1.0");
    let make = |name: &str| {
        let mut writer = Writer::create(&scratch.join(name), info.clone()).unwrap();
        writer.compress(Compression::Lz4).unwrap();
        content.pages.chunks(12288).for_each(|piece| {
            writer.append_pages(piece).unwrap();
        });
        fs::read(writer.commit().unwrap().path).unwrap()
    };
    assert!(make("1") == make("2"));
}

#[test]
fn an_image_of_nothing_can_be_compressed() {
    let scratch = Scratch::new();
    let mut writer = Writer::create(scratch.path(), HeaderInfo::new("0.1.0")).unwrap();
    writer.compress(Compression::Lz4).unwrap();
    writer.commit().unwrap();
    let reader = Reader::open(scratch.path()).unwrap();
    reader.verify().unwrap();
    assert_eq!(reader.data_len(), 0);
    assert!(reader.read_block(4096, &mut Vec::new()).is_err());
}

#[test]
fn compression_comes_first_or_not_at_all() {
    let scratch = Scratch::new();
    let mut writer = Writer::create(scratch.path(), HeaderInfo::new("0.1.0")).unwrap();
    writer.append_blob(b"x").unwrap();
    assert_eq!(writer.compress(Compression::Lz4).unwrap_err().code(), "internal");
    writer.compress(Compression::None).unwrap();
    drop(writer);
    assert!(scratch.is_empty());
    let mut writer = Writer::create(scratch.path(), HeaderInfo::new("0.1.0")).unwrap();
    writer.compress(Compression::Zstd(3)).unwrap();
    assert_eq!(writer.compress(Compression::Lz4).unwrap_err().code(), "internal");
    writer.append_pages(&noise(5 << 20)).unwrap();
    drop(writer);
    assert!(scratch.is_empty());
}

#[test]
fn a_chain_may_be_compressed_in_many_ways() {
    let scratch = Scratch::new();
    let content = content();
    let pages = content.pages.len() as u64 / 4096;
    write(&scratch.join("0"), Compression::Zstd(1), &content);
    for (number, how) in [Compression::None, Compression::Lz4, Compression::Zstd(3)]
        .into_iter()
        .enumerate()
    {
        let parent = format!("../{number}");
        let dir = scratch.join(&(number + 1).to_string());
        let mut writer = Writer::create_child(&dir, HeaderInfo::new("0.1.0"), parent.as_ref()).unwrap();
        writer.compress(how).unwrap();
        let own = writer.append_pages(&page(200 + number as u8).repeat(2)).unwrap();
        let at = number as u64 * 8192;
        writer.push_run(PageRun::data(1, at, own, 2));
        writer.inherit((1, 0), (1, 0), at / 4096).unwrap();
        writer.inherit((1, at + 8192), (1, at + 8192), pages).unwrap();
        writer.commit().unwrap();
    }
    let mut expected = content.pages.clone();
    for number in 0..3_u8 {
        let at = usize::from(number) * 8192;
        expected[at..at + 8192].copy_from_slice(&page(200 + number).repeat(2));
    }
    let reader = Reader::open(&scratch.join("3")).unwrap();
    reader.verify().unwrap();
    let names: Vec<_> = reader.chain().map(|link| link.compression()).collect();
    assert_eq!(names, ["zstd", "lz4", "none", "zstd"]);
    let mut found = vec![0; expected.len()];
    for run in reader.runs() {
        let at = run.start as usize;
        reader
            .read_at(run.offset, &mut found[at..at + run.bytes() as usize])
            .unwrap();
    }
    assert!(found == expected);
}
