//! Sockets of our own, or borrowed from a task.
//!
//! A borrowed socket is shared with a program that must not notice: nothing here that looks at a socket waits,
//! takes data or a pending error away, or changes a flag of it.

pub mod diag;
pub mod message;
pub mod options;
pub mod segment;
pub mod stall;
pub mod tcp;

use std::ffi::OsStr;
use std::net::{IpAddr, SocketAddr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::errno::Errno;

use crate::error::{Error, Result, check};
use crate::fd;

/// The address of a socket.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// The bytes of a unix name without the NUL that ends a path. Abstract names begin with NUL; empty means none.
    Unix(Vec<u8>),
    /// IPv4 or IPv6.
    Inet(SocketAddr),
}

/// Room for any address that the kernel gives (struct sockaddr_storage).
const ADDRESS: usize = 128;

impl Address {
    fn to_bytes(&self) -> Vec<u8> {
        let family = |f: i32| (f as u16).to_ne_bytes();
        match self {
            Address::Unix(name) => [&family(libc::AF_UNIX)[..], name].concat(),
            Address::Inet(SocketAddr::V4(a)) => {
                let head = [&family(libc::AF_INET)[..], &a.port().to_be_bytes(), &a.ip().octets()].concat();
                [&head[..], &[0; 8]].concat()
            }
            Address::Inet(SocketAddr::V6(a)) => [
                &family(libc::AF_INET6)[..],
                &a.port().to_be_bytes(),
                &a.flowinfo().to_ne_bytes(),
                &a.ip().octets(),
                &a.scope_id().to_ne_bytes(),
            ]
            .concat(),
        }
    }

    fn from_bytes(bytes: &[u8]) -> Option<Address> {
        let (family, rest) = bytes.split_first_chunk::<2>()?;
        let port = || Some(u16::from_be_bytes(*rest.first_chunk()?));
        match u16::from_ne_bytes(*family).into() {
            libc::AF_UNIX => Some(Address::Unix(unix_name(rest).to_vec())),
            libc::AF_INET => {
                let ip: [u8; 4] = *rest.get(2..)?.first_chunk()?;
                Some(Address::Inet(SocketAddrV4::new(ip.into(), port()?).into()))
            }
            libc::AF_INET6 => {
                let flow = u32::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
                let ip: [u8; 16] = *rest.get(6..)?.first_chunk()?;
                let scope = u32::from_ne_bytes(*rest.get(22..)?.first_chunk()?);
                Some(Address::Inet(SocketAddrV6::new(ip.into(), port()?, flow, scope).into()))
            }
            _ => None,
        }
    }
}

/// A unix name as [`Address::Unix`] has it: paths come from the kernel with and without a NUL at their end.
fn unix_name(raw: &[u8]) -> &[u8] {
    let is_path = raw.first().is_some_and(|b| *b != 0);
    let end = raw.iter().position(|b| is_path && *b == 0).unwrap_or(raw.len());
    &raw[..end]
}

impl std::fmt::Display for Address {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Address::Unix(name) => write!(f, "{}", name.escape_ascii()),
            Address::Inet(address) => write!(f, "{address}"),
        }
    }
}

fn owned(ret: i32, call: &'static str, object: impl ToString) -> Result<OwnedFd> {
    check(ret.into(), call, object)?;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(ret) })
}

fn raw(fd: &impl AsFd) -> i32 {
    fd.as_fd().as_raw_fd()
}

/// socket(2), close-on-exec, in the network namespace of the calling thread.
pub fn create(family: i32, kind: i32, protocol: i32) -> Result<OwnedFd> {
    // SAFETY: plain numbers.
    let fd = unsafe { libc::socket(family, kind | libc::SOCK_CLOEXEC, protocol) };
    owned(
        fd,
        "socket",
        format!("family {family}, type {kind}, protocol {protocol}"),
    )
}

/// socketpair(2) of unix sockets, close-on-exec.
pub fn pair(kind: i32) -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    let ret = unsafe { libc::socketpair(libc::AF_UNIX, kind | libc::SOCK_CLOEXEC, 0, fds.as_mut_ptr()) };
    check(ret.into(), "socketpair", kind)?;
    // SAFETY: the kernel just gave us both.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// bind(2).
