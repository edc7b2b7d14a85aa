//! One verb of the command line per file.

pub mod create;
pub mod delete;
pub mod exec;
pub mod features;
pub mod filter;
pub mod hook;
pub mod start;
pub mod started;
