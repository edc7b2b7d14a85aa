//! Directory trees: the calls that std does not have. Names are bytes and relative to an open directory; no look-up
//! ever follows a link, leaves the directory or enters another mount.

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use nix::errno::Errno;

use crate::error::{Error, Result, check};
use crate::fd;

/// A path longer than this is opened in pieces (PATH_MAX is 4096).
const PIECE_OF_PATH: usize = 3000;

/// What statx(2) says of a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Node {
    pub mode: u32,
    pub uid: u32,
    pub gid: u32,
    pub ino: u64,
    pub nlink: u32,
    pub size: u64,
    /// Bytes that are allocated.
    pub allocated: u64,
    pub rdev: u64,
    /// Nanoseconds after the epoch.
    pub atime: i64,
    pub mtime: i64,
    /// chattr(1) +i or +a.
    pub is_locked: bool,
}

impl Node {
    /// The S_IFMT part of the mode.
    pub fn kind(&self) -> u32 {
        self.mode & libc::S_IFMT
    }
}

/// Room of a file system. Zero means without limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(missing_docs)]
pub struct Space {
    pub bytes: u64,
    pub bytes_free: u64,
    pub nodes: u64,
    pub nodes_free: u64,
}

fn c_string(name: &[u8]) -> Result<CString> {
    CString::new(name).map_err(|_| Error::Parse {
        file: "path".into(),
        text: show(name),
    })
}

fn show(name: &[u8]) -> String {
    String::from_utf8_lossy(name).into_owned()
}