pub fn bind(socket: impl AsFd, to: &Address) -> Result<()> {
    let bytes = to.to_bytes();
    // SAFETY: an address and its length.
    let ret = unsafe { libc::bind(raw(&socket), bytes.as_ptr().cast(), bytes.len() as u32) };
    check(ret.into(), "bind", to).map(drop)
}

/// connect(2); `None` takes the peer away again.
pub fn connect(socket: impl AsFd, to: Option<&Address>) -> Result<()> {
    let bytes = to.map_or_else(|| (libc::AF_UNSPEC as u128).to_ne_bytes().to_vec(), Address::to_bytes);
    // SAFETY: an address and its length.
    let ret = unsafe { libc::connect(raw(&socket), bytes.as_ptr().cast(), bytes.len() as u32) };
    check(ret.into(), "connect", to.map(Address::to_string).unwrap_or_default()).map(drop)
}

/// connect(2) that does not wait for the answer.
pub fn connect_later(socket: impl AsFd, to: &Address) -> Result<()> {
    let flags = fd::fcntl(&socket, libc::F_GETFL, 0)?;
    fd::fcntl(&socket, libc::F_SETFL, i64::from(flags | libc::O_NONBLOCK))?;
    let called = connect(&socket, Some(to));
    fd::fcntl(&socket, libc::F_SETFL, flags.into())?;
    match called {
        Err(e) if e.errno() == Some(Errno::EINPROGRESS) => Ok(()),
        other => other,
    }
}

/// accept(2), close-on-exec.
pub fn accept_next(socket: impl AsFd) -> Result<OwnedFd> {
    let none = std::ptr::null_mut();
    // SAFETY: no room for an address is given.
    let fd = unsafe { libc::accept4(raw(&socket), none, none.cast(), libc::SOCK_CLOEXEC) };
    owned(fd, "accept", raw(&socket))
}

/// listen(2).
pub fn listen(socket: impl AsFd, backlog: u32) -> Result<()> {
    let backlog = backlog.try_into().unwrap_or(i32::MAX);
    // SAFETY: plain numbers.
    check(unsafe { libc::listen(raw(&socket), backlog) }.into(), "listen", backlog).map(drop)
}

/// accept(2) of a connection that this process has made to itself, close-on-exec. Others are turned away.
pub fn accept_own(socket: impl AsFd) -> Result<OwnedFd> {
    let none = std::ptr::null_mut();
    loop {
        // SAFETY: no room for an address is given.
        let fd = unsafe { libc::accept4(raw(&socket), none, none.cast(), libc::SOCK_CLOEXEC) };
        let accepted = owned(fd, "accept", raw(&socket))?;
        // struct ucred begins with the process id.
        let mut caller = [0; 12];
        options::get(&accepted, libc::SOL_SOCKET, libc::SO_PEERCRED, &mut caller)?;
        if caller.starts_with(&std::process::id().to_ne_bytes()) {
            return Ok(accepted);
        }
    }
}

/// Shuts down what `mask` says: 1 receiving, 2 sending. A TCP socket without a connection is shut down too,
/// although the kernel answers ENOTCONN.
pub fn shutdown(socket: impl AsFd, mask: u8) -> Result<()> {
    let how = match mask & 3 {
        0 => return Ok(()),
        1 => libc::SHUT_RD,
        2 => libc::SHUT_WR,
        _ => libc::SHUT_RDWR,
    };
    // SAFETY: plain numbers.
    match check(unsafe { libc::shutdown(raw(&socket), how) }.into(), "shutdown", how) {
        Err(e) if e.errno() != Some(Errno::ENOTCONN) => Err(e),
        _ => Ok(()),
    }
}

type AskAddress = unsafe extern "C" fn(i32, *mut libc::sockaddr, *mut libc::socklen_t) -> i32;

