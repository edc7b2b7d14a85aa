//! The engine: it takes a running container apart into an image, and puts an image together into a container.
//!
//! [`checkpoint()`] and [`restore()`] are its two flows; each is a list of [`stage::Stage`]s. `kinds` holds one
//! file for each kind of state. It knows nothing of OCI or Python.
#![forbid(unsafe_code)]

pub mod advance;
pub mod base;
pub mod bounds;
pub mod build;
pub mod capture;
pub mod checkpoint;
pub mod collect;
pub mod common;
pub mod error;
pub mod fill;
pub mod freeze;
pub mod guards;
pub mod huge;
pub mod inspect;
pub mod kinds;
pub mod model;
pub mod pager;
pub mod plan;
pub mod progress;
pub mod restore;
mod source;
pub mod squash;
pub mod stage;
pub mod track;
pub mod twin;
mod vfork;

pub use checkpoint::checkpoint;
pub use error::Error;
pub use restore::restore;

#[cfg(test)]
mod tests {
    use std::sync::{Mutex, MutexGuard, PoisonError};

    static ALONE: Mutex<()> = Mutex::new(());

    /// For tests of sockets that are closed: a process that another test forks has them for a moment too.
    pub(crate) fn alone() -> MutexGuard<'static, ()> {
        ALONE.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
