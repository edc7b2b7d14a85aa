//! Why a process that libcontainer forked has failed.
//!
//! libcontainer hands errors of its children to the parent as text without their causes ("failed to prepare rootfs");
//! the cause is only in its log events. So events of level error are written to a pipe, as are the errors of our own
//! executor, and the parent reads the first.

use std::fmt;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::error::Error;

/// One write of at most this many bytes to a pipe is never mixed with another's.
const ATOMIC: usize = libc::PIPE_BUF;

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Cause {
    /// Said by our executor, in words meant for the user; else by libcontainer's log.
    ours: bool,
    message: String,
}

impl Cause {
    pub fn ours(message: impl Into<String>) -> Self {
        Self {
            ours: true,
            message: message.into(),
        }
    }
}

/// The end that failing processes write to.
#[derive(Debug, Clone)]
pub struct Sink(Arc<OwnedFd>);

impl Sink {
    pub fn new(fd: OwnedFd) -> Self {
        Self(Arc::new(fd))
    }

    pub fn tell(&self, mut cause: Cause) {
        let mut limit = cause.message.len().min(ATOMIC / 4);
        while !cause.message.is_char_boundary(limit) {
            limit -= 1;
        }
        cause.message.truncate(limit);
        if let (Ok(mut line), Ok(fd)) = (serde_json::to_vec(&cause), self.0.try_clone()) {
            line.push(b'\n');
            // Nobody to tell is no reason to fail differently.
            let _ = File::from(fd).write_all(&line);
        }
    }
}

/// The end that the launcher reads.
#[derive(Debug)]
pub struct Causes(File);

impl Causes {
    /// Opens the pipe and listens to libcontainer's log from now on, in this process and those it forks.
    pub fn listen(debug: bool) -> Result<(Self, Sink), Error> {
        let (read, write) =
            nix::unistd::pipe2(OFlag::O_CLOEXEC | OFlag::O_NONBLOCK).map_err(Error::call("open a pipe"))?;
        let sink = Sink::new(write);
        let listener = Listener {
            sink: sink.clone(),
            debug,
        };
        tracing::subscriber::set_global_default(listener).map_err(|error| Error::Container(error.to_string()))?;
        Ok((Self(File::from(read)), sink))
    }

    pub fn raw_fd(&self) -> RawFd {
        self.0.as_raw_fd()
    }

    /// The error to report for `error`, which libcontainer returned.
    pub fn explain(mut self, error: &dyn std::error::Error) -> Error {
        match first(&mut self.0) {
            Some(cause) if cause.ours => Error::BadSpec(cause.message),
            Some(cause) => Error::Container(cause.message),
            None => Error::Container(crate::error::one_line(error)),
        }
    }
}

/// The error written to `file`, if any; blocks until the writers are gone unless `file` is non-blocking.
pub fn first(file: &mut File) -> Option<Cause> {
    let mut text = Vec::new();
    match file.read_to_end(&mut text) {
        Ok(_) => {}
        Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
        Err(_) => return None,
    }
    let causes: Vec<Cause> = text
        .split(|byte| *byte == b'\n')
        .filter_map(|line| serde_json::from_slice(line).ok())
        .collect();
    let ours = causes.iter().find(|cause| cause.ours);
    ours.or(causes.first()).cloned()
}

/// As `first`, for a file whose writers may live on: waits for none of them.
pub fn blocking(file: &File, wait: bool) -> Result<(), Error> {
    let flags = if wait { OFlag::empty() } else { OFlag::O_NONBLOCK };
    fcntl(file.as_raw_fd(), FcntlArg::F_SETFL(flags))
        .map(|_| ())
        .map_err(Error::call("set a pipe's mode"))
}

impl Cause {
    pub fn into_error(self) -> Error {
        if self.ours {
            Error::BadSpec(self.message)
        } else {
            Error::Container(self.message)
        }
    }
}

/// Sends error events of `tracing` to the sink, and all to stderr when debugging.
struct Listener {
    sink: Sink,
    debug: bool,
}

impl Subscriber for Listener {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        metadata.is_event() && (self.debug || *metadata.level() == Level::ERROR)
    }

    fn event(&self, event: &Event<'_>) {
        let mut text = Text::default();
        event.record(&mut text);
        if self.debug {
            eprintln!("torpor-launcher: {} {text}", event.metadata().level());
        }
        if *event.metadata().level() == Level::ERROR {
            self.sink.tell(Cause {
                ours: false,
                message: text.to_string(),
            });
        }
    }

    fn new_span(&self, _: &span::Attributes<'_>) -> span::Id {
        span::Id::from_u64(1)
    }

    fn record(&self, _: &span::Id, _: &span::Record<'_>) {}

    fn record_follows_from(&self, _: &span::Id, _: &span::Id) {}

    fn enter(&self, _: &span::Id) {}

    fn exit(&self, _: &span::Id) {}
}

/// An event as "what (key=value): cause".
#[derive(Default)]
struct Text {
    message: String,
    cause: String,
    others: Vec<String>,
}

impl Visit for Text {
    fn record_debug(&mut self, field: &Field, value: &dyn fmt::Debug) {
        let value = format!("{value:?}");
        match field.name() {
            "message" => self.message = value,
            "err" | "error" | "e" | "ret" => self.cause = plain(&value),
            name => self.others.push(format!("{name}={value}")),
        }
    }
}

impl fmt::Display for Text {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        if !self.others.is_empty() {
            write!(f, " ({})", self.others.join(", "))?;
        }
        if !self.cause.is_empty() {
            write!(f, ": {}", self.cause)?;
        }
        Ok(())
    }
}

/// The reason in the debug form of an error, which is all that libcontainer logs: `Nix(ENOENT)`, or
/// `Os { code: 2, message: "No such file or directory" }`.
fn plain(debug: &str) -> String {
    if let Some((_, rest)) = debug.split_once("message: \"")
        && let Some((message, _)) = rest.split_once('"')
    {
        return lower(message);
    }
    let is_name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit();
    let known = debug
        .split(|c| !is_name(c))
        .filter(|word| word.len() > 2 && word.starts_with('E'))
        .find_map(errno_named);
    match known {
        Some(errno) => lower(errno.desc()),
        None => debug.trim_matches('"').to_owned(),
    }
}

fn errno_named(name: &str) -> Option<Errno> {
    (1..=133)
        .map(Errno::from_raw)
        .find(|errno| format!("{errno:?}") == name)
}

pub fn lower(text: &str) -> String {
    let mut chars = text.chars();
    match chars.next() {
        Some(first) => first.to_lowercase().chain(chars).collect(),
        None => String::new(),
    }
}

#[cfg(test)]
mod tests {
    use super::plain;

    #[test]
    fn reasons_are_found_in_debug_text() {
        assert_eq!(plain("Syscall(Nix(ENOENT))"), "no such file or directory");
        assert_eq!(
            plain(r#"Io(Os { code: 13, kind: PermissionDenied, message: "Permission denied" })"#),
            "permission denied"
        );
        assert_eq!(plain("Custom(\"odd\")"), "Custom(\"odd\")");
    }
}