fn ask_address(socket: &impl AsFd, ask: AskAddress, call: &'static str) -> Result<Address> {
    let mut room = [0u8; ADDRESS];
    let mut len = room.len() as u32;
    // SAFETY: `ask` is getsockname or getpeername; room and len are places for the result.
    let ret = unsafe { ask(raw(socket), room.as_mut_ptr().cast(), &raw mut len) };
    check(ret.into(), call, raw(socket))?;
    let bytes = &room[..(len as usize).min(ADDRESS)];
    Address::from_bytes(bytes).ok_or_else(|| Error::Parse {
        file: call.into(),
        text: format!("{bytes:?}"),
    })
}

/// getsockname(2).
pub fn local(socket: impl AsFd) -> Result<Address> {
    ask_address(&socket, libc::getsockname, "getsockname")
}

/// getpeername(2); `None` when the socket is not connected.
pub fn peer(socket: impl AsFd) -> Result<Option<Address>> {
    match ask_address(&socket, libc::getpeername, "getpeername") {
        Err(e) if e.errno() == Some(Errno::ENOTCONN) => Ok(None),
        answer => answer.map(Some),
    }
}

/// What poll(2) says right now of input, urgent data, an end of input, and errors. It clears none of them.
pub fn poll(socket: impl AsFd) -> i16 {
    let events = libc::POLLIN | libc::POLLPRI | libc::POLLRDHUP;
    let mut poll = libc::pollfd {
        fd: raw(&socket),
        events,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    unsafe { libc::poll(&raw mut poll, 1, 0) };
    poll.revents
}

/// Bytes that can be read: of all messages, or of the first one of a datagram socket (SIOCINQ).
pub fn incoming(socket: impl AsFd) -> Result<usize> {
    fd::ioctl_int(socket, libc::FIONREAD).map(|n| n.try_into().unwrap_or(0))
}

/// What of the data sent is not off yet (SIOCOUTQ): for a unix socket the memory of what its peers have not read.
pub fn outgoing(socket: impl AsFd) -> Result<usize> {
    fd::ioctl_int(socket, libc::TIOCOUTQ).map(|n| n.try_into().unwrap_or(0))
}

/// Sends without waiting and without SIGPIPE; the number of bytes that went.
pub fn send(socket: impl AsFd, data: &[u8], to: Option<&Address>) -> Result<usize> {
    let flags = libc::MSG_DONTWAIT | libc::MSG_NOSIGNAL;
    let bytes = to.map(Address::to_bytes).unwrap_or_default();
    let address = if bytes.is_empty() {
        std::ptr::null()
    } else {
        bytes.as_ptr().cast()
    };
    // SAFETY: data and an address with their lengths; a null address of length 0 means none.
    let ret = unsafe {
        libc::sendto(
            raw(&socket),
            data.as_ptr().cast(),
            data.len(),
            flags,
            address,
            bytes.len() as u32,
        )
    };
    check(ret as i64, "send", format!("{} bytes", data.len())).map(|n| n as usize)
}

/// What a look at the next message says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peeked {
    /// Its length, which may be more than there was room for.
    pub len: usize,
    /// The name of its sender; empty when it has none.
    pub from: Vec<u8>,
    /// Descriptors, credentials or other control data came with it. None were received.
    pub has_control: bool,
}

/// Copies the next message of a unix socket, or the bytes of a stream as far as `room` goes, and leaves them
/// there. `None` when there are none; but a pending error is taken away then, so look only where there is data.
pub fn peek(socket: impl AsFd, room: &mut [u8]) -> Result<Option<Peeked>> {
    let mut name = [0u8; ADDRESS];
    let mut part = libc::iovec {
        iov_base: room.as_mut_ptr().cast(),
        iov_len: room.len(),
    };
    // SAFETY: a struct of numbers and pointers, for which zero means none.
    let mut head: libc::msghdr = unsafe { std::mem::zeroed() };
    head.msg_name = name.as_mut_ptr().cast();
    head.msg_namelen = name.len() as u32;
    head.msg_iov = &raw mut part;
    head.msg_iovlen = 1;
    let flags = libc::MSG_PEEK | libc::MSG_DONTWAIT | libc::MSG_TRUNC;
    // SAFETY: name, part and room outlive the call. Without room for control data the kernel installs no
    // descriptors and says so by MSG_CTRUNC.
    let ret = unsafe { libc::recvmsg(raw(&socket), &raw mut head, flags) };
    let len = match check(ret as i64, "recvmsg", raw(&socket)) {
        Err(e) if e.errno() == Some(Errno::EAGAIN) => return Ok(None),
        len => len? as usize,
    };
    let from = unix_name(name.get(2..head.msg_namelen as usize).unwrap_or_default()).to_vec();
    Ok(Some(Peeked {
        len,
        from,
        has_control: head.msg_flags & libc::MSG_CTRUNC != 0,
    }))
}

