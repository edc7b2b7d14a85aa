//! Acting inside another process: a table of system calls, run by a stub of some hundred bytes.
//!
//! [`batch`] describes calls, [`stub`] is the code that runs them, [`visit`] runs them inside a living task
//! that must not notice, [`site`] runs them inside a process that is being built.

pub mod batch;
pub mod site;
pub mod stub;
pub mod visit;

pub use batch::{Arg, Batch, Data, Results};
pub use site::Site;
pub use visit::{Door, Visit};
