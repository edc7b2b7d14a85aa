//! An image from its directory to its reader and back.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, as it should")]

mod support;

use std::fs::{self, File};
use std::io::{self, Read};
use std::os::unix::fs::PermissionsExt;
use std::sync::Barrier;
use std::thread;

use nix::unistd::geteuid;
use support::{BLOB, Notes, Scratch, page, small};
use torpor_image::{BlobRef, Error, FILE_NAME, HeaderInfo, PageRun, Reader, SectionKind, Writer};

fn info() -> HeaderInfo {
    HeaderInfo::new("0.1.0")
}

#[test]
fn what_was_written_is_read() {
    let scratch = Scratch::new();
    let header = info();
    let committed = small(&scratch.join("a/b"), header.clone());
    assert_eq!(committed.path, scratch.join("a/b").join(FILE_NAME));
    assert_eq!(committed.bytes, committed.path.metadata().unwrap().len());
    assert_eq!(committed.path.metadata().unwrap().permissions().mode() & 0o777, 0o600);

    for path in [scratch.join("a/b"), committed.path.clone()] {
        let reader = Reader::open(&path).unwrap();
        reader.verify().unwrap();
        assert_eq!(*reader.header(), header);
        assert_eq!(Reader::peek(&path).unwrap(), header);
        assert_eq!(reader.digest(), committed.digest);
        assert_eq!(reader.len(), committed.bytes);
        assert_eq!(
            reader.runs(),
            [PageRun::zero(1, 0x40_0000, 16), PageRun::data(2, 0x7000_0000, 4096, 1)]
        );
        assert_eq!(reader.runs_of(2), &reader.runs()[1..]);
        assert!(reader.runs_of(0).is_empty() && reader.runs_of(3).is_empty());
        let mut bytes = vec![0; 4096];
        reader.read_at(reader.runs()[1].offset, &mut bytes).unwrap();
        assert_eq!(bytes, page(1));
        let notes: Notes = reader.section("metadata").unwrap();
        assert_eq!(notes.text, "small");
        assert_eq!(reader.blob(notes.blob).unwrap(), BLOB);
        let mut streamed = Vec::new();
        reader
            .blob_reader(notes.blob)
            .unwrap()
            .read_to_end(&mut streamed)
            .unwrap();
        assert_eq!(streamed, BLOB);
        let names: Vec<_> = reader.sections().map(|section| section.name.as_str()).collect();
        assert_eq!(names, ["metadata", "container", "pages"]);
        assert_eq!(reader.sections().last().unwrap().kind, SectionKind::Index);
    }
}

#[test]
fn two_images_never_share_a_digest() {
    let scratch = Scratch::new();
    let first = small(&scratch.join("1"), info());
    let second = small(&scratch.join("2"), info());
    assert_ne!(first.digest, second.digest, "the uuid is part of it");
}

#[test]
fn an_image_of_nothing_is_an_image() {
    let scratch = Scratch::new();
    Writer::create(scratch.path(), info()).unwrap().commit().unwrap();
    let reader = Reader::open(scratch.path()).unwrap();
    reader.verify().unwrap();
    assert!(reader.runs().is_empty());
    assert_eq!(reader.section::<()>("metadata").unwrap_err().code(), "image-corrupt");
}

#[test]
fn dropping_the_writer_leaves_no_trace() {
    let scratch = Scratch::new();
    let mut writer = Writer::create(&scratch.join("a/b/c"), info()).unwrap();
    writer.append_pages(&page(1).repeat(1000)).unwrap();
    writer.add_section("metadata", &1).unwrap();
    drop(writer);
    assert!(scratch.is_empty());

    fs::create_dir(scratch.join("a")).unwrap();
    drop(Writer::create(&scratch.join("a/b"), info()).unwrap());
    assert!(scratch.join("a").exists() && !scratch.join("a/b").exists());
}

#[test]
fn an_existing_checkpoint_is_refused_and_stays() {
    let scratch = Scratch::new();
    let committed = small(scratch.path(), info());
    let before = fs::read(&committed.path).unwrap();
    let error = Writer::create(scratch.path(), info()).unwrap_err();
    assert_eq!(error.code(), "image-exists");
    assert!(error.to_string().contains("choose another directory"), "{error}");
    assert_eq!(fs::read(&committed.path).unwrap(), before);
}