/// The inode number of the network namespace that a socket belongs to (SIOCGSKNS).
pub fn net_namespace(socket: impl AsFd) -> Result<u64> {
    const SIOCGSKNS: u64 = 0x894c;
    // SAFETY: the request takes no argument and gives a descriptor.
    let ret = unsafe { libc::ioctl(raw(&socket), SIOCGSKNS, 0) };
    fd::stat(owned(ret, "SIOCGSKNS", raw(&socket))?).map(|id| id.ino)
}

/// The file that a unix socket is bound to, opened with O_PATH (SIOCUNIXFILE).
pub fn bound_file(socket: impl AsFd) -> Result<OwnedFd> {
    const SIOCUNIXFILE: u64 = 0x89e0;
    // SAFETY: the request takes no argument and gives a descriptor.
    let ret = unsafe { libc::ioctl(raw(&socket), SIOCUNIXFILE, 0) };
    owned(ret, "SIOCUNIXFILE", raw(&socket))
}

/// The name of a network device of the socket's namespace by its number (SIOCGIFNAME).
pub fn device_name(socket: impl AsFd, index: u32) -> Result<String> {
    let mut request = [0u8; 40];
    request[16..20].copy_from_slice(&index.to_ne_bytes());
    // SAFETY: a struct ifreq has 40 bytes: a name of 16, then the number.
    let ret = unsafe { libc::ioctl(raw(&socket), libc::SIOCGIFNAME, request.as_mut_ptr()) };
    check(ret.into(), "SIOCGIFNAME", index)?;
    let name = request[..16].split(|b| *b == 0).next().unwrap_or_default();
    Ok(String::from_utf8_lossy(name).into_owned())
}

/// The number of a network device (SIOCGIFINDEX).
pub fn device_index(socket: impl AsFd, name: &str) -> Result<u32> {
    let mut request = [0u8; 40];
    for (place, byte) in request.iter_mut().zip(name.bytes().take(15)) {
        *place = byte;
    }
    // SAFETY: a struct ifreq has 40 bytes: a name of 16, then the number.
    let ret = unsafe { libc::ioctl(raw(&socket), libc::SIOCGIFINDEX, request.as_mut_ptr()) };
    check(ret.into(), "SIOCGIFINDEX", name)?;
    Ok(u32::from_ne_bytes([request[16], request[17], request[18], request[19]]))
}

/// struct group_req: a device number, padding, a struct sockaddr_storage.
fn group(index: u32, address: IpAddr) -> Vec<u8> {
    let mut bytes = [&index.to_ne_bytes()[..], &[0; 4]].concat();
    bytes.extend(Address::Inet(SocketAddr::new(address, 0)).to_bytes());
    bytes.resize(8 + ADDRESS, 0);
    bytes
}

fn group_level(address: IpAddr) -> i32 {
    if address.is_ipv4() {
        libc::SOL_IP
    } else {
        libc::SOL_IPV6
    }
}

/// Whether a socket receives a multicast group on a device: `None` if not, else whether from every source.
pub fn is_member(socket: impl AsFd, index: u32, address: IpAddr) -> Result<Option<bool>> {
    const MCAST_MSFILTER: i32 = 48;
    let mut filter = group(index, address);
    filter.resize(filter.len() + 8, 0);
    match options::get(&socket, group_level(address), MCAST_MSFILTER, &mut filter) {
        // No member, or an IPv6 group and an IPv4 socket.
        Err(e) if matches!(e.errno(), Some(Errno::EADDRNOTAVAIL | Errno::EOPNOTSUPP)) => Ok(None),
        Err(e) => Err(e),
        // After the group: the mode, MCAST_EXCLUDE being 0, and the number of sources.
        Ok(_) => Ok(Some(filter[8 + ADDRESS..].iter().all(|b| *b == 0))),
    }
}

