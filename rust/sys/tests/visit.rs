//! Visits to living programs: they must not notice, also when the tracer is killed in the middle.
//!
//! Needs ptrace rights. Each test ends the programs that it starts.
#![allow(clippy::unwrap_used, clippy::expect_used)]

use std::io::{BufRead, BufReader, Write};
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::time::Duration;

use torpor_sys::mem::Memory;
use torpor_sys::ptrace::{self, Options};
use torpor_sys::remote::visit::Host;
use torpor_sys::remote::{Batch, Door};
use torpor_sys::wait::{self, Event};
use torpor_sys::{Pid, fork, proc};

/// An odd size, so that a table that was left is told from anything else.
const TABLE: u64 = 61 * 4096;

/// A shell that answers each line with the same line: proof that it still works.
struct Echo {
    child: Child,
    input: ChildStdin,
    output: BufReader<ChildStdout>,
}

impl Echo {
    fn start(traps: &str) -> Echo {
        let script = format!("{traps} while read -r line; do echo \"$line\"; done");
        let mut child = Command::new("/bin/sh")
            .args(["-c", &script])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let input = child.stdin.take().unwrap();
        let output = BufReader::new(child.stdout.take().unwrap());
        let mut echo = Echo { child, input, output };
        echo.check("started");
        echo
    }

    fn pid(&self) -> Pid {
        self.child.id() as Pid
    }