#[test]
fn of_writers_in_a_race_one_wins() {
    for _ in 0..20 {
        let scratch = Scratch::new();
        let dir = scratch.join("a/b");
        let barrier = Barrier::new(4);
        let race = |seed: u8| {
            barrier.wait();
            let mut writer = Writer::create(&dir, info())?;
            for _ in 0..50 {
                writer.append_pages(&page(seed))?;
            }
            writer.push_run(PageRun::data(0, 0, 4096, 1));
            writer.commit().map(|committed| (seed, committed))
        };
        let results: Vec<Result<_, Error>> = thread::scope(|scope| {
            let racers: Vec<_> = (0..4).map(|seed| scope.spawn(move || race(seed))).collect();
            racers.into_iter().map(|racer| racer.join().unwrap()).collect()
        });
        let (won, lost): (Vec<_>, Vec<_>) = results.into_iter().partition(Result::is_ok);
        assert_eq!(won.len(), 1, "{lost:?}");
        for error in lost {
            assert_eq!(error.unwrap_err().code(), "image-exists");
        }
        let (seed, committed) = won.into_iter().next().unwrap().unwrap();
        let reader = Reader::open(&dir).unwrap();
        reader.verify().unwrap();
        assert_eq!(reader.digest(), committed.digest);
        let mut bytes = vec![0; 4096];
        reader.read_at(4096, &mut bytes).unwrap();
        assert_eq!(bytes, page(seed));
        assert_eq!(fs::read_dir(&dir).unwrap().count(), 1);
    }
}

#[test]
fn data_larger_than_blocks_and_buffers_arrives_in_any_pieces() {
    let scratch = Scratch::new();
    let all: Vec<u8> = (0..=255_u8).flat_map(page).collect::<Vec<u8>>().repeat(5);
    let mut writer = Writer::create(scratch.path(), info()).unwrap();
    let mut placed = Vec::new();
    let mut rest = all.as_slice();
    for pages in [1, 3, 16, 17, 255, 256, 257, 300].into_iter().cycle() {
        let (piece, later) = rest.split_at(rest.len().min(pages * 4096));
        placed.push((writer.append_pages(piece).unwrap(), piece));
        rest = later;
        if rest.is_empty() {
            break;
        }
        let blob = writer.append_blob(&piece[..pages]).unwrap();
        assert_eq!(blob.offset % 8, 0);
    }
    let blob = writer.append_blob_from(&mut all.as_slice(), None).unwrap();
    let hinted = writer.append_blob_from(&mut &all[..5000], Some(5000)).unwrap();
    assert_eq!(writer.bytes(), hinted.offset + hinted.len);
    writer.commit().unwrap();

    let reader = Reader::open(scratch.path()).unwrap();
    reader.verify().unwrap();
    for (offset, piece) in placed {
        assert_eq!(offset % 4096, 0);
        let mut bytes = vec![0; piece.len()];
        reader.read_at(offset, &mut bytes).unwrap();
        assert!(bytes == piece);
    }
    assert!(reader.blob(blob).unwrap() == all);
    assert!(reader.blob(hinted).unwrap() == all[..5000]);
}

#[test]
fn runs_are_sorted_and_joined() {
    let scratch = Scratch::new();
    let mut writer = Writer::create(scratch.path(), info()).unwrap();
    let offset = writer.append_pages(&page(0).repeat(4)).unwrap();
    writer.push_run(PageRun::data(1, 0x3000, offset + 0x3000, 1));
    writer.push_run(PageRun::data(0, 0x9000, offset, 1));
    writer.push_run(PageRun::data(1, 0x1000, offset + 0x1000, 1));
    writer.push_run(PageRun::data(1, 0x2000, offset + 0x2000, 1));
    writer.push_run(PageRun::data(1, 0x4000, offset, 1));
    writer.commit().unwrap();
    let expected = [
        PageRun::data(0, 0x9000, offset, 1),
        PageRun::data(1, 0x1000, offset + 0x1000, 3),
        PageRun::data(1, 0x4000, offset, 1),
    ];
    assert_eq!(Reader::open(scratch.path()).unwrap().runs(), expected);
}

