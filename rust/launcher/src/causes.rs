//! Why a process that libcontainer forked has failed.
//!
//! libcontainer hands errors of its children to the parent as text without their causes ("failed to prepare rootfs");
//! the cause is only in its log events. So events of level error are written to a pipe, as are the errors of our own
//! executor, and the parent reads the first.

use std::fmt;
use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::sync::Arc;

use libcontainer::error::LibcontainerError;
use nix::errno::Errno;
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use serde::{Deserialize, Serialize};
use tracing::field::{Field, Visit};
use tracing::span;
use tracing::{Event, Level, Metadata, Subscriber};

use crate::error::{Error, one_line};

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
    pub fn explain(mut self, error: &LibcontainerError) -> Error {
        use LibcontainerError::{InvalidSpec, MissingSpec, Spec, UserNamespace};
        if let InvalidSpec(_) | MissingSpec(_) | Spec(_) | UserNamespace(_) = error {
            return Error::BadSpec(one_line(error));
        }
        let causes = read(&mut self.0);
        match causes.iter().find(|cause| cause.ours) {
            Some(cause) => Error::BadSpec(cause.message.clone()),
            None => Error::Container(theirs(&causes).unwrap_or_else(|| one_line(error))),
        }
    }
}

/// The error our executor has written to `file`, if any; waits for the writers to go, unless `file` is non-blocking.
pub fn ours(file: &mut File) -> Option<Error> {
    let mut causes = read(file).into_iter();
    let cause = causes.find(|cause| cause.ours)?;
    Some(Error::BadSpec(cause.message))
}

fn read(file: &mut File) -> Vec<Cause> {
    let mut text = Vec::new();
    // An error is a pipe that is empty but still open; what was read before it counts.
    let _ = file.read_to_end(&mut text);
    let lines = text.split(|byte| *byte == b'\n');
    lines.filter_map(|line| serde_json::from_slice(line).ok()).collect()
}

/// The innermost event says best what failed, but some leave out why; an outer one has it then.
fn theirs(causes: &[Cause]) -> Option<String> {
    let first = causes.first()?;
    let mount = causes.iter().find_map(|cause| mount(&cause.message));
    let what = mount.unwrap_or_else(|| first.message.clone());
    let what = what.split(" (os error").next().unwrap_or(&what);
    let Some(errno) = causes.iter().find_map(|cause| errno_in(&cause.message)) else {
        return Some(what.to_owned());
    };
    let why = lower(errno.desc());
    if what.to_lowercase().contains(&why) {
        return Some(what.to_owned());
    }
    Some(format!("{what}: {why}"))
}

/// `failed to mount Mount { destination: "/x", .. source: Some("/y"), .. }: syscall` as a person would say it.
fn mount(message: &str) -> Option<String> {
    let (_, mount) = message.split_once("failed to mount Mount {")?;
    let quoted = |label: &str| Some(mount.split_once(label)?.1.split_once('"')?.0);
    let destination = quoted("destination: \"")?;
    match quoted("source: Some(\"") {
        Some(source) => Some(format!("mount {source} to {destination}")),
        None => Some(format!("mount {destination}")),
    }
}

/// The errno in a text: its name, as in `Nix(ENOENT)`, or its description.
fn errno_in(text: &str) -> Option<Errno> {
    let is_name = |c: char| c.is_ascii_uppercase() || c.is_ascii_digit();
    let names = text
        .split(|c| !is_name(c))
        .filter(|word| word.len() > 2 && word.starts_with('E'));
    let mut all = (1..=133)
        .map(Errno::from_raw)
        .filter(|errno| *errno != Errno::UnknownErrno);
    let named = names.into_iter().find_map(errno_named);
    let text = text.to_lowercase();
    named.or_else(|| all.find(|errno| text.contains(&errno.desc().to_lowercase())))
}

/// Whether reading `file` waits for its writers.
pub fn blocking(file: &File, wait: bool) -> Result<(), Error> {
    let flags = if wait { OFlag::empty() } else { OFlag::O_NONBLOCK };
    fcntl(file.as_raw_fd(), FcntlArg::F_SETFL(flags))
        .map(|_| ())
        .map_err(Error::call("set a pipe's mode"))
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
            "err" | "error" | "e" | "ret" => self.cause = plain(value),
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

/// Errors are logged in their debug form, which says less to people than the errno in it.
fn plain(debug: String) -> String {
    match errno_in(&debug) {
        Some(errno) => lower(errno.desc()),
        None => debug,
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
    use super::{Cause, theirs};

    fn event(message: &str) -> Cause {
        Cause {
            ours: false,
            message: message.to_owned(),
        }
    }

    #[test]
    fn the_reason_comes_from_whichever_event_has_it() {
        let events = [
            event(
                "failed to mount Mount { destination: \"/x\", typ: None, source: Some(\"tmpfs\"), options: None }: syscall",
            ),
            event("failed to prepare rootfs: invalid argument"),
        ];
        assert_eq!(theirs(&events).as_deref(), Some("mount tmpfs to /x: invalid argument"));
        let events = [event(
            "failed to canonicalize \"/nonexist\": No such file or directory (os error 2)",
        )];
        assert_eq!(
            theirs(&events).as_deref(),
            Some("failed to canonicalize \"/nonexist\": No such file or directory")
        );
    }
}
