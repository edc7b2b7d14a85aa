//! Damaged, foreign and hostile files: each is refused with a reason, none is believed, none makes the reader panic.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, as it should")]

mod support;

use std::fs::{self, File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread;

use support::{Scratch, small, small_child};
use torpor_image::{Compression, Error, HeaderInfo, PageRun, Reader, SectionKind, Writer};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

fn info() -> HeaderInfo {
    HeaderInfo::new("0.1.0")
}

/// Opens and verifies, as a restore does.
fn check(path: &Path) -> Result<Reader, Error> {
    let reader = Reader::open(path)?;
    reader.verify()?;
    Ok(reader)
}

/// A file with given bytes, rewritten in place.
struct Victim {
    file: File,
    path: PathBuf,
}

impl Victim {
    fn new(path: PathBuf, bytes: &[u8]) -> Victim {
        fs::write(&path, bytes).unwrap();
        let file = OpenOptions::new().write(true).open(&path).unwrap();
        Victim { file, path }
    }

    fn put(&self, offset: usize, bytes: &[u8]) {
        self.file.write_all_at(bytes, offset as u64).unwrap();
    }
}

fn intact(scratch: &Scratch) -> Vec<u8> {
    fs::read(small(&scratch.join("intact"), info()).path).unwrap()
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
}

/// The parts of an image, found by the numbers in the documentation and not by the code under test.
struct Layout {
    sections: Vec<(String, usize, usize)>,
    data_end: usize,
    table: usize,
    blocks: usize,
    trailer: usize,
}

fn layout(image: &[u8]) -> Layout {
    let trailer = image.len() - 64;
    let data_end = 4096 + u64_at(image, trailer) as usize;
    let table = image.len() - u64_at(image, trailer + 48) as usize;
    let count = u32::from_le_bytes(image[trailer + 24..trailer + 28].try_into().unwrap()) as usize;
    let sections = (0..count).map(|n| {
        let entry = &image[table + 64 * n..table + 64 * (n + 1)];
        let name = String::from_utf8(entry[32..].iter().copied().take_while(|&byte| byte != 0).collect()).unwrap();
        (name, u64_at(entry, 8) as usize, u64_at(entry, 16) as usize)
    });
    Layout {
        sections: sections.collect(),
        data_end,
        table,
        blocks: table + 64 * count,
        trailer,
    }
}

/// Makes every checksum right again after a change: what somebody who wants to deceive would do.
fn reseal(image: &mut [u8]) {
    let parts = layout(image);
    reseal_as(image, &parts);
}

/// As [`reseal`], with the parts where they really are, for an image whose numbers lie.
fn reseal_as(image: &mut [u8], parts: &Layout) {
    let sum = xxh3_64(&image[..4088]);
    image[4088..4096].copy_from_slice(&sum.to_le_bytes());
    for entry in (parts.table..parts.blocks).step_by(64) {
        let (offset, len) = (u64_at(image, entry + 8), u64_at(image, entry + 16));
        let range = offset
            .checked_add(len)
            .and_then(|end| image.get(offset as usize..end as usize));
        let Some(content) = range else { continue };
        let sum = xxh3_64(content);
        image[entry + 24..entry + 32].copy_from_slice(&sum.to_le_bytes());
    }
    for (number, begin) in (4096..parts.data_end).step_by(1 << 20).enumerate() {
        let sum = xxh3_64(&image[begin..parts.data_end.min(begin + (1 << 20))]);
        let at = parts.blocks + 8 * number;
        image[at..at + 8].copy_from_slice(&sum.to_le_bytes());
    }
    let mut total = Xxh3::new();
    total.update(&image[..4096]);
    total.update(&image[parts.table..parts.trailer + 32]);
    let digest = total.digest128();
    image[parts.trailer + 32..parts.trailer + 48].copy_from_slice(&digest.to_le_bytes());
}

/// The checksums, computed here from the documentation alone, are those that the writer wrote.
#[test]
fn resealing_an_intact_image_changes_nothing() {
    let scratch = Scratch::new();
    let mut writer = Writer::create(&scratch.join("large"), info()).unwrap();
    writer.append_blob(b"shifts the pages against the blocks").unwrap();
    writer.append_pages(&support::page(9).repeat(600)).unwrap();
    let large = fs::read(writer.commit().unwrap().path).unwrap();
    for image in [intact(&scratch), large] {
        let mut sealed = image.clone();
        reseal(&mut sealed);
        assert!(
            sealed == image,
            "the documentation of the checksums and the code differ"
        );
    }
}

#[test]
fn every_flipped_bit_is_detected() {
    let scratch = Scratch::new();
    let image = intact(&scratch);
    let parts = layout(&image);
    assert!(
        parts.data_end % 8 != 0 && parts.sections.iter().any(|(_, _, len)| len % 8 != 0),
        "no padding to damage"
    );
    let workers = thread::available_parallelism().map_or(1, |count| count.get());
    thread::scope(|scope| {
        for worker in 0..workers {
            let (image, scratch) = (&image, &scratch);
            scope.spawn(move || {
                let victim = Victim::new(scratch.join(&format!("flipped{worker}")), image);
                for at in (worker..image.len()).step_by(workers) {
                    for bit in 0..8 {
                        victim.put(at, &[image[at] ^ (1 << bit)]);
                        let error = check(&victim.path)
                            .err()
                            .unwrap_or_else(|| panic!("bit {bit} of byte {at}"));
                        assert_eq!(error.code(), "image-corrupt", "bit {bit} of byte {at}: {error}");
                    }
                    victim.put(at, &image[at..=at]);
                }
                check(&victim.path).unwrap();
            });
        }
    });
}

#[test]
fn a_damaged_part_is_named() {
    let scratch = Scratch::new();
    let image = intact(&scratch);
    let parts = layout(&image);
    let mut places = vec![
        (100, "header"),
        (4200, "data"),
        (parts.data_end, "padding"),
        (parts.table, "footer"),
        (parts.blocks, "footer"),
    ];
    let names = [
        ("metadata", "section \"metadata\""),
        ("container", "section \"container\""),
        ("pages", "section \"pages\""),
    ];
    for ((name, offset, _), (expected, part)) in parts.sections.iter().zip(names) {
        assert_eq!(name, expected);
        places.push((*offset, part));
    }
    for (at, part) in places {
        let victim = Victim::new(scratch.join("victim"), &image);
        victim.put(at, &[image[at] ^ 0x10]);
        let error = check(&victim.path).unwrap_err();
        assert_eq!(error.section(), Some(part), "byte {at}");
        let text = error.to_string();
        assert!(text.contains("checkpoint again") && !text.contains('\n'), "{text}");
    }
}

#[test]
fn every_truncation_is_detected() {
    let scratch = Scratch::new();
    let image = intact(&scratch);
    let victim = Victim::new(scratch.join("shorter"), &image);
    for len in (0..image.len()).rev() {
        victim.file.set_len(len as u64).unwrap();
        assert_eq!(check(&victim.path).unwrap_err().code(), "image-corrupt", "length {len}");
    }
}

#[test]
fn bytes_added_or_missing_are_detected() {
    let scratch = Scratch::new();
    let image = intact(&scratch);
    for extra in [1, 8, 64, 2048] {
        let mut longer = image.clone();
        longer.resize(image.len() + extra, 0);
        let victim = Victim::new(scratch.join("longer"), &longer);
        assert_eq!(check(&victim.path).unwrap_err().code(), "image-corrupt");
        // Also when the end is where an end must be.
        let mut inserted = image.clone();
        inserted.splice(5000..5000, std::iter::repeat_n(0, extra));
        let victim = Victim::new(scratch.join("longer"), &inserted);
        assert_eq!(check(&victim.path).unwrap_err().code(), "image-corrupt");
        let mut removed = image.clone();
        removed.drain(5000..5000 + extra);
        let victim = Victim::new(scratch.join("removed"), &removed);
        assert_eq!(check(&victim.path).unwrap_err().code(), "image-corrupt");
    }
}

#[test]
fn what_is_no_image_at_all_is_refused() {
    let scratch = Scratch::new();
    for (name, content) in [
        ("empty", Vec::new()),
        ("zeros", vec![0; 1 << 20]),
        ("ones", vec![0xff; 1 << 20]),
        ("page", vec![0; 4096]),
        ("text", b"#!/bin/sh\n".repeat(1000)),
    ] {
        let victim = Victim::new(scratch.join(name), &content);
        let error = check(&victim.path).unwrap_err();
        assert_eq!(error.code(), "image-corrupt", "{name}");
        assert_eq!(
            Reader::peek(&victim.path).unwrap_err().code(),
            "image-corrupt",
            "{name}"
        );
    }
}

#[test]
fn a_block_that_is_wrong_is_named_by_its_offset() {
    let scratch = Scratch::new();
    let mut writer = Writer::create(scratch.path(), info()).unwrap();
    writer.append_pages(&support::page(3).repeat(256 * 40)).unwrap();
    let path = writer.commit().unwrap().path;
    check(&path).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    for block in [33_u64, 21, 17, 39, 0] {
        let begin = 4096 + (block << 20);
        file.write_all_at(b"!", begin + 77_777).unwrap();
        let reader = Reader::open(&path).unwrap();
        let error = reader.verify().unwrap_err().to_string();
        let first = [33, 21, 17, 39, 0]
            .into_iter()
            .take_while(|&b| b != block)
            .chain([block])
            .min()
            .unwrap();
        assert!(
            error.contains(&format!("at offset {}", 4096 + (first << 20))),
            "{error}"
        );
    }
}

#[test]
fn a_newer_major_version_is_refused_by_its_number() {
    let scratch = Scratch::new();
    let mut image = intact(&scratch);
    image[8..12].copy_from_slice(&[2, 0, 3, 0]);
    reseal(&mut image);
    // It may look quite different after the header.
    image.truncate(5000);
    let victim = Victim::new(scratch.join("newer"), &image);
    let error = check(&victim.path).unwrap_err();
    assert_eq!(error.code(), "image-version");
    assert!(error.to_string().contains("2.3"), "{error}");
    assert_eq!(Reader::peek(&victim.path).unwrap_err().code(), "image-version");
}

/// Inserts a section of kind 77 behind the others, as a newer version might.
fn with_new_section(image: &[u8], flags: u32) -> Vec<u8> {
    let parts = layout(image);
    let content = b"from the future.";
    let mut longer = image[..parts.table].to_vec();
    longer.extend(content);
    longer.extend(&image[parts.table..parts.blocks]);
    let mut entry = [0; 64];
    entry[0] = 77;
    entry[4..8].copy_from_slice(&flags.to_le_bytes());
    entry[8..16].copy_from_slice(&(parts.table as u64).to_le_bytes());
    entry[16..24].copy_from_slice(&(content.len() as u64).to_le_bytes());
    entry[32..37].copy_from_slice(b"hints");
    longer.extend(entry);
    longer.extend(&image[parts.blocks..]);
    let trailer = longer.len() - 64;
    let len = longer.len() as u64;
    longer[trailer + 8..trailer + 16].copy_from_slice(&len.to_le_bytes());
    longer[trailer + 24] += 1;
    let footer = u64_at(&longer, trailer + 48) + 64;
    longer[trailer + 48..trailer + 56].copy_from_slice(&footer.to_le_bytes());
    longer
}

#[test]
fn a_newer_minor_version_is_read_and_its_sections_listed() {
    let scratch = Scratch::new();
    let image = intact(&scratch);
    let open = |flags, minor| {
        let mut image = with_new_section(&image, flags);
        image[10] = minor;
        reseal(&mut image);
        check(&Victim::new(scratch.join("newer"), &image).path)
    };
    let newer = torpor_image::MINOR as u8 + 1;
    let reader = open(0, newer).unwrap();
    assert_eq!(reader.version(), (1, newer.into()));
    let hints = reader.sections().last().unwrap();
    assert_eq!((hints.name.as_str(), hints.kind), ("hints", SectionKind::Unknown(77)));
    assert_eq!(reader.section_bytes("hints").unwrap(), b"from the future.");
    let notes: support::Notes = reader.section("metadata").unwrap();
    assert_eq!(reader.blob(notes.blob).unwrap(), support::BLOB);
    // Flags without meaning to us are left alone, but for the one that says we must know.
    assert!(open(2, newer).is_ok());
    let error = open(1, newer).unwrap_err();
    assert_eq!(error.code(), "image-version");
    assert!(error.to_string().contains("newer torpor"), "{error}");
    // In the versions that we know there is no such section.
    for known in 0..newer {
        assert_eq!(open(0, known).unwrap_err().code(), "image-corrupt");
    }
}

#[test]
fn header_keys_of_later_versions_are_kept_and_required_abilities_refused() {
    let scratch = Scratch::new();
    let mut newer = info();
    newer.extra.insert("mood".to_owned(), serde_json::json!("0123"));
    small(&scratch.join("1"), newer.clone());
    assert_eq!(*Reader::open(&scratch.join("1")).unwrap().header(), newer);

    newer.requires.push("magic".to_owned());
    small(&scratch.join("2"), newer.clone());
    let error = Reader::open(&scratch.join("2")).unwrap_err();
    assert_eq!(error.code(), "image-version");
    assert!(error.to_string().contains("magic"), "{error}");
    assert_eq!(Reader::peek(&scratch.join("2")).unwrap(), newer);
}

#[test]
fn an_image_of_another_machine_is_refused_but_can_be_looked_at() {
    let scratch = Scratch::new();
    let path = small(
        scratch.path(),
        HeaderInfo {
            arch: "riscv64".to_owned(),
            ..info()
        },
    )
    .path;
    let error = Reader::open(&path).unwrap_err();
    assert_eq!(error.code(), "image-arch");
    assert!(error.to_string().contains("riscv64"), "{error}");
    Reader::open_foreign(&path).unwrap().verify().unwrap();

    let mut image = fs::read(&path).unwrap();
    let at = image
        .windows(16)
        .position(|window| window == b"\"page_size\":4096")
        .unwrap();
    image[at..at + 16].copy_from_slice(b"\"page_size\":8192");
    reseal(&mut image);
    let victim = Victim::new(scratch.join("other"), &image);
    assert_eq!(Reader::open_foreign(&victim.path).unwrap_err().code(), "image-arch");
}

/// Every number of the footer and of the index, set to what breaks careless arithmetic, with all checksums right.
#[test]
fn lying_numbers_are_refused() {
    let scratch = Scratch::new();
    let image = intact(&scratch);
    let parts = layout(&image);
    let (_, index, _) = parts.sections.iter().find(|(name, ..)| name == "pages").unwrap();
    let lies = [
        0,
        1,
        7,
        8,
        64,
        4095,
        4096,
        4097,
        1 << 20,
        1 << 32,
        1 << 44,
        (1 << 44) + 1,
        1 << 63,
        u64::MAX - 4095,
        u64::MAX - 1,
        u64::MAX,
    ];
    let mut numbers: Vec<usize> = vec![
        parts.trailer,
        parts.trailer + 8,
        parts.trailer + 16,
        parts.trailer + 24,
        parts.trailer + 48,
    ];
    for section in 0..parts.sections.len() {
        numbers.extend([0, 8, 16].map(|field| parts.table + 64 * section + field));
    }
    // Flags and start, offset, pages of both records, the first of which is of zeros.
    numbers.extend([0, 16, 24, 32, 48, 56].map(|field| index + field));
    for at in numbers {
        for lie in lies {
            if u64_at(&image, at) == lie {
                continue;
            }
            let mut lying = image.clone();
            lying[at..at + 8].copy_from_slice(&lie.to_le_bytes());
            reseal_as(&mut lying, &parts);
            let victim = Victim::new(scratch.join("lying"), &lying);
            match check(&victim.path) {
                Err(error) => assert_eq!(error.code(), "image-corrupt", "{lie:#x} at {at}"),
                // Other numbers can be true: fewer zero pages, another page of the data area.
                Ok(reader) => {
                    assert!(at >= *index && at < parts.table, "{lie:#x} at {at} was believed");
                    let end = 4096 + reader.data_len();
                    assert!(
                        reader
                            .runs()
                            .iter()
                            .all(|run| run.is_zero() || run.offset + run.bytes() <= end)
                    );
                }
            }
        }
    }
}

#[test]
fn records_that_overlap_or_are_out_of_order_are_refused() {
    let scratch = Scratch::new();
    let image = intact(&scratch);
    let parts = layout(&image);
    let (_, index, len) = parts
        .sections
        .iter()
        .find(|(name, ..)| name == "pages")
        .cloned()
        .unwrap();
    assert_eq!(len, 64);
    let record = |space: u32, start: u64| {
        let mut raw = [0; 32];
        raw[0..4].copy_from_slice(&space.to_le_bytes());
        raw[4] = 1;
        raw[8..16].copy_from_slice(&start.to_le_bytes());
        raw[24] = 2;
        raw
    };
    let open = |first: [u8; 32], second: [u8; 32]| {
        let mut image = image.clone();
        image[index..index + 32].copy_from_slice(&first);
        image[index + 32..index + 64].copy_from_slice(&second);
        reseal(&mut image);
        check(&Victim::new(scratch.join("index"), &image).path)
    };
    assert_eq!(
        open(record(1, 0x1000), record(1, 0x3000)).unwrap().runs()[1],
        PageRun::zero(1, 0x3000, 2)
    );
    assert!(open(record(1, 0x3000), record(2, 0)).is_ok());
    for (first, second) in [
        (record(1, 0x1000), record(1, 0x2000)),
        (record(1, 0x3000), record(1, 0x1000)),
        (record(2, 0), record(1, 0x9000)),
    ] {
        let error = open(first, second).unwrap_err();
        assert_eq!(error.section(), Some("page index"), "{error}");
    }
}

#[test]
fn a_hole_in_place_of_the_index_is_refused_at_its_first_record() {
    let scratch = Scratch::new();
    let image = intact(&scratch);
    let parts = layout(&image);
    // The record count is within the limit, but zeros are no records: nothing may be allocated for what the length promises.
    let hole = 64_u64 << 20;
    let (_, index, len) = parts.sections.last().unwrap();
    let mut tail = image[parts.table..].to_vec();
    let entry = 64 * (parts.sections.len() - 1);
    tail[entry + 16..entry + 24].copy_from_slice(&hole.to_le_bytes());
    let mut zeros = Xxh3::new();
    let chunk = vec![0; 1 << 20];
    (0..hole >> 20).for_each(|_| zeros.update(&chunk));
    tail[entry + 24..entry + 32].copy_from_slice(&zeros.digest().to_le_bytes());
    let at = tail.len() - 64;
    let total = *index as u64 + hole + tail.len() as u64;
    assert_eq!(index + len, parts.table);
    tail[at + 8..at + 16].copy_from_slice(&total.to_le_bytes());
    let mut digest = Xxh3::new();
    digest.update(&image[..4096]);
    digest.update(&tail[..at + 32]);
    tail[at + 32..at + 48].copy_from_slice(&digest.digest128().to_le_bytes());
    let victim = Victim::new(scratch.join("sparse"), &image[..*index]);
    victim.file.write_all_at(&tail, *index as u64 + hole).unwrap();
    let error = check(&victim.path).unwrap_err();
    assert_eq!(error.section(), Some("page index"), "{error}");
    assert!(error.to_string().contains("no pages"), "{error}");
}

/// Every byte of a small image that is compressed and has a parent, and of that parent, flipped.
#[test]
fn every_flipped_byte_of_a_compressed_child_is_refused() {
    let scratch = Scratch::new();
    for how in [Compression::Lz4, Compression::Zstd(3)] {
        let (parent, child) = (
            scratch.join(&format!("{how}-parent")),
            scratch.join(&format!("{how}-child")),
        );
        let parent_file = small(&parent, info()).path;
        let path = small_child(&child, info(), &format!("../{how}-parent"), how).path;
        check(&path).unwrap();
        for file in [&path, &parent_file] {
            let image = fs::read(file).unwrap();
            let victim = Victim::new(file.clone(), &image);
            for (at, byte) in image.iter().enumerate() {
                victim.put(at, &[byte ^ 0x41]);
                let error = check(&path)
                    .err()
                    .unwrap_or_else(|| panic!("{how}: byte {at} of {file:?}"));
                assert_eq!(error.code(), "image-corrupt", "{how}: byte {at} of {file:?}: {error}");
                victim.put(at, &[*byte]);
            }
            check(&path).unwrap();
        }
        check(&path).unwrap();
    }
}

/// Where the record of the only frame is.
fn frame_record(parts: &Layout) -> usize {
    parts.sections.iter().find(|(name, ..)| name == "frames").unwrap().1
}

/// As [`reseal`], also the checksum of the stored bytes of the only frame: only what comes out of it is left to tell.
fn reseal_frame(image: &mut [u8], parts: &Layout) {
    let sum = xxh3_64(&image[4096..parts.data_end]);
    let record = frame_record(parts);
    image[record + 16..record + 24].copy_from_slice(&sum.to_le_bytes());
    reseal_as(image, parts);
}

/// With all checksums of the file right, a changed frame does not come out as something else.
#[test]
fn a_forged_frame_is_refused_or_harmless() {
    let scratch = Scratch::new();
    small(&scratch.join("parent"), info());
    for how in [Compression::Lz4, Compression::Zstd(3)] {
        let image = fs::read(small_child(&scratch.join(&how.to_string()), info(), "../parent", how).path).unwrap();
        let parts = layout(&image);
        let dir = scratch.join(&format!("{how}-forged"));
        fs::create_dir(&dir).unwrap();
        let path = dir.join("checkpoint.img");
        for at in (4096..parts.data_end).step_by(41) {
            let mut forged = image.clone();
            forged[at] ^= 0x41;
            reseal_frame(&mut forged, &parts);
            let reader = open_forged(&path, &forged).unwrap();
            let mut block = Vec::new();
            match (reader.verify(), reader.read_block(4096, &mut block)) {
                (Err(error), Err(_)) => assert_eq!(error.code(), "image-corrupt", "{how} {at}"),
                // Bits that the codec does not use: what came out is what went in, by its own checksum.
                (Ok(()), Ok(_)) => {}
                other => panic!("{how} {at}: {other:?}"),
            }
        }
    }
}

fn open_forged(path: &Path, image: &[u8]) -> Result<Reader, Error> {
    fs::write(path, image).unwrap();
    Reader::open(path)
}

/// Every number of the frame table, set to what breaks careless arithmetic, with all checksums right.
#[test]
fn lying_frames_are_refused() {
    let scratch = Scratch::new();
    small(&scratch.join("parent"), info());
    let image = fs::read(small_child(&scratch.join("child"), info(), "../parent", Compression::Lz4).path).unwrap();
    let parts = layout(&image);
    let record = frame_record(&parts);
    let dir = scratch.join("lying");
    fs::create_dir(&dir).unwrap();
    let check = |lying: &[u8]| open_forged(&dir.join("checkpoint.img"), lying).and_then(|reader| reader.verify());
    for field in [0, 8, 12] {
        let old = u32::from_le_bytes(image[record + field..record + field + 4].try_into().unwrap());
        for lie in [0, 1, old - 1, old + 1, 1 << 20, (1 << 20) + 1, 1 << 30, u32::MAX] {
            let mut lying = image.clone();
            lying[record + field..record + field + 4].copy_from_slice(&lie.to_le_bytes());
            reseal(&mut lying);
            assert_eq!(
                check(&lying).unwrap_err().code(),
                "image-corrupt",
                "{lie:#x} in {field}"
            );
        }
    }
    // A frame table without a word in the header, and the other way round.
    for (from, to) in [("lz4", "zst"), ("\"lz4\"", "     "), (",\"lz4\"", "      ")] {
        let mut lying = image.clone();
        let at = lying
            .windows(from.len())
            .position(|window| window == from.as_bytes())
            .unwrap();
        lying[at..at + from.len()].copy_from_slice(to.as_bytes());
        reseal(&mut lying);
        assert!(
            ["image-corrupt", "image-version"].contains(&check(&lying).unwrap_err().code()),
            "{from}"
        );
    }
    let mut twice = image.clone();
    let at = twice.windows(5).position(|window| window == b"\"lz4\"").unwrap();
    twice[at..at + 5].copy_from_slice(b"\"zst\"");
    reseal(&mut twice);
    assert_eq!(check(&twice).unwrap_err().code(), "image-version");
}
