//! TEMPORARY stub by the lead so that the crate compiles; helper-5 replaces this file.
use std::os::fd::OwnedFd; use serde::{Deserialize, Serialize}; use torpor_sys::Pid; use crate::error::{Error, Result};
#[derive(Debug, Clone, Serialize, Deserialize)] pub struct State {}
pub fn collect(pid: Pid, fd_no: i32, _fd: &OwnedFd) -> Result<State> { Err(Error::unsupported(pid, format!("fd {fd_no}"), "inet sockets", "")) }
pub fn rebuild(_init: Pid, _s: &[&State]) -> Result<Vec<OwnedFd>> { Ok(vec![]) }
