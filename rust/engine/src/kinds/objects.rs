//! What more than one descriptor, mapping or thread may refer to.

use serde::{Deserialize, Serialize};

use super::{memory, pipe, pty, seccomp, shared};

/// Each list is referred to by index.
#[derive(Debug, Default, Serialize, Deserialize)]
pub struct Objects {
    /// Seccomp filters.
    pub seccomp: Vec<seccomp::State>,
    /// Pipes.
    pub pipes: Vec<pipe::State>,
    /// Pseudo-terminals.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub ptys: Vec<pty::State>,
    /// Memory that is shared by mapping, and files without a name.
    pub shared: Vec<shared::State>,
    /// Files with a name that are mapped.
    pub mapped: Vec<memory::MappedFile>,
}
