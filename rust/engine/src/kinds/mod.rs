//! One file for each kind of state: what it is in the image, how it is collected, how it is rebuilt.

pub mod console;
pub mod cpu;
pub mod creds;
pub mod epoll;
pub mod eventfd;
pub mod files;
pub mod fs;
pub mod inet;
pub mod ipc;
pub mod memory;
pub mod mounts;
pub mod objects;
pub mod paths;
pub mod pipe;
pub mod seccomp;
pub mod settings;
pub mod shared;
pub mod signals;
pub mod timers;
pub mod tmpfs;
pub mod unix;
pub mod vdso;
