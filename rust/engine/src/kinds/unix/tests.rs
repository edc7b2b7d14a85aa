use std::cell::RefCell;
use std::collections::BTreeMap;
use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::{SocketAddr, UnixDatagram, UnixListener, UnixStream};
use std::path::PathBuf;

use torpor_sys::socket::message::{self, Credentials};
use torpor_sys::socket::{self, Address, Place, options};
use torpor_sys::{Pid, fd, proc};

use super::call::bind;
use super::*;
use crate::error::Result;

/// An image of a few sockets of this very process.
#[derive(Default)]
struct Image {
    blobs: RefCell<Vec<Vec<u8>>>,
    /// Open files in flight.
    cargo: RefCell<Vec<OwnedFd>>,
    states: Vec<State>,
}

fn me() -> Pid {
    std::process::id() as Pid
}

fn find(fd: &OwnedFd, inside: &[&OwnedFd], image: &Image) -> Result<Found> {
    let inside: BTreeSet<u64> = inside.iter().map(|f| fd::stat(*f).unwrap().ino).collect();
    let mut store = |bytes: &[u8]| {
        image.blobs.borrow_mut().push(bytes.to_vec());
        Ok(BlobRef {
            offset: image.blobs.borrow().len() as u64 - 1,
            len: bytes.len() as u64,
        })
    };
    let survey = survey(me())?;
    let holder = Holder {
        pid: me(),
        number: fd.as_raw_fd(),
        ino: fd::stat(fd).unwrap().ino,
        fd,
    };
    let queue = if survey.concerns(holder.ino, &inside) {
        look(&survey, &[holder])?.remove(0)
    } else {
        Vec::new()
    };
    let keep = |m: Unread<OwnedFd>| {
        let keep = |fd| {
            image.cargo.borrow_mut().push(fd);
            image.cargo.borrow().len() - 1
        };
        Unread {
            data: m.data,
            from: m.from,
            rights: m.rights.into_iter().map(keep).collect(),
            credentials: m.credentials,
        }
    };
    let queue: Vec<Unread<usize>> = queue.into_iter().map(keep).collect();
    collect(&holder, &survey, &inside, &queue, &mut store)
}

fn save(fds: &[&OwnedFd]) -> Image {
    let image = Image::default();
    let save = |fd: &&OwnedFd| {
        let before = all_options(fd);
        let flags = fd::fcntl(fd, libc::F_GETFL, 0).unwrap();
        let Found::Inside(state) = find(fd, fds, &image).unwrap() else {
            panic!("outside")
        };
        assert_eq!(before, all_options(fd), "collect left no trace");
        assert_eq!(flags, fd::fcntl(fd, libc::F_GETFL, 0).unwrap());
        *state
    };
    let states: Vec<State> = fds.iter().map(save).collect();
    let json = serde_json::to_string(&states).unwrap();
    Image {
        states: serde_json::from_str(&json).unwrap(),
        ..image
    }
}

fn load(image: &Image) -> Vec<OwnedFd> {
    let states: Vec<&State> = image.states.iter().collect();
    let (made, pending) = rebuild(me(), &states).unwrap();
    pending
        .deliver(&Recipients {
            init: me(),
            sockets: made.iter().collect(),
            descriptions: &image.cargo.borrow(),
            pid: &Some,
            blob: &|blob| Ok(image.blobs.borrow()[blob.offset as usize].clone()),
        })
        .unwrap();
    made
}

