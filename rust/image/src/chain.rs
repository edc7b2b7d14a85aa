//! An image and its ancestors, each found from the one before it.

use std::path::{Path, PathBuf};

use crate::error::Error;
use crate::header::Parent;
use crate::layout::{FILE_NAME, MAX_CHAIN};
use crate::link::Link;

/// Opens an image and all that it goes on from.
pub(crate) fn open(path: &Path) -> Result<Vec<Link>, Error> {
    let mut chain = vec![Link::open(path)?];
    while let Some(parent) = chain.last().and_then(parent_of) {
        let child = chain[chain.len() - 1].path();
        // A parent is known by its digest, and a digest depends on the parent's: only a forged chain comes back to itself, and ends here.
        if chain.len() >= MAX_CHAIN {
            return Err(Error::ChainTooLong {
                path: chain[0].path().to_path_buf(),
            });
        }
        let link = open_parent(child, &parent)?;
        chain.push(link);
    }
    Ok(chain)
}

fn parent_of(link: &Link) -> Option<Parent> {
    link.info().parent.clone()
}

/// Where the parent of the image `child` is: the path in a header is that of a directory.
pub(crate) fn place(child: &Path, path: &str) -> PathBuf {
    child.parent().unwrap_or(Path::new("")).join(path).join(FILE_NAME)
}

fn open_parent(child: &Path, wanted: &Parent) -> Result<Link, Error> {
    let place = place(child, &wanted.path);
    let link = Link::open(&place).map_err(|error| match error {
        Error::Missing { path } => Error::ParentMissing {
            path: child.to_path_buf(),
            parent: path,
            wanted: Box::new(wanted.clone()),
        },
        other => other,
    })?;
    if link.digest() != wanted.digest || link.info().uuid != wanted.uuid {
        return Err(Error::ParentChanged {
            path: child.to_path_buf(),
            parent: place,
            wanted: Box::new(wanted.clone()),
            found: link.digest(),
        });
    }
    Ok(link)
}