#[test]
fn what_the_caller_does_wrong_is_refused_and_leaves_nothing() {
    let scratch = Scratch::new();
    let dir = scratch.join("x");
    let mut writer = Writer::create(&dir, info()).unwrap();
    assert_eq!(writer.append_pages(&[0; 100]).unwrap_err().code(), "internal");
    writer.add_section("metadata", &1).unwrap();
    for name in ["metadata", "pages", "", "Upper", "a/b", &"x".repeat(33)] {
        assert_eq!(writer.add_section(name, &1).unwrap_err().code(), "internal", "{name:?}");
    }
    writer.push_run(PageRun::data(0, 0, 4096, 1));
    assert_eq!(
        writer.commit().unwrap_err().code(),
        "internal",
        "a run outside the data"
    );

    let mut writer = Writer::create(&dir, info()).unwrap();
    writer.push_run(PageRun::zero(0, 0x1000, 2));
    writer.push_run(PageRun::zero(0, 0x2000, 2));
    let error = writer.commit().unwrap_err();
    assert!(error.to_string().contains("overlaps"), "{error}");

    let mut writer = Writer::create(
        &dir,
        HeaderInfo {
            page_size: 16384,
            ..info()
        },
    )
    .unwrap_err();
    assert_eq!(writer.code(), "image-arch");
    writer = Writer::create(
        &dir,
        HeaderInfo {
            arch: "\x1b[31m".to_owned(),
            ..info()
        },
    )
    .unwrap_err();
    assert_eq!(writer.code(), "internal");
    assert!(scratch.is_empty());
}

#[test]
fn a_failing_source_is_told_apart_from_a_failing_disk() {
    struct Fails;
    impl Read for Fails {
        fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
            Err(io::Error::from_raw_os_error(nix::libc::EIO))
        }
    }
    let scratch = Scratch::new();
    let mut writer = Writer::create(scratch.path(), info()).unwrap();
    let error = writer.append_blob_from(&mut b"some".chain(Fails), None).unwrap_err();
    assert!(matches!(error, Error::Source { .. }), "{error}");
    assert_eq!(error.errno(), Some(nix::libc::EIO));
    let blob = writer.append_blob(b"after").unwrap();
    writer.commit().unwrap();
    let reader = Reader::open(scratch.path()).unwrap();
    reader.verify().unwrap();
    assert_eq!(reader.blob(blob).unwrap(), b"after");
}

#[test]
fn reads_outside_the_data_area_are_refused() {
    let scratch = Scratch::new();
    small(scratch.path(), info());
    let reader = Reader::open(scratch.path()).unwrap();
    let end = 4096 + reader.data_len();
    let refused = |offset, len| {
        let blob = BlobRef { offset, len };
        assert_eq!(reader.blob(blob).unwrap_err().code(), "image-corrupt", "{blob:?}");
        assert_eq!(
            reader.blob_reader(blob).unwrap_err().code(),
            "image-corrupt",
            "{blob:?}"
        );
    };
    refused(0, 8);
    refused(4095, 1);
    refused(end, 1);
    refused(end - 1, 2);
    refused(4096, u64::MAX);
    refused(u64::MAX, 1);
    assert_eq!(reader.blob(BlobRef { offset: end, len: 0 }).unwrap(), b"");
    assert_eq!(
        reader.read_at(end - 10, &mut [0; 11]).unwrap_err().code(),
        "image-corrupt"
    );
}

#[test]
fn what_is_not_there_or_no_file_is_named() {
    let scratch = Scratch::new();
    let code = |name: &str| Reader::open(&scratch.join(name)).unwrap_err().code();
    assert_eq!(code("nowhere"), "image-missing");
    assert_eq!(
        Reader::open(scratch.path()).unwrap_err().path(),
        scratch.join(FILE_NAME)
    );
    File::create(scratch.join("empty")).unwrap();
    assert_eq!(code("empty"), "image-corrupt");
    assert_eq!(code("empty/below"), "image-missing");
    fs::create_dir_all(scratch.join("dir").join(FILE_NAME)).unwrap();
    assert_eq!(code("dir"), "image-corrupt");
    nix::unistd::mkfifo(&scratch.join("fifo"), nix::sys::stat::Mode::S_IRWXU).unwrap();
    assert_eq!(
        code("fifo"),
        "image-corrupt",
        "and without waiting for somebody to open the other end"
    );
    assert_eq!(Reader::open("/dev/zero".as_ref()).unwrap_err().code(), "image-corrupt");
}

#[test]
fn a_directory_that_is_not_writable_is_refused() {
    let read_only = if geteuid().is_root() { "/proc/torpor" } else { "/torpor" };
    let error = Writer::create(read_only.as_ref(), info()).unwrap_err();
    // /proc answers ENOENT to mkdir, a directory of root EACCES.
    assert!(
        matches!(error, Error::Permission { .. } | Error::Io { .. }),
        "{error:?}"
    );
}
