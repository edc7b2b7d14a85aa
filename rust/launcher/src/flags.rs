//! The command line: `torpor-launcher VERB --flag value ...`. Private to torpor, so it is strict and has no help.

use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::PathBuf;
use std::str::FromStr;

use lexopt::prelude::*;

use crate::error::Error;
use crate::layout::Layout;

/// Flags that take no value.
const SWITCHES: &[&str] = &["debug", "supervise", "systemd-cgroup", "no-pivot", "no-new-keyring"];

#[derive(Debug)]
pub struct Flags {
    pub verb: String,
    values: BTreeMap<String, OsString>,
    /// What follows `--`.
    pub rest: Vec<OsString>,
}

impl Flags {
    pub fn parse(arguments: impl IntoIterator<Item = OsString>) -> Result<Self, Error> {
        let mut parser = lexopt::Parser::from_args(arguments);
        let mut flags = Self {
            verb: String::new(),
            values: BTreeMap::new(),
            rest: Vec::new(),
        };
        while let Some(argument) = parser.next().map_err(usage)? {
            match argument {
                Long(name) => {
                    let name = name.to_owned();
                    let value = match SWITCHES.contains(&name.as_str()) {
                        true => OsString::new(),
                        false => parser.value().map_err(usage)?,
                    };
                    flags.values.insert(name, value);
                }
                Value(verb) if flags.verb.is_empty() => flags.verb = verb.string().map_err(usage)?,
                Value(word) => flags.rest.push(word),
                Short(_) => return Err(usage(argument.unexpected())),
            }
        }
        Ok(flags)
    }

    pub fn has(&self, name: &str) -> bool {
        self.values.contains_key(name)
    }

    pub fn path(&self, name: &str) -> Option<PathBuf> {
        self.values.get(name).map(PathBuf::from)
    }

    pub fn needed_path(&self, name: &str) -> Result<PathBuf, Error> {
        self.path(name)
            .ok_or_else(|| Error::Usage(format!("{} needs --{name}", self.verb)))
    }

    pub fn text(&self, name: &str) -> Result<Option<String>, Error> {
        self.values
            .get(name)
            .map(|value| value.clone().string().map_err(usage))
            .transpose()
    }

    pub fn number<T: FromStr>(&self, name: &str) -> Result<Option<T>, Error> {
        self.text(name)?
            .map(|text| {
                text.parse()
                    .map_err(|_| Error::Usage(format!("--{name} {text:?} is not a number")))
            })
            .transpose()
    }

    pub fn layout(&self) -> Result<Layout, Error> {
        let id = self
            .text("id")?
            .ok_or_else(|| Error::Usage(format!("{} needs --id", self.verb)))?;
        Layout::new(&self.needed_path("root")?, &id)
    }
}

fn usage(error: lexopt::Error) -> Error {
    Error::Usage(error.to_string())
}