    fn check(&mut self, text: &str) {
        writeln!(self.input, "{text}").unwrap();
        let mut line = String::new();
        self.output.read_line(&mut line).unwrap();
        assert_eq!(line.trim(), text);
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn stop(pid: Pid) {
    wait::block_sigchld();
    ptrace::seize(pid, Options::NONE).unwrap();
    ptrace::interrupt(pid).unwrap();
    let event = wait::until(pid, Duration::from_secs(5)).unwrap();
    assert!(
        matches!(
            event,
            Event::Stopped {
                event: ptrace::EVENT_STOP,
                ..
            }
        ),
        "{event:?}"
    );
}

fn visit(pid: Pid) {
    let status = proc::status(pid).unwrap();
    let busy = status.sig_caught | status.sig_blocked | status.sig_pending | status.shared_pending;
    let memory = Memory::open(pid).unwrap();
    let vmas = proc::maps(pid).unwrap();
    let host = Host {
        pid,
        inner_pid: pid,
        busy_signals: busy,
        instructions: vec![ptrace::regs(pid).unwrap().rip],
    };
    let door = Door::find(host, &memory, &vmas, TABLE).unwrap();
    let mut visit = door.enter(pid, pid).unwrap();
    let mut batch = Batch::new();
    let room = batch.room(8);
    let own = batch.must("getpid", libc::SYS_getpid, []);
    let bad = batch.may("close", libc::SYS_close, [(-1).into()]);
    let twice = batch.must("getpgid", libc::SYS_getpgid, [torpor_sys::remote::Arg::Result(own)]);
    batch.must(
        "PR_GET_PDEATHSIG",
        libc::SYS_prctl,
        [libc::PR_GET_PDEATHSIG.into(), room.into()],
    );
    let results = visit.run(&batch).unwrap();
    assert_eq!(results.raw(own), i64::from(pid));
    assert_eq!(results.raw(bad), -i64::from(libc::EBADF));
    assert!(results.get(bad, "close").is_err());
    assert!(results.raw(twice) > 0);
    assert_eq!(results.i32(room), 0);
    let mut batch = Batch::new();
    let made = batch.must("eventfd2", libc::SYS_eventfd2, [0.into(), 0.into()]);
    let halt = visit.halt(&mut batch);
    batch.must("close", libc::SYS_close, [torpor_sys::remote::Arg::Result(made)]);
    let look = |number: i64| proc::link(&format!("/proc/{pid}/fd/{number}"));
    let (results, seen) = visit.run_around(&batch, made, halt, look).unwrap();
    assert_eq!(seen.unwrap().unwrap(), "anon_inode:[eventfd]");
    look(results.raw(made)).expect_err("a descriptor was left");
    visit.leave().unwrap();
    door.close().unwrap();
    assert_eq!(proc::maps(pid).unwrap(), vmas, "a mapping was left");
}

#[test]
fn a_visited_program_works_on() {
    let mut echo = Echo::start("");
    for round in 0..20 {
        stop(echo.pid());
        let before = ptrace::regs(echo.pid()).unwrap();
        visit(echo.pid());
        assert_eq!(ptrace::regs(echo.pid()).unwrap(), before);
        ptrace::detach(echo.pid(), 0).unwrap();
        echo.check(&format!("round {round}"));
    }
}

#[test]
fn a_program_that_uses_every_marker_signal_is_stepped() {
    let mut echo = Echo::start("trap : URG WINCH CHLD;");
    let caught = proc::status(echo.pid()).unwrap().sig_caught;
    for signal in [libc::SIGURG, libc::SIGWINCH, libc::SIGCHLD] {
        assert!(caught >> (signal - 1) & 1 == 1, "the shell does not catch {signal}");
    }
    for round in 0..5 {
        stop(echo.pid());
        visit(echo.pid());
        ptrace::detach(echo.pid(), 0).unwrap();
        echo.check(&format!("round {round}"));
    }
}

#[test]
fn a_batch_that_must_succeed_stops_at_the_first_failure() {
    let mut echo = Echo::start("");
    stop(echo.pid());
    let pid = echo.pid();
    let memory = Memory::open(pid).unwrap();
    let vmas = proc::maps(pid).unwrap();
    let host = Host {
        pid,
        inner_pid: pid,
        busy_signals: 0,
        instructions: Vec::new(),
    };
    let door = Door::find(host, &memory, &vmas, TABLE).unwrap();
    let mut visit = door.enter(pid, pid).unwrap();
    let mut batch = Batch::new();
    batch.must("getpid", libc::SYS_getpid, []);
    batch.must("closing nothing", libc::SYS_close, [(-1).into()]);
    batch.must("umask", libc::SYS_umask, [0.into()]);
    let umask = proc::status(pid).unwrap().umask;
    let error = visit.run(&batch).unwrap_err();
    assert!(error.to_string().contains("closing nothing"), "{error}");
    assert_eq!(proc::status(pid).unwrap().umask, umask, "the batch went on");
    visit.leave().unwrap();
    ptrace::detach(pid, 0).unwrap();
    echo.check("still there");
}

/// The tracer dies at whatever instant a few microseconds of delay lead to: the program goes home by itself.
#[test]
fn a_program_whose_tracer_is_killed_works_on() {
    let mut echo = Echo::start("");
    let fds = proc::fds(echo.pid()).unwrap();
    for round in 0u32..200 {
        let pid = echo.pid();
        let tracer = fork::fork(|| {
            stop(pid);
            loop {
                visit(pid);
            }
        })
        .unwrap();
        std::thread::sleep(Duration::from_micros(300 + u64::from(round) * 37 % 4000));
        fork::kill(tracer, 9).unwrap();
        fork::wait_child(tracer).unwrap();
        echo.check(&format!("round {round}"));
    }
    // What was left of the code is used again.
    stop(echo.pid());
    visit(echo.pid());
    ptrace::detach(echo.pid(), 0).unwrap();
    echo.check("visited again");
    // A table that was in place when the tracer died was unmapped on the way home.
    assert_eq!(proc::status(echo.pid()).unwrap().sig_blocked, 0);
    let maps = proc::maps(echo.pid()).unwrap();
    let count = maps
        .iter()
        .filter(|v| v.len() % TABLE == 0 && v.name.is_empty())
        .count();
    assert_eq!(count, 0, "tables were left");
    assert_eq!(proc::fds(echo.pid()).unwrap(), fds, "descriptors were left");
}
