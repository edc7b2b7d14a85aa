//! Pseudo-terminals made inside of the container: both ends, how they are set up, whose controlling terminal they are.
//! Sources: pty(7), ioctl_tty(2), drivers/tty/pty.c, drivers/tty/n_tty.c.

use std::os::fd::OwnedFd;

use serde::{Deserialize, Serialize};
use torpor_sys::fd::{self, FileId};
use torpor_sys::{Pid, proc};

use super::creds::IdMaps;
use super::{console, tasks::Tasks};
use crate::error::{About, Error, Result};

/// `struct termios2` of the kernel: termios(3) and two speeds.
const TERMIOS: usize = 44;
const TCGETS2: u64 = 0x802c_542a;
const TCSETS2: u64 = 0x402c_542b;
const TIOCGLCKTRMIOS: u64 = 0x5456;
const TIOCSLCKTRMIOS: u64 = 0x5457;
const TIOCGWINSZ: u64 = 0x5413;
const TIOCSWINSZ: u64 = 0x5414;
const TIOCGETD: u64 = 0x5424;
const TIOCGSID: u64 = 0x5429;
const TIOCGPGRP: u64 = 0x540f;
const TIOCGPTN: u64 = 0x8004_5430;
const TIOCSPTLCK: u64 = 0x4004_5431;
const TIOCGDEV: u64 = 0x8004_5432;
const TIOCGPKT: u64 = 0x8004_5438;
const TIOCGPTLCK: u64 = 0x8004_5439;
const TIOCGEXCL: u64 = 0x8004_5440;
const TIOCPKT: u64 = 0x5420;
const TIOCEXCL: u64 = 0x540c;
/// Where c_lflag is in `struct termios2`.
const LOCAL_FLAGS: usize = 12;

/// One end, open.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct End {
    /// Which pseudo-terminal, by index.
    pub pty: usize,
    /// Which end of it, and how it was opened.
    pub side: Side,
}

/// How an end was opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Side {
    /// By opening ptmx.
    Master,
    /// By its path.
    Slave,
    /// By /dev/tty, in a session whose controlling terminal it is.
    Controlling,
}

/// A pseudo-terminal.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct State {
    /// Where its devpts is mounted.
    pub point: String,
    /// Its number there.
    pub index: i32,
    /// Its master was closed: whoever has the slave finds it hung up.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub is_hung_up: bool,
    /// How it is set up; `None` when hung up, since nothing is left of it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub setup: Option<Setup>,
}

/// How a pseudo-terminal is set up.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Setup {
    /// `struct termios2`.
    pub termios: Vec<u8>,
    /// Which of those settings are locked.
    pub locked: Vec<u8>,
    /// Rows, columns, pixels.
    pub winsize: Vec<u8>,
    /// The slave cannot be opened (unlockpt(3)).
    pub is_locked: bool,
    /// Packet mode.
    pub packets: bool,
    /// The master, the slave cannot be opened again (TIOCEXCL).
    pub exclusive: [bool; 2],
    /// All descriptions of the slave were closed.
    pub was_closed: bool,
    /// Owner, group and permissions of the slave, in the container's ids.
    pub owner: (u32, u32, u32),
    /// The session that it controls, in the container's ids; 0 for none.
    pub session: i32,
    /// The process group in the foreground.
    pub foreground: i32,
}

/// A description that may be an end.
#[derive(Debug, Clone, Copy)]
#[allow(missing_docs)]
pub struct Candidate<'a> {
    pub pid: Pid,
    pub number: i32,
    pub link: &'a str,
    pub id: &'a FileId,
    pub flags: i32,
    pub fd: &'a OwnedFd,
}

