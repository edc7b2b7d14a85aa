//! `started`: a restore has filled init with a running program; nothing is released, but from now on the container runs.

use serde_json::json;

use crate::error::Error;
use crate::flags::Flags;
use crate::record::Record;
use crate::report::Report;
use crate::verbs::start::{created, mark_running, poststart};

pub fn run(flags: &Flags, report: &mut Report) -> Result<i32, Error> {
    let layout = flags.layout()?;
    let record = Record::load(&layout)?;
    let mut container = created(&layout)?;
    mark_running(&mut container)?;
    let warnings = poststart(&layout, &record, &container);
    let mut fields = json!({});
    if !warnings.is_empty() {
        fields["warnings"] = json!(warnings);
    }
    report.success(fields).map_err(Error::call("report"))?;
    Ok(0)
}
