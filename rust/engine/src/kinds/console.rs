//! The terminal that a container was started with. Its master is outside; what is carried is how the slave is
//! set up, and which process group is in its foreground.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_sys::remote::Batch;
use torpor_sys::{Pid, fd, proc};

use crate::error::{About, Result};

const TCGETS: u64 = 0x5401;
const TCSETS: u64 = 0x5402;
const TIOCGWINSZ: u64 = 0x5413;
const TIOCSPGRP: i64 = 0x5410;
/// `struct termios` of the kernel: four flags, the line discipline, 19 characters.
const TERMIOS: usize = 36;

/// A terminal's settings.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct State {
    /// `struct termios`.
    pub termios: Vec<u8>,
    /// Rows, columns, pixels.
    pub winsize: Vec<u8>,
    /// Foreground process group, in the container's ids; 0 when init's session has no terminal.
    pub foreground: i32,
}

/// True for the device numbers of pty slaves (Documentation/admin-guide/devices.txt: 136-143).
pub fn is_pty(rdev: u64) -> bool {
    (136..=143).contains(&libc::major(rdev))
}

/// The settings of the terminal behind `fd`. `inner` turns our pids into the container's.
pub fn collect(init: Pid, fd: &OwnedFd, inner: impl Fn(Pid) -> Option<i32>) -> Result<State> {
    let termios = fd::ioctl_get::<TERMIOS>(fd, TCGETS).about(init, "terminal")?;
    let winsize = fd::ioctl_get::<8>(fd, TIOCGWINSZ).about(init, "terminal")?;
    let tpgid = proc::stat(init).about(init, "stat")?.tpgid;
    Ok(State {
        termios: termios.into(),
        winsize: winsize.into(),
        foreground: inner(tpgid).unwrap_or(0),
    })
}

/// Sets the new terminal up like the old one. The window size is the new terminal's own.
pub fn rebuild(fd: &OwnedFd, state: &State) -> Result<()> {
    let Ok(termios) = <[u8; TERMIOS]>::try_from(state.termios.as_slice()) else {
        return Ok(());
    };
    fd::ioctl_set(fd, TCSETS, &termios).about(1, "terminal")
}

/// Puts the process group into the foreground again, from the session's leader, whose descriptor `fd` is the
/// terminal. The caller blocks SIGTTOU.
pub fn rebuild_foreground(batch: &mut Batch, number: i32, state: &State) {
    let group = batch.data(&i64::from(state.foreground).to_le_bytes());
    batch.may(
        "TIOCSPGRP",
        libc::SYS_ioctl,
        [number.into(), TIOCSPGRP.into(), group.into()],
    );
}
