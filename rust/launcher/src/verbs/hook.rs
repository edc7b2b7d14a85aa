//! `hook`: stands before a hook that libcontainer runs while it creates the container, and tells it the user's bundle
//! instead of the effective one. Not for callers: `spec::effective` writes it into the effective spec.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{Read, Seek, Write, stdin};
use std::os::fd::AsRawFd;
use std::os::unix::ffi::OsStringExt;
use std::path::Path;

use libcontainer::oci_spec::runtime::{Hook, HookBuilder};
use nix::sys::memfd::{MemFdCreateFlag, memfd_create};
use nix::unistd::{dup2, execv};
use serde_json::Value;
use torpor_sys::start::reset_signals;

use crate::error::Error;
use crate::flags::Flags;

/// This program as a process it forked finds it, whatever file it came from.
const OURSELVES: &str = "/proc/self/exe";

/// The hook that runs `hook` with `bundle` in its state.
pub fn wrap(hook: &Hook, bundle: &Path) -> Option<Hook> {
    let path = hook.path().display().to_string();
    let mut arguments = vec![
        "torpor-hook".to_owned(),
        "hook".to_owned(),
        "--bundle".to_owned(),
        bundle.display().to_string(),
        "--".to_owned(),
        path.clone(),
    ];
    match hook.args() {
        Some(given) if !given.is_empty() => arguments.extend(given.iter().cloned()),
        _ => arguments.push(path),
    }
    let mut wrapped = HookBuilder::default().path(OURSELVES).args(arguments);
    if let Some(env) = hook.env() {
        wrapped = wrapped.env(env.clone());
    }
    if let Some(timeout) = hook.timeout() {
        wrapped = wrapped.timeout(timeout);
    }
    wrapped.build().ok()
}

pub fn run(flags: &Flags) -> Result<i32, Error> {
    let bundle = flags.needed_path("bundle")?;
    let mut state = Vec::new();
    stdin().read_to_end(&mut state).map_err(Error::call("read the state"))?;
    if let Ok(Value::Object(mut fields)) = serde_json::from_slice(&state) {
        fields.insert("bundle".to_owned(), bundle.display().to_string().into());
        state = Value::Object(fields).to_string().into_bytes();
    }
    // A file, because a pipe may be too small for it and nobody would read.
    let memory = memfd_create(c"state", MemFdCreateFlag::MFD_CLOEXEC);
    let mut input = File::from(memory.map_err(Error::call("pass the state on"))?);
    input
        .write_all(&state)
        .and_then(|()| input.rewind())
        .map_err(Error::call("pass the state on"))?;
    dup2(input.as_raw_fd(), 0).map_err(Error::call("pass the state on"))?;

    let words: Vec<CString> = flags.rest.iter().cloned().filter_map(c_string).collect();
    let [path, arguments @ ..] = words.as_slice() else {
        return Err(Error::Usage("hook needs a path".to_owned()));
    };
    reset_signals();
    match execv(path, arguments) {
        Ok(never) => match never {},
        Err(errno) => Err(Error::call(&format!("hook {path:?}"))(errno)),
    }
}

fn c_string(word: OsString) -> Option<CString> {
    CString::new(word.into_vec()).ok()
}
