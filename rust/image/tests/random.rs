//! Random images and random damage.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, as it should")]

mod support;

use std::collections::BTreeMap;
use std::fs;

use proptest::prelude::*;
use proptest::sample::Index;
use support::Scratch;
use torpor_image::{HeaderInfo, PageRun, Reader, Writer};

#[derive(Debug, Clone)]
enum Step {
    Pages(u8, usize),
    Blob(Vec<u8>),
    BlobFrom(Vec<u8>, Option<u64>),
}

fn step() -> impl Strategy<Value = Step> {
    let bytes = || prop::collection::vec(any::<u8>(), 0..10_000);
    prop_oneof![
        (any::<u8>(), 0_usize..600).prop_map(|(seed, pages)| Step::Pages(seed, pages)),
        bytes().prop_map(Step::Blob),
        (bytes(), prop::option::of(0_u64..20_000)).prop_map(|(bytes, hint)| Step::BlobFrom(bytes, hint)),
    ]
}

fn sections() -> impl Strategy<Value = BTreeMap<String, Vec<String>>> {
    let name = "[a-z0-9._-]{1,32}".prop_filter("reserved", |name| name != "pages" && name != "frames");
    prop::collection::btree_map(name, prop::collection::vec(".{0,40}", 0..5), 0..6)
}

fn pages(seed: u8, count: usize) -> Vec<u8> {
    (0..count)
        .flat_map(|number| support::page(seed.wrapping_add(number as u8)))
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn round_trip(steps in prop::collection::vec(step(), 0..12), sections in sections(), zeros in 0_u64..100) {
        let scratch = Scratch::new();
        let mut writer = Writer::create(scratch.path(), HeaderInfo::new("0.1.0")).unwrap();
        let (mut runs, mut blobs) = (Vec::new(), Vec::new());
        for (number, step) in steps.iter().enumerate() {
            match step {
                Step::Pages(seed, count) => {
                    let offset = writer.append_pages(&pages(*seed, *count)).unwrap();
                    if *count > 0 {
                        // A gap between the runs, so that they are not joined; the last step first.
                        runs.push((PageRun::data(7, (100 - number as u64) << 24, offset, *count as u64), *seed, *count));
                    }
                }
                Step::Blob(bytes) => blobs.push((writer.append_blob(bytes).unwrap(), bytes)),
                Step::BlobFrom(bytes, hint) => {
                    blobs.push((writer.append_blob_from(&mut bytes.as_slice(), *hint).unwrap(), bytes));
                }
            }
        }
        for (run, ..) in &runs {
            writer.push_run(*run);
        }
        for number in 0..zeros {
            writer.push_run(PageRun::zero(3, number << 13, 1));
        }
        for (name, value) in &sections {
            writer.add_section(name, value).unwrap();
        }
        let before = writer.bytes();
        let committed = writer.commit().unwrap();
        prop_assert!(committed.bytes >= before);

        let reader = Reader::open(scratch.path()).unwrap();
        reader.verify().unwrap();
        prop_assert_eq!(reader.digest(), committed.digest);
        prop_assert_eq!(reader.runs_of(3).len() as u64, zeros);
        let mut expected: Vec<PageRun> = runs.iter().map(|(run, ..)| *run).collect();
        expected.sort();
        prop_assert_eq!(reader.runs_of(7), expected);
        for (run, seed, count) in runs {
            let mut bytes = vec![0; run.bytes() as usize];
            reader.read_at(run.offset, &mut bytes).unwrap();
            prop_assert!(bytes == pages(seed, count));
        }
        for (blob, bytes) in blobs {
            prop_assert!(reader.blob(blob).unwrap() == *bytes);
        }
        for (name, value) in sections {
            prop_assert_eq!(reader.section::<Vec<String>>(&name).unwrap(), value);
        }
    }
}

#[derive(Debug, Clone)]
enum Change {
    Set(Index, u8),
    Number(Index, u64),
    Cut(Index),
    Remove(Index, usize),
    Insert(Index, Vec<u8>),
    Copy(Index, Index, usize),
}

fn change() -> impl Strategy<Value = Change> {
    let at = any::<Index>;
    let number = prop_oneof![
        any::<u64>(),
        0_u64..100_000,
        (0_u32..64).prop_map(|bit| 1 << bit),
        (0_u64..5000).prop_map(|n| u64::MAX - n)
    ];
    prop_oneof![
        (at(), any::<u8>()).prop_map(|(at, byte)| Change::Set(at, byte)),
        (at(), number).prop_map(|(at, number)| Change::Number(at, number)),
        at().prop_map(Change::Cut),
        (at(), 1_usize..5000).prop_map(|(at, count)| Change::Remove(at, count)),
        (at(), prop::collection::vec(any::<u8>(), 1..200)).prop_map(|(at, bytes)| Change::Insert(at, bytes)),
        (at(), at(), 1_usize..500).prop_map(|(from, to, count)| Change::Copy(from, to, count)),
    ]
}

fn apply(image: &mut Vec<u8>, change: &Change) {
    if image.is_empty() {
        return;
    }
    let len = image.len();
    match change {
        Change::Set(at, byte) => *at.get_mut(image) = *byte,
        Change::Number(at, number) => {
            let at = at.index(len) & !7;
            let room = (len - at).min(8);
            image[at..at + room].copy_from_slice(&number.to_le_bytes()[..room]);
        }
        Change::Cut(at) => image.truncate(at.index(len)),
        Change::Remove(at, count) => {
            let at = at.index(len);
            image.drain(at..len.min(at + count));
        }
        Change::Insert(at, bytes) => drop(image.splice(at.index(len)..at.index(len), bytes.iter().copied())),
        Change::Copy(from, to, count) => {
            let (from, to) = (from.index(len), to.index(len));
            let count = (*count).min(len - from).min(len - to);
            image.copy_within(from..from + count, to);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 2500, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn random_damage_never_panics_and_is_never_believed(changes in prop::collection::vec(change(), 1..6), front in any::<bool>()) {
        thread_local! {
            static INTACT: (Scratch, Vec<u8>) = {
                let scratch = Scratch::new();
                let image = fs::read(support::small(&scratch.join("intact"), HeaderInfo::new("0.1.0")).path).unwrap();
                (scratch, image)
            };
        }
        INTACT.with(|(scratch, intact)| {
            let mut image = intact.clone();
            // Half of the damage goes to the end of the file, where all the structure is.
            let kept = if front { Vec::new() } else { image.drain(..intact.len() - 600).collect() };
            changes.iter().for_each(|change| apply(&mut image, change));
            image.splice(0..0, kept);
            let path = scratch.join("damaged");
            fs::write(&path, &image).unwrap();
            let opened = Reader::open(&path).and_then(|reader| reader.verify().map(|()| reader));
            prop_assert_eq!(opened.is_ok(), image == *intact);
            Ok(())
        })?;
    }
}