/// Saves, closes and rebuilds; what is rebuilt has the same options and would be saved the same again.
fn cycle<const N: usize>(fds: [OwnedFd; N]) -> [OwnedFd; N] {
    let options: Vec<_> = fds.iter().map(all_options).collect();
    let image = save(&fds.each_ref());
    drop(fds);
    let made: [OwnedFd; N] = load(&image).try_into().unwrap();
    assert_eq!(options, made.iter().map(all_options).collect::<Vec<_>>());
    let again = save(&made.each_ref());
    let inos: BTreeMap<u64, u64> = image
        .states
        .iter()
        .map(|s| s.ino)
        .zip(again.states.iter().map(|s| s.ino))
        .collect();
    for (mut old, new) in image.states.into_iter().zip(&again.states) {
        old.ino = inos[&old.ino];
        if old.kind != Kind::Datagram && old.peer != Peer::None {
            // The file of the socket that listened, which nobody sees.
            old.file.clone_from(&new.file);
        }
        if let Peer::Socket(ino) | Peer::Waiting(ino) = &mut old.peer {
            *ino = inos[ino];
        }
        old.waiting.iter_mut().for_each(|ino| *ino = inos[ino]);
        assert_eq!(format!("{old:?}"), format!("{new:?}"));
    }
    assert_eq!(image.blobs, again.blobs);
    made
}

/// Every option that can be read, but those that tell sockets or times apart or that reading changes.
fn all_options(fd: &impl AsFd) -> Vec<(i32, Option<Vec<u8>>)> {
    const SO_ERROR_PEERCRED_MEMINFO_COOKIE_PEERGROUPS_NETNSCOOKIE_PEERPIDFD: [i32; 7] = [4, 17, 55, 57, 59, 71, 77];
    let numbers = (1..100).filter(|n| !SO_ERROR_PEERCRED_MEMINFO_COOKIE_PEERGROUPS_NETNSCOOKIE_PEERPIDFD.contains(n));
    let read = |n| {
        let mut room = [0; 256];
        let len = options::get(fd, libc::SOL_SOCKET, n, &mut room).ok()?;
        Some(room[..len.min(256)].to_vec())
    };
    numbers.map(|n| (n, read(n))).collect()
}

/// A directory that is removed at the end.
struct Temp(PathBuf);

impl Temp {
    fn new(name: &str) -> Temp {
        let dir = std::env::temp_dir().join(format!("torpor-unix-{}-{name}", std::process::id()));
        std::fs::create_dir(&dir).unwrap();
        Temp(dir)
    }

    fn join(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }
}

