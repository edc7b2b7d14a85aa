//! torpor-launcher: builds containers with libcontainer. Private to torpor, which executes it from a sealed memfd.
//! The contract is docs/internals.md §2.

mod causes;
mod cgroup;
mod cgroup_mounts;
mod copy_up;
mod error;
mod flags;
mod layout;
mod limits;
mod privilege;
mod program;
mod record;
mod report;
mod spec;
mod supervise;
mod verbs;
mod workload;

use std::process::ExitCode;

use error::Error;
use flags::Flags;
use report::Report;

fn main() -> ExitCode {
    let flags = match Flags::parse(std::env::args_os().skip(1)) {
        Ok(flags) => flags,
        Err(error) => return fail(&error, &mut Report::default(), true),
    };
    let fd = flags.number("report-fd");
    let (mut report, opened) = match fd.and_then(Report::to) {
        Ok(report) => (report, Ok(())),
        Err(error) => (Report::default(), Err(error)),
    };
    match opened.and_then(|()| dispatch(&flags, &mut report)) {
        Ok(code) => ExitCode::from(code as u8),
        Err(error) => fail(&error, &mut report, flags.has("debug") || !flags.has("report-fd")),
    }
}

fn dispatch(flags: &Flags, report: &mut Report) -> Result<i32, Error> {
    match flags.verb.as_str() {
        "create" => verbs::create::run(flags, report),
        "start" => verbs::start::run(flags, report),
        "started" => verbs::started::run(flags, report),
        "exec" => verbs::exec::run(flags, report),
        "delete" => verbs::delete::run(flags, report),
        "hook" => verbs::hook::run(flags),
        "filter" => verbs::filter::run(flags, report),
        "features" => Ok(verbs::features::run()),
        verb => Err(Error::Usage(format!("{verb:?} is not a verb"))),
    }
}

fn fail(error: &Error, report: &mut Report, say: bool) -> ExitCode {
    report.failure(error);
    if say {
        eprintln!("torpor-launcher: {error}");
    }
    ExitCode::FAILURE
}