/// Joins a multicast group on a device (MCAST_JOIN_GROUP).
pub fn join(socket: impl AsFd, index: u32, address: IpAddr) -> Result<()> {
    const MCAST_JOIN_GROUP: i32 = 42;
    options::set(
        &socket,
        group_level(address),
        MCAST_JOIN_GROUP,
        &group(index, address),
        "MCAST_JOIN_GROUP",
    )
}

/// Brings the loopback device of this network namespace up.
pub fn raise_loopback() -> Result<()> {
    let socket = create(libc::AF_INET, libc::SOCK_DGRAM, 0)?;
    // A struct ifreq has 40 bytes: a name of 16, then the flags.
    let mut request = [0u8; 40];
    request[..2].copy_from_slice(b"lo");
    // SAFETY: room for the struct.
    let ret = unsafe { libc::ioctl(raw(&socket), libc::SIOCGIFFLAGS, request.as_mut_ptr()) };
    check(ret.into(), "SIOCGIFFLAGS", "lo")?;
    let flags = u16::from_ne_bytes([request[16], request[17]]) | libc::IFF_UP as u16;
    request[16..18].copy_from_slice(&flags.to_ne_bytes());
    // SAFETY: a struct ifreq.
    let ret = unsafe { libc::ioctl(raw(&socket), libc::SIOCSIFFLAGS, request.as_ptr()) };
    check(ret.into(), "SIOCSIFFLAGS", "lo").map(drop)
}

/// Where the file of a unix socket is to be.
#[derive(Debug)]
pub struct Place<'a> {
    /// Its directory.
    pub directory: BorrowedFd<'a>,
    /// Its name there.
    pub name: &'a str,
    /// Its mode.
    pub mode: u32,
    /// Its owner.
    pub uid: u32,
    /// Its group.
    pub gid: u32,
}

/// Gives a unix socket the path `name`, as getsockname(2) will show it, and a file at `place`, whatever `name`
/// leads to: the program may have a root or a working directory of its own, or may have moved the file. A socket
/// file that is there already is replaced. Without a `place` there is a name but no file, as after unlink(2).
///
/// From then on the calling thread has root and working directory for itself (CLONE_FS).
pub fn bind_file(socket: impl AsFd, name: &[u8], place: Option<&Place<'_>>) -> Result<()> {
    let home = Home::leave()?;
    let Some(place) = place else {
        let tree = scratch()?;
        enter(tree.as_fd())?;
        return bind_below_root(&socket, name, |path| io("unlink", path, std::fs::remove_file(path)));
    };
    change_directory(place.directory)?;
    if std::fs::symlink_metadata(place.name).is_ok_and(|m| fd_kind(&m) != libc::S_IFSOCK) {
        return Err(Error::Call {
            call: "bind",
            object: place.name.into(),
            errno: Errno::EADDRINUSE,
        });
    }
    let stage = format!(".torpor-{}-{}", std::process::id(), raw(&socket));
    io(
        "mkdir",
        Path::new(&stage),
        std::os::unix::fs::DirBuilderExt::mode(&mut std::fs::DirBuilder::new(), 0o700).create(&stage),
    )?;
    let bound = fd::open(&stage, libc::O_PATH | libc::O_DIRECTORY).and_then(|stage| {
        enter(stage.as_fd())?;
        bind_below_root(&socket, name, |path| {
            io(
                "chown",
                path,
                std::os::unix::fs::lchown(path, Some(place.uid), Some(place.gid)),
            )?;
            let mode = std::os::unix::fs::PermissionsExt::from_mode(place.mode & 0o7777);
            io("chmod", path, std::fs::set_permissions(path, mode))?;
            nix::fcntl::renameat(nix::fcntl::AT_FDCWD, path, place.directory, place.name).map_err(|errno| Error::Call {
                call: "rename",
                object: place.name.into(),
                errno,
            })
        })
    });
    home.back()?;
    change_directory(place.directory)?;
    let removed = io("rmdir", Path::new(&stage), std::fs::remove_dir_all(&stage));
    bound.and(removed)
}

