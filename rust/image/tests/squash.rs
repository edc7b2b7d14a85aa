//! Chains that are folded into one image.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, as it should")]

mod support;

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;

use proptest::prelude::*;
use support::{BLOB, Notes, Scratch, page, small, small_child};
use torpor_image::{CONNECTIONS, Compression, HeaderInfo, PageRun, Reader, Writer, squash};

fn info() -> HeaderInfo {
    HeaderInfo::new("0.1.0")
}

/// Every page by space and address; zero pages as `None`.
fn content(reader: &Reader) -> BTreeMap<(u32, u64), Option<Vec<u8>>> {
    let mut all = BTreeMap::new();
    for run in reader.runs() {
        for at in (0..run.bytes()).step_by(4096) {
            let bytes = (!run.is_zero()).then(|| {
                let mut bytes = vec![0; 4096];
                reader.read_at(run.offset + at, &mut bytes).unwrap();
                bytes
            });
            assert!(all.insert((run.space, run.start + at), bytes).is_none());
        }
    }
    all
}

#[test]
fn the_new_image_has_all_and_needs_no_other() {
    let scratch = Scratch::new();
    small(&scratch.join("1"), info());
    let mut header = info();
    header.extra.insert("mood".to_owned(), serde_json::json!("calm"));
    header.requires.push(CONNECTIONS.to_owned());
    small_child(&scratch.join("2"), header, "../1", Compression::Lz4);
    let old = Reader::open(&scratch.join("2")).unwrap();
    let expected = content(&old);
    assert_eq!(expected.len(), 18);
    for how in [Compression::None, Compression::Zstd(3)] {
        let dir = scratch.join(&how.to_string());
        let committed = squash(&old, &dir, info(), how).unwrap();
        let new = Reader::open(&dir).unwrap();
        new.verify().unwrap();
        assert_eq!((new.chain().len(), new.digest()), (1, committed.digest));
        assert!(new.header().parent.is_none() && new.header().uuid != old.header().uuid);
        assert_eq!(new.header().extra, old.header().extra);
        // What the file holds, not how the old one held it.
        let packed = (how != Compression::None).then_some("zstd");
        let requires = [CONNECTIONS].into_iter().chain(packed);
        assert!(new.header().requires.iter().eq(requires), "{:?}", new.header());
        assert!(content(&new) == expected);
        let notes: Notes = new.section("metadata").unwrap();
        assert_eq!(new.blob(notes.blob).unwrap(), BLOB);
        assert_eq!(
            new.section_bytes("container").unwrap(),
            old.section_bytes("container").unwrap()
        );
    }
    assert_eq!(
        squash(&old, &scratch.join("none"), info(), Compression::None)
            .unwrap_err()
            .code(),
        "image-exists"
    );
}

#[test]
fn a_damaged_parent_makes_no_image() {
    let scratch = Scratch::new();
    let parent = small(&scratch.join("1"), info()).path;
    small_child(&scratch.join("2"), info(), "../1", Compression::None);
    let old = Reader::open(&scratch.join("2")).unwrap();
    let mut bytes = fs::read(&parent).unwrap();
    bytes[5000] ^= 1;
    fs::write(&parent, bytes).unwrap();
    let error = squash(&old, &scratch.join("3"), info(), Compression::None).unwrap_err();
    assert_eq!(error.code(), "image-corrupt");
    assert!(error.path().ends_with("1/checkpoint.img") && !scratch.join("3").exists());
}

/// What one checkpoint of a chain does with 64 pages of memory: writes some, gives some up, some become zero.
#[derive(Debug, Clone)]
struct Step {
    written: BTreeMap<u64, u8>,
    zeroed: Vec<u64>,
    dropped: Vec<u64>,
    how: Compression,
}

fn step() -> impl Strategy<Value = Step> {
    let pages = || prop::collection::vec(0_u64..64, 0..10);
    let how = prop_oneof![
        Just(Compression::None),
        Just(Compression::Lz4),
        Just(Compression::Zstd(1))
    ];
    (
        prop::collection::btree_map(0_u64..64, any::<u8>(), 0..20),
        pages(),
        pages(),
        how,
    )
        .prop_map(|(written, zeroed, dropped, how)| Step {
            written,
            zeroed,
            dropped,
            how,
        })
}

/// Writes what changed, takes the rest over, and does the same to `memory`.
fn take(dir: &Path, parent: Option<&str>, step: &Step, memory: &mut BTreeMap<u64, Option<u8>>) {
    let mut writer = match parent {
        Some(parent) => Writer::create_child(dir, info(), parent.as_ref()).unwrap(),
        None => Writer::create(dir, info()).unwrap(),
    };
    writer.compress(step.how).unwrap();
    let mut changed = BTreeMap::new();
    changed.extend(step.dropped.iter().map(|number| (*number, None)));
    changed.extend(step.zeroed.iter().map(|number| (*number, Some(None))));
    changed.extend(step.written.iter().map(|(number, seed)| (*number, Some(Some(*seed)))));
    for number in 0..64 {
        match changed.get(&number) {
            Some(Some(Some(seed))) => {
                let offset = writer.append_pages(&page(*seed)).unwrap();
                writer.push_run(PageRun::data(1, number * 4096, offset, 1));
                memory.insert(number, Some(*seed));
            }
            Some(Some(None)) => {
                writer.push_run(PageRun::zero(1, number * 4096, 1));
                memory.insert(number, None);
            }
            Some(None) => {
                memory.remove(&number);
            }
            None if parent.is_some() => {
                writer.inherit((1, number * 4096), (1, number * 4096), 1).unwrap();
            }
            None => {}
        }
    }
    writer.commit().unwrap();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_chains_hold_what_memory_held(steps in prop::collection::vec(step(), 1..6), how in step()) {
        let scratch = Scratch::new();
        let mut memory = BTreeMap::new();
        for (number, step) in steps.iter().enumerate() {
            let parent = number.checked_sub(1).map(|before| format!("../{before}"));
            take(&scratch.join(&number.to_string()), parent.as_deref(), step, &mut memory);
        }
        let expected: BTreeMap<_, _> = memory
            .iter()
            .map(|(number, seed)| ((1, number * 4096), seed.map(page)))
            .collect();
        let last = Reader::open(&scratch.join(&(steps.len() - 1).to_string())).unwrap();
        last.verify().unwrap();
        prop_assert!(content(&last) == expected);
        squash(&last, &scratch.join("new"), info(), how.how).unwrap();
        let new = Reader::open(&scratch.join("new")).unwrap();
        new.verify().unwrap();
        prop_assert!(content(&new) == expected);
    }
}
