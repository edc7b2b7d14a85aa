//! Memory of another process, read and written from outside.

use std::fs::File;
use std::os::fd::{AsFd, AsRawFd};
use std::os::unix::fs::FileExt;

use crate::error::{Error, Result, check};
use crate::{Pid, RemoteAddr};

/// The memory of one process through /proc/PID/mem, which ignores page protections (FOLL_FORCE),
/// and through process_vm_readv(2), which does not but copies once.
#[derive(Debug)]
pub struct Memory {
    pid: Pid,
    file: File,
}

impl Memory {
    /// Opens the memory of a process that we trace.
    pub fn open(pid: Pid) -> Result<Memory> {
        let path = format!("/proc/{pid}/mem");
        let file = File::options()
            .read(true)
            .write(true)
            .open(&path)
            .map_err(|e| Error::io("open", &path, &e))?;
        Ok(Memory { pid, file })
    }

    /// The process.
    pub fn pid(&self) -> Pid {
        self.pid
    }

    /// Reads exactly `buf.len()` bytes, whatever the protection of the pages.
    pub fn read(&self, address: RemoteAddr, buf: &mut [u8]) -> Result<()> {
        self.file
            .read_exact_at(buf, address)
            .map_err(|e| Error::io("read", format!("memory of {} at {address:#x}", self.pid), &e))
    }

    /// Writes all of `buf`, whatever the protection of the pages.
    pub fn write(&self, address: RemoteAddr, buf: &[u8]) -> Result<()> {
        self.file
            .write_all_at(buf, address)
            .map_err(|e| Error::io("write", format!("memory of {} at {address:#x}", self.pid), &e))
    }

    /// Reads one 64-bit word.
    pub fn read_u64(&self, address: RemoteAddr) -> Result<u64> {
        let mut word = [0; 8];
        self.read(address, &mut word)?;
        Ok(u64::from_le_bytes(word))
    }

    /// Copies pages, whatever their protection, that the process may have in common with another since a fork: the
    /// ranges' bytes one after another into `buf`. [`Memory::gather`] would give the process a copy of its own of each
    /// (a pinned page must not be shared: FAULT_FLAG_UNSHARE in mm/gup.c, since Linux 5.19), which takes twice the time
    /// and as much memory again as is read. Measured for 512 MiB: 0.40 s against 0.92 s.
    pub fn gather_common(&self, ranges: &[(RemoteAddr, u64)], buf: &mut [u8]) -> Result<()> {
        let mut rest = buf;
        for &(address, len) in ranges {
            let (part, after) = rest.split_at_mut(len as usize);
            self.read(address, part)?;
            rest = after;
        }
        Ok(())
    }

    /// Copies readable pages in one go: the ranges' bytes one after another into `buf`.
    /// Falls back to [`Memory::read`] for ranges that cannot be read by the process itself.
    /// For pages that no other process has: see [`Memory::gather_common`].
    pub fn gather(&self, ranges: &[(RemoteAddr, u64)], buf: &mut [u8]) -> Result<()> {
        let mut done = 0usize;
        for chunk in ranges.chunks(512) {
            let want: usize = chunk.iter().map(|r| r.1 as usize).sum();
            let out = &mut buf[done..done + want];
            if self.vm_read(chunk, out)? != want {
                let mut at = 0;
                for &(address, len) in chunk {
                    self.read(address, &mut out[at..at + len as usize])?;
                    at += len as usize;
                }
            }
            done += want;
        }
        Ok(())
    }

    fn vm_read(&self, ranges: &[(RemoteAddr, u64)], out: &mut [u8]) -> Result<usize> {
        let local = libc::iovec {
            iov_base: out.as_mut_ptr().cast(),
            iov_len: out.len(),
        };
        let remote: Vec<libc::iovec> = ranges
            .iter()
            .map(|&(a, n)| libc::iovec {
                iov_base: a as *mut _,
                iov_len: n as usize,
            })
            .collect();
        // SAFETY: `local` covers exactly `out`; the remote addresses are only used by the kernel.
        let ret = unsafe {
            libc::process_vm_readv(
                self.pid,
                &raw const local,
                1,
                remote.as_ptr(),
                remote.len() as libc::c_ulong,
                0,
            )
        };
        match check(ret as i64, "process_vm_readv", self.pid) {
            Ok(n) => Ok(n as usize),
            Err(e) if e.errno() == Some(nix::errno::Errno::EFAULT) => Ok(0),
            Err(e) => Err(e),
        }
    }

    /// Writes `data` to pages that the process itself could write.
    pub fn scatter(&self, address: RemoteAddr, data: &[u8]) -> Result<()> {
        let mut done = 0usize;
        while done < data.len() {
            let rest = &data[done..];
            let local = libc::iovec {
                iov_base: rest.as_ptr().cast_mut().cast(),
                iov_len: rest.len(),
            };
            let remote = libc::iovec {
                iov_base: (address + done as u64) as *mut _,
                iov_len: rest.len(),
            };
            // SAFETY: `local` covers exactly `rest`, which the kernel only reads.
            let ret = unsafe { libc::process_vm_writev(self.pid, &raw const local, 1, &raw const remote, 1, 0) };
            let what = format!("{} at {:#x}", self.pid, address + done as u64);
            done += check(ret as i64, "process_vm_writev", what)? as usize;
        }
        Ok(())
    }
}

/// A read-only mapping of a file, for handing its page cache to [`Memory::scatter`] without a copy of our own.
#[derive(Debug)]
pub struct Mapping {
    base: *mut libc::c_void,
    len: usize,
}

// SAFETY: the mapping is read-only and owned; moving it between threads is harmless.
unsafe impl Send for Mapping {}
// SAFETY: shared access only reads.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps `len` bytes of `file` from `offset` (a multiple of the page size).
    pub fn of(file: &File, offset: u64, len: usize) -> Result<Mapping> {
        use std::os::fd::AsRawFd;
        // SAFETY: a new shared read-only mapping at an address of the kernel's choice.
        let base = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                len,
                libc::PROT_READ,
                libc::MAP_SHARED,
                file.as_raw_fd(),
                offset as libc::off_t,
            )
        };
        if base == libc::MAP_FAILED {
            return Err(Error::last("mmap", "image"));
        }
        Ok(Mapping { base, len })
    }

    /// The bytes. A read error of the device shows as SIGBUS, which the caller's process must expect.
    pub fn bytes(&self) -> &[u8] {
        // SAFETY: base..base+len stays mapped as long as self lives.
        unsafe { std::slice::from_raw_parts(self.base.cast(), self.len) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: unmaps exactly what `of` mapped.
        unsafe { libc::munmap(self.base, self.len) };
    }
}

/// Puts the pages of a range of another process together into huge pages, those that are not yet (process_madvise(2),
/// MADV_COLLAPSE, kernel 6.1). `start` and `len` are multiples of 2 MiB.
///
/// # Errors
/// ENOMEM or EBUSY without a free huge page, EINVAL where the mapping or the kernel allows none.
pub fn collapse(process: impl AsFd, start: RemoteAddr, len: u64) -> Result<()> {
    const MADV_COLLAPSE: i32 = 25;
    let range = libc::iovec {
        iov_base: start as *mut _,
        iov_len: len as usize,
    };
    let fd = process.as_fd().as_raw_fd();
    // SAFETY: one iovec that is only read; its address is one of the other process.
    let ret = unsafe { libc::syscall(libc::SYS_process_madvise, fd, &raw const range, 1, MADV_COLLAPSE, 0) };
    check(ret, "process_madvise", format!("{start:x}+{len:x}")).map(drop)
}
