//! How fast images are hashed, written and verified here, next to plain writes and reads of the same bytes.
//!
//! `cargo bench -p torpor-image [-- MIB]`, in the directory that `TMPDIR` names. Not a criterion bench: each run moves gigabytes.
#![allow(clippy::unwrap_used, reason = "a bench that panics has failed, as it should")]

use std::fs::{self, File};
use std::hint::black_box;
use std::io::{Read, Write};
use std::time::{Duration, Instant};

use torpor_image::{HeaderInfo, PageRun, Reader, Writer};
use xxhash_rust::xxh3::{Xxh3, xxh3_64};

const ROUNDS: usize = 5;

fn report(what: &str, bytes: usize, mut rounds: Vec<Duration>) {
    rounds.sort();
    let rate = |time: Duration| bytes as f64 / time.as_secs_f64() / 1e9;
    println!(
        "{what:<44} {:>7.2} GB/s median   {:>7.2} best",
        rate(rounds[rounds.len() / 2]),
        rate(rounds[0])
    );
}

fn time(mut work: impl FnMut()) -> Vec<Duration> {
    let one = |_| {
        let begin = Instant::now();
        work();
        begin.elapsed()
    };
    (0..ROUNDS).map(one).collect()
}

fn main() {
    let numbers: Vec<usize> = std::env::args()
        .skip(1)
        .filter_map(|argument| argument.parse().ok())
        .collect();
    if std::env::args().any(|argument| argument == "--test") {
        return;
    }
    let len = numbers.first().unwrap_or(&1024) << 20;
    let dir = std::env::temp_dir().join(format!("torpor-image-bench-{}", std::process::id()));
    fs::create_dir(&dir).unwrap();
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let data: Vec<u8> = (0..len / 8)
        .flat_map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            state.to_le_bytes()
        })
        .collect();

    report(
        "hash, 1 MiB at once",
        len,
        time(|| drop(black_box(data.chunks(1 << 20).map(xxh3_64).collect::<Vec<_>>()))),
    );
    let stream = |piece: usize| {
        time(|| {
            let mut hash = Xxh3::new();
            data.chunks(piece).for_each(|piece| hash.update(piece));
            black_box(hash.digest());
        })
    };
    report("hash, streamed by 4 KiB", len, stream(4096));
    report("hash, streamed by 256 KiB", len, stream(256 << 10));

    for piece in [4096, 64 << 10, 256 << 10, 1 << 20, 64 << 20] {
        let (mut plain, mut plain_sync, mut write, mut commit) = (vec![], vec![], vec![], vec![]);
        for _ in 0..ROUNDS {
            let path = dir.join("plain");
            let begin = Instant::now();
            let mut file = File::create(&path).unwrap();
            data.chunks(piece).for_each(|piece| file.write_all(piece).unwrap());
            plain.push(begin.elapsed());
            file.sync_all().unwrap();
            plain_sync.push(begin.elapsed());
            drop(file);
            fs::remove_file(path).unwrap();

            let target = dir.join("image");
            let begin = Instant::now();
            let mut writer = Writer::create(&target, HeaderInfo::new("bench")).unwrap();
            for (number, piece) in data.chunks(piece).enumerate() {
                let offset = writer.append_pages(piece).unwrap();
                writer.push_run(PageRun::data(
                    0,
                    (number as u64) << 32,
                    offset,
                    piece.len() as u64 / 4096,
                ));
            }
            write.push(begin.elapsed());
            writer.commit().unwrap();
            commit.push(begin.elapsed());
            fs::remove_dir_all(target).unwrap();
        }
        println!("pieces of {} KiB", piece >> 10);
        report("  plain write", len, plain);
        report("  image write", len, write);
        report("  plain write + fsync", len, plain_sync);
        report("  image write + commit", len, commit);
    }

    let target = dir.join("image");
    let mut writer = Writer::create(&target, HeaderInfo::new("bench")).unwrap();
    writer.append_pages(&data).unwrap();
    let path = writer.commit().unwrap().path;
    let reader = Reader::open(&target).unwrap();
    report("open", len, time(|| drop(Reader::open(&target).unwrap())));
    report("verify, in the page cache", len, time(|| reader.verify().unwrap()));
    let mut buffer = vec![0; 1 << 20];
    let plain = || {
        let mut file = File::open(&path).unwrap();
        while file.read(&mut buffer).unwrap() > 0 {}
    };
    report("plain read, in the page cache, one thread", len, time(plain));
    let evict = || {
        nix::fcntl::posix_fadvise(
            reader.stored(4096).unwrap().unwrap().0,
            0,
            0,
            nix::fcntl::PosixFadviseAdvice::POSIX_FADV_DONTNEED,
        )
        .unwrap()
    };
    let mut cold = Vec::new();
    for _ in 0..ROUNDS {
        evict();
        cold.extend(time(|| reader.verify().unwrap()).first());
    }
    report("verify, from disk", len, cold);
    fs::remove_dir_all(dir).unwrap();
}
