//! `filter`: the seccomp filter of a container's spec, as the kernel holds it. A restored thread must have it.
//!
//! libseccomp does not show what it compiles through libcontainer, so a child loads it, under our eyes, and is gone.

use std::time::Duration;

use libcontainer::oci_spec::runtime::LinuxSeccomp;
use libcontainer::seccomp;
use serde_json::{Value, json};
use torpor_sys::ptrace::{self, Options, SeccompFilter};
use torpor_sys::wait::{self, Event};
use torpor_sys::{Pid, fork, proc};

use crate::error::{Error, one_line};
use crate::flags::Flags;
use crate::record::Record;
use crate::report::Report;
use crate::spec::own_filter;

/// Far more than compiling the largest filter takes.
const LIMIT: Duration = Duration::from_secs(10);

pub fn run(flags: &Flags, report: &mut Report) -> Result<i32, Error> {
    let record = Record::load(&flags.layout()?)?;
    let filter = match own_filter(&record.spec) {
        Some(filter) => as_json(&loaded(&filter)?),
        None => Value::Null,
    };
    report
        .success(json!({"filter": filter}))
        .map_err(Error::call("report"))?;
    Ok(0)
}

fn as_json(filter: &SeccompFilter) -> Value {
    let word = |c: &[u8]| c.iter().rev().fold(0u64, |word, byte| word << 8 | u64::from(*byte));
    let program: Vec<u64> = filter.program.chunks_exact(8).map(word).collect();
    json!({"program": program, "flags": filter.flags})
}

fn failed(error: &torpor_sys::Error) -> Error {
    Error::Container(format!("compile the seccomp filter: {error}"))
}

/// What a thread has that has loaded `filter`.
fn loaded(filter: &LinuxSeccomp) -> Result<SeccompFilter, Error> {
    wait::block_sigchld();
    let (ours, theirs) = fork::socket_pair().map_err(|e| failed(&e))?;
    let child = fork::fork(|| {
        if fork::read_byte(&theirs).is_none() {
            return 1;
        }
        match seccomp::initialize_seccomp(filter) {
            Ok(_) => 0,
            Err(error) => {
                // Our report's reader sees the status; a debugging user the cause.
                eprintln!("torpor-launcher: load the seccomp filter: {}", one_line(&error));
                2
            }
        }
    })
    .map_err(|e| failed(&e))?;
    let found = ptrace::seize(child, Options::EXIT_KILL)
        .and_then(|()| ptrace::interrupt(child))
        .and_then(|()| fork::write_byte(&ours))
        .and_then(|()| watch(child));
    let _ = fork::kill(child, libc::SIGKILL);
    wait::all_gone(&[child], LIMIT);
    found
        .map_err(|e| failed(&e))?
        .ok_or_else(|| Error::Container("the seccomp filter of the spec cannot be loaded".to_owned()))
}

/// Runs the child from call to call until it has a filter: the next call may already be forbidden to it.
fn watch(child: Pid) -> torpor_sys::Result<Option<SeccompFilter>> {
    loop {
        match wait::until(child, LIMIT)? {
            Event::Stopped { .. } => {}
            Event::Exited(_) | Event::Killed(_) => return Ok(None),
            Event::Continued => continue,
        }
        // The kernel refuses to look for filters in a task that has none.
        if proc::status(child)?.seccomp != 0 {
            return ptrace::seccomp_filter(child, 0);
        }
        ptrace::cont_to_syscall(child, 0)?;
    }
}
