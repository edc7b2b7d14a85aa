//! Bringing descriptors into a process and to their numbers.

use std::os::fd::OwnedFd;

use torpor_sys::fd;
use torpor_sys::remote::{Arg, Batch, Site};

use super::Skeleton;
use crate::error::{About, Error, Result};

/// The kernel passes at most 253 descriptors in one message (SCM_MAX_FD).
pub(super) const AT_ONCE: usize = 200;

impl Skeleton {
    /// Sends descriptors into a process. The n-th gets the number that [`Skeleton::temporary`] says.
    pub(super) fn send(&self, pid: i32, fds: &[&OwnedFd]) -> Result<()> {
        self.send_to(self.site(pid)?, pid, fds)
    }

    /// The same, into a thread.
    pub(super) fn send_to(&self, site: &Site, pid: i32, fds: &[&OwnedFd]) -> Result<()> {
        let transport = self.transport.as_ref().ok_or_else(|| Error::nonsense("no transport"))?;
        for (group_index, group) in fds.chunks(AT_ONCE).enumerate() {
            fd::send_fds(transport, group).about(pid, "descriptors")?;
            let mut batch = Batch::new();
            let numbers = self.receive(&mut batch, group.len());
            let mut placed = Vec::new();
            for number in &numbers {
                let from = self.base + 1;
                let what = "F_DUPFD_CLOEXEC";
                let args = [*number, libc::F_DUPFD_CLOEXEC.into(), from.into()];
                placed.push(batch.must(what, libc::SYS_fcntl, args));
                batch.must("close", libc::SYS_close, [*number]);
            }
            let results = site.run(&batch).about(pid, "descriptors")?;
            for (i, call) in placed.iter().enumerate() {
                if results.raw(*call) != i64::from(self.temporary(group_index * AT_ONCE + i)) {
                    return Err(Error::nonsense(format!("a descriptor of process {pid} went astray")));
                }
            }
        }
        Ok(())
    }

    /// Where the n-th descriptor of a [`Skeleton::send`] is.
    pub(super) fn temporary(&self, n: usize) -> i32 {
        self.base + 1 + n as i32
    }

    /// Adds a recvmsg(2) of `count` descriptors; returns where their numbers will be.
    fn receive(&self, batch: &mut Batch, count: usize) -> Vec<Arg> {
        let control_len = 16 + (count * 4).next_multiple_of(8);
        let byte = batch.room(8);
        let iov = batch.data(&[0u64.to_le_bytes(), 1u64.to_le_bytes()].concat());
        batch.point(iov, byte);
        let control = batch.room(control_len + 8);
        // struct msghdr: name, namelen, iov, iovlen, control, controllen, flags.
        let words = [0, 0, 0, 1, 0, control_len as u64, 0];
        let header = batch.data(&words.iter().flat_map(|w: &u64| w.to_le_bytes()).collect::<Vec<u8>>());
        batch.point(header.skip(16), iov);
        batch.point(header.skip(32), control);
        let args = [self.base.into(), header.into(), libc::MSG_CMSG_CLOEXEC.into()];
        batch.must("recvmsg", libc::SYS_recvmsg, args);
        (0..count).map(|i| Arg::Word(control.skip(16 + i * 4))).collect()
    }

    /// Closes what was sent.
    pub(super) fn close_temporary(&self, batch: &mut Batch) {
        batch.must(
            "close_range",
            libc::SYS_close_range,
            [(self.base + 1).into(), u32::MAX.into(), 0.into()],
        );
    }

    /// Closes everything of ours, the transport included.
    pub(super) fn close_ours(&self, batch: &mut Batch) {
        batch.must(
            "close_range",
            libc::SYS_close_range,
            [self.base.into(), u32::MAX.into(), 0.into()],
        );
    }
}