/// openat2(2) with close-on-exec.
fn open_with(directory: impl AsFd, path: &[u8], flags: i32, mode: u32, resolve: u64) -> Result<OwnedFd> {
    let c = c_string(path)?;
    let how = [(flags | libc::O_CLOEXEC) as u64, mode.into(), resolve];
    // SAFETY: c is a C string and how has the layout of struct open_how.
    let fd = unsafe {
        libc::syscall(
            libc::SYS_openat2,
            directory.as_fd().as_raw_fd(),
            c.as_ptr(),
            how.as_ptr(),
            size_of_val(&how),
        )
    };
    let fd = check(fd, "openat2", show(path))?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

const RESOLVE_NO_XDEV: u64 = 0x01;
const RESOLVE_NO_MAGICLINKS: u64 = 0x02;
const RESOLVE_NO_SYMLINKS: u64 = 0x04;
const RESOLVE_BENEATH: u64 = 0x08;
const RESOLVE_IN_ROOT: u64 = 0x10;

/// Opens what is mounted at `point`, a path as mountinfo has it, below the root directory of a container.
pub fn open_mount(root: impl AsFd, point: &str, flags: i32) -> Result<OwnedFd> {
    let resolve = RESOLVE_IN_ROOT | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS;
    open_with(root, point.as_bytes(), flags, 0, resolve)
}

/// Opens a relative path of any length. A link is not followed: with O_PATH | O_NOFOLLOW it is opened itself.
///
/// # Errors
/// EXDEV when something is mounted on it or on the way, ELOOP when a link is on the way.
pub fn open(directory: impl AsFd, path: &[u8], flags: i32) -> Result<OwnedFd> {
    const RESOLVE: u64 = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV;
    if path.len() <= PIECE_OF_PATH {
        return open_with(directory, path, flags, 0, RESOLVE);
    }
    let slash = path[..PIECE_OF_PATH].iter().rposition(|b| *b == b'/');
    let Some(slash) = slash.filter(|at| *at > 0) else {
        return Err(Error::Call {
            call: "openat2",
            object: show(path),
            errno: Errno::ENAMETOOLONG,
        });
    };
    let nearer = open(directory, &path[..slash], libc::O_PATH | libc::O_DIRECTORY)?;
    open(nearer, &path[slash + 1..], flags)
}

/// Makes a regular file that must not be there yet, open for writing.
pub fn create(directory: impl AsFd, name: &[u8]) -> Result<OwnedFd> {
    let resolve = RESOLVE_BENEATH | RESOLVE_NO_SYMLINKS | RESOLVE_NO_MAGICLINKS | RESOLVE_NO_XDEV;
    open_with(
        directory,
        name,
        libc::O_CREAT | libc::O_EXCL | libc::O_WRONLY,
        0o600,
        resolve,
    )
}

/// Makes a FIFO, a socket file or a device node (mknodat(2)).
pub fn make_node(directory: impl AsFd, name: &[u8], mode: u32, rdev: u64) -> Result<()> {
    let c = c_string(name)?;
    // SAFETY: c is a C string.
    let ret = unsafe { libc::mknodat(directory.as_fd().as_raw_fd(), c.as_ptr(), mode, rdev) };
    check(ret.into(), "mknodat", show(name)).map(drop)
}

/// mkdirat(2).
pub fn make_directory(directory: impl AsFd, name: &[u8]) -> Result<()> {
    let c = c_string(name)?;
    // SAFETY: c is a C string.
    let ret = unsafe { libc::mkdirat(directory.as_fd().as_raw_fd(), c.as_ptr(), 0o700) };
    check(ret.into(), "mkdirat", show(name)).map(drop)
}

/// symlinkat(2).
pub fn make_link(directory: impl AsFd, name: &[u8], target: &[u8]) -> Result<()> {
    let (c, to) = (c_string(name)?, c_string(target)?);
    // SAFETY: two C strings.
    let ret = unsafe { libc::symlinkat(to.as_ptr(), directory.as_fd().as_raw_fd(), c.as_ptr()) };
    check(ret.into(), "symlinkat", show(name)).map(drop)
}

/// One more name for an open file (linkat(2), AT_EMPTY_PATH).
pub fn add_name(file: impl AsFd, directory: impl AsFd, name: &[u8]) -> Result<()> {
    let c = c_string(name)?;
    // SAFETY: two C strings.
    let ret = unsafe {
        libc::linkat(
            file.as_fd().as_raw_fd(),
            c"".as_ptr(),
            directory.as_fd().as_raw_fd(),
            c.as_ptr(),
            libc::AT_EMPTY_PATH,
        )
    };
    check(ret.into(), "linkat", show(name)).map(drop)
}

/// unlinkat(2). The caller has seen that nothing is mounted there: from here, the kernel would take the mount away too.
pub fn remove(directory: impl AsFd, name: &[u8], is_directory: bool) -> Result<()> {
    let c = c_string(name)?;
    let flags = if is_directory { libc::AT_REMOVEDIR } else { 0 };
    // SAFETY: c is a C string.
    let ret = unsafe { libc::unlinkat(directory.as_fd().as_raw_fd(), c.as_ptr(), flags) };
    check(ret.into(), "unlinkat", show(name)).map(drop)
}

/// Where an open link (O_PATH) leads.
pub fn target(link: impl AsFd) -> Result<Vec<u8>> {
    let mut room = vec![0u8; libc::PATH_MAX as usize];
    let fd = link.as_fd().as_raw_fd();
    // SAFETY: a C string and room of the given length.
    let len = unsafe { libc::readlinkat(fd, c"".as_ptr(), room.as_mut_ptr().cast(), room.len()) };
    room.truncate(check(len as i64, "readlinkat", fd)? as usize);
    Ok(room)
}

/// statx(2) of an open file, O_PATH or not.
pub fn node(file: impl AsFd) -> Result<Node> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: st is a plain struct for the kernel to fill.
    let mut st: libc::statx = unsafe { std::mem::zeroed() };
    let (flags, mask) = (libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW, libc::STATX_BASIC_STATS);
    // SAFETY: as above, and a C string.
    let ret = unsafe { libc::statx(fd, c"".as_ptr(), flags, mask, &raw mut st) };
    check(ret.into(), "statx", fd)?;
    let time = |t: libc::statx_timestamp| t.tv_sec.saturating_mul(1_000_000_000).saturating_add(t.tv_nsec.into());
    let locked = (libc::STATX_ATTR_IMMUTABLE | libc::STATX_ATTR_APPEND) as u64;
    Ok(Node {
        mode: st.stx_mode.into(),
        uid: st.stx_uid,
        gid: st.stx_gid,
        ino: st.stx_ino,
        nlink: st.stx_nlink,
        size: st.stx_size,
        allocated: st.stx_blocks.saturating_mul(512),
        rdev: libc::makedev(st.stx_rdev_major, st.stx_rdev_minor),
        atime: time(st.stx_atime),
        mtime: time(st.stx_mtime),
        is_locked: st.stx_attributes & locked != 0,
    })
}

