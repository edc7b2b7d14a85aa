//! Calls on descriptors of our own that std and nix do not have in the shape needed here.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::error::{Error, Result, check};

/// Identity and type of an open file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct FileId {
    pub dev: u64,
    pub ino: u64,
    pub mode: u32,
    pub size: u64,
    pub nlink: u64,
    pub rdev: u64,
    pub uid: u32,
    pub gid: u32,
    /// Nanoseconds after the epoch.
    pub mtime: i64,
}

impl FileId {
    /// The S_IFMT part of the mode.
    pub fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
}

fn from_stat(st: &libc::stat) -> FileId {
    FileId {
        dev: st.st_dev,
        ino: st.st_ino,
        mode: st.st_mode,
        size: st.st_size.try_into().unwrap_or(0),
        nlink: st.st_nlink,
        rdev: st.st_rdev,
        uid: st.st_uid,
        gid: st.st_gid,
        mtime: st
            .st_mtime
            .saturating_mul(1_000_000_000)
            .saturating_add(st.st_mtime_nsec),
    }
}

/// fstat(2).
pub fn stat(fd: impl AsFd) -> Result<FileId> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: st is a plain struct for the kernel to fill.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    check(unsafe { libc::fstat(fd, &raw mut st) }.into(), "fstat", fd)?;
    Ok(from_stat(&st))
}

/// stat(2), following links.
pub fn stat_path(path: &str) -> Result<FileId> {
    let c = c_string(path)?;
    // SAFETY: st is a plain struct for the kernel to fill, c a C string.
    let mut st: libc::stat = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    check(unsafe { libc::stat(c.as_ptr(), &raw mut st) }.into(), "stat", path)?;
    Ok(from_stat(&st))
}

fn c_string(path: &str) -> Result<std::ffi::CString> {
    std::ffi::CString::new(path).map_err(|_| Error::Parse {
        file: "path".into(),
        text: path.into(),
    })
}

/// open(2) with close-on-exec.
pub fn open(path: &str, flags: i32) -> Result<OwnedFd> {
    let c = c_string(path)?;
    // SAFETY: c is a C string.
    let fd = unsafe { libc::open(c.as_ptr(), flags | libc::O_CLOEXEC) };
    check(fd.into(), "open", path)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// fcntl(2) with a number as argument.
pub fn fcntl(fd: impl AsFd, command: i32, arg: i64) -> Result<i32> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: commands that take a pointer are not passed here by callers of this crate.
    let ret = unsafe { libc::fcntl(fd, command, arg) };
    check(ret.into(), "fcntl", fd).map(|v| v as i32)
}

/// An ioctl(2) that gives a 32-bit number.
pub fn ioctl_int(fd: impl AsFd, request: u64) -> Result<i32> {
    let fd = fd.as_fd().as_raw_fd();
    let mut value: i32 = 0;
    // SAFETY: value is room for the result.
    let ret = unsafe { libc::ioctl(fd, request, &raw mut value) };
    check(ret.into(), "ioctl", fd)?;
    Ok(value)
}

/// An ioctl(2) that fills a struct of `N` bytes.
pub fn ioctl_get<const N: usize>(fd: impl AsFd, request: u64) -> Result<[u8; N]> {
    let fd = fd.as_fd().as_raw_fd();
    let mut value = [0u8; N];
    // SAFETY: callers pass a request whose result has N bytes.
    let ret = unsafe { libc::ioctl(fd, request, value.as_mut_ptr()) };
    check(ret.into(), "ioctl", fd)?;
    Ok(value)
}

/// An ioctl(2) that takes a struct of `N` bytes.
pub fn ioctl_set<const N: usize>(fd: impl AsFd, request: u64, value: &[u8; N]) -> Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: callers pass a request whose argument has N bytes.
    let ret = unsafe { libc::ioctl(fd, request, value.as_ptr()) };
    check(ret.into(), "ioctl", fd).map(drop)
}