impl Candidate<'_> {
    fn object(&self) -> String {
        format!("fd {} ({})", self.number, self.link)
    }

    fn refuse(&self, why: impl Into<String>, remedy: &str) -> Error {
        Error::unsupported(self.pid, self.object(), why, remedy)
    }

    fn is_a_terminal(&self, major: u32, minor: u32) -> bool {
        self.id.kind() == libc::S_IFCHR
            && self.flags & libc::O_PATH == 0
            && (libc::major(self.id.rdev), libc::minor(self.id.rdev)) == (major, minor)
    }

    /// Whether it is a master (Documentation/admin-guide/devices.txt).
    pub fn is_master(&self) -> bool {
        self.is_a_terminal(5, 2)
    }

    fn is_slave(&self) -> bool {
        console::is_pty(self.id.rdev) && self.id.kind() == libc::S_IFCHR && self.flags & libc::O_PATH == 0
    }

    fn flag(&self, request: u64) -> Result<bool> {
        Ok(fd::ioctl_int(self.fd, request).about(self.pid, self.object())? != 0)
    }

    /// # Errors
    /// Refused: what waits to be read, since it cannot be looked at without taking it, and other line disciplines.
    fn check(&self) -> Result<()> {
        if fd::ioctl_int(self.fd, TIOCGETD).about(self.pid, self.object())? != 0 {
            return Err(self.refuse("it has another line discipline than N_TTY, which is not carried", ""));
        }
        let waiting = fd::ioctl_int(self.fd, libc::FIONREAD).about(self.pid, self.object())?;
        if waiting > 0 {
            let why = format!("{waiting} bytes wait to be read from the terminal, which nobody can look at and leave");
            return Err(self.refuse(why, "try again when the program has read them"));
        }
        Ok(())
    }
}

/// The number of a slave, of its device number.
fn index_of(rdev: u64) -> i32 {
    ((libc::major(rdev) - 136) * 256 + libc::minor(rdev)) as i32
}

/// All pseudo-terminals of a container.
#[derive(Debug, Default)]
pub struct Survey {
    /// What goes into the image.
    pub states: Vec<State>,
    /// In the same order: the devpts.
    devices: Vec<u64>,
    /// What comes back different, in words.
    pub warnings: Vec<String>,
}

/// What collecting needs of the container.
#[allow(missing_debug_implementations)]
pub struct Around<'a> {
    /// The container's init, in our pid namespace.
    pub init: Pid,
    /// Its processes.
    pub tasks: &'a Tasks,
    /// The same, as we number them.
    pub pids: &'a [Pid],
    /// What a path names inside.
    pub stat: &'a dyn Fn(&str) -> torpor_sys::Result<FileId>,
}

