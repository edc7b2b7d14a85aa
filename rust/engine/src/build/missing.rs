//! Making userfaultfds inside the processes that are being built, for a background restore.

use std::os::fd::OwnedFd;

use torpor_image::Reader;
use torpor_sys::remote::Batch;
use torpor_sys::track::{self, Watch};
use torpor_sys::uffd::Uffd;
use torpor_sys::{fd, pidfd};

use super::Skeleton;
use crate::error::{About, Error, Result};
use crate::fill::parts;
use crate::model::Inventory;
use crate::pager::Missing;

/// `_IO(0xAA, 0)`: a new descriptor from /dev/userfaultfd.
const NEW: i64 = 0xaa00;

impl Skeleton {
    /// Everything that may come after the programs run: a userfaultfd for each process that has such memory.
    pub fn missing(&self, inventory: &Inventory, image: &Reader) -> Result<Vec<Missing>> {
        let mut all = Vec::new();
        for (index, process) in inventory.processes.iter().enumerate() {
            let Some(body) = &process.body else { continue };
            let number = index as u32;
            let mut ranges: Vec<(u64, u64)> = Vec::new();
            for run in image.runs_of(number).iter().filter(|r| !r.is_zero()) {
                ranges.extend(
                    parts(body, run)
                        .filter(|(a, ..)| a.can_wait())
                        .map(|(a, ..)| (a.start, a.end)),
                );
            }
            ranges.dedup();
            if !ranges.is_empty() {
                all.push(Missing {
                    uffd: self.userfaultfd(process.pid)?,
                    pid: self.site(process.pid)?.tid(),
                    number,
                    huge: body.memory.huge.clone(),
                    ranges,
                });
            }
        }
        Ok(all)
    }

    /// A userfaultfd of a process. The system call is refused to a process in a user namespace; an open
    /// /dev/userfaultfd, sent in, is not (kernel 6.1).
    pub fn userfaultfd(&self, pid: i32) -> Result<Uffd> {
        let flags = libc::O_CLOEXEC | libc::O_NONBLOCK;
        let mut batch = Batch::new();
        let call = batch.may("userfaultfd", libc::SYS_userfaultfd, [flags.into()]);
        let results = self.site(pid)?.run(&batch).about(pid, "userfaultfd")?;
        let number = match results.raw(call) {
            refused if refused == -i64::from(libc::EPERM) => self.watch_by_device(pid, flags)?,
            _ => results.get(call, "userfaultfd").about(pid, "userfaultfd")? as i32,
        };
        let file = self.take(pid, number)?;
        Uffd::enable(file).about(pid, "userfaultfd")
    }

    /// A watch over what a process writes to (see track.rs).
    pub fn write_watch(&self, pid: i32) -> Result<Watch> {
        let mut batch = Batch::new();
        let call = batch.must("userfaultfd", libc::SYS_userfaultfd, [track::FLAGS.into()]);
        let results = self.site(pid)?.run(&batch).about(pid, "userfaultfd")?;
        let file = self.take(pid, results.raw(call) as i32)?;
        Watch::enable(file).about(pid, "userfaultfd")
    }

    fn watch_by_device(&self, pid: i32, flags: i32) -> Result<i32> {
        let device = fd::open("/dev/userfaultfd", libc::O_RDWR).about(pid, "userfaultfd")?;
        self.send(pid, &[&device])?;
        let mut batch = Batch::new();
        let args = [self.temporary(0).into(), NEW.into(), flags.into()];
        let call = batch.must("USERFAULTFD_IOC_NEW", libc::SYS_ioctl, args);
        let results = self.site(pid)?.run(&batch).about(pid, "userfaultfd")?;
        Ok(results.raw(call) as i32)
    }

    /// Takes a descriptor over, and closes it and the temporary ones there.
    fn take(&self, pid: i32, number: i32) -> Result<OwnedFd> {
        let site = self.site(pid)?;
        let process = pidfd::open(site.tid()).about(pid, "pidfd")?;
        let file = pidfd::get_fd(&process, number).about(pid, "userfaultfd")?;
        let mut batch = Batch::new();
        batch.must("close", libc::SYS_close, [number.into()]);
        self.close_temporary(&mut batch);
        site.run(&batch).about(pid, "userfaultfd")?;
        if number < 0 {
            return Err(Error::nonsense("no userfaultfd"));
        }
        Ok(file)
    }
}