/// Changes the owner of an open file, O_PATH or not. `None` leaves it.
pub fn set_owner(file: impl AsFd, uid: Option<u32>, gid: Option<u32>) -> Result<()> {
    let fd = file.as_fd().as_raw_fd();
    let (uid, gid) = (uid.unwrap_or(u32::MAX), gid.unwrap_or(u32::MAX));
    let flags = libc::AT_EMPTY_PATH | libc::AT_SYMLINK_NOFOLLOW;
    // SAFETY: a C string and numbers.
    let ret = unsafe { libc::fchownat(fd, c"".as_ptr(), uid, gid, flags) };
    check(ret.into(), "fchownat", fd).map(drop)
}

/// Runs a call on a descriptor; on one that is only O_PATH, where calls on descriptors fail, the one on a path.
fn by_fd_or_path<T>(
    file: impl AsFd,
    by_fd: impl Fn(i32) -> Result<T>,
    by_path: impl Fn(&CStr) -> Result<T>,
) -> Result<T> {
    let fd = file.as_fd().as_raw_fd();
    match by_fd(fd) {
        Err(e) if e.errno() == Some(Errno::EBADF) => by_path(&c_string(format!("/proc/self/fd/{fd}").as_bytes())?),
        result => result,
    }
}

/// Changes the permissions of an open file, O_PATH or not, that is not a link.
pub fn set_mode(file: impl AsFd, mode: u32) -> Result<()> {
    let mode = mode & 0o7777;
    let by_fd = |fd| {
        // SAFETY: plain numbers.
        check(unsafe { libc::fchmod(fd, mode) }.into(), "fchmod", fd).map(drop)
    };
    by_fd_or_path(file, by_fd, |path| {
        // SAFETY: path is a C string.
        check(unsafe { libc::chmod(path.as_ptr(), mode) }.into(), "chmod", mode).map(drop)
    })
}

/// Sets both times (nanoseconds after the epoch) of an open file, O_PATH or not.
pub fn set_times(file: impl AsFd, atime: i64, mtime: i64) -> Result<()> {
    let fd = file.as_fd().as_raw_fd();
    let time = |ns: i64| libc::timespec {
        tv_sec: ns.div_euclid(1_000_000_000),
        tv_nsec: ns.rem_euclid(1_000_000_000),
    };
    let times = [time(atime), time(mtime)];
    // SAFETY: a C string and two timespecs.
    let ret = unsafe { libc::utimensat(fd, c"".as_ptr(), times.as_ptr(), libc::AT_EMPTY_PATH) };
    check(ret.into(), "utimensat", fd).map(drop)
}

