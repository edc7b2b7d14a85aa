//! `exec`: one more process in a running container.

use crate::error::Error;
use crate::flags::Flags;
use crate::report::Report;

pub fn run(_: &Flags, _: &mut Report) -> Result<i32, Error> {
    Err(Error::Usage("exec is not there yet".to_owned()))
}