impl Survey {
    /// Looks at every master.
    pub fn of<'c>(candidates: impl Iterator<Item = Candidate<'c>>, around: &Around<'_>) -> Result<Survey> {
        let mut survey = Survey::default();
        for master in candidates.filter(Candidate::is_master) {
            let index = fd::ioctl_int(master.fd, TIOCGPTN).about(master.pid, master.object())?;
            let point = point_of(&master, around.init)?;
            let setup = collect(&master, &format!("{point}/{index}"), around)?;
            if setup.termios[LOCAL_FLAGS] & libc::ICANON as u8 != 0 {
                survey.warnings.push(format!(
                    "terminal {point}/{index} reads lines: what was typed of a line that is not ended is not carried"
                ));
            }
            survey.devices.push(master.id.dev);
            survey.states.push(State {
                point,
                index,
                is_hung_up: false,
                setup: Some(setup),
            });
        }
        Ok(survey)
    }

    /// Which end a description is; `None` when it is none of the container's own.
    pub fn end(&mut self, of: &Candidate<'_>, init: Pid) -> Result<Option<End>> {
        if of.is_master() {
            let index = fd::ioctl_int(of.fd, TIOCGPTN).about(of.pid, of.object())?;
            let side = Side::Master;
            return Ok(self.find(of.id.dev, index).map(|pty| End { pty, side }));
        }
        if of.is_slave() {
            return self.slave(of, init);
        }
        if of.is_a_terminal(5, 0) {
            return self.controlling(of);
        }
        Ok(None)
    }

    fn find(&self, dev: u64, index: i32) -> Option<usize> {
        (0..self.states.len()).find(|at| self.devices[*at] == dev && self.states[*at].index == index)
    }

    fn slave(&mut self, of: &Candidate<'_>, init: Pid) -> Result<Option<End>> {
        let index = index_of(of.id.rdev);
        let side = Side::Slave;
        if let Some(pty) = self.find(of.id.dev, index) {
            if !self.states[pty].is_hung_up {
                self.look_at_slave(pty, of)?;
            }
            return Ok(Some(End { pty, side }));
        }
        if fd::poll_now(of.fd) & libc::POLLHUP == 0 {
            return Ok(None);
        }
        // A console whose master is gone is connected to the new console, like any.
        if of.pid == init && of.number < 3 {
            return Ok(None);
        }
        let Ok(point) = point_of(of, init) else { return Ok(None) };
        if !of.link.starts_with(&format!("{point}/{index}")) {
            return Ok(None);
        }
        self.devices.push(of.id.dev);
        self.states.push(State {
            point,
            index,
            is_hung_up: true,
            setup: None,
        });
        let pty = self.states.len() - 1;
        Ok(Some(End { pty, side }))
    }

    fn controlling(&mut self, of: &Candidate<'_>) -> Result<Option<End>> {
        let number = fd::ioctl_int(of.fd, TIOCGDEV);
        let number =
            number.map_err(|_| of.refuse("the terminal behind it is hung up", "close it before the checkpoint"))?;
        // new_encode_dev() of the kernel: 12 bits of major number above 8 of minor, the rest of the minor above those.
        let number = number as u32;
        let rdev = libc::makedev(number >> 8 & 0xfff, number & 0xff | number >> 12 & 0xfff00);
        if !console::is_pty(rdev) {
            return Ok(None);
        }
        let index = index_of(rdev);
        let side = Side::Controlling;
        let has = |s: &State| s.index == index && s.setup.as_ref().is_some_and(|s| s.session != 0);
        let Some(pty) = self.states.iter().position(has) else {
            return Ok(None);
        };
        self.look_at_slave(pty, of)?;
        Ok(Some(End { pty, side }))
    }

    /// What only the slave tells.
    fn look_at_slave(&mut self, pty: usize, slave: &Candidate<'_>) -> Result<()> {
        slave.check()?;
        if fd::poll_now(slave.fd) & libc::POLLOUT == 0 {
            return Err(slave.refuse("its output is stopped (Ctrl-S, TCOOFF)", "let it go on first (Ctrl-Q)"));
        }
        if let Some(setup) = &mut self.states[pty].setup {
            setup.exclusive[1] |= slave.flag(TIOCGEXCL)?;
        }
        Ok(())
    }
}

/// # Errors
/// Refused: a devpts that is not the container's own.
fn point_of(of: &Candidate<'_>, init: Pid) -> Result<String> {
    let me = std::process::id() as Pid;
    let dev = (libc::major(of.id.dev), libc::minor(of.id.dev));
    let is_it = |m: &&proc::Mount| m.dev == dev && m.root == "/" && m.fs_type == "devpts";
    let ours = proc::mountinfo(me).about(me, "own mounts")?;
    let theirs = proc::mountinfo(init).about(init, "mounts")?;
    match theirs.iter().find(is_it) {
        Some(mount) if !ours.iter().any(|m| m.dev == dev) => Ok(mount.point.clone()),
        _ => Err(of.refuse(
            "its terminal is not one of a devpts of the container's own",
            "mount a devpts in the container (newinstance)",
        )),
    }
}

/// All that the master tells, which is the same from outside as from inside.
fn collect(master: &Candidate<'_>, slave: &str, around: &Around<'_>) -> Result<Setup> {
    let about = |r: torpor_sys::Result<[u8; TERMIOS]>| r.about(master.pid, master.object());
    master.check()?;
    let events = fd::poll_now(master.fd);
    if events & libc::POLLPRI != 0 {
        let why = "a change waits to be told in packet mode (TIOCPKT)";
        return Err(master.refuse(why, "try again when the program has read it"));
    }
    if master.flags & libc::O_ACCMODE != libc::O_RDWR {
        return Err(master.refuse("a master that is not open for reading and writing is not carried", ""));
    }
    let node = (around.stat)(slave).about(master.pid, master.object())?;
    let maps = IdMaps {
        uids: proc::id_map(around.init, "uid_map").about(around.init, "uid_map")?,
        gids: proc::id_map(around.init, "gid_map").about(around.init, "gid_map")?,
    };
    let (uid, gid) = maps.inner(node.uid, node.gid);
    let (session, foreground) = session(master, around)?;
    Ok(Setup {
        termios: about(fd::ioctl_get(master.fd, TCGETS2))?.into(),
        locked: about(fd::ioctl_get(master.fd, TIOCGLCKTRMIOS))?.into(),
        winsize: fd::ioctl_get::<8>(master.fd, TIOCGWINSZ)
            .about(master.pid, master.object())?
            .into(),
        is_locked: master.flag(TIOCGPTLCK)?,
        packets: master.flag(TIOCGPKT)?,
        exclusive: [master.flag(TIOCGEXCL)?, false],
        was_closed: events & libc::POLLHUP != 0,
        owner: (uid, gid, node.mode & 0o7777),
        session,
        foreground,
    })
}