/// The names of the extended attributes of an open file, O_PATH or not. None where the file system has no such thing.
pub fn attributes(file: impl AsFd) -> Result<Vec<Vec<u8>>> {
    let list = |room: &mut [u8]| -> Result<usize> {
        let (at, len) = (room.as_mut_ptr().cast(), room.len());
        let by_fd = |fd| {
            // SAFETY: room of the given length.
            check(unsafe { libc::flistxattr(fd, at, len) } as i64, "flistxattr", fd)
        };
        let found = by_fd_or_path(&file, by_fd, |path| {
            // SAFETY: a C string and room of the given length.
            check(
                unsafe { libc::listxattr(path.as_ptr(), at, len) } as i64,
                "listxattr",
                "file",
            )
        });
        found.map(|len| len as usize)
    };
    // Most files have none; a list has at most XATTR_LIST_MAX bytes.
    let mut room = vec![0u8; 256];
    let len = match list(&mut room) {
        Err(e) if e.errno() == Some(Errno::ERANGE) => {
            room.resize(1 << 16, 0);
            list(&mut room)
        }
        result => result,
    };
    match len {
        Ok(len) => {
            let names = room[..len].split(|b| *b == 0);
            Ok(names.filter(|n| !n.is_empty()).map(<[u8]>::to_vec).collect())
        }
        Err(e) if e.errno() == Some(Errno::EOPNOTSUPP) => Ok(Vec::new()),
        Err(e) => Err(e),
    }
}

/// The value of an extended attribute of an open file, O_PATH or not.
pub fn attribute(file: impl AsFd, name: &[u8]) -> Result<Vec<u8>> {
    let attribute = c_string(name)?;
    let mut room = vec![0u8; 1 << 16];
    let (at, len) = (room.as_mut_ptr().cast(), room.len());
    let by_fd = |fd| {
        // SAFETY: a C string and room of the given length.
        check(
            unsafe { libc::fgetxattr(fd, attribute.as_ptr(), at, len) } as i64,
            "fgetxattr",
            show(name),
        )
    };
    let len = by_fd_or_path(file, by_fd, |path| {
        // SAFETY: two C strings and room of the given length.
        let len = unsafe { libc::getxattr(path.as_ptr(), attribute.as_ptr(), at, len) };
        check(len as i64, "getxattr", show(name))
    })?;
    room.truncate(len as usize);
    Ok(room)
}

/// Sets an extended attribute of an open file, O_PATH or not.
pub fn set_attribute(file: impl AsFd, name: &[u8], value: &[u8]) -> Result<()> {
    let attribute = c_string(name)?;
    let (at, len) = (value.as_ptr().cast(), value.len());
    let by_fd = |fd| {
        // SAFETY: a C string and bytes of the given length.
        check(
            unsafe { libc::fsetxattr(fd, attribute.as_ptr(), at, len, 0) }.into(),
            "fsetxattr",
            show(name),
        )
        .map(drop)
    };
    by_fd_or_path(file, by_fd, |path| {
        // SAFETY: two C strings and bytes of the given length.
        let ret = unsafe { libc::setxattr(path.as_ptr(), attribute.as_ptr(), at, len, 0) };
        check(ret.into(), "setxattr", show(name)).map(drop)
    })
}

/// Takes an extended attribute away.
pub fn remove_attribute(file: impl AsFd, name: &[u8]) -> Result<()> {
    let attribute = c_string(name)?;
    let by_fd = |fd| {
        // SAFETY: a C string.
        check(
            unsafe { libc::fremovexattr(fd, attribute.as_ptr()) }.into(),
            "fremovexattr",
            show(name),
        )
        .map(drop)
    };
    by_fd_or_path(file, by_fd, |path| {
        // SAFETY: two C strings.
        let ret = unsafe { libc::removexattr(path.as_ptr(), attribute.as_ptr()) };
        check(ret.into(), "removexattr", show(name)).map(drop)
    })
}

