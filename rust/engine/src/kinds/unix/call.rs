//! Giving sockets of ours their names, and reaching them by these.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use torpor_sys::socket::{self, Address, Place, options};
use torpor_sys::{fd, tree};

use super::Name;

pub(super) type Made<T> = torpor_sys::Result<T>;

/// Gives a socket a name; the file of a path goes where it is said to be, or nowhere.
pub(super) fn bind(socket: &OwnedFd, name: &Name, place: Option<(&OwnedFd, &str, (u32, u32, u32))>) -> Made<()> {
    if name.is_empty() {
        return Ok(());
    }
    if !name.is_path() {
        return socket::bind(socket, &Address::Unix(name.0.clone()));
    }
    let Some((root, path, (mode, uid, gid))) = place else {
        return socket::bind_file(socket, &name.0, None);
    };
    let (parent, file) = path.rsplit_once('/').unwrap_or(("", path));
    let parent = if parent.is_empty() { "/" } else { parent };
    let directory = fd::open_in_root(root, parent, libc::O_PATH | libc::O_DIRECTORY)?;
    let place = Place {
        directory: directory.as_fd(),
        name: file,
        mode,
        uid,
        gid,
    };
    // A file system of a user namespace takes no files of ids that it does not know.
    let bound = tree::as_owner(uid, gid, || socket::bind_file(socket, &name.0, Some(&place))).and_then(|made| made);
    bound.map_err(|error| match error {
        torpor_sys::Error::Call { call, errno, .. } => torpor_sys::Error::Call {
            call,
            object: path.into(),
            errno,
        },
        other => other,
    })
}

/// An address that leads to a socket of ours with that name. A path goes through its open file, which must stay
/// open: what the name leads to may be in other mounts, or nowhere.
pub(super) fn address(socket: &OwnedFd, name: &Name) -> Made<(Address, Option<OwnedFd>)> {
    if !name.is_path() {
        return Ok((Address::Unix(name.0.clone()), None));
    }
    let file = socket::bound_file(socket)?;
    Ok((
        Address::Unix(format!("/proc/self/fd/{}", file.as_raw_fd()).into_bytes()),
        Some(file),
    ))
}

pub(super) fn call(caller: &OwnedFd, called: &OwnedFd, name: &Name) -> Made<()> {
    let (to, _file) = address(called, name)?;
    socket::connect(caller, Some(&to))
}

/// Sends messages, or the bytes of a stream, with as much room as they need.
pub(super) fn send_all(from: &OwnedFd, messages: &[Vec<u8>], to: Option<&Address>) -> Made<()> {
    let before = options::widen(from, messages.iter().map(|m| m.len() + 4096).sum())?;
    for message in messages {
        let mut sent = socket::send(from, message, to)?;
        while sent < message.len() {
            sent += socket::send(from, &message[sent..], to)?;
        }
    }
    options::narrow(from, before)
}
