//! `tmpcopyup`: a tmpfs that starts with what the image has at its place. Podman asks for it by default; libcontainer
//! does not know it.

use std::fs::{self, Metadata};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{MetadataExt, lchown, symlink};
use std::path::{Path, PathBuf};

use libcontainer::oci_spec::runtime::Spec;
use libcontainer::syscall::Syscall;

use crate::error::reason;
use crate::program::Failure;

const OPTION: &str = "tmpcopyup";

#[derive(Debug, Clone)]
pub struct CopyUp {
    destination: PathBuf,
    /// Whether the directory keeps the mode that the image gives it.
    keep_mode: bool,
}

/// Takes the option out of the spec, which could not be mounted with it.
pub fn take(spec: &mut Spec) -> Vec<CopyUp> {
    let mut found = Vec::new();
    for mount in spec.mounts_mut().iter_mut().flatten() {
        let mut options = mount.options().clone().unwrap_or_default();
        let before = options.len();
        options.retain(|option| option != OPTION);
        if options.len() == before {
            continue;
        }
        found.push(CopyUp {
            destination: mount.destination().clone(),
            keep_mode: !options.iter().any(|option| option.starts_with("mode=")),
        });
        mount.set_options(Some(options));
    }
    found
}

impl CopyUp {
    /// In the container, once its root is mounted. The image's files are found in a copy of the root mount that has
    /// nothing mounted on it.
    pub fn run(&self, syscall: &dyn Syscall) -> Result<(), Failure> {
        let failed = |why: String| format!("{OPTION} of {}: {why}", self.destination.display());
        let flags = libc::OPEN_TREE_CLOEXEC | libc::OPEN_TREE_CLONE as libc::c_uint;
        let image = syscall
            .open_tree(libc::AT_FDCWD, Some("/"), flags)
            .map_err(|error| failed(error.to_string()))?;
        let inside = self.destination.strip_prefix("/").unwrap_or(&self.destination);
        let from = PathBuf::from(format!("/proc/self/fd/{}", image.as_raw_fd())).join(inside);
        match from.symlink_metadata() {
            Ok(metadata) if metadata.is_dir() => self.copy(&from, &metadata),
            // libcontainer made the place for the mount itself, or a link leads elsewhere: nothing to copy.
            _ => Ok(()),
        }
        .map_err(|error| failed(reason(&error)))
    }

    fn copy(&self, from: &Path, metadata: &Metadata) -> io::Result<()> {
        copy_entries(from, &self.destination)?;
        lchown(&self.destination, Some(metadata.uid()), Some(metadata.gid()))?;
        if self.keep_mode {
            fs::set_permissions(&self.destination, metadata.permissions())?;
        }
        Ok(())
    }
}

/// Directories, files and links; the rest of what a file system can hold is of no use as a copy.
fn copy_entries(from: &Path, to: &Path) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let metadata = entry.metadata()?;
        let (from, to) = (entry.path(), to.join(entry.file_name()));
        if metadata.is_dir() {
            fs::create_dir(&to)?;
            copy_entries(&from, &to)?;
        } else if metadata.is_file() {
            fs::copy(&from, &to)?;
        } else if metadata.is_symlink() {
            symlink(fs::read_link(&from)?, &to)?;
        } else {
            continue;
        }
        lchown(&to, Some(metadata.uid()), Some(metadata.gid()))?;
        if !metadata.is_symlink() {
            // After the owner, whose change takes set-user-id bits away.
            fs::set_permissions(&to, metadata.permissions())?;
        }
    }
    Ok(())
}
