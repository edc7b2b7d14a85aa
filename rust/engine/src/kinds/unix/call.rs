//! Giving sockets of ours their names, and reaching them by these.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use torpor_sys::socket::message::{self, Credentials};
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

/// A message that is to be sent.
#[derive(Debug)]
pub(super) struct Letter<'a> {
    pub(super) data: Vec<u8>,
    pub(super) rights: Vec<&'a OwnedFd>,
    /// In our numbers.
    pub(super) credentials: Option<Credentials>,
}

impl Letter<'_> {
    pub(super) fn plain(data: Vec<u8>) -> Self {
        Letter {
            data,
            rights: Vec::new(),
            credentials: None,
        }
    }
}

/// Sends messages, or the bytes of a stream, with as much room as they need.
pub(super) fn send_all(from: &OwnedFd, letters: &[Letter<'_>], to: Option<&Address>) -> Made<()> {
    let before = options::widen(from, letters.iter().map(|l| l.data.len() + 4096).sum())?;
    for Letter {
        data,
        rights,
        credentials,
    } in letters
    {
        let mut sent = message::send(from, data, to, rights, *credentials)?;
        while sent < data.len() {
            // What comes with a message comes with its first bytes.
            sent += message::send(from, &data[sent..], to, &[], *credentials)?;
        }
    }
    options::narrow(from, before)
}