/// The content of a pipe, left in it: tee(2) into a pipe of ours. `fd` must be open for reading. One piece for
/// each read(2), which in packet mode is a packet.
pub fn pipe_content(fd: impl AsFd) -> Result<Vec<Vec<u8>>> {
    let len = ioctl_int(&fd, libc::FIONREAD)?;
    if len == 0 {
        return Ok(Vec::new());
    }
    let size = fcntl(&fd, libc::F_GETPIPE_SZ, 0)?;
    let (reader, writer) = pipe()?;
    fcntl(&writer, libc::F_SETPIPE_SZ, size.into())?;
    // SAFETY: plain descriptors and numbers.
    let copied = unsafe {
        libc::tee(
            fd.as_fd().as_raw_fd(),
            writer.as_raw_fd(),
            usize::MAX >> 1,
            libc::SPLICE_F_NONBLOCK,
        )
    };
    check(copied as i64, "tee", "pipe")?;
    drop(writer);
    let mut file = std::fs::File::from(reader);
    let mut pieces = Vec::new();
    let mut buffer = vec![0; size.max(len) as usize];
    loop {
        let got = std::io::Read::read(&mut file, &mut buffer).map_err(|e| Error::io("read", "pipe", &e))?;
        if got == 0 {
            break;
        }
        pieces.push(buffer[..got].to_vec());
    }
    let total: usize = pieces.iter().map(Vec::len).sum();
    if total != len as usize {
        return Err(Error::Parse {
            file: "pipe".into(),
            text: format!("{total} of {len} bytes"),
        });
    }
    Ok(pieces)
}

/// A pipe: (read end, write end).
pub fn pipe() -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    let ret = unsafe { libc::pipe2(fds.as_mut_ptr(), libc::O_CLOEXEC) };
    check(ret.into(), "pipe2", "")?;
    // SAFETY: the kernel just gave us both.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// The ranges of a file that hold data (SEEK_DATA, SEEK_HOLE), as (start, end).
pub fn data_ranges(fd: impl AsFd, size: u64) -> Result<Vec<(u64, u64)>> {
    let fd = fd.as_fd().as_raw_fd();
    let seek = |from: u64, whence| {
        // SAFETY: plain numbers.
        let at = unsafe { libc::lseek(fd, from as i64, whence) };
        check(at, "lseek", fd).map(|v| v as u64)
    };
    let mut ranges = Vec::new();
    let mut at = 0;
    while at < size {
        let start = match seek(at, libc::SEEK_DATA) {
            Ok(start) => start,
            Err(e) if e.errno() == Some(nix::errno::Errno::ENXIO) => break,
            Err(e) => return Err(e),
        };
        let end = seek(start, libc::SEEK_HOLE)?.min(size);
        ranges.push((start, end));
        at = end;
    }
    Ok(ranges)
}

/// Sends descriptors over a unix socket with one byte of data.
pub fn send_fds(socket: impl AsFd, fds: &[&OwnedFd]) -> Result<()> {
    use nix::sys::socket::{ControlMessage, MsgFlags, sendmsg};
    let raw: Vec<i32> = fds.iter().map(|f| f.as_raw_fd()).collect();
    let byte = [std::io::IoSlice::new(b"f")];
    let rights = [ControlMessage::ScmRights(&raw)];
    sendmsg::<()>(socket.as_fd().as_raw_fd(), &byte, &rights, MsgFlags::empty(), None).map_err(|errno| {
        Error::Call {
            call: "sendmsg",
            object: format!("{} descriptors", raw.len()),
            errno,
        }
    })?;
    Ok(())
}

/// Opens a path as a process whose root is `root` would see it: links cannot lead out (openat2(2),
/// RESOLVE_IN_ROOT).
pub fn open_in_root(root: impl AsFd, path: &str, flags: i32) -> Result<OwnedFd> {
    const RESOLVE_IN_ROOT: u64 = 0x10;
    let c = c_string(path)?;
    let how = [(flags | libc::O_CLOEXEC) as u64, 0, RESOLVE_IN_ROOT];
    // SAFETY: c is a C string and how has the layout of struct open_how.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            root.as_fd().as_raw_fd(),
            c.as_ptr(),
            how.as_ptr(),
            size_of_val(&how),
        )
    };
    let fd = check(fd, "openat2", path)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// memfd_create(2).