/// The first range of a file, from `from` on, that holds data (SEEK_DATA, SEEK_HOLE), as (start, end).
pub fn next_data(file: impl AsFd, from: u64) -> Result<Option<(u64, u64)>> {
    let fd = file.as_fd().as_raw_fd();
    let seek = |from: u64, whence| {
        // SAFETY: plain numbers.
        let at = unsafe { libc::lseek(fd, from as i64, whence) };
        check(at, "lseek", fd).map(|v| v as u64)
    };
    match seek(from, libc::SEEK_DATA) {
        Ok(start) => Ok(Some((start, seek(start, libc::SEEK_HOLE)?))),
        Err(e) if e.errno() == Some(Errno::ENXIO) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Takes memory or disk for the first `len` bytes of a file (fallocate(2)).
pub fn allocate(file: impl AsFd, len: u64) -> Result<()> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: plain numbers.
    let ret = unsafe { libc::fallocate(fd, 0, 0, len as i64) };
    check(ret.into(), "fallocate", fd).map(drop)
}

/// The room of the file system that a file is on.
pub fn space(file: impl AsFd) -> Result<Space> {
    let fd = file.as_fd().as_raw_fd();
    // SAFETY: st is a plain struct for the kernel to fill.
    let mut st: libc::statfs = unsafe { std::mem::zeroed() };
    // SAFETY: as above.
    check(unsafe { libc::fstatfs(fd, &raw mut st) }.into(), "fstatfs", fd)?;
    let block = st.f_bsize.unsigned_abs();
    Ok(Space {
        bytes: st.f_blocks.saturating_mul(block),
        bytes_free: st.f_bfree.saturating_mul(block),
        nodes: st.f_files,
        nodes_free: st.f_ffree,
    })
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: Vec<u8>,
    /// It is a regular file: opening it has no effect on anybody.
    pub is_file: bool,
}

/// The names in a directory that is open for reading, without `.` and `..`; read as they are asked for.
pub fn names(directory: &OwnedFd) -> Names<'_> {
    Names {
        directory,
        buffer: vec![0; 32 << 10],
        at: 0,
        end: 0,
        is_done: false,
    }
}

/// Iterator over the names in a directory.
#[derive(Debug)]
pub struct Names<'d> {
    directory: &'d OwnedFd,
    buffer: Vec<u8>,
    at: usize,
    end: usize,
    is_done: bool,
}

impl Names<'_> {
    fn refill(&mut self) -> Result<()> {
        let fd = self.directory.as_raw_fd();
        // SAFETY: room of the given length.
        let len = unsafe { libc::syscall(libc::SYS_getdents64, fd, self.buffer.as_mut_ptr(), self.buffer.len()) };
        self.end = check(len, "getdents64", fd)? as usize;
        self.at = 0;
        self.is_done = self.end == 0;
        Ok(())
    }

    /// The next name in the buffer, whatever it is (struct linux_dirent64: ino, off, reclen, type, name).
    fn take(&mut self) -> Option<DirEntry> {
        let entry = self.buffer.get(self.at..self.end)?;
        let len = usize::from(u16::from_le_bytes([*entry.get(16)?, *entry.get(17)?]));
        let is_file = *entry.get(18)? == libc::DT_REG;
        let name = entry.get(19..len)?.split(|b| *b == 0).next()?.to_vec();
        self.at += len;
        Some(DirEntry { name, is_file })
    }
}

impl Iterator for Names<'_> {
    type Item = Result<DirEntry>;

    fn next(&mut self) -> Option<Result<DirEntry>> {
        while !self.is_done {
            match self.take() {
                Some(entry) if entry.name == b"." || entry.name == b".." => {}
                Some(entry) => return Some(Ok(entry)),
                None => {
                    if let Err(e) = self.refill() {
                        self.is_done = true;
                        return Some(Err(e));
                    }
                }
            }
        }
        None
    }
}

