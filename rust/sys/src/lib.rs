//! Kernel calls as safe typed functions. The only crate of torpor with `unsafe`.
//!
//! It knows processes, memory and descriptors; it knows nothing of images or containers.
//! Addresses inside another process are plain `u64` ([`RemoteAddr`]), never pointers.

mod btf;
pub mod cgroup;
pub mod error;
pub mod event;
pub mod fd;
pub mod fork;
pub mod guard;
pub mod kcmp;
pub mod keys;
pub mod lock;
pub mod marks;
pub mod mem;
pub mod namespace;
pub mod pagemap;
pub mod pidfd;
pub mod probe;
pub mod proc;
pub mod ptrace;
pub mod remote;
pub mod sched;
pub mod sleepers;
pub mod socket;
pub mod start;
pub mod sysv;
pub mod timens;
pub mod track;
pub mod tree;
pub mod uffd;
pub mod wait;
pub mod xsave;

pub use error::{Error, Result};

/// A process or thread id as the tracer's pid namespace numbers it.
pub type Pid = i32;

/// An address in another process.
pub type RemoteAddr = u64;

/// The page size of the only architecture supported so far.
pub const PAGE_SIZE: u64 = 4096;
