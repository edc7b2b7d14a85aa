//! What goes wrong around a writer: a full disk, a directory it may not write to, a SIGKILL.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, as it should")]

mod support;

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::thread;

use nix::mount::{MsFlags, mount};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::geteuid;
use support::{Scratch, page, small};
use torpor_image::{Error, HeaderInfo, PageRun, Reader, Writer};

fn info() -> HeaderInfo {
    HeaderInfo::new("0.1.0")
}

/// Runs `test` in a thread with a mount namespace of its own, where a small file system lies on a directory; nothing is left behind.
fn on_small_disk(options: &'static str, flags: MsFlags, test: impl FnOnce(&Path) + Send) {
    if !geteuid().is_root() {
        eprintln!("SKIPPED: needs root, to mount a small file system");
        return;
    }
    let scratch = Scratch::new();
    let dir = scratch.path();
    thread::scope(|scope| {
        let run = scope.spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).unwrap();
            mount(
                None::<&str>,
                "/",
                None::<&str>,
                MsFlags::MS_REC | MsFlags::MS_PRIVATE,
                None::<&str>,
            )
            .unwrap();
            mount(Some("torpor-test"), dir, Some("tmpfs"), flags, Some(options)).unwrap();
            test(dir);
        });
        run.join().unwrap();
    });
}

fn is_empty(dir: &Path) -> bool {
    fs::read_dir(dir).unwrap().next().is_none()
}

#[test]
fn a_full_disk_is_told_and_nothing_stays() {
    on_small_disk("size=1m", MsFlags::empty(), |disk| {
        let fill = |dir: &Path| {
            let mut writer = Writer::create(dir, info())?;
            for _ in 0..100 {
                writer.append_pages(&page(1).repeat(32))?;
            }
            writer.commit()
        };
        let error = fill(&disk.join("a/b")).unwrap_err();
        assert_eq!(error.code(), "no-space", "{error}");
        assert_eq!(error.errno(), Some(nix::libc::ENOSPC));
        assert!(error.to_string().contains("free some"), "{error}");
        assert!(is_empty(disk));
        // And the space is there again.
        small(&disk.join("a/b"), info());
        Reader::open(&disk.join("a/b")).unwrap().verify().unwrap();
    });
}

#[test]
fn a_disk_that_fills_at_the_last_moment_leaves_no_image() {
    on_small_disk("size=1m", MsFlags::empty(), |disk| {
        let mut writer = Writer::create(&disk.join("x"), info()).unwrap();
        writer.append_pages(&page(1).repeat(200)).unwrap();
        writer.add_section("metadata", &"x".repeat(400_000)).unwrap();
        assert_eq!(writer.commit().unwrap_err().code(), "no-space");
        assert!(is_empty(disk));
    });
}

#[test]
fn a_writer_is_of_no_use_after_a_failed_write() {
    on_small_disk("size=1m", MsFlags::empty(), |disk| {
        let mut writer = Writer::create(&disk.join("x"), info()).unwrap();
        assert_eq!(
            writer.append_pages(&page(1).repeat(400)).unwrap_err().code(),
            "no-space"
        );
        assert!(writer.append_pages(&page(1).repeat(100)).is_err());
        assert!(writer.commit().is_err());
        assert!(is_empty(disk));
    });
}

#[test]
fn a_disk_without_inodes_is_full_too() {
    on_small_disk("size=1m,nr_inodes=3", MsFlags::empty(), |disk| {
        let error = Writer::create(&disk.join("a/b/c/d"), info()).unwrap_err();
        assert_eq!(error.code(), "no-space", "{error}");
        assert!(is_empty(disk));
    });
}

#[test]
fn a_read_only_disk_is_refused() {
    on_small_disk("size=1m", MsFlags::MS_RDONLY, |disk| {
        for dir in [disk.to_path_buf(), disk.join("a/b")] {
            let error = Writer::create(&dir, info()).unwrap_err();
            assert!(matches!(error, Error::Permission { .. }), "{error:?}");
            assert!(error.to_string().contains("choose another directory"), "{error}");
        }
    });
}

const CHILD: &str = "TORPOR_IMAGE_TEST_CHILD";

/// Not a test by itself: what the next one kills.
#[test]
fn child_that_writes_until_it_is_killed() {
    let Some(dir) = std::env::var_os(CHILD) else { return };
    let mut writer = Writer::create(dir.as_ref(), info()).unwrap();
    loop {
        let offset = writer.append_pages(&page(1).repeat(64)).unwrap();
        writer.push_run(PageRun::data(0, offset, offset, 64));
        println!("\nwriting");
        thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn a_writer_killed_while_it_writes_leaves_no_file_and_no_lock() {
    let scratch = Scratch::new();
    for _ in 0..5 {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "child_that_writes_until_it_is_killed", "--nocapture"])
            .env(CHILD, scratch.path())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stdout.take().unwrap()).lines();
        assert!(lines.any(|line| line.unwrap() == "writing"));
        assert_eq!(
            Writer::create(scratch.path(), info()).unwrap_err().code(),
            "image-exists",
            "it is being written"
        );
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(scratch.is_empty());
    }
    small(scratch.path(), info());
}
