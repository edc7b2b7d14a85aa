//! The program a container runs: its environment, and the file its first argument names.

use std::ffi::CString;
use std::fs::{self, File};
use std::io::{Read, Take};
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::Process;
use nix::unistd::{AccessFlags, access};

use crate::causes::lower;
use crate::error::reason;

/// Where to look when the environment has no PATH, as the shells do it.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// More than any real user table; the file is the container's, so it may be anything.
const PASSWD_LIMIT: u64 = 1 << 20;

pub type Failure = String;

/// Finds the file to execute, as the user we are now. The texts are runc's: clients look for them.
pub fn locate(process: &Process) -> Result<PathBuf, Failure> {
    let name = process
        .args()
        .as_ref()
        .and_then(|args| args.first())
        .filter(|name| !name.is_empty())
        .ok_or("process.args is empty")?;
    if name.contains('/') {
        let path = process.cwd().join(name);
        return match check(&path) {
            Ok(()) => Ok(PathBuf::from(name)),
            Err(why) => Err(format!("exec: {name:?}: {why}")),
        };
    }
    let path = variable(process.env().as_deref().unwrap_or_default(), "PATH");
    path.unwrap_or(DEFAULT_PATH)
        .split(':')
        .filter(|directory| directory.starts_with('/'))
        .map(|directory| Path::new(directory).join(name))
        .find(|candidate| check(candidate).is_ok())
        .ok_or_else(|| format!("exec: {name:?}: executable file not found in $PATH"))
}

fn check(path: &Path) -> Result<(), String> {
    let metadata = fs::metadata(path).map_err(|error| format!("stat {}: {}", path.display(), reason(&error)))?;
    if metadata.is_dir() {
        return Err("is a directory".to_owned());
    }
    // The mode is asked too: a user with CAP_DAC_OVERRIDE may still not execute a file that nobody may.
    if metadata.mode() & 0o111 == 0 {
        return Err("permission denied".to_owned());
    }
    access(path, AccessFlags::X_OK).map_err(|errno| lower(errno.desc()))
}

/// The environment in the order of the spec; of two entries with one name the last one counts.
pub fn environment(process: &Process, extra: &[String]) -> Result<Vec<CString>, Failure> {
    let mut entries: Vec<String> = Vec::new();
    let given = process.env().as_deref().unwrap_or_default();
    for entry in given.iter().chain(extra) {
        let Some((name, _)) = entry.split_once('=').filter(|(name, _)| !name.is_empty()) else {
            return Err(format!("process.env: {entry:?} is not NAME=VALUE"));
        };
        let prefix = format!("{name}=");
        entries.retain(|earlier| !earlier.starts_with(&prefix));
        entries.push(entry.clone());
    }
    if variable(&entries, "HOME").is_none_or(str::is_empty) {
        entries.retain(|entry| !entry.starts_with("HOME="));
        entries.push(format!("HOME={}", home(process.user().uid())));
    }
    strings("process.env", entries.iter())
}

pub fn arguments(process: &Process) -> Result<Vec<CString>, Failure> {
    strings("process.args", process.args().iter().flatten())
}

fn strings<'a>(what: &str, texts: impl Iterator<Item = &'a String>) -> Result<Vec<CString>, Failure> {
    texts
        .map(|text| CString::new(text.as_str()).map_err(|_| format!("{what} holds a zero byte")))
        .collect()
}

fn variable<'a>(entries: &'a [String], name: &str) -> Option<&'a str> {
    entries
        .iter()
        .rev()
        .find_map(|entry| entry.strip_prefix(name)?.strip_prefix('='))
}

/// The home directory in the container's user table. Read by hand: getpwuid in a static binary would load the
/// container's own NSS libraries into this privileged process.
fn home(uid: u32) -> String {
    passwd()
        .and_then(|table| {
            table.lines().find_map(|line| {
                let fields: Vec<&str> = line.split(':').collect();
                let found = fields.get(2)?.parse::<u32>().ok()? == uid;
                found.then(|| fields.get(5).map(|home| (*home).to_owned()))?
            })
        })
        .filter(|home| home.starts_with('/'))
        .unwrap_or_else(|| "/".to_owned())
}

fn passwd() -> Option<String> {
    // Not to hang on a FIFO somebody put there.
    let file = File::options()
        .read(true)
        .custom_flags(libc::O_NONBLOCK | libc::O_CLOEXEC)
        .open("/etc/passwd")
        .ok()?;
    if !file.metadata().ok()?.is_file() {
        return None;
    }
    let mut table = Vec::new();
    let mut limited: Take<File> = file.take(PASSWD_LIMIT);
    limited.read_to_end(&mut table).ok()?;
    Some(String::from_utf8_lossy(&table).into_owned())
}