/// Runs `work` in a thread whose new files belong to these ids, and which keeps all its capabilities. A file system
/// of a user namespace takes no files of ids that it does not know, root's included.
pub fn as_owner<T: Send>(uid: u32, gid: u32, work: impl FnOnce() -> T + Send) -> Result<T> {
    const SECBIT_NO_SETUID_FIXUP: u64 = 1 << 2;
    if (uid, gid) == (0, 0) {
        return Ok(work());
    }
    let whole = || {
        // SAFETY: plain numbers; all three concern only this thread, which ends soon.
        unsafe {
            let ret = libc::prctl(libc::PR_SET_SECUREBITS, SECBIT_NO_SETUID_FIXUP, 0, 0, 0);
            check(ret.into(), "prctl", "PR_SET_SECUREBITS")?;
            libc::syscall(libc::SYS_setfsgid, gid);
            libc::syscall(libc::SYS_setfsuid, uid);
        }
        Ok(work())
    };
    std::thread::scope(|scope| {
        scope.spawn(whole).join().unwrap_or_else(|_| {
            Err(Error::Unsuitable {
                pid: 0,
                why: "the thread that makes files died".into(),
            })
        })
    })
}

/// The POSIX message queues of the IPC namespace of the calling thread, whether it has them mounted or not.
pub fn message_queues() -> Result<Vec<Vec<u8>>> {
    const FSCONFIG_CMD_CREATE: u32 = 6;
    let flag = 1; // FSOPEN_CLOEXEC and FSMOUNT_CLOEXEC
    // SAFETY: a C string and a number.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"mqueue".as_ptr(), flag) };
    let context = match check(context, "fsopen", "mqueue") {
        // SAFETY: the kernel just gave us this descriptor.
        Ok(fd) => unsafe { OwnedFd::from_raw_fd(fd as i32) },
        // A kernel without message queues.
        Err(e) if e.errno() == Some(Errno::ENODEV) => return Ok(Vec::new()),
        Err(e) => return Err(e),
    };
    let nothing = std::ptr::null::<u8>();
    // SAFETY: this command takes neither key nor value.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            nothing,
            nothing,
            0,
        )
    };
    check(ret, "fsconfig", "mqueue")?;
    // SAFETY: plain numbers.
    let mount = unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), flag, 0) };
    // SAFETY: the kernel just gave us this descriptor.
    let mount = unsafe { OwnedFd::from_raw_fd(check(mount, "fsmount", "mqueue")? as i32) };
    let directory = fd::open_in_root(&mount, "/", libc::O_RDONLY | libc::O_DIRECTORY)?;
    names(&directory).map(|entry| entry.map(|e| e.name)).collect()
}

#[cfg(test)]
#[allow(clippy::unwrap_used)]
mod tests {
    use std::io::Write;
    use std::os::unix::fs::FileExt;

    use super::*;

    /// A directory that is removed with what is in it.
    struct Scratch(std::path::PathBuf);

    impl Scratch {
        fn new(name: &str) -> Scratch {
            let path = std::path::PathBuf::from(format!("/dev/shm/torpor-tree-{name}-{}", std::process::id()));
            std::fs::create_dir(&path).unwrap();
            Scratch(path)
        }

        fn open(&self) -> OwnedFd {
            fd::open(self.0.to_str().unwrap(), libc::O_RDONLY | libc::O_DIRECTORY).unwrap()
        }
    }

    impl Drop for Scratch {
        fn drop(&mut self) {
            let _ = std::fs::remove_dir_all(&self.0);
        }
    }

    fn errno<T>(result: Result<T>) -> Option<Errno> {
        result.err().and_then(|e| e.errno())
    }

    #[test]
    fn links_lead_nowhere() {
        let scratch = Scratch::new("links");
        let top = scratch.open();
        make_directory(&top, b"d").unwrap();
        make_link(&top, b"out", b"/etc").unwrap();
        make_link(&top, b"d/up", b"..").unwrap();
        let flags = libc::O_PATH | libc::O_NOFOLLOW;
        for path in [&b"out/passwd"[..], b"d/up/d", b"d/../..", b"/etc"] {
            assert!(
                matches!(errno(open(&top, path, flags)), Some(Errno::ELOOP | Errno::EXDEV)),
                "{path:?}"
            );
        }
        assert!(errno(create(&top, b"out/new")).is_some());
        let link = open(&top, b"out", flags).unwrap();
        assert_eq!(node(&link).unwrap().kind(), libc::S_IFLNK);
        assert_eq!(target(&link).unwrap(), b"/etc");
        set_times(&link, -1, 5).unwrap();
        assert_eq!((node(&link).unwrap().atime, node(&link).unwrap().mtime), (-1, 5));
    }

