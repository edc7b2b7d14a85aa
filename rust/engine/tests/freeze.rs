//! Stopping trees of processes, with each kind of freezer and with none. Needs root.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use torpor_engine::freeze::freeze;
use torpor_sys::cgroup::Freezer;
use torpor_sys::{Pid, fork, proc, wait};

/// A program of ours with a cgroup of its own; both are gone when this is dropped.
struct Subject {
    child: Child,
    group: Option<PathBuf>,
}

impl Subject {
    fn start(script: &str, hierarchy: Option<&str>) -> Subject {
        wait::block_sigchld();
        let group = hierarchy.map(|root| {
            let path = Path::new(root).join(format!("torpor-test-{}-{}", std::process::id(), script.len()));
            fs::create_dir_all(&path).unwrap();
            path
        });
        // The shell joins the group before it does anything else.
        let join = group
            .as_ref()
            .map_or(String::new(), |g| format!("echo $$ > {}/cgroup.procs;", g.display()));
        let child = Command::new("/bin/sh")
            .args(["-c", &format!("{join} {script}")])
            .stdout(Stdio::null())
            .stdin(Stdio::null())
            .spawn()
            .unwrap();
        std::thread::sleep(Duration::from_millis(150));
        Subject { child, group }
    }

    fn pid(&self) -> Pid {
        self.child.id() as Pid
    }

    fn tree(&self) -> Vec<Pid> {
        let mut all = vec![self.pid()];
        let mut at = 0;
        while at < all.len() {
            all.extend(proc::children(all[at]).unwrap_or_default());
            at += 1;
        }
        all
    }
}

impl Drop for Subject {
    fn drop(&mut self) {
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            let alive: Vec<Pid> = match &self.group {
                Some(g) => Freezer::at(g, false).pids().unwrap_or_default(),
                None => self.tree(),
            };
            alive.iter().for_each(|p| drop(fork::kill(*p, 9)));
            let _ = self.child.try_wait();
            let removed = self
                .group
                .as_ref()
                .is_none_or(|g| fs::remove_dir(g).is_ok() || !g.exists());
            if removed || Instant::now() > end {
                break;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

const V1: &str = "/sys/fs/cgroup/freezer";
const V2: &str = "/sys/fs/cgroup/unified";

fn state(pid: Pid) -> char {
    proc::stat(pid).unwrap().state
}

fn stops_and_goes_on(hierarchy: Option<&str>) {
    let subject = Subject::start("sleep 1000 & sleep 1001 & while :; do :; done", hierarchy);
    let tree = subject.tree();
    assert_eq!(tree.len(), 3);
    let frozen = freeze(subject.pid()).unwrap();
    assert_eq!(frozen.processes.len(), 3);
    assert_eq!(frozen.processes[0].pid, subject.pid());
    assert!(tree.iter().all(|p| state(*p) == 't'), "not all stopped");
    frozen.release().unwrap();
    std::thread::sleep(Duration::from_millis(20));
    assert_eq!(state(subject.pid()), 'R');
    assert!(tree.iter().all(|p| proc::status(*p).unwrap().tracer == 0));
}

#[test]
fn without_a_cgroup() {
    stops_and_goes_on(None);
}

#[test]
fn with_a_v1_freezer() {
    stops_and_goes_on(Some(V1));
}

#[test]
fn with_a_v2_group() {
    stops_and_goes_on(Some(V2));
}

fn a_paused_group_stays_paused(root: &str, v2: bool) {
    let subject = Subject::start("while :; do :; done # paused", Some(root));
    let freezer = Freezer::at(subject.group.as_ref().unwrap(), v2);
    freezer.freeze(Duration::from_secs(5)).unwrap();
    let before = fs::read_to_string(format!("/proc/{}/stat", subject.pid())).unwrap();
    let ticks = |s: &str| s.split(' ').nth(13).unwrap().to_string();
    freeze(subject.pid()).unwrap().release().unwrap();
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end && !freezer.is_settled().unwrap() {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert!(freezer.is_settled().unwrap(), "it was not paused again");
    let after = fs::read_to_string(format!("/proc/{}/stat", subject.pid())).unwrap();
    assert_eq!(ticks(&before), ticks(&after), "it ran while it was paused");
    freezer.thaw().unwrap();
}

#[test]
fn a_paused_v1_group() {
    a_paused_group_stays_paused(V1, false);
}

#[test]
fn a_paused_v2_group() {
    a_paused_group_stays_paused(V2, true);
}

#[test]
fn a_process_stopped_by_a_signal_stays_stopped() {
    for hierarchy in [None, Some(V1), Some(V2)] {
        let subject = Subject::start("sleep 1000 & kill -STOP $!; wait # stopped", hierarchy);
        let stopped = subject.tree()[1];
        assert_eq!(state(stopped), 'T');
        let frozen = freeze(subject.pid()).unwrap();
        assert!(frozen.is_stopped(stopped) && !frozen.is_stopped(subject.pid()));
        frozen.release().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(state(stopped), 'T', "{hierarchy:?}");
    }
}

#[test]
fn a_stopped_process_in_a_paused_group() {
    for (root, v2) in [(V1, false), (V2, true)] {
        let subject = Subject::start("sleep 1000 & kill -STOP $!; wait # stopped, paused", Some(root));
        let stopped = subject.tree()[1];
        let freezer = Freezer::at(subject.group.as_ref().unwrap(), v2);
        freezer.freeze(Duration::from_secs(5)).unwrap();
        let frozen = freeze(subject.pid()).unwrap();
        assert!(frozen.is_stopped(stopped));
        frozen.release().unwrap();
        freezer.thaw().unwrap();
        std::thread::sleep(Duration::from_millis(20));
        assert_eq!(state(stopped), 'T');
    }
}

#[test]
fn a_program_that_makes_children_all_the_time() {
    for hierarchy in [None, Some(V1), Some(V2)] {
        let script = "for i in 1 2 3 4; do (while :; do (:); done) & done; while :; do (:) & wait $!; done # storm";
        let subject = Subject::start(script, hierarchy);
        for _ in 0..20 {
            let frozen = freeze(subject.pid()).unwrap();
            let before = subject.tree();
            std::thread::sleep(Duration::from_millis(2));
            assert_eq!(subject.tree(), before, "it still makes children ({hierarchy:?})");
            frozen.release().unwrap();
        }
    }
}

#[test]
fn a_traced_process_is_refused_by_name() {
    let subject = Subject::start("sleep 1000; : # traced", None);
    let target = subject.tree()[1];
    let tracer = fork::fork(|| {
        torpor_sys::ptrace::seize(target, torpor_sys::ptrace::Options::NONE).unwrap();
        loop {
            std::thread::sleep(Duration::from_secs(1));
        }
    })
    .unwrap();
    std::thread::sleep(Duration::from_millis(50));
    let error = freeze(subject.pid()).unwrap_err();
    assert_eq!(error.code(), "unsupported");
    assert!(
        error.to_string().contains(&format!("traced by process {tracer}")),
        "{error}"
    );
    fork::kill(tracer, 9).unwrap();
    fork::wait_child(tracer).unwrap();
    // It was let go a moment ago and has to fall asleep again.
    let end = std::time::Instant::now() + Duration::from_secs(10);
    while state(subject.pid()) == 'R' && std::time::Instant::now() < end {
        std::thread::sleep(Duration::from_millis(1));
    }
    assert_eq!(state(subject.pid()), 'S');
}