impl Drop for Temp {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

fn abstract_name(name: &str) -> SocketAddr {
    SocketAddr::from_abstract_name(format!("torpor-{}-{name}", std::process::id())).unwrap()
}

fn refusal(fd: &OwnedFd, inside: &[&OwnedFd]) -> String {
    match find(fd, inside, &Image::default()) {
        Err(e) => e.to_string(),
        Ok(found) => panic!("not refused: {found:?}"),
    }
}

fn read_all(mut stream: &UnixStream) -> Vec<u8> {
    let mut room = vec![0; 1 << 20];
    let len = stream.read(&mut room).unwrap();
    room.truncate(len);
    room
}

#[test]
fn a_stream_pair_keeps_what_is_unread_and_the_original_goes_on() {
    let _alone = crate::tests::alone();
    let (mut a, mut b) = UnixStream::pair().unwrap();
    a.write_all(&[7; 100_000]).unwrap();
    a.write_all(b"end").unwrap();
    b.write_all(b"back").unwrap();
    let (a, b): (OwnedFd, OwnedFd) = (a.into(), b.into());
    let image = save(&[&a, &b]);
    let made = load(&image).into_iter().map(UnixStream::from);
    let original = [a, b].into_iter().map(UnixStream::from);
    for pair in [original.collect::<Vec<_>>(), made.collect()] {
        assert_eq!(read_all(&pair[1]), [&[7; 100_000][..], b"end"].concat());
        assert_eq!(read_all(&pair[0]), b"back");
        (&pair[0]).write_all(b"more").unwrap();
        assert_eq!(read_all(&pair[1]), b"more");
        drop(pair);
    }
}

#[test]
fn half_closed_pairs() {
    let _alone = crate::tests::alone();
    let (mut a, b) = UnixStream::pair().unwrap();
    a.write_all(b"last words").unwrap();
    a.shutdown(std::net::Shutdown::Write).unwrap();
    let [a, b] = cycle([a.into(), b.into()]).map(UnixStream::from);
    assert_eq!(read_all(&b), b"last words");
    assert_eq!(read_all(&b), b"");
    (&b).write_all(b"still heard").unwrap();
    assert_eq!(read_all(&a), b"still heard");
    assert_eq!((&a).write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
}

#[test]
fn a_peer_that_is_gone_with_and_without_a_reset() {
    let _alone = crate::tests::alone();
    for unread in [false, true] {
        for kind in [libc::SOCK_STREAM, libc::SOCK_SEQPACKET] {
            let (a, b) = socket::pair(kind).unwrap();
            if unread {
                socket::send(&a, b"never read", None).unwrap();
            } else {
                socket::send(&b, b"last words", None).unwrap();
            }
            drop(b);
            let [a] = cycle([a]).map(UnixStream::from);
            if unread {
                assert_eq!(
                    (&a).read(&mut [0; 8]).unwrap_err().kind(),
                    std::io::ErrorKind::ConnectionReset
                );
            } else {
                assert_eq!(read_all(&a), b"last words");
            }
            assert_eq!(read_all(&a), b"");
            assert_eq!((&a).write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
        }
    }
}

#[test]
fn seqpacket_keeps_messages_apart() {
    let _alone = crate::tests::alone();
    let (a, b) = socket::pair(libc::SOCK_SEQPACKET).unwrap();
    for message in [&b"one"[..], b"two", &[9; 70_000]] {
        socket::send(&a, message, None).unwrap();
    }
    socket::send(&b, b"back", None).unwrap();
    let [a, b] = cycle([a, b]).map(UnixStream::from);
    assert_eq!(
        [read_all(&b), read_all(&b), read_all(&b), read_all(&a)],
        [&b"one"[..], b"two", &[9; 70_000], b"back"]
    );
}

#[test]
fn empty_messages_are_kept_and_never_lost_in_silence() {
    let _alone = crate::tests::alone();
    for kind in [libc::SOCK_SEQPACKET, libc::SOCK_DGRAM] {
        let (a, b) = socket::pair(kind).unwrap();
        for message in [&b"one"[..], b"", b"", b"two", b""] {
            socket::send(&a, message, None).unwrap();
        }
        let lens = |i: &Image| i.states[1].queue.iter().map(|m| m.data.len).collect::<Vec<_>>();
        let image = save(&[&a, &b]);
        assert_eq!(lens(&image), [3, 0, 0, 3, 0]);
        assert_eq!(lens(&save(&load(&image).iter().collect::<Vec<_>>())), [3, 0, 0, 3, 0]);
        assert!(refusal(&b, &[&a, &b]).contains("empty messages"));
    }
}

#[test]
fn datagram_pairs_hold_more_than_a_queue_of_strangers_may() {
    let _alone = crate::tests::alone();
    let (a, b) = UnixDatagram::pair().unwrap();
    let before = options::widen(&a, 1 << 20).unwrap();
    for i in 0..100 {
        a.send(&vec![i; 1 + 50 * usize::from(i)]).unwrap();
    }
    options::narrow(&a, before).unwrap();
    let [a, b] = cycle([a.into(), b.into()]).map(UnixDatagram::from);
    for i in 0..100 {
        let mut room = [0; 8192];
        let len = b.recv(&mut room).unwrap();
        assert_eq!(room[..len], vec![i; 1 + 50 * usize::from(i)]);
    }
    b.send(b"back").unwrap();
    assert_eq!(a.recv(&mut [0; 8]).unwrap(), 4);
    drop(b);
    let [a] = cycle([a.into()]).map(UnixDatagram::from);
    assert_eq!(a.send(b"x").unwrap_err().kind(), std::io::ErrorKind::ConnectionRefused);
}

#[test]
fn a_listening_socket_comes_back_with_its_file() {
    let _alone = crate::tests::alone();
    let dir = Temp::new("listen");
    let path = dir.join("socket");
    let listener = UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o620)).unwrap();
    std::os::unix::fs::chown(&path, Some(12), Some(34)).unwrap();
    socket::listen(&listener, 77).unwrap();
    let [listener] = cycle([listener.into()]);
    let id = fd::stat_path(path.to_str().unwrap()).unwrap();
    assert_eq!((id.mode, id.uid, id.gid), (libc::S_IFSOCK | 0o620, 12, 34));
    let _client = UnixStream::connect(&path).unwrap();
    assert!(refusal(&listener, &[&listener]).contains("from outside of the container waits to be accepted"));
    UnixListener::from(listener).accept().unwrap();
    let left: Vec<_> = std::fs::read_dir(&dir.0)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["socket"]);
}

