//! TEMPORARY stub by the lead so that the crate compiles; helper-5 replaces this file.
use std::collections::BTreeSet; use std::os::fd::OwnedFd; use serde::{Deserialize, Serialize}; use torpor_image::BlobRef; use torpor_sys::Pid; use crate::error::{Error, Result};
#[derive(Debug, Clone, Serialize, Deserialize)] pub struct State {}
#[derive(Debug)] pub struct Survey;
pub fn survey(_init: Pid) -> Result<Survey> { Ok(Survey) }
#[derive(Debug)] pub enum Found { Inside(Box<State>), Outside }
pub fn collect(pid: Pid, fd_no: i32, _fd: &OwnedFd, _ino: u64, _s: &Survey, _i: &BTreeSet<u64>, _b: &mut dyn FnMut(&[u8]) -> Result<BlobRef>) -> Result<Found> { Err(Error::unsupported(pid, format!("fd {fd_no}"), "unix sockets", "")) }
pub fn rebuild(_init: Pid, _s: &[&State], _b: &dyn Fn(BlobRef) -> Result<Vec<u8>>) -> Result<Vec<OwnedFd>> { Ok(vec![]) }