    #[test]
    fn everything_works_through_o_path() {
        let scratch = Scratch::new("path");
        let top = scratch.open();
        make_node(&top, b"fifo", libc::S_IFIFO | 0o600, 0).unwrap();
        let fifo = open(&top, b"fifo", libc::O_PATH | libc::O_NOFOLLOW).unwrap();
        set_mode(&fifo, 0o644).unwrap();
        set_times(&fifo, 1, 2).unwrap();
        add_name(&fifo, &top, b"other").unwrap();
        let now = node(&fifo).unwrap();
        assert_eq!((now.mode, now.mtime, now.nlink), (libc::S_IFIFO | 0o644, 2, 2));
        let mut all: Vec<_> = names(&top).map(|e| e.unwrap().name).collect();
        all.sort();
        assert_eq!(all, [b"fifo".to_vec(), b"other".to_vec()]);
        remove(&top, b"fifo", false).unwrap();
        assert_eq!(errno(remove(&top, b"other", true)), Some(Errno::ENOTDIR));
    }

    #[test]
    fn paths_of_any_length() {
        let scratch = Scratch::new("long");
        let mut at = scratch.open();
        let name = [b'n'; 200];
        for _ in 0..40 {
            make_directory(&at, &name).unwrap();
            at = open(&at, &name, libc::O_RDONLY | libc::O_DIRECTORY).unwrap();
        }
        let path = vec![name.to_vec(); 40].join(&b'/');
        let found = open(scratch.open(), &path, libc::O_PATH).unwrap();
        assert_eq!(node(found).unwrap().ino, node(&at).unwrap().ino);
    }

    #[test]
    fn data_between_holes() {
        let scratch = Scratch::new("holes");
        let top = scratch.open();
        let mut file = std::fs::File::from(create(&top, b"f").unwrap());
        file.write_all(b"x").unwrap();
        file.write_all_at(b"y", 1 << 20).unwrap();
        file.set_len(1 << 21).unwrap();
        assert_eq!(next_data(&file, 0).unwrap(), Some((0, 4096)));
        assert_eq!(next_data(&file, 4096).unwrap(), Some((1 << 20, (1 << 20) + 4096)));
        assert_eq!(next_data(&file, (1 << 20) + 4096).unwrap(), None);
        assert_eq!(node(&file).unwrap().allocated, 8192);
        allocate(&file, 1 << 21).unwrap();
        assert_eq!(node(&file).unwrap().allocated, 1 << 21);
    }

    #[test]
    fn files_belong_to_the_given_owner() {
        let scratch = Scratch::new("owner");
        let top = scratch.open();
        make_directory(&top, b"closed").unwrap();
        let make = || make_node(&top, b"closed/disk", libc::S_IFBLK | 0o600, libc::makedev(7, 250));
        as_owner(1234, 5678, make).unwrap().unwrap();
        make_node(&top, b"fifo", libc::S_IFIFO | 0o600, 0).unwrap();
        let owner = |path| {
            let now = node(open(&top, path, libc::O_PATH).unwrap()).unwrap();
            (now.uid, now.gid)
        };
        assert_eq!((owner(b"closed/disk"), owner(b"fifo")), ((1234, 5678), (0, 0)));
    }

    #[test]
    fn names_of_a_large_directory() {
        let scratch = Scratch::new("many");
        let top = scratch.open();
        for i in 0..3000 {
            make_node(&top, format!("{i:0>40}").as_bytes(), libc::S_IFREG | 0o600, 0).unwrap();
        }
        let all: std::collections::BTreeSet<_> = names(&top).map(|e| e.unwrap().name).collect();
        assert_eq!(all.len(), 3000);
    }
}
