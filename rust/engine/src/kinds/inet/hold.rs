//! Peers outside are made to wait while their connections are saved: what the kernel acknowledged after the look at a
//! connection would be lost with it. A filter on each socket drops what arrives, as a network does; the peers send it
//! again, to the restored connection, or to this one when nothing comes of the checkpoint.

use std::os::fd::{AsFd, OwnedFd};
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use torpor_sys::Pid;
use torpor_sys::socket::{stall, tcp};

use crate::error::{About, Result};

/// How long the filter lasts when nobody is left to remove it.
const LASTS: Duration = Duration::from_secs(10);
const RENEWED: Duration = Duration::from_secs(2);

/// Connections to which nothing gets through. Dropping it ends that.
#[derive(Debug)]
pub struct Hold {
    sockets: Vec<OwnedFd>,
    renewal: Option<(Sender<()>, JoinHandle<()>)>,
}

impl Hold {
    /// Begins it.
    pub(super) fn take<'a>(init: Pid, sockets: impl Iterator<Item = &'a OwnedFd>) -> Result<Option<Hold>> {
        const OBJECT: &str = "TCP connections to the outside";
        let copy = |s: &OwnedFd| s.as_fd().try_clone_to_owned();
        let sockets: std::io::Result<Vec<OwnedFd>> = sockets.map(copy).collect();
        let sockets = sockets
            .map_err(|e| torpor_sys::Error::io("dup", "socket", &e))
            .about(init, OBJECT)?;
        if sockets.is_empty() {
            return Ok(None);
        }
        let mut hold = Hold { sockets, renewal: None };
        stall::stall(&hold.sockets, LASTS.as_millis() as u64).about(init, OBJECT)?;
        hold.renew().about(init, OBJECT)?;
        Ok(Some(hold))
    }

    /// Makes it last as long as this process does.
    fn renew(&mut self) -> torpor_sys::Result<()> {
        let copies: std::io::Result<Vec<OwnedFd>> = self.sockets.iter().map(OwnedFd::try_clone).collect();
        let copies = copies.map_err(|e| torpor_sys::Error::io("dup", "socket", &e))?;
        let (stop, stopped) = channel();
        let thread = std::thread::spawn(move || {
            while stopped.recv_timeout(RENEWED) == Err(RecvTimeoutError::Timeout) {
                let _ = stall::stall(&copies, LASTS.as_millis() as u64);
            }
        });
        self.renewal = Some((stop, thread));
        Ok(())
    }

    fn stop_renewal(&mut self) {
        if let Some((stop, thread)) = self.renewal.take() {
            drop(stop);
            let _ = thread.join();
        }
    }

    /// Ends the connections when all programs that had them are gone. A socket that is closed in repair tells its peer
    /// nothing.
    pub fn bury(mut self) {
        self.stop_renewal();
        for socket in self.sockets.drain(..) {
            // One that is gone already has nothing to tell.
            let _ = tcp::enter(&socket);
        }
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.stop_renewal();
        // What cannot be removed ends by itself.
        let _ = stall::release(&self.sockets);
    }
}
