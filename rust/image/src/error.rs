//! The one error type. Every message is one line: which file, which part of it, what is wrong, what to do.

use std::io;
use std::path::{Path, PathBuf};

use nix::errno::Errno;

use crate::header::Parent;

/// Why an image could not be written or read.
///
/// Paths and everything that came out of a file are printed escaped, so that a message stays one line and cannot drive a terminal.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The directory already holds a checkpoint.
    #[error("{path:?} already exists; choose another directory, or remove it if it is no longer needed")]
    Exists { path: PathBuf },

    /// Somebody else is writing a checkpoint into the directory.
    #[error(
        "{path:?} is locked: another checkpoint is being written there; choose another directory, or wait for it (lslocks shows whose it is)"
    )]
    Busy { path: PathBuf },

    /// The path where a directory is wanted is something else.
    #[error("{path:?} is not a directory; an image is a directory that holds {file}", file = crate::FILE_NAME)]
    NotADirectory { path: PathBuf },

    /// There is no image to read.
    #[error("{path:?} does not exist; give the directory that was given to checkpoint")]
    Missing { path: PathBuf },

    /// The file is not what a writer wrote.
    #[error(
        "{path:?} is damaged ({section}: {detail}); it cannot be restored: copy it again from where it was made, or checkpoint again"
    )]
    Corrupt {
        path: PathBuf,
        section: String,
        detail: String,
    },

    /// The image that an image goes on from is not where it was.
    #[error(
        "{path:?} goes on from {parent:?}, which does not exist; put the image with uuid {} and digest {} there again",
        wanted.uuid,
        wanted.digest
    )]
    ParentMissing {
        path: PathBuf,
        parent: PathBuf,
        wanted: Box<Parent>,
    },

    /// Where the parent of an image was is another one.
    #[error(
        "{path:?} goes on from {parent:?}, which has changed: it has digest {found}, not {}; put the image with uuid {} there again",
        wanted.digest,
        wanted.uuid
    )]
    ParentChanged {
        path: PathBuf,
        parent: PathBuf,
        wanted: Box<Parent>,
        found: String,
    },

    /// A chain of images does not end.
    #[error("{path:?} has a parent too many: a chain has at most {limit} images; fold it into one with torpor squash", limit = crate::MAX_CHAIN)]
    ChainTooLong { path: PathBuf },

    /// The path of a parent cannot be kept in an image.
    #[error(
        "the parent path {parent:?} is not usable for {path:?}: {detail}; give a path relative to the directory of the image"
    )]
    ParentPath {
        path: PathBuf,
        parent: PathBuf,
        detail: &'static str,
    },

    /// The file has a major format version that this program does not know.
    #[error(
        "{path:?} has format version {major}.{minor}, this torpor reads {ours}.x; use the torpor release that wrote it",
        ours = crate::MAJOR
    )]
    Version { path: PathBuf, major: u16, minor: u16 },

    /// The file needs an ability of the reader that this program does not have.
    #[error("{path:?} needs {feature:?} ({section}), which this torpor does not know; restore it with a newer torpor")]
    Feature {
        path: PathBuf,
        section: String,
        feature: String,
    },

    /// The file was made on another kind of machine.
    #[error(
        "{path:?} was made on a machine with {what} {found:?}, this one has {host:?}; restore it on a machine like the first"
    )]
    Arch {
        path: PathBuf,
        what: &'static str,
        found: String,
        host: String,
    },

    /// The file system is full, or a quota or file size limit is reached.
    #[error(
        "no space left for {path:?} ({source}); free some, raise the quota or file size limit, or choose another directory"
    )]
    NoSpace { path: PathBuf, source: io::Error },

    /// The caller may not do this here.
    #[error("cannot {operation} {path:?} ({source}); choose another directory, or change its permissions")]
    Permission {
        path: PathBuf,
        operation: &'static str,
        source: io::Error,
    },

    /// Any other failure of a system call.
    #[error("cannot {operation} {path:?} ({source}); see the kernel log, or choose another directory")]
    Io {
        path: PathBuf,
        operation: &'static str,
        source: io::Error,
    },

    /// Reading what should have gone into a blob failed; the image itself is not at fault.
    #[error("cannot read the content of a blob for {path:?} ({source}); the image was not made")]
    Source { path: PathBuf, source: io::Error },

    /// More than the format can hold.
    #[error("{path:?} would hold {count} {what}, the format allows {limit}; the image was not made")]
    TooLarge {
        path: PathBuf,
        what: &'static str,
        count: u64,
        limit: u64,
    },

    /// The caller broke a rule of this crate: a defect of torpor.
    #[error("{path:?}: {detail} ({section}); this is a defect of torpor, please report it")]
    Misuse {
        path: PathBuf,
        section: String,
        detail: String,
    },
}

