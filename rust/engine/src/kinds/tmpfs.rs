//! Files in memory: what the container's own tmpfs mounts hold (/dev, /dev/shm, /run, /tmp). They end with the
//! container, so they travel in its image, and are put into the tmpfs that the new container has at the same place.
//!
//! The files are a list of lines, each a JSON object, in blobs of about a megabyte: a directory, then what is in it.
//! So neither saving nor restoring holds more of it in memory than the names of one directory. Nothing in that list
//! is believed: names are looked up without following links and without entering other mounts, and what the
//! container's own processes could not have done is refused.

mod fill;
mod guest;
mod save;
mod target;
#[cfg(test)]
mod tests;

use serde::{Deserialize, Serialize};
use torpor_image::BlobRef;

use super::unix::Name;

pub use fill::rebuild;
pub use save::collect;
pub use target::plan;

/// One tmpfs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct State {
    /// Where it is mounted.
    pub point: String,
    /// Files, directories and all else, hard links once.
    pub nodes: u64,
    /// Memory that their content takes.
    pub bytes: u64,
    /// How much it could take; zero when there is no limit. The new container has its own.
    #[serde(default)]
    pub limit: u64,
    /// The list of its files.
    pub listing: Vec<BlobRef>,
}

/// A line of the list.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Line {
    /// The nodes that follow are in this directory; the first is the root, whose path is empty.
    Directory { path: Name, meta: Meta },
    /// Something in it. Those that were made first come first.
    Node(Entry),
    /// Content of the regular file before.
    Data { at: u64, bytes: BlobRef },
}

/// What a directory holds under a name.
#[derive(Debug, Serialize, Deserialize)]
struct Entry {
    name: Name,
    kind: Kind,
    /// None for directories, which say it themselves, for links to other names, and under mounts.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    meta: Option<Meta>,
}

#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
enum Kind {
    Directory,
    File {
        size: u64,
        /// It has memory for all of its bytes although not all were written (fallocate(2)).
        #[serde(default, skip_serializing_if = "std::ops::Not::not")]
        reserved: bool,
    },
    Symlink {
        target: Name,
    },
    Fifo,
    /// A socket that is open is bound to it anew by `kinds/unix.rs`.
    Socket,
    Device {
        block: bool,
        rdev: u64,
    },
    /// One more name of a node that was listed before.
    Link {
        path: Name,
    },
    /// Something else is mounted there.
    Covered,
}

/// What every file has. Owners are in the container's ids, times in nanoseconds after the epoch.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Meta {
    mode: u32,
    uid: u32,
    gid: u32,
    atime: i64,
    mtime: i64,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    attributes: Vec<(Name, Name)>,
}

/// The id of an owner who has none in the container.
const STRANGER: u32 = u32::MAX;

/// A blob of the list is closed when it is this large.
const FULL: usize = 1 << 20;

/// How much content is moved at once. Reading ahead in another thread was tried: it gains nothing.
const PIECE: usize = 1 << 20;

/// A file with more bytes of extended attributes is refused.
const MAX_ATTRIBUTES: usize = 4 << 20;

const LOOK: i32 = libc::O_PATH | libc::O_NOFOLLOW;
const LIST: i32 = libc::O_RDONLY | libc::O_DIRECTORY | libc::O_NOATIME;

/// What tells a call's error apart from another.
fn is(error: &torpor_sys::Error, number: i32) -> bool {
    error.errno().is_some_and(|e| e as i32 == number)
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    match path.is_empty() {
        true => name.to_vec(),
        false => [path, b"/", name].concat(),
    }
}

/// The path in the container, for messages.
fn shown(point: &str, path: &[u8]) -> String {
    format!("{point}/{}", path.escape_ascii())
}

/// Whether an attribute is the files' own; others are made by the machine's security module.
fn is_carried(attribute: &[u8]) -> bool {
    const EXACT: [&[u8]; 3] = [
        b"security.capability",
        b"system.posix_acl_access",
        b"system.posix_acl_default",
    ];
    attribute.starts_with(b"user.") || attribute.starts_with(b"trusted.") || EXACT.contains(&attribute)
}

/// Changes the ids inside of an attribute: those of an ACL (struct posix_acl_xattr_entry: tag, perm, id), and the
/// root user of capabilities that belong to a user namespace (struct vfs_ns_cap_data).
fn translate(name: &[u8], value: &mut [u8], uid: impl Fn(u32) -> u32, gid: impl Fn(u32) -> u32) {
    const ACL_USER: u16 = 2;
    const ACL_GROUP: u16 = 8;
    fn change(at: &mut [u8], map: impl Fn(u32) -> u32) {
        if let Ok(bytes) = <[u8; 4]>::try_from(&*at) {
            at.copy_from_slice(&map(u32::from_le_bytes(bytes)).to_le_bytes());
        }
    }
    if name.starts_with(b"system.posix_acl_") {
        for entry in value.get_mut(4..).unwrap_or_default().chunks_exact_mut(8) {
            match u16::from_le_bytes([entry[0], entry[1]]) {
                ACL_USER => change(&mut entry[4..], &uid),
                ACL_GROUP => change(&mut entry[4..], &gid),
                _ => {}
            }
        }
    } else if name == b"security.capability" && value.len() == 24 && value[3] == 3 {
        change(&mut value[20..], uid);
    }
}

fn inside(map: &[(u32, u32, u32)], id: u32) -> u32 {
    let part = map
        .iter()
        .find(|(_, outside, count)| id.wrapping_sub(*outside) < *count);
    part.map_or(STRANGER, |(inside, outside, _)| inside + (id - outside))
}

fn outside(map: &[(u32, u32, u32)], id: u32) -> u32 {
    let part = map.iter().find(|(inside, _, count)| id.wrapping_sub(*inside) < *count);
    part.map_or(STRANGER, |(inside, outside, _)| outside + (id - inside))
}
