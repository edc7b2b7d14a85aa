//! Images that go on from others.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, as it should")]

mod support;

use std::fs::{self, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::Path;

use support::{Scratch, page};
use torpor_image::{Error, HeaderInfo, MAX_CHAIN, PageRun, Reader, Writer};

const AT: u64 = 0x7000_0000;

fn info() -> HeaderInfo {
    HeaderInfo::new("0.1.0")
}

fn at(page: u64) -> u64 {
    AT + page * 4096
}

/// Eight pages with data, four of zeros.
fn first(dir: &Path) {
    let mut writer = Writer::create(dir, info()).unwrap();
    writer.append_blob(b"a blob before the pages").unwrap();
    let offset = writer
        .append_pages(&(0..8).flat_map(page).collect::<Vec<u8>>())
        .unwrap();
    writer.push_run(PageRun::data(0, AT, offset, 8));
    writer.push_run(PageRun::zero(0, at(8), 4));
    writer.commit().unwrap();
}

/// Page 2 is new, page 5 was given up, the rest is as it was.
fn second(dir: &Path, parent: &str) {
    let mut writer = Writer::create_child(dir, info(), parent.as_ref()).unwrap();
    let offset = writer.append_pages(&page(102)).unwrap();
    writer.push_run(PageRun::data(0, at(2), offset, 1));
    assert_eq!(writer.inherit((0, AT), (0, AT), 2).unwrap(), 2);
    assert_eq!(writer.inherit((0, at(3)), (0, at(3)), 2).unwrap(), 2);
    // To the end and beyond: two with data, four of zeros, and nothing where the parent has nothing.
    assert_eq!(writer.inherit((0, at(6)), (0, at(6)), 100).unwrap(), 2);
    writer.commit().unwrap();
}

/// All of it moved, into another space; page 0 is new.
fn third(dir: &Path, parent: &str) {
    let mut writer = Writer::create_child(dir, info(), parent.as_ref()).unwrap();
    let offset = writer.append_pages(&page(200)).unwrap();
    writer.push_run(PageRun::data(7, at(1000), offset, 1));
    writer.inherit((0, at(1)), (7, at(1001)), 50).unwrap();
    writer.commit().unwrap();
}

fn chain(scratch: &Scratch) {
    first(&scratch.join("1"));
    second(&scratch.join("2"), "../1");
    third(&scratch.join("3"), "../2");
}

/// Each page with its content, read by itself and through its block; zero pages as `None`.
fn content(reader: &Reader) -> Vec<(u32, u64, Option<Vec<u8>>)> {
    let mut all = Vec::new();
    let mut block = Vec::new();
    for run in reader.runs() {
        for number in 0..run.pages {
            let start = run.start + number * 4096;
            let offset = run.offset + number * 4096;
            let bytes = (!run.is_zero()).then(|| {
                let mut bytes = vec![0; 4096];
                reader.read_at(offset, &mut bytes).unwrap();
                let begin = reader.read_block(offset, &mut block).unwrap();
                let at = (offset - begin) as usize;
                assert_eq!(block[at..at + 4096], bytes);
                let (file, at) = reader.stored(offset).unwrap().unwrap();
                let mut again = vec![0; 4096];
                file.read_exact_at(&mut again, at).unwrap();
                assert_eq!(again, bytes);
                bytes
            });
            all.push((run.space, start, bytes));
        }
    }
    all
}

#[test]
fn a_chain_of_three_is_read_as_one_image() {
    let scratch = Scratch::new();
    chain(&scratch);
    let reader = Reader::open(&scratch.join("3")).unwrap();
    reader.verify().unwrap();
    assert_eq!(reader.version(), (1, 1));
    assert_eq!(Reader::open(&scratch.join("1")).unwrap().version(), (1, 0));
    let expected: Vec<_> = [(0, Some(200)), (1, Some(1)), (2, Some(102)), (3, Some(3)), (4, Some(4))]
        .into_iter()
        .chain([(6, Some(6)), (7, Some(7)), (8, None), (9, None), (10, None), (11, None)])
        .map(|(number, seed): (u64, Option<u8>)| (7, at(1000 + number), seed.map(page)))
        .collect();
    assert!(content(&reader) == expected);
    assert_eq!(
        reader.runs_of(7).iter().map(PageRun::link).collect::<Vec<_>>(),
        [0, 2, 1, 2, 2, 0]
    );
    let paths: Vec<_> = reader.chain().map(|link| link.path().to_path_buf()).collect();
    assert_eq!(paths.len(), 3);
    assert!(paths[2].ends_with("3/../2/../1/checkpoint.img"), "{paths:?}");
    let parent = reader.header().parent.clone().unwrap();
    assert_eq!(parent.path, "../2");
    let second = Reader::open(&scratch.join("2")).unwrap();
    assert_eq!(
        (parent.digest, parent.uuid),
        (second.digest(), second.header().uuid.clone())
    );
    assert_eq!(reader.first_page(), 4096);
    assert_eq!(Reader::peek(&scratch.join("3")).unwrap(), *reader.header());
    // All of it may move together.
    fs::create_dir(scratch.join("elsewhere")).unwrap();
    for name in ["1", "2", "3"] {
        fs::rename(scratch.join(name), scratch.join("elsewhere").join(name)).unwrap();
    }
    let moved = Reader::open(&scratch.join("elsewhere/3")).unwrap();
    assert!(content(&moved) == expected);
}

fn refused(scratch: &Scratch, code: &str, words: &[&str]) {
    let error = Reader::open(&scratch.join("3")).unwrap_err();
    assert_eq!(error.code(), code, "{error}");
    let text = error.to_string();
    assert!(
        !text.contains('\n') && words.iter().all(|word| text.contains(word)),
        "{text}"
    );
}

#[test]
fn a_missing_parent_is_named() {
    let scratch = Scratch::new();
    chain(&scratch);
    let wanted = Reader::open(&scratch.join("1")).unwrap();
    let (digest, uuid) = (wanted.digest(), wanted.header().uuid.clone());
    fs::rename(scratch.join("1"), scratch.join("gone")).unwrap();
    refused(
        &scratch,
        "image-parent",
        &["/1/checkpoint.img", &digest, &uuid, "does not exist"],
    );
    // What is not a directory is not one either.
    fs::write(scratch.join("1"), b"").unwrap();
    refused(&scratch, "image-parent", &["/1/checkpoint.img"]);
}

#[test]
fn another_image_in_place_of_a_parent_is_refused() {
    let scratch = Scratch::new();
    chain(&scratch);
    let wanted = Reader::open(&scratch.join("1")).unwrap().digest();
    fs::remove_dir_all(scratch.join("1")).unwrap();
    // The same pages, made again: another image all the same.
    first(&scratch.join("1"));
    let found = Reader::open(&scratch.join("1")).unwrap().digest();
    refused(
        &scratch,
        "image-parent",
        &["/1/checkpoint.img", "has changed", &wanted, &found],
    );
}

#[test]
fn a_damaged_parent_is_found_and_named() {
    let scratch = Scratch::new();
    chain(&scratch);
    let path = scratch.join("1/checkpoint.img");
    let image = fs::read(&path).unwrap();
    let file = OpenOptions::new().write(true).open(&path).unwrap();
    file.write_all_at(&[image[5000] ^ 1], 5000).unwrap();
    let reader = Reader::open(&scratch.join("3")).unwrap();
    let error = reader.verify().unwrap_err();
    assert_eq!((error.code(), error.section()), ("image-corrupt", Some("data")));
    assert!(error.path().ends_with("1/checkpoint.img"), "{error}");
    let inherited = reader.runs_of(7)[1].offset;
    assert!(reader.read_block(inherited, &mut Vec::new()).is_err());
    file.write_all_at(&image[5000..=5000], 5000).unwrap();
    reader.verify().unwrap();
    file.set_len(image.len() as u64 - 1).unwrap();
    refused(&scratch, "image-corrupt", &["/1/checkpoint.img"]);
}

#[test]
fn a_chain_that_comes_back_to_itself_is_refused() {
    let scratch = Scratch::new();
    chain(&scratch);
    // By its digest no image can be its own ancestor.
    fs::rename(scratch.join("1"), scratch.join("gone")).unwrap();
    std::os::unix::fs::symlink("3", scratch.join("1")).unwrap();
    refused(&scratch, "image-parent", &["has changed"]);
}

#[test]
fn a_chain_ends() {
    let scratch = Scratch::new();
    first(&scratch.join("0"));
    for number in 1..MAX_CHAIN {
        let mut writer = Writer::create_child(
            &scratch.join(&number.to_string()),
            info(),
            format!("../{}", number - 1).as_ref(),
        )
        .unwrap();
        writer.inherit((0, AT), (0, AT), 12).unwrap();
        writer.commit().unwrap();
    }
    let reader = Reader::open(&scratch.join(&(MAX_CHAIN - 1).to_string())).unwrap();
    assert_eq!(reader.chain().len(), MAX_CHAIN);
    assert_eq!(content(&reader).len(), 12);
    let error =
        Writer::create_child(&scratch.join("more"), info(), format!("../{}", MAX_CHAIN - 1).as_ref()).unwrap_err();
    assert_eq!(error.code(), "image-parent");
    assert!(error.to_string().contains("squash"), "{error}");
    assert!(!scratch.join("more").exists());
}

#[test]
fn a_parent_that_cannot_be_is_refused_and_leaves_nothing() {
    let scratch = Scratch::new();
    first(&scratch.join("1"));
    let absolute = scratch.join("1");
    let code = |parent: &Path| {
        let error = Writer::create_child(&scratch.join("2"), info(), parent).unwrap_err();
        assert!(!scratch.join("2").exists());
        error.code()
    };
    assert_eq!(code(&absolute), "usage");
    assert_eq!(code(Path::new("")), "usage");
    assert_eq!(code(Path::new("../nothing")), "image-missing");
    assert_eq!(code(Path::new("../1/checkpoint.img")), "image-missing");
    assert_eq!(code(Path::new("../1\n")), "image-missing");
    let mut writer = Writer::create(&scratch.join("2"), info()).unwrap();
    assert_eq!(writer.inherit((0, AT), (0, AT), 1).unwrap_err().code(), "internal");
    // An offset in an image that is not in the chain.
    writer.push_run(PageRun::data(0, AT, (1 << 48) + 4096, 1));
    assert_eq!(writer.commit().unwrap_err().code(), "internal");
}

#[test]
fn pages_are_inherited_once_and_only_pages() {
    let scratch = Scratch::new();
    first(&scratch.join("1"));
    let child = || Writer::create_child(&scratch.join("2"), info(), "../1".as_ref()).unwrap();
    let mut writer = child();
    for (from, to) in [((0, AT + 1), (0, AT)), ((0, AT), (0, 12))] {
        let error = writer.inherit(from, to, 2).unwrap_err();
        assert_eq!(error.code(), "internal", "{from:?} {to:?}");
    }
    let mut writer = {
        drop(writer);
        child()
    };
    writer.inherit((0, AT), (0, AT), 2).unwrap();
    writer.inherit((0, at(1)), (0, at(1)), 2).unwrap();
    assert!(matches!(writer.commit().unwrap_err(), Error::Misuse { .. }));
    assert!(!scratch.join("2").exists());
}