impl Error {
    /// The stable name of this kind of failure, for programs.
    pub fn code(&self) -> &'static str {
        match self {
            Error::Exists { .. } | Error::Busy { .. } => "image-exists",
            Error::NotADirectory { .. } => "usage",
            Error::Missing { .. } => "image-missing",
            Error::Corrupt { .. } => "image-corrupt",
            Error::ParentMissing { .. } | Error::ParentChanged { .. } | Error::ChainTooLong { .. } => "image-parent",
            Error::ParentPath { .. } => "usage",
            Error::Version { .. } | Error::Feature { .. } => "image-version",
            Error::Arch { .. } => "image-arch",
            Error::NoSpace { .. } => "no-space",
            Error::Permission { .. } => "permission",
            Error::Io { .. } | Error::Source { .. } => "kernel",
            Error::TooLarge { .. } => "unsupported",
            Error::Misuse { .. } => "internal",
        }
    }

    /// The file or directory it is about.
    pub fn path(&self) -> &Path {
        match self {
            Error::Exists { path }
            | Error::Busy { path }
            | Error::NotADirectory { path }
            | Error::Missing { path }
            | Error::Corrupt { path, .. }
            | Error::ParentMissing { path, .. }
            | Error::ParentChanged { path, .. }
            | Error::ChainTooLong { path }
            | Error::ParentPath { path, .. }
            | Error::Version { path, .. }
            | Error::Feature { path, .. }
            | Error::Arch { path, .. }
            | Error::NoSpace { path, .. }
            | Error::Permission { path, .. }
            | Error::Io { path, .. }
            | Error::Source { path, .. }
            | Error::TooLarge { path, .. }
            | Error::Misuse { path, .. } => path,
        }
    }

    /// The part of the file it is about, where one can be named.
    pub fn section(&self) -> Option<&str> {
        match self {
            Error::Corrupt { section, .. } | Error::Feature { section, .. } | Error::Misuse { section, .. } => {
                Some(section)
            }
            _ => None,
        }
    }

    /// The error number of the system call that failed, if one did.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Error::NoSpace { source, .. }
            | Error::Permission { source, .. }
            | Error::Io { source, .. }
            | Error::Source { source, .. } => source.raw_os_error(),
            _ => None,
        }
    }

    /// Sorts the failure of a system call on `path` into its kind.
    pub(crate) fn io(path: &Path, operation: &'static str, source: io::Error) -> Error {
        let path = path.to_path_buf();
        match source.raw_os_error().map(Errno::from_raw) {
            Some(Errno::ENOSPC | Errno::EDQUOT | Errno::EFBIG) => Error::NoSpace { path, source },
            Some(Errno::EACCES | Errno::EPERM | Errno::EROFS) => Error::Permission {
                path,
                operation,
                source,
            },
            Some(Errno::ENOTDIR) => Error::NotADirectory { path },
            _ => Error::Io {
                path,
                operation,
                source,
            },
        }
    }

    pub(crate) fn errno_on(path: &Path, operation: &'static str, errno: Errno) -> Error {
        Error::io(path, operation, errno.into())
    }

    pub(crate) fn corrupt(path: &Path, section: impl Into<String>, detail: impl Into<String>) -> Error {
        Error::Corrupt {
            path: path.to_path_buf(),
            section: section.into(),
            detail: detail.into(),
        }
    }

    pub(crate) fn misuse(path: &Path, section: impl Into<String>, detail: impl Into<String>) -> Error {
        Error::Misuse {
            path: path.to_path_buf(),
            section: section.into(),
            detail: detail.into(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_kernel_failures_are_told_apart() {
        let code = |errno: Errno| Error::errno_on(Path::new("/x"), "write", errno).code();
        assert_eq!(code(Errno::ENOSPC), "no-space");
        assert_eq!(code(Errno::EDQUOT), "no-space");
        assert_eq!(code(Errno::EFBIG), "no-space");
        assert_eq!(code(Errno::EROFS), "permission");
        assert_eq!(code(Errno::EACCES), "permission");
        assert_eq!(code(Errno::ENOTDIR), "usage");
        assert_eq!(code(Errno::EIO), "kernel");
    }

    #[test]
    fn a_message_is_one_line_whatever_the_path_is() {
        let error = Error::corrupt(Path::new("/tmp/a\nb\x1b[31m"), "header", "checksum");
        let text = error.to_string();
        assert!(!text.contains('\n') && !text.contains('\x1b'), "{text}");
        assert!(text.contains("header") && text.contains("checkpoint again"));
    }
}