#[test]
fn files_are_those_of_the_container() {
    let _alone = crate::tests::alone();
    let containers = [(); 2].map(|()| {
        let script = "mount -t tmpfs none /mnt && mkdir /mnt/dir && echo ready && exec sleep 600";
        let mut command = std::process::Command::new("unshare");
        let mut child = command
            .args(["-m", "sh", "-c", script])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        child.stdout.as_mut().unwrap().read_exact(&mut [0; 6]).unwrap();
        child
    });
    let [here, there] = containers.each_ref().map(|c| c.id() as Pid);
    let root = fd::open(&format!("/proc/{here}/root"), libc::O_PATH).unwrap();
    let listener = socket::create(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
    bind(
        &listener,
        &Name(b"/mnt/dir/socket".to_vec()),
        Some((&root, "/mnt/dir/socket", (0o666, 0, 0))),
    )
    .unwrap();
    socket::listen(&listener, 5).unwrap();
    let ino = fd::stat(&listener).unwrap().ino;
    let look = |pid| {
        let holder = Holder {
            pid,
            number: 3,
            ino,
            fd: &listener,
        };
        let store = &mut |_: &[u8]| unreachable!();
        collect(&holder, &survey(pid).unwrap(), &BTreeSet::new(), &[], store)
    };
    let Found::Inside(state) = look(here).unwrap() else {
        panic!("outside")
    };
    assert_eq!(state.file.as_ref().unwrap().path.as_deref(), Some("/mnt/dir/socket"));
    assert!(
        look(there)
            .unwrap_err()
            .to_string()
            .contains("outside of the container")
    );
    let made = rebuild(there, &[&state]).unwrap().0.remove(0);
    let _client = UnixStream::connect(format!("/proc/{there}/root/mnt/dir/socket")).unwrap();
    assert_eq!(
        UnixListener::from(made).local_addr().unwrap().as_pathname(),
        Some(std::path::Path::new("/mnt/dir/socket"))
    );
    assert!(!PathBuf::from("/mnt/dir").exists());
    for mut child in containers {
        child.kill().unwrap();
        child.wait().unwrap();
    }
}

#[test]
fn only_socket_files_are_replaced() {
    let _alone = crate::tests::alone();
    let dir = Temp::new("replace");
    let path = dir.join("socket");
    let listener: OwnedFd = UnixListener::bind(&path).unwrap().into();
    let image = save(&[&listener]);
    std::fs::remove_file(&path).unwrap();
    std::fs::write(&path, "a file").unwrap();
    let states: Vec<&State> = image.states.iter().collect();
    let error = rebuild(me(), &states).unwrap_err().to_string();
    assert!(error.contains("in use"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"a file");
}

#[test]
fn names_that_lead_nowhere_or_elsewhere() {
    let _alone = crate::tests::alone();
    let dir = Temp::new("names");
    let (removed, odd, moved) = (dir.join("removed"), dir.join("odd"), dir.join("moved"));
    let a = UnixListener::bind(&removed).unwrap();
    std::fs::remove_file(&removed).unwrap();
    // As a program names it that is elsewhere: in a directory or under a root of its own.
    let b = socket::create(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
    let directory = fd::open(dir.0.to_str().unwrap(), libc::O_PATH).unwrap();
    let place = Place {
        directory: directory.as_fd(),
        name: "odd",
        mode: 0o600,
        uid: 0,
        gid: 0,
    };
    socket::bind_file(&b, b"../x/./y/../odd", Some(&place)).unwrap();
    socket::listen(&b, 5).unwrap();
    let c = UnixListener::bind(dir.join("old")).unwrap();
    std::fs::rename(dir.join("old"), &moved).unwrap();
    let [a, b, c] = cycle([a.into(), b, c.into()]);
    assert_eq!(socket::local(&b).unwrap(), Address::Unix(b"../x/./y/../odd".to_vec()));
    assert!(!removed.exists() && !dir.join("old").exists());
    assert_eq!(
        UnixListener::from(a).local_addr().unwrap().as_pathname(),
        Some(removed.as_path())
    );
    for (listener, path) in [(b, odd), (c, moved)] {
        let _client = UnixStream::connect(path).unwrap();
        UnixListener::from(listener).accept().unwrap();
    }
}

#[test]
fn accepted_connections_keep_all_names() {
    let _alone = crate::tests::alone();
    let dir = Temp::new("accept");
    let path = dir.join("socket");
    for address in [SocketAddr::from_pathname(&path).unwrap(), abstract_name("accept")] {
        let listener = UnixListener::bind_addr(&address).unwrap();
        let clients = [0, 1].map(|_| UnixStream::connect_addr(&address).unwrap());
        let servers = [0, 1].map(|_| listener.accept().unwrap().0);
        let named = socket::create(libc::AF_UNIX, libc::SOCK_STREAM, 0).unwrap();
        socket::bind(&named, &Address::Unix(b"\0torpor-test-client".to_vec())).unwrap();
        socket::connect(&named, Some(&socket::local(&listener).unwrap())).unwrap();
        let of_named = listener.accept().unwrap().0;
        (&clients[1]).write_all(b"waits").unwrap();
        let [c0, c1] = clients.map(OwnedFd::from);
        let [s0, s1] = servers.map(OwnedFd::from);
        let all = cycle([s0, c0, listener.into(), c1, s1, named, of_named.into()]);
        let names = |all: &[OwnedFd]| -> Vec<String> {
            let show = |fd| format!("{} {:?}", socket::local(fd).unwrap(), socket::peer(fd).unwrap());
            all.iter().map(show).collect()
        };
        let before = names(&all);
        // The one that listened is gone, its connections stay.
        let [s0, c0, listener, c1, s1, named, of_named] = all;
        drop(listener);
        let all = cycle([s0, c0, c1, s1, named, of_named]);
        assert_eq!(
            before
                .iter()
                .enumerate()
                .filter(|(i, _)| *i != 2)
                .map(|(_, n)| n.clone())
                .collect::<Vec<_>>(),
            names(&all)
        );
        let [s0, c0, c1, s1, ..] = all.map(UnixStream::from);
        assert_eq!(read_all(&s1), b"waits");
        for (mut from, to) in [(&s0, &c0), (&c1, &s1)] {
            from.write_all(b"hello").unwrap();
            assert_eq!(read_all(to), b"hello");
        }
        drop((s0, s1));
        let [c0, c1] = cycle([c0.into(), c1.into()]);
        assert_eq!(socket::peer(&c0).unwrap(), socket::peer(&c1).unwrap());
        let _ = std::fs::remove_file(&path);
    }
}

#[test]
fn datagrams_remember_their_senders() {
    let _alone = crate::tests::alone();
    let dir = Temp::new("datagrams");
    let path = dir.join("server");
    let server = UnixDatagram::bind(&path).unwrap();
    let connected = UnixDatagram::unbound().unwrap();
    connected.connect(&path).unwrap();
    let named = UnixDatagram::bind_addr(&abstract_name("sender")).unwrap();
    connected.send(b"from nobody").unwrap();
    named.send_to(b"from a name", &path).unwrap();
    let brief = path.with_file_name("brief");
    UnixDatagram::bind(&brief)
        .unwrap()
        .send_to(b"from one that is gone", &path)
        .unwrap();
    std::fs::remove_file(&brief).unwrap();
    let [server, connected, named] = cycle([server.into(), connected.into(), named.into()]).map(UnixDatagram::from);
    let mut room = [0; 64];
    for (text, from) in [
        ("from nobody", None),
        ("from a name", None),
        ("from one that is gone", Some(brief.as_path())),
    ] {
        let (len, sender) = server.recv_from(&mut room).unwrap();
        assert_eq!(&room[..len], text.as_bytes());
        assert_eq!(sender.as_pathname(), from);
        assert_eq!(sender.as_abstract_name().is_some(), text == "from a name");
    }
    connected.send(b"more").unwrap();
    assert_eq!(server.recv(&mut room).unwrap(), 4);
    named.send_to(b"more", &path).unwrap();
    assert_eq!(server.recv(&mut room).unwrap(), 4);
    drop(server);
    std::fs::remove_file(&path).unwrap();
    let [connected] = cycle([connected.into()]);
    assert_eq!(
        socket::peer(&connected).unwrap(),
        Some(Address::Unix(path.to_str().unwrap().into()))
    );
}

#[test]
fn options_of_every_form() {
    let _alone = crate::tests::alone();
    let (a, b) = UnixStream::pair().unwrap();
    a.set_read_timeout(Some(std::time::Duration::from_millis(1500)))
        .unwrap();
    a.set_nonblocking(true).unwrap();
    let (a, b): (OwnedFd, OwnedFd) = (a.into(), b.into());
    for (number, value) in [
        (libc::SO_PASSCRED, 1),
        (libc::SO_SNDBUF, 5000),
        (libc::SO_RCVBUFFORCE, 1 << 24),
        (libc::SO_PRIORITY, 5),
        (libc::SO_MARK, 77),
        (libc::SO_KEEPALIVE, 1),
        (libc::SO_RCVLOWAT, 9),
        (libc::SO_PEEK_OFF, 3),
    ] {
        options::set_int(&a, number, value, "test").unwrap();
    }
    options::set(&a, libc::SOL_SOCKET, libc::SO_LINGER, &[1, 0, 0, 0, 5, 0, 0, 0], "test").unwrap();
    fd::set_owner(&a, 0o640, 5, 6).unwrap();
    let image = save(&[&a, &b]);
    assert_eq!(image.states[0].options.len(), 10);
    assert_eq!(image.states[1].options.len(), 0);
    cycle([a, b]);
}

#[test]
fn peek_offset_of_the_program_is_put_back() {
    let _alone = crate::tests::alone();
    let (a, b) = UnixDatagram::pair().unwrap();
    a.send(b"one").unwrap();
    a.send(b"two").unwrap();
    let (a, b): (OwnedFd, OwnedFd) = (a.into(), b.into());
    options::set_int(&b, libc::SO_PEEK_OFF, 3, "test").unwrap();
    let [_a, b] = cycle([a, b]);
    let mut room = [0; 8];
    assert_eq!(message::look(&b, &mut room).unwrap().unwrap().len, 3);
    assert_eq!(&room[..3], b"two");
}

#[test]
fn what_is_outside() {
    let _alone = crate::tests::alone();
    let (a, b) = UnixStream::pair().unwrap();
    let (a, b): (OwnedFd, OwnedFd) = (a.into(), b.into());
    assert!(matches!(find(&a, &[&a], &Image::default()), Ok(Found::Outside)));
    assert!(matches!(find(&a, &[&a, &b], &Image::default()), Ok(Found::Inside(_))));
    let name = abstract_name("outside");
    let listener: OwnedFd = UnixListener::bind_addr(&name).unwrap().into();
    let client: OwnedFd = UnixStream::connect_addr(&name).unwrap().into();
    assert!(matches!(
        find(&client, &[&client], &Image::default()),
        Ok(Found::Outside)
    ));
    assert!(matches!(
        find(&client, &[&client, &listener], &Image::default()),
        Ok(Found::Inside(_))
    ));
    socket::send(&client, b"hello", None).unwrap();
    let why = "waits to be accepted and has sent data";
    assert!(refusal(&client, &[&client, &listener]).contains(why));
    drop(client);
    assert!(refusal(&listener, &[&listener]).contains("whose caller has closed it"));
}

fn peer(fd: &OwnedFd) -> (usize, OwnedFd) {
    let mut room = [0; 64];
    let seen = message::look(fd, &mut room).unwrap().unwrap();
    let mut rights = seen.rights;
    assert_eq!(rights.len(), 1, "one descriptor came");
    (seen.len, rights.remove(0))
}

#[test]
fn open_files_in_flight_arrive_with_their_bytes() {
    let _alone = crate::tests::alone();
    for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
        let (a, b) = socket::pair(kind).unwrap();
        let (reader, writer) = fd::pipe().unwrap();
        socket::send(&a, b"before", None).unwrap();
        message::send(&a, b"brings", None, &[&reader], None).unwrap();
        message::send(&a, b"both", None, &[&writer, &a], None).unwrap();
        socket::send(&a, b"after", None).unwrap();
        let link = |fd: i32| proc::link(&format!("/proc/self/fd/{fd}")).ok();
        let count = || {
            let all = proc::fds(me()).unwrap().into_iter();
            all.filter(|fd| link(*fd) == link(reader.as_raw_fd())).count()
        };
        let image = save(&[&a, &b]);
        let brought: Vec<usize> = image.states[1].queue.iter().map(|m| m.rights.len()).collect();
        assert_eq!(brought, [0, 1, 2, 0]);
        assert_eq!(count(), 4, "two are ours, two were received for the look");
        drop(image);
        assert_eq!(count(), 2, "what was received for the look is closed");
        let [_a, b] = cycle([a, b]);
        let mut room = [0; 16];
        let got = |room: &mut [u8]| {
            let fds = socket::message::look(&b, room).unwrap().unwrap().rights;
            let len = UnixStream::from(b.try_clone().unwrap()).read(room).unwrap();
            (len, fds)
        };
        // A look at a stream shows the files that come next however little is read.
        assert_eq!(got(&mut room[..6]).0, 6);
        let (len, first) = got(&mut room);
        assert_eq!((len, first.len()), (6, 1));
        let (len, second) = got(&mut room);
        assert_eq!((len, second.len()), (4, 2));
        std::fs::File::from(second.into_iter().next().unwrap())
            .write_all(b"through")
            .unwrap();
        let mut text = [0; 7];
        std::fs::File::from(first.into_iter().next().unwrap())
            .read_exact(&mut text)
            .unwrap();
        assert_eq!(&text, b"through");
        assert_eq!(got(&mut room).0, 5);
    }
}

#[test]
fn who_sent_a_message_is_kept_and_who_did_not_say_too() {
    let _alone = crate::tests::alone();
    for kind in [libc::SOCK_STREAM, libc::SOCK_DGRAM, libc::SOCK_SEQPACKET] {
        let (a, b) = socket::pair(kind).unwrap();
        socket::send(&a, b"nobody", None).unwrap();
        let sender = |uid| {
            Some(Credentials {
                pid: me(),
                uid,
                gid: uid + 1,
            })
        };
        message::send(&a, b"one", None, &[], sender(12)).unwrap();
        message::send(&a, b"two", None, &[], sender(34)).unwrap();
        options::set_int(&b, libc::SO_PASSCRED, 1, "test").unwrap();
        socket::send(&a, b"myself", None).unwrap();
        let image = save(&[&a, &b]);
        let found: Vec<_> = image.states[1].queue.iter().map(|m| m.credentials).collect();
        let myself = Some(Credentials {
            pid: me(),
            uid: 0,
            gid: 0,
        });
        assert_eq!(found, [None, sender(12), sender(34), myself]);
        cycle([a, b]);
    }
}

#[test]
fn a_socket_in_its_own_queue() {
    let _alone = crate::tests::alone();
    let (a, b) = socket::pair(libc::SOCK_STREAM).unwrap();
    message::send(&a, b"x", None, &[&b], None).unwrap();
    let [_a, b] = cycle([a, b]);
    let (len, inner) = peer(&b);
    assert_eq!(len, 1);
    // In this test the image holds the old socket, which has the byte in it.
    assert_eq!(socket::incoming(&inner).unwrap(), 1);
}

#[test]
fn who_waits_to_be_accepted_waits_again() {
    let _alone = crate::tests::alone();
    let dir = Temp::new("backlog");
    let path = dir.join("socket");
    for address in [SocketAddr::from_pathname(&path).unwrap(), abstract_name("backlog")] {
        let listener = UnixListener::bind_addr(&address).unwrap();
        let clients = [0, 1, 2].map(|_| UnixStream::connect_addr(&address).unwrap());
        clients[1].shutdown(std::net::Shutdown::Write).unwrap();
        let [c0, c1, c2] = clients.map(OwnedFd::from);
        let [c2, c0, listener, c1] = cycle([c2, c0, listener.into(), c1]);
        let listener = UnixListener::from(listener);
        for (at, client) in [c0, c1, c2].into_iter().map(UnixStream::from).enumerate() {
            let (served, _) = listener.accept().unwrap();
            if at == 1 {
                assert_eq!(read_all(&served), b"");
            } else {
                (&client).write_all(&[at as u8]).unwrap();
                assert_eq!(read_all(&served), [at as u8]);
            }
            (&served).write_all(b"welcome").unwrap();
            assert_eq!(read_all(&client), b"welcome");
        }
        drop(listener);
        let _ = std::fs::remove_file(&path);
    }
}

#[test]
fn datagrams_that_came_before_the_peer_did() {
    let _alone = crate::tests::alone();
    let names = ["first", "second", "third"].map(abstract_name);
    let [a, b, c] = names.each_ref().map(|n| UnixDatagram::bind_addr(n).unwrap());
    let nameless = UnixDatagram::unbound().unwrap();
    nameless.send_to_addr(b"from nobody", &names[1]).unwrap();
    a.connect_addr(&names[1]).unwrap();
    c.send_to_addr(b"from c", &names[1]).unwrap();
    a.send(b"from a").unwrap();
    // From here on b takes nothing but from c, and c is told by nobody but b.
    b.connect_addr(&names[2]).unwrap();
    c.connect_addr(&names[1]).unwrap();
    b.send(b"from b").unwrap();
    let [b, a, c] = cycle([b.into(), a.into(), c.into()]).map(UnixDatagram::from);
    let mut room = [0; 64];
    for (text, from) in [
        ("from nobody", None),
        ("from c", Some(&names[2])),
        ("from a", Some(&names[0])),
    ] {
        let (len, sender) = b.recv_from(&mut room).unwrap();
        assert_eq!(&room[..len], text.as_bytes());
        assert_eq!(sender.as_abstract_name(), from.and_then(|f| f.as_abstract_name()));
    }
    assert_eq!(c.recv(&mut room).unwrap(), 6);
    assert!(a.send(b"x").is_err(), "b has another peer");
    assert!(nameless.send_to_addr(b"x", &names[2]).is_err());
}

#[test]
fn an_image_that_contradicts_itself() {
    let _alone = crate::tests::alone();
    let (a, b) = socket::pair(libc::SOCK_STREAM).unwrap();
    let good = save(&[&a, &b]).states;
    let bad = |change: fn(&mut Vec<State>)| {
        let mut states = good.clone();
        change(&mut states);
        let states: Vec<&State> = states.iter().collect();
        rebuild(me(), &states).unwrap_err().to_string()
    };
    let all = [
        bad(|s| s[0].peer = Peer::Socket(1)),
        bad(|s| s[0].peer = Peer::Socket(s[0].ino)),
        bad(|s| s[0].peer = Peer::None),
        bad(|s| s[0].kind = Kind::Datagram),
        bad(|s| s[0].backlog = Some(1)),
        bad(|s| s[0].name = Name(b"/path".to_vec())),
        bad(|s| s[0].ino = s[1].ino),
        bad(|s| s[0].waiting = vec![s[1].ino]),
        bad(|s| s[0].peer = Peer::Waiting(s[1].ino)),
    ];
    assert!(all.iter().all(|e| e.contains("damaged")), "{all:?}");
}