pub fn memfd(name: &str, flags: u32) -> Result<OwnedFd> {
    let c = c_string(name)?;
    // SAFETY: c is a C string.
    let fd = unsafe { libc::memfd_create(c.as_ptr(), flags | libc::MFD_CLOEXEC) };
    check(fd.into(), "memfd_create", name)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// eventfd(2).
pub fn eventfd(count: u32, flags: i32) -> Result<OwnedFd> {
    // SAFETY: plain numbers.
    let fd = unsafe { libc::eventfd(count, flags | libc::EFD_CLOEXEC) };
    check(fd.into(), "eventfd", count)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// epoll_create1(2).
pub fn epoll() -> Result<OwnedFd> {
    // SAFETY: plain numbers.
    let fd = unsafe { libc::epoll_create1(libc::EPOLL_CLOEXEC) };
    check(fd.into(), "epoll_create1", "")?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

/// The file behind a shared anonymous mapping of `len` bytes, as mmap(2) makes it.
pub fn shared_anonymous(len: u64) -> Result<OwnedFd> {
    // SAFETY: a new mapping at an address of the kernel's choice, unmapped below.
    let base = unsafe {
        libc::mmap(
            std::ptr::null_mut(),
            len as usize,
            libc::PROT_READ | libc::PROT_WRITE,
            libc::MAP_SHARED | libc::MAP_ANONYMOUS,
            -1,
            0,
        )
    };
    if base == libc::MAP_FAILED {
        return Err(Error::last("mmap", format!("{len} bytes of shared memory")));
    }
    let start = base as u64;
    let end = start + len.next_multiple_of(crate::PAGE_SIZE);
    let file = open(&format!("/proc/self/map_files/{start:x}-{end:x}"), libc::O_RDWR);
    // SAFETY: exactly what was mapped above.
    unsafe { libc::munmap(base, len as usize) };
    file
}

/// Another open file description of the same file (open(2) on /proc/self/fd/N).
pub fn reopen(fd: impl AsFd, flags: i32) -> Result<OwnedFd> {
    open(&format!("/proc/self/fd/{}", fd.as_fd().as_raw_fd()), flags)
}

/// Whether a file is made of huge pages.
pub fn is_hugetlb(fd: impl AsFd) -> Result<bool> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: a struct of plain integers, for which zeroes are valid.
    let mut of: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: room for the result.
    check(unsafe { libc::fstatfs(fd, &raw mut of) }.into(), "fstatfs", fd)?;
    Ok(of.f_type == libc::HUGETLBFS_MAGIC)
}

/// lseek(2) to an absolute position.
pub fn seek(fd: impl AsFd, pos: i64) -> Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: plain numbers.
    check(unsafe { libc::lseek(fd, pos, libc::SEEK_SET) }, "lseek", fd).map(drop)
}

/// ftruncate(2).
pub fn truncate(fd: impl AsFd, size: u64) -> Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: plain numbers.
    check(unsafe { libc::ftruncate(fd, size as i64) }.into(), "ftruncate", fd).map(drop)
}

/// fchmod(2) and fchown(2).
pub fn set_owner(fd: impl AsFd, mode: u32, uid: u32, gid: u32) -> Result<()> {
    let fd = fd.as_fd().as_raw_fd();
    // SAFETY: plain numbers.
    check(unsafe { libc::fchown(fd, uid, gid) }.into(), "fchown", fd)?;
    // SAFETY: plain numbers.
    check(unsafe { libc::fchmod(fd, mode & 0o7777) }.into(), "fchmod", fd).map(drop)
}

/// What poll(2) says of a file right now.
pub fn poll_now(fd: impl AsFd) -> i16 {
    let mut poll = libc::pollfd {
        fd: fd.as_fd().as_raw_fd(),
        events: libc::POLLIN | libc::POLLOUT,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    poll.revents
}

/// Lets this process have as many descriptors as it may.
pub fn raise_limit() {
    let mut limit = libc::rlimit {
        rlim_cur: 0,
        rlim_max: 0,
    };
    // SAFETY: limit is room for the result, then the value to set.
    unsafe {
        libc::getrlimit(libc::RLIMIT_NOFILE, &raw mut limit);
        limit.rlim_cur = limit.rlim_max;
        libc::setrlimit(libc::RLIMIT_NOFILE, &raw const limit);
    }
}

/// The address family of a socket (SO_DOMAIN).
pub fn socket_domain(fd: impl AsFd) -> Result<i32> {
    let fd = fd.as_fd().as_raw_fd();
    let mut domain: i32 = 0;
    let mut len: libc::socklen_t = 4;
    // SAFETY: domain and len are room for the result.
    let ret = unsafe {
        libc::getsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_DOMAIN,
            (&raw mut domain).cast(),
            &raw mut len,
        )
    };
    check(ret.into(), "getsockopt", fd)?;
    Ok(domain)
}

/// The names in a directory.
pub fn list(directory: impl AsFd) -> Result<Vec<String>> {
    let path = format!("/proc/self/fd/{}", directory.as_fd().as_raw_fd());
    let entries = std::fs::read_dir(&path).map_err(|e| Error::io("open", &path, &e))?;
    Ok(entries
        .flatten()
        .filter_map(|e| e.file_name().into_string().ok())
        .collect())
}
