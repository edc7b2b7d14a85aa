//! The one error type, and the stable code each error is reported under.

use std::error::Error as StdError;
use std::io;
use std::path::{Path, PathBuf};

#[derive(Debug, thiserror::Error)]
pub enum Error {
    #[error("{0}")]
    Usage(String),
    #[error("container {0:?} already exists")]
    Exists(String),
    #[error("cgroup {path:?} is in use by {processes} process(es): give the container a cgroupsPath of its own")]
    CgroupInUse { path: PathBuf, processes: usize },
    #[error("container {0:?} does not exist")]
    NotFound(String),
    #[error("{0}")]
    BadState(String),
    #[error("{0}")]
    BadSpec(String),
    #[error("{what}: {reason}")]
    Io { what: String, reason: String },
    #[error("{0}")]
    Container(String),
}

impl Error {
    /// The slug that Python chooses its exception class by.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Usage(_) => "usage",
            Self::Exists(_) | Self::CgroupInUse { .. } => "exists",
            Self::NotFound(_) => "not-found",
            Self::BadState(_) => "bad-state",
            Self::BadSpec(_) => "bad-spec",
            Self::Io { .. } | Self::Container(_) => "launcher",
        }
    }

    /// For `map_err`: names the file that an I/O error is about.
    pub fn io(action: &str, path: &Path) -> impl FnOnce(io::Error) -> Self {
        let what = format!("{action} {}", path.display());
        move |error| Self::Io {
            what,
            reason: reason(&error),
        }
    }

    /// For `map_err` of calls that are not about a file.
    pub fn call<E: Into<io::Error>>(what: &str) -> impl FnOnce(E) -> Self {
        let what = what.to_owned();
        move |error| Self::Io {
            what,
            reason: reason(&error.into()),
        }
    }
}

/// The text of an I/O error as C programs print it: no code number, small first letter.
pub fn reason(error: &io::Error) -> String {
    let text = error.to_string();
    let text = text.split(" (os error").next().unwrap_or(&text);
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}

/// An error and its causes as one line, each part said once.
pub fn one_line(error: &dyn StdError) -> String {
    let mut line = error.to_string();
    let mut next = error.source();
    while let Some(cause) = next {
        let text = cause.to_string();
        if !line.contains(&text) {
            line.push_str(": ");
            line.push_str(&text);
        }
        next = cause.source();
    }
    line.replace('\n', " ")
}
