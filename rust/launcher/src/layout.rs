//! Where the files of one container are, below the directory given as --root.

use std::path::{Path, PathBuf};

use crate::error::Error;

#[derive(Debug, Clone)]
pub struct Layout {
    root: PathBuf,
    id: String,
}

impl Layout {
    pub fn new(root: &Path, id: &str) -> Result<Self, Error> {
        let plain = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '+' | '-' | '.');
        if id.is_empty() || id == "." || id == ".." || !id.chars().all(plain) {
            return Err(Error::Usage(format!("{id:?} is not a container id")));
        }
        let root = std::path::absolute(root).map_err(Error::io("find", root))?;
        Ok(Self {
            root,
            id: id.to_owned(),
        })
    }

    pub fn root(&self) -> &Path {
        &self.root
    }

    pub fn id(&self) -> &str {
        &self.id
    }

    /// libcontainer's own directory.
    pub fn state(&self) -> PathBuf {
        self.root.join(&self.id)
    }

    /// Ours: the effective bundle, and the files below.
    pub fn bundle(&self) -> PathBuf {
        self.root.join(format!("{}-bundle", self.id))
    }

    pub fn effective_spec(&self) -> PathBuf {
        self.bundle().join("config.json")
    }

    pub fn record(&self) -> PathBuf {
        self.bundle().join("record.json")
    }

    pub fn init(&self) -> PathBuf {
        self.bundle().join("init.json")
    }

    /// A FIFO that init holds open until it executes the program; what it writes is why it could not.
    pub fn gate(&self) -> PathBuf {
        self.bundle().join("gate")
    }

    /// Locked by the processes that build the container, until the last of them is done or dead.
    pub fn lock(&self) -> PathBuf {
        self.bundle().join("lock")
    }
}