fn fd_kind(meta: &std::fs::Metadata) -> u32 {
    std::os::unix::fs::MetadataExt::mode(meta) & libc::S_IFMT
}

fn io<T>(call: &'static str, path: &Path, result: std::io::Result<T>) -> Result<T> {
    result.map_err(|e| Error::io(call, path.display(), &e))
}

/// Makes the directories that `name` passes through, binds, and hands the file to `then`. Root and working
/// directory are an empty directory.
fn bind_below_root(socket: &impl AsFd, name: &[u8], then: impl FnOnce(&Path) -> Result<()>) -> Result<()> {
    let path = Path::new(OsStr::from_bytes(name));
    let climbs = path
        .components()
        .filter(|c| matches!(c, std::path::Component::ParentDir))
        .count();
    let deep = "d/".repeat(climbs);
    if climbs > 0 {
        io("mkdir", path, std::fs::create_dir_all(&deep))?;
        io("chdir", path, std::env::set_current_dir(&deep))?;
    }
    if let Some(parent) = path.parent().filter(|p| !p.as_os_str().is_empty()) {
        io("mkdir", parent, std::fs::create_dir_all(parent))?;
    }
    bind(socket, &Address::Unix(name.to_vec()))?;
    then(path)
}

fn change_directory(to: BorrowedFd<'_>) -> Result<()> {
    nix::unistd::fchdir(to).map_err(|errno| Error::Call {
        call: "fchdir",
        object: String::new(),
        errno,
    })
}

/// Makes a directory the root and the working directory of this thread.
fn enter(directory: BorrowedFd<'_>) -> Result<()> {
    change_directory(directory)?;
    io("chroot", Path::new("."), std::os::unix::fs::chroot("."))
}

/// Root and working directory of this thread before it went elsewhere. Dropping it goes back.
struct Home {
    root: OwnedFd,
    directory: OwnedFd,
}

impl Home {
    fn leave() -> Result<Home> {
        // SAFETY: from now on what this thread does to its root and working directory concerns only itself.
        check(unsafe { libc::unshare(libc::CLONE_FS) }.into(), "unshare", "CLONE_FS")?;
        let open = |path| fd::open(path, libc::O_PATH | libc::O_DIRECTORY);
        Ok(Home {
            root: open("/")?,
            directory: open(".")?,
        })
    }

    fn back(&self) -> Result<()> {
        enter(self.root.as_fd())?;
        change_directory(self.directory.as_fd())
    }
}

impl Drop for Home {
    fn drop(&mut self) {
        let _ = self.back();
    }
}

/// An empty tmpfs that is mounted nowhere and goes away when nothing refers to it.
fn scratch() -> Result<OwnedFd> {
    const FSCONFIG_CMD_CREATE: u32 = 6;
    const CLOEXEC: u32 = 1;
    let none = std::ptr::null::<libc::c_char>();
    // SAFETY: a C string and a number.
    let context = unsafe { libc::syscall(libc::SYS_fsopen, c"tmpfs".as_ptr(), CLOEXEC) };
    let context = owned(context as i32, "fsopen", "tmpfs")?;
    // SAFETY: this command takes neither key nor value.
    let ret = unsafe {
        libc::syscall(
            libc::SYS_fsconfig,
            context.as_raw_fd(),
            FSCONFIG_CMD_CREATE,
            none,
            none,
            0,
        )
    };
    check(ret, "fsconfig", "tmpfs")?;
    // SAFETY: plain numbers.
    let mount = unsafe { libc::syscall(libc::SYS_fsmount, context.as_raw_fd(), CLOEXEC, 0) };
    owned(mount as i32, "fsmount", "tmpfs")
}
