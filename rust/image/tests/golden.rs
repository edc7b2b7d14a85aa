//! Images of released versions stay readable for ever.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, as it should")]

#[path = "../examples/golden/image.rs"]
mod image;
mod support;

use std::fs;
use std::path::{Path, PathBuf};

use support::Scratch;
use torpor_image::{MINOR, Reader};

fn golden(version: &str) -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/golden")
        .join(version)
}

#[test]
fn version_1_is_read() {
    let reader = Reader::open_foreign(&golden("v1")).unwrap();
    reader.verify().unwrap();
    assert_eq!(reader.version(), (1, 0));
    assert_eq!(*reader.header(), image::header());
    assert_eq!(reader.digest(), "20f6e33788806ed9925172a7d08ff6a6");
    assert_eq!(reader.runs(), image::runs());
    for (run, expected) in reader.runs().iter().zip([
        [image::page(1), image::page(2)].concat(),
        vec![],
        image::page(3),
        image::page(3),
    ]) {
        if !run.is_zero() {
            let mut bytes = vec![0; run.bytes() as usize];
            reader.read_at(run.offset, &mut bytes).unwrap();
            assert_eq!(bytes, expected);
        }
    }
    let metadata: image::Metadata = reader.section("metadata").unwrap();
    assert_eq!(
        (metadata.comm.as_str(), metadata.pids.as_slice()),
        ("golden", [1, 7].as_slice())
    );
    assert_eq!(reader.blob(metadata.xstate).unwrap(), image::xstate());
    assert_eq!(reader.blob(metadata.pipe).unwrap(), image::PIPE);
    assert_eq!(
        reader.section::<image::Container>("container").unwrap(),
        image::container()
    );
}

/// A change of the bytes that a writer makes is a new version, and a new golden image beside this one.
#[test]
fn version_1_0_is_still_what_is_written() {
    let scratch = Scratch::new();
    let committed = image::write(scratch.path()).unwrap();
    let old = fs::read(golden("v1").join("checkpoint.img")).unwrap();
    assert!(fs::read(committed.path).unwrap() == old);
}

/// A parent, its child and the child's child, of version 1.1.
#[test]
fn version_1_1_is_read_and_still_what_is_written() {
    let reader = Reader::open_foreign(&golden("v1.1/last")).unwrap();
    reader.verify().unwrap();
    assert_eq!(reader.version(), (1, 1));
    assert_eq!(reader.chain().len(), 3);
    assert_eq!(reader.runs(), image::chained_runs());
    for (run, seed) in reader.runs().iter().zip([5, 4, 3]) {
        let mut bytes = vec![0; 4096];
        reader.read_at(run.offset, &mut bytes).unwrap();
        assert_eq!(bytes, image::page(seed));
    }
    let scratch = Scratch::new();
    image::write_chain(scratch.path()).unwrap();
    for name in ["first", "middle", "last"] {
        let file = |dir: &Path| fs::read(dir.join(name).join("checkpoint.img")).unwrap();
        assert!(file(scratch.path()) == file(&golden("v1.1")), "{name}");
    }
    // Another release of a codec may pack in another way, and unpacks all the same.
    for name in ["lz4", "zstd"] {
        let reader = Reader::open_foreign(&golden("v1.1").join(name)).unwrap();
        reader.verify().unwrap();
        assert_eq!(reader.chain().next().unwrap().compression(), name);
        let mut bytes = vec![0; reader.runs()[0].bytes() as usize];
        reader.read_at(reader.runs()[0].offset, &mut bytes).unwrap();
        assert!(bytes == image::packed_pages());
    }
}

/// Images that require what was found only while they were written: the version follows from that.
#[test]
fn versions_1_2_and_1_3_are_read_and_still_what_is_written() {
    assert_eq!(
        MINOR, 3,
        "add the golden image of the new version, and compare with that one"
    );
    type Write = fn(&std::path::Path) -> Result<torpor_image::Committed, torpor_image::Error>;
    let all: [(&str, u16, &str, Write); 2] = [
        ("v1.2", 2, torpor_image::CONNECTIONS, image::write_with_connections),
        ("v1.3", 3, torpor_image::SHARING, image::write_with_sharing),
    ];
    for (name, minor, word, write) in all {
        let reader = Reader::open_foreign(&golden(name)).unwrap();
        reader.verify().unwrap();
        assert_eq!(reader.version(), (1, minor));
        assert_eq!(reader.header().requires, [word]);
        let scratch = Scratch::new();
        let committed = write(scratch.path()).unwrap();
        assert_eq!(committed.digest, reader.digest());
        assert!(fs::read(committed.path).unwrap() == fs::read(golden(name).join("checkpoint.img")).unwrap());
    }
}