/// The session that the terminal controls and its foreground group, as the container numbers them; 0 for none.
fn session(master: &Candidate<'_>, around: &Around<'_>) -> Result<(i32, i32)> {
    let Ok(leader) = fd::ioctl_int(master.fd, TIOCGSID) else {
        return Ok((0, 0));
    };
    let session = around.tasks.inner(leader).ok_or_else(|| {
        let why = "it is the controlling terminal of a session that is not saved";
        master.refuse(why, "end the session first")
    })?;
    let group = fd::ioctl_int(master.fd, TIOCGPGRP).unwrap_or(0);
    let foreground = around.tasks.inner_group(group).unwrap_or(0);
    for &pid in around.pids {
        let status = proc::status(pid).about(pid, "status")?;
        if status.ns_sids.first() == Some(&leader) && proc::stat(pid).about(pid, "stat")?.tpgid == -1 {
            let why = "it has none, but the leader of its session has one";
            return Err(Error::unsupported(pid, "controlling terminal", why, ""));
        }
    }
    Ok((session, foreground))
}

/// How the number of a new master compares with the one that it should have.
///
/// # Errors
/// The number is taken in the new container.
pub fn check_index(master: &OwnedFd, state: &State) -> Result<std::cmp::Ordering> {
    let object = format!("terminal {}/{}", state.point, state.index);
    let got = fd::ioctl_int(master, TIOCGPTN).about(1, &object)?;
    if got > state.index {
        return Err(Error::unsupported(
            1,
            object,
            "the new container has given its number away",
            "",
        ));
    }
    Ok(got.cmp(&state.index))
}

/// Sets a new terminal up like the old one, as far as its slave can still be opened.
pub fn rebuild(master: &OwnedFd, state: &State) -> Result<()> {
    let object = || format!("terminal {}/{}", state.point, state.index);
    fd::ioctl_set(master, TIOCSPTLCK, &0i32.to_le_bytes()).about(1, object())?;
    let Some(setup) = &state.setup else { return Ok(()) };
    let bad = |_| Error::nonsense(format!("{} has settings of another length", object()));
    let termios: [u8; TERMIOS] = setup.termios.as_slice().try_into().map_err(bad)?;
    let locked: [u8; TERMIOS] = setup.locked.as_slice().try_into().map_err(bad)?;
    let winsize: [u8; 8] = setup.winsize.as_slice().try_into().map_err(bad)?;
    fd::ioctl_set(master, TCSETS2, &termios).about(1, object())?;
    fd::ioctl_set(master, TIOCSLCKTRMIOS, &locked).about(1, object())?;
    fd::ioctl_set(master, TIOCSWINSZ, &winsize).about(1, object())
}

/// What would be in the way of opening it: last. `slave` is any description of the slave.
pub fn close_up(master: &OwnedFd, slave: Option<&OwnedFd>, setup: &Setup) -> Result<()> {
    let set = |fd: &OwnedFd, request: u64, on: bool| {
        let value = i32::from(on).to_le_bytes();
        if on { fd::ioctl_set(fd, request, &value) } else { Ok(()) }.about(1, "terminal")
    };
    set(master, TIOCPKT, setup.packets)?;
    set(master, TIOCEXCL, setup.exclusive[0])?;
    if let Some(slave) = slave {
        set(slave, TIOCEXCL, setup.exclusive[1])?;
    }
    set(master, TIOCSPTLCK, setup.is_locked)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_go_on_in_the_next_major() {
        assert_eq!(index_of(libc::makedev(136, 3)), 3);
        assert_eq!(index_of(libc::makedev(137, 1)), 257);
    }
}
