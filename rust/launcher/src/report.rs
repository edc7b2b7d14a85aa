//! The one line of JSON that tells the caller how the verb ended.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::{AsRawFd, RawFd};

use serde_json::{Value, json};

use torpor_sys::start::adopt;

use crate::error::Error;

#[derive(Debug, Default)]
pub struct Report {
    pipe: Option<File>,
}

/// The pipe that the caller left open for us.
fn private(fd: RawFd) -> Result<File, Error> {
    if fd <= libc::STDERR_FILENO {
        return Err(Error::Usage(format!("descriptor {fd} is the container's own")));
    }
    adopt(fd)
        .map(File::from)
        .map_err(|_| Error::Usage(format!("descriptor {fd} is not open")))
}

impl Report {
    pub fn to(fd: Option<RawFd>) -> Result<Self, Error> {
        let pipe = fd.map(private).transpose()?;
        Ok(Self { pipe })
    }

    /// For those who must close it in a process that lives on.
    pub fn raw_fd(&self) -> Option<RawFd> {
        self.pipe.as_ref().map(AsRawFd::as_raw_fd)
    }

    /// Sends success with `fields` added, and closes the pipe. Fails when nobody reads any more.
    pub fn success(&mut self, mut fields: Value) -> io::Result<()> {
        if let Some(object) = fields.as_object_mut() {
            object.insert("ok".to_owned(), Value::Bool(true));
        }
        self.send(&fields)
    }

    pub fn failure(&mut self, error: &Error) {
        let line = json!({
            "ok": false,
            "error": {"code": error.code(), "message": error.to_string()},
        });
        // The exit code still tells it to a caller that stopped reading.
        let _ = self.send(&line);
    }

    fn send(&mut self, value: &Value) -> io::Result<()> {
        match self.pipe.take() {
            Some(mut pipe) => pipe.write_all(format!("{value}\n").as_bytes()),
            None => Ok(()),
        }
    }
}
