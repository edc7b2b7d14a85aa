//! Pseudo-terminals of the container's own: made before the tree grows, since a process is born with the controlling
//! terminal that its parent has at that time.

use std::cmp::Ordering;
use std::os::fd::OwnedFd;

use torpor_sys::pidfd;
use torpor_sys::remote::Batch;

use super::Skeleton;
use crate::error::{About, Error, Result};
use crate::kinds::files::{Description, Object};
use crate::kinds::pty::{self, End, Setup, Side, State};
use crate::model::{Inventory, Process};

const TIOCSPGRP: i64 = 0x5410;
/// How many numbers may be free between those that are taken.
const MOST: usize = 4096;

/// A new pseudo-terminal.
#[derive(Debug)]
pub struct Made {
    master: OwnedFd,
    /// Keeps it the controlling terminal of its session: the kernel forgets that with the slave's last close.
    slave: Option<OwnedFd>,
}

fn path(state: &State) -> String {
    format!("{}/{}", state.point, state.index)
}

/// The terminal that a session leader has.
fn controlled<'i>(inventory: &'i Inventory, process: &Process) -> Option<(&'i State, &'i Setup)> {
    let of = |s: &'i State| Some((s, s.setup.as_ref()?));
    let mut all = inventory.objects.ptys.iter().filter_map(of);
    all.find(|(_, setup)| setup.session == process.sid && process.sid == process.pid)
}

impl Skeleton {
    /// Makes them, in the order of their numbers: the kernel gives the lowest that is free.
    pub(super) fn make_terminals(&mut self, inventory: &Inventory) -> Result<()> {
        let states = &inventory.objects.ptys;
        let mut order: Vec<usize> = (0..states.len()).collect();
        order.sort_by_key(|at| states[*at].index);
        let mut made: Vec<Option<Made>> = states.iter().map(|_| None).collect();
        let mut gaps = Vec::new();
        for at in order {
            made[at] = Some(self.make_terminal(&states[at], &mut gaps)?);
        }
        self.terminals = made.into_iter().flatten().collect();
        Ok(())
    }

    fn make_terminal(&self, state: &State, gaps: &mut Vec<OwnedFd>) -> Result<Made> {
        let master = loop {
            let master = self.open_one(&format!("{}/ptmx", state.point), libc::O_RDWR)?;
            if pty::check_index(&master, state)? == Ordering::Equal {
                break master;
            }
            gaps.push(master);
            if gaps.len() > MOST {
                return Err(Error::unsupported(
                    1,
                    path(state),
                    "too many numbers before it are free",
                    "",
                ));
            }
        };
        pty::rebuild(&master, state)?;
        let mut slave = None;
        if let Some(setup) = &state.setup {
            let mut batch = Batch::new();
            let name = batch.string(&path(state));
            let (uid, gid, mode) = setup.owner;
            let at = libc::AT_FDCWD;
            let to = [at.into(), name.into(), uid.into(), gid.into(), 0.into()];
            batch.must(format!("chown of {}", path(state)), libc::SYS_fchownat, to);
            let to = [at.into(), name.into(), mode.into()];
            batch.must(format!("chmod of {}", path(state)), libc::SYS_fchmodat, to);
            self.root()?.run(&batch).about(1, "terminal")?;
            if setup.session != 0 || setup.was_closed {
                slave = Some(self.open_one(&path(state), libc::O_RDWR)?).filter(|_| setup.session != 0);
            }
        }
        Ok(Made { master, slave })
    }

    fn open_one(&self, path: &str, flags: i32) -> Result<OwnedFd> {
        let mut fds = self.open_as(&[(path.into(), flags)], None)?;
        fds.pop().ok_or_else(|| Error::nonsense("a terminal was not opened"))
    }

    /// Lets a session leader take its terminal: it is the first that the leader opens (tty_open() of the kernel).
    pub(super) fn take_terminal(&self, inventory: &Inventory, process: &Process, batch: &mut Batch) {
        let Some((state, _)) = controlled(inventory, process) else {
            return;
        };
        let name = batch.string(&path(state));
        let flags = libc::O_RDWR | libc::O_CLOEXEC;
        let args = [libc::AT_FDCWD.into(), name.into(), flags.into(), 0.into()];
        batch.must(format!("open of {}", path(state)), libc::SYS_openat, args);
        // It is at the lowest free number, and nothing else of a process that is being built is below the transport.
        batch.must(
            "close_range",
            libc::SYS_close_range,
            [0.into(), (self.base - 1).into(), 0.into()],
        );
    }

    /// Puts the groups into the foreground that were, when all groups are there.
    pub(super) fn foregrounds(&self, inventory: &Inventory) -> Result<()> {
        for process in inventory.processes.iter().filter(|p| p.zombie.is_none()) {
            let Some((state, setup)) = controlled(inventory, process) else {
                continue;
            };
            if setup.foreground == 0 {
                continue;
            }
            let mut batch = Batch::new();
            let name = batch.string(&path(state));
            let flags = libc::O_RDWR | libc::O_CLOEXEC | libc::O_NOCTTY;
            let args = [libc::AT_FDCWD.into(), name.into(), flags.into(), 0.into()];
            batch.must(format!("open of {}", path(state)), libc::SYS_openat, args);
            let group = batch.data(&i64::from(setup.foreground).to_le_bytes());
            // The lowest free number, as above.
            batch.must("TIOCSPGRP", libc::SYS_ioctl, [0.into(), TIOCSPGRP.into(), group.into()]);
            batch.must("close", libc::SYS_close, [0.into()]);
            self.results(process.pid, &batch, "foreground group of its terminal")?;
        }
        Ok(())
    }

    /// One more description of an end; of a master there is only one.
    pub(super) fn terminal_end(&self, inventory: &Inventory, end: End, flags: i32) -> Result<OwnedFd> {
        let missing = || Error::nonsense("a terminal is missing");
        let state = inventory.objects.ptys.get(end.pty).ok_or_else(missing)?;
        let made = self.terminals.get(end.pty).ok_or_else(missing)?;
        match end.side {
            Side::Master => {
                let same = made.master.try_clone();
                same.map_err(|e| torpor_sys::Error::io("dup", "terminal", &e))
                    .about(1, path(state))
            }
            Side::Slave => self.open_one(&path(state), flags),
            Side::Controlling => {
                let session = state.setup.as_ref().map_or(0, |s| s.session);
                self.open_controlling(session, flags)
            }
        }
    }

    fn open_controlling(&self, leader: i32, flags: i32) -> Result<OwnedFd> {
        let mut batch = Batch::new();
        let name = batch.string("/dev/tty");
        let args = [
            libc::AT_FDCWD.into(),
            name.into(),
            (flags | libc::O_CLOEXEC).into(),
            0.into(),
        ];
        let call = batch.must("open of /dev/tty", libc::SYS_openat, args);
        let number = self.results(leader, &batch, "terminal")?.raw(call) as i32;
        let process = pidfd::open(self.site(leader)?.tid()).about(leader, "pidfd")?;
        let taken = pidfd::get_fd(&process, number).about(leader, "terminal")?;
        let mut batch = Batch::new();
        batch.must("close", libc::SYS_close, [number.into()]);
        self.results(leader, &batch, "terminal")?;
        Ok(taken)
    }

    /// When all ends are open: closes what was closed, and locks what was locked.
    pub(super) fn finish_terminals(&mut self, inventory: &Inventory, descriptions: &[OwnedFd]) -> Result<()> {
        for (at, made) in std::mem::take(&mut self.terminals).into_iter().enumerate() {
            let is_slave = |(d, _): &(&Description, &OwnedFd)| matches!(d.object, Object::Pty(End { pty, side }) if pty == at && side != Side::Master);
            let slave = inventory.descriptions.iter().zip(descriptions).find(is_slave);
            if let Some(setup) = &inventory.objects.ptys[at].setup {
                pty::close_up(&made.master, slave.map(|(_, fd)| fd), setup)?;
            }
            drop(made.slave);
        }
        Ok(())
    }
}
