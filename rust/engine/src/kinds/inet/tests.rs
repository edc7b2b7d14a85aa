//! Sockets of containers that are network namespaces with a sleeping process.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, AsRawFd};
use std::process::{Child, Command, Stdio};

use super::udp::{parse_igmp, parse_igmp6};
use super::*;

/// A process with a network namespace of its own, with lo and a link between two devices.
struct Container(Child);

impl Container {
    fn new() -> Container {
        let script = "ip link set lo up && ip link add eth0 type veth peer name eth1 && ip link set eth0 up && \
            ip link set eth1 up && ip addr add 10.7.7.1/24 dev eth0 && ip -6 addr add fe80::7/64 dev eth0 nodad && \
            echo ready && exec sleep 600";
        let mut command = Command::new("unshare");
        let mut child = command
            .args(["-n", "sh", "-c", script])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let mut ready = [0; 6];
        child.stdout.as_mut().unwrap().read_exact(&mut ready).unwrap();
        Container(child)
    }

    fn pid(&self) -> Pid {
        self.0.id() as Pid
    }

    fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> T {
        namespace::within(self.pid(), &["net"], || Ok(work())).unwrap()
    }

    fn save(&self, fd: &OwnedFd) -> Result<State> {
        let before = all_options(fd);
        let flags = fd::fcntl(fd, libc::F_GETFL, 0).unwrap();
        let one = connection::Candidate {
            pid: self.pid(),
            number: fd.as_raw_fd(),
            ino: fd::stat(fd).unwrap().ino,
            fd,
        };
        let streams: &[_] = if is_tcp(fd) { &[one] } else { &[] };
        let survey = connection::survey(self.pid(), streams, connection::Policy::default())?;
        let mut no_blob = |_: &[u8]| Ok(BlobRef::default());
        let state = collect(self.pid(), fd.as_raw_fd(), fd, &survey, &mut no_blob)?;
        same(before, all_options(fd));
        assert_eq!(flags, fd::fcntl(fd, libc::F_GETFL, 0).unwrap());
        Ok(serde_json::from_str(&serde_json::to_string(&state).unwrap()).unwrap())
    }

    fn refusal(&self, fd: &impl AsFd) -> String {
        let fd = fd.as_fd().try_clone_to_owned().unwrap();
        let error = self.save(&fd).unwrap_err();
        assert_eq!(error.code(), "unsupported");
        error.to_string()
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Saves the sockets of one container and rebuilds them in another: same options, would be saved the same again.
fn cycle<const N: usize>(from: &Container, to: &Container, fds: [&OwnedFd; N]) -> [OwnedFd; N] {
    let states = fds.map(|fd| from.save(fd).unwrap());
    let made: [OwnedFd; N] = rebuild(to.pid(), &states.each_ref(), &nothing)
        .unwrap()
        .try_into()
        .unwrap();
    for ((fd, state), made) in fds.iter().zip(&states).zip(&made) {
        same(all_options(fd), all_options(made));
        assert_eq!(format!("{state:?}"), format!("{:?}", to.save(made).unwrap()));
        assert_eq!(socket::poll(fd), socket::poll(made));
    }
    made
}

fn nothing(_: BlobRef) -> Result<Vec<u8>> {
    Ok(Vec::new())
}

type Options = Vec<(i32, i32, Vec<u8>)>;

/// Every option that can be read, but those that tell sockets, CPUs or times apart or that reading changes.
fn all_options(fd: &impl AsFd) -> Options {
    let skipped = |level, number| match level {
        // ERROR PEERCRED INCOMING_CPU MEMINFO INCOMING_NAPI_ID COOKIE NETNS_COOKIE PEERPIDFD
        libc::SOL_SOCKET => [4, 17, 49, 55, 56, 57, 71, 77].contains(&number),
        // INFO TIMESTAMP CC_INFO FASTOPEN_KEY ZEROCOPY_RECEIVE
        libc::SOL_TCP => [11, 24, 26, 33, 35].contains(&number),
        _ => false,
    };
    let mut all = Vec::new();
    for level in [
        libc::SOL_SOCKET,
        libc::SOL_IP,
        libc::SOL_IPV6,
        libc::SOL_TCP,
        libc::SOL_UDP,
    ] {
        for number in (1..120).filter(|n| !skipped(level, *n)) {
            let mut room = [0; 256];
            if let Ok(len) = options::get(fd, level, number, &mut room) {
                all.push((level, number, room[..len.min(256)].to_vec()));
            }
        }
    }
    all
}

fn same(a: Options, b: Options) {
    let only = |a: &Options, b: &Options| a.iter().filter(|o| !b.contains(o)).cloned().collect::<Vec<_>>();
    assert_eq!(only(&a, &b), only(&b, &a));
}

fn set(fd: &impl AsFd, level: i32, number: i32, value: i32) {
    options::set(fd, level, number, &value.to_ne_bytes(), "test").unwrap_or_else(|e| panic!("{level} {number}: {e}"));
}

/// Changes every option that this kernel lets us change on such a socket; the number of them.
fn change_all(fd: &OwnedFd) -> usize {
    const STRANGE: [(i32, i32); 12] = [
        // What attaches, repairs or needs a peer, an address or a key.
        (1, 26),
        (1, 27),
        (1, 50),
        (1, 51),
        (1, 52),
        (1, 68),
        (6, 14),
        (6, 19),
        (6, 33),
        (41, 1),
        (41, 20),
        (6, 31),
    ];
    let mut changed = 0;
    for (level, number, value) in all_options(fd) {
        let Ok(now) = <[u8; 4]>::try_from(value).map(i32::from_ne_bytes) else {
            continue;
        };
        if STRANGE.contains(&(level, number)) {
            continue;
        }
        for value in [1, 0, 2, 30, 600, now + 1] {
            let done = value != now && options::set(fd, level, number, &value.to_ne_bytes(), "").is_ok();
            let mut room = [0; 4];
            if done && options::get(fd, level, number, &mut room).is_ok() && i32::from_ne_bytes(room) != now {
                changed += 1;
                break;
            }
        }
    }
    changed
}

#[test]
fn listening_sockets_accept_again() {
    let _alone = crate::tests::alone();
    let (here, there) = (Container::new(), Container::new());
    for (address, client) in [
        ("127.0.0.1:80", "127.0.0.1:80"),
        ("0.0.0.0:81", "10.7.7.1:81"),
        ("[::1]:82", "[::1]:82"),
        ("[::]:83", "127.0.0.1:83"),
        ("[::ffff:127.0.0.1]:84", "127.0.0.1:84"),
        ("[fe80::7%eth0]:85", "[fe80::7%eth0]:85"),
    ] {
        let of = |c: &Container, a: &str| -> SocketAddr {
            a.replace("%eth0", &format!("%{}", index_of(c, "eth0")))
                .parse()
                .unwrap()
        };
        let listener: OwnedFd = here.run(|| TcpListener::bind(of(&here, address)).unwrap()).into();
        socket::listen(&listener, 33).unwrap();
        let [made] = cycle(&here, &there, [&listener]);
        assert_eq!(here.save(&listener).unwrap().backlog, Some(33));
        for (container, fd) in [(&here, listener), (&there, made)] {
            let listener = TcpListener::from(fd);
            let target = of(container, client);
            let mut stream = container.run(|| TcpStream::connect(target).unwrap());
            stream.write_all(b"hello").unwrap();
            let mut room = [0; 5];
            listener.accept().unwrap().0.read_exact(&mut room).unwrap();
            assert_eq!(&room, b"hello");
        }
    }
}

fn index_of(container: &Container, device: &str) -> u32 {
    container.run(|| socket::device_index(socket::create(libc::AF_INET, libc::SOCK_DGRAM, 0).unwrap(), device).unwrap())
}

#[test]
fn every_option_that_can_be_set_is_carried() {
    let _alone = crate::tests::alone();
    let (here, there) = (Container::new(), Container::new());
    for (family, kind) in [
        (libc::AF_INET, libc::SOCK_STREAM),
        (libc::AF_INET6, libc::SOCK_STREAM),
        (libc::AF_INET, libc::SOCK_DGRAM),
        (libc::AF_INET6, libc::SOCK_DGRAM),
    ] {
        let fd = here.run(|| socket::create(family, kind, 0).unwrap());
        let changed = change_all(&fd);
        assert!(changed > 40, "{changed}");
        set(&fd, libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, 1 << 24);
        options::set(&fd, libc::SOL_SOCKET, libc::SO_BINDTODEVICE, b"eth0", "").unwrap();
        options::set(&fd, libc::SOL_SOCKET, libc::SO_LINGER, &[1, 0, 0, 0, 5, 0, 0, 0], "").unwrap();
        if kind == libc::SOCK_STREAM {
            options::set(&fd, libc::SOL_TCP, libc::TCP_CONGESTION, b"reno", "").unwrap();
            set(&fd, libc::SOL_SOCKET, libc::SO_INCOMING_CPU, 1);
            cycle(&here, &there, [&fd]);
            socket::listen(&fd, 5).unwrap();
        }
        fd::set_owner(&fd, 0o600, 11, 12).unwrap();
        cycle(&here, &there, [&fd]);
    }
}

// Each round has containers of its own: a child that another test starts meanwhile holds a copy of our sockets until it
// executes its program, and a port that is held cannot be bound again.
#[test]
fn sockets_that_share_a_port() {
    let _alone = crate::tests::alone();
    let make = |here: &Container, option| {
        let fd = here.run(|| socket::create(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap());
        set(&fd, libc::SOL_SOCKET, option, 1);
        socket::bind(&fd, &Address::Inet("0.0.0.0:90".parse().unwrap())).unwrap();
        fd
    };
    let (here, there) = (Container::new(), Container::new());
    let group = [(); 3].map(|()| make(&here, libc::SO_REUSEPORT));
    group.iter().for_each(|fd| socket::listen(fd, 5).unwrap());
    cycle(&here, &there, group.each_ref());
    let here = Container::new();
    let (a, b) = (make(&here, libc::SO_REUSEADDR), make(&here, libc::SO_REUSEADDR));
    socket::listen(&a, 5).unwrap();
    set(&a, libc::SOL_SOCKET, libc::SO_REUSEADDR, 0);
    cycle(&here, &Container::new(), [&a, &b]);
    cycle(&here, &Container::new(), [&b, &a]);
}

#[test]
fn udp_sockets_send_and_receive_again() {
    let _alone = crate::tests::alone();
    let (here, there) = (Container::new(), Container::new());
    for (a, b) in [("127.0.0.1:7001", "127.0.0.1:7002"), ("[::1]:7001", "[::1]:7002")] {
        let (a, b) = here.run(|| (UdpSocket::bind(a).unwrap(), UdpSocket::bind(b).unwrap()));
        a.connect(b.local_addr().unwrap()).unwrap();
        let (a, b): (OwnedFd, OwnedFd) = (a.into(), b.into());
        let made = cycle(&here, &there, [&a, &b]);
        for [a, b] in [[a, b], made].map(|pair| pair.map(UdpSocket::from)) {
            a.send(b"hello").unwrap();
            let mut room = [0; 8];
            let (len, from) = b.recv_from(&mut room).unwrap();
            assert_eq!((&room[..len], from), (&b"hello"[..], a.local_addr().unwrap()));
            a.send(b"").unwrap();
        }
    }
}

/// Saves sockets with what waits in them, closes them, and rebuilds them in another container.
fn move_all<const N: usize>(from: &Container, to: &Container, fds: [OwnedFd; N]) -> [OwnedFd; N] {
    let blobs = std::cell::RefCell::new(Vec::<Vec<u8>>::new());
    let mut store = |bytes: &[u8]| {
        blobs.borrow_mut().push(bytes.to_vec());
        Ok(BlobRef {
            offset: blobs.borrow().len() as u64 - 1,
            len: bytes.len() as u64,
        })
    };
    let survey = connection::survey(from.pid(), &[], connection::Policy::default()).unwrap();
    let mut save = |fd: &OwnedFd| {
        let before = all_options(fd);
        let state = collect(from.pid(), fd.as_raw_fd(), fd, &survey, &mut store).unwrap();
        same(before, all_options(fd));
        state
    };
    let states: Vec<State> = fds.iter().map(&mut save).collect();
    let options: Vec<Options> = fds.iter().map(all_options).collect();
    drop(fds);
    let read = |blob: BlobRef| Ok(blobs.borrow()[blob.offset as usize].clone());
    let made = rebuild(to.pid(), &states.iter().collect::<Vec<_>>(), &read).unwrap();
    for (before, made) in options.into_iter().zip(&made) {
        same(before, all_options(made));
    }
    made.try_into().unwrap()
}

#[test]
fn datagrams_that_wait_arrive_once_more() {
    let _alone = crate::tests::alone();
    let (here, there) = (Container::new(), Container::new());
    let bind = |address: &str| here.run(|| UdpSocket::bind(address).unwrap());
    let (plain, both, tied) = (bind("0.0.0.0:7003"), bind("[::]:7005"), bind("127.0.0.1:7006"));
    let senders = ["127.0.0.1:7101", "10.7.7.1:7102", "[::1]:7103"].map(bind);
    let port = |to: &UdpSocket| to.local_addr().unwrap().port();
    for n in 0..20u8 {
        let text = vec![n; usize::from(n) * 300];
        senders[0].send_to(&text, ("127.0.0.1", port(&plain))).unwrap();
        senders[1].send_to(&text, ("10.7.7.1", port(&plain))).unwrap();
    }
    senders[0].send_to(b"v4", ("127.0.0.1", port(&both))).unwrap();
    senders[2].send_to(&[7; 65_000], ("::1", port(&both))).unwrap();
    senders[2].send_to(b"odd", ("::1", port(&both))).unwrap();
    senders[0]
        .send_to(b"from a stranger", ("127.0.0.1", port(&tied)))
        .unwrap();
    tied.connect("127.0.0.1:9").unwrap();
    set(&plain, libc::SOL_SOCKET, libc::SO_PEEK_OFF, 3);
    let addresses = senders.each_ref().map(|s| s.local_addr().unwrap());
    // They are gone when the datagrams come again.
    drop(senders);
    let made = move_all(&here, &there, [plain.into(), both.into(), tied.into()]);
    let [plain, both, tied] = move_all(&there, &here, made).map(UdpSocket::from);
    let mut room = vec![0; 70_000];
    let mut next = |socket: &UdpSocket| {
        socket.set_nonblocking(true).unwrap();
        let (len, from) = socket.recv_from(&mut room).unwrap();
        (room[..len].to_vec(), from)
    };
    for n in 0..20u8 {
        let text = vec![n; usize::from(n) * 300];
        assert_eq!(next(&plain), (text.clone(), addresses[0]));
        assert_eq!(next(&plain), (text, addresses[1]));
    }
    assert_eq!(
        next(&both),
        (b"v4".to_vec(), "[::ffff:127.0.0.1]:7101".parse().unwrap())
    );
    assert_eq!(next(&both), (vec![7; 65_000], addresses[2]));
    assert_eq!(next(&both), (b"odd".to_vec(), addresses[2]));
    assert_eq!(next(&tied), (b"from a stranger".to_vec(), addresses[0]));
    for socket in [plain, both, tied] {
        assert!(socket.recv(&mut [0]).is_err(), "nothing came twice");
    }
}

#[test]
fn datagrams_that_nobody_could_send_again() {
    let _alone = crate::tests::alone();
    let here = Container::new();
    let shared = here.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    set(&shared, libc::SOL_SOCKET, libc::SO_REUSEPORT, 1);
    shared.send_to(b"x", shared.local_addr().unwrap()).unwrap();
    assert!(here.refusal(&shared).contains("may share its port (SO_REUSEPORT)"));
    let group = here.run(|| {
        let socket = UdpSocket::bind("0.0.0.0:7009").unwrap();
        socket
            .join_multicast_v4(&"239.1.2.3".parse().unwrap(), &"127.0.0.1".parse().unwrap())
            .unwrap();
        let sender = UdpSocket::bind("127.0.0.1:0").unwrap();
        sender.send_to(b"x", "239.1.2.3:7009").unwrap();
        socket
    });
    assert!(here.refusal(&group).contains("which nobody could send again"));
    let empty = here.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    empty.send_to(b"", empty.local_addr().unwrap()).unwrap();
    assert!(
        here.save(&empty.into())
            .unwrap()
            .warning()
            .unwrap()
            .contains("an empty datagram waits")
    );
}

#[test]
fn multicast_groups() {
    let _alone = crate::tests::alone();
    let (here, there) = (Container::new(), Container::new());
    let (v4, v6) = here.run(|| {
        (
            UdpSocket::bind("0.0.0.0:5353").unwrap(),
            UdpSocket::bind("[::]:5354").unwrap(),
        )
    });
    v4.join_multicast_v4(&"224.0.0.251".parse().unwrap(), &"10.7.7.1".parse().unwrap())
        .unwrap();
    v6.join_multicast_v6(&"ff02::fb".parse().unwrap(), index_of(&here, "eth0"))
        .unwrap();
    let bystander = here.run(|| UdpSocket::bind("0.0.0.0:5355").unwrap());
    let fds: [OwnedFd; 3] = [v4.into(), v6.into(), bystander.into()];
    let made = cycle(&here, &there, fds.each_ref());
    let groups = |fd: &OwnedFd| {
        there
            .save(fd)
            .unwrap()
            .groups
            .iter()
            .map(|g| g.address.to_string())
            .collect::<Vec<_>>()
    };
    assert_eq!(
        made.each_ref().map(groups),
        [vec!["224.0.0.251"], vec!["ff02::fb"], vec![]]
    );
    // IP_ADD_SOURCE_MEMBERSHIP (39): group, device, source.
    options::set(&fds[2], libc::SOL_IP, 39, &[224, 0, 0, 9, 10, 7, 7, 1, 10, 7, 7, 2], "").unwrap();
    assert!(here.refusal(&fds[2]).contains("from some sources"));
}

#[test]
fn a_connection_that_is_over() {
    let _alone = crate::tests::alone();
    let (here, there) = (Container::new(), Container::new());
    for address in ["127.0.0.1:95", "[::1]:95"] {
        let listener = here.run(|| TcpListener::bind(address).unwrap());
        let client = here.run(|| TcpStream::connect(address).unwrap());
        assert!(here.refusal(&listener).contains("connections from outside wait"));
        let server = listener.accept().unwrap().0;
        options::set(
            &client,
            libc::SOL_SOCKET,
            libc::SO_LINGER,
            &[1, 0, 0, 0, 0, 0, 0, 0],
            "",
        )
        .unwrap();
        drop(client);
        // The reset leaves with the last copy of the client, which a child of another test may hold for a moment.
        while socket::poll(&server) & libc::POLLERR == 0 {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
        assert!(here.refusal(&server).contains("an error waits"));
        assert!((&server).read(&mut [0; 8]).is_err());
        let server: OwnedFd = server.into();
        let state = here.save(&server).unwrap();
        let made = rebuild(there.pid(), &[&state], &nothing).unwrap().remove(0);
        assert_eq!(format!("{state:?}"), format!("{:?}", there.save(&made).unwrap()));
        for mut stream in [server, made].map(TcpStream::from) {
            assert_eq!(stream.read(&mut [0; 8]).unwrap(), 0);
            assert_eq!(stream.write(b"x").unwrap_err().kind(), std::io::ErrorKind::BrokenPipe);
        }
    }
}

#[test]
fn mptcp_comes_back_as_tcp() {
    let _alone = crate::tests::alone();
    let (here, there) = (Container::new(), Container::new());
    let Ok(fd) = here.run(|| socket::create(libc::AF_INET, libc::SOCK_STREAM, IPPROTO_MPTCP)) else {
        return;
    };
    set(&fd, libc::SOL_SOCKET, libc::SO_KEEPALIVE, 1);
    socket::bind(&fd, &Address::Inet("127.0.0.1:96".parse().unwrap())).unwrap();
    socket::listen(&fd, 44).unwrap();
    let state = here.save(&fd).unwrap();
    assert!(state.warning().unwrap().contains("127.0.0.1:96"));
    let made = rebuild(there.pid(), &[&state], &nothing).unwrap().remove(0);
    let again = there.save(&made).unwrap();
    assert_eq!((again.backlog, again.warning()), (Some(44), None));
    assert_eq!((&again.options, &again.local), (&state.options, &state.local));
    let _client = there.run(|| TcpStream::connect("127.0.0.1:96").unwrap());
    TcpListener::from(made).accept().unwrap();
}

#[test]
fn what_is_refused() {
    let _alone = crate::tests::alone();
    let here = Container::new();
    let make = |family, kind, protocol| here.run(|| socket::create(family, kind, protocol).unwrap());
    assert!(
        here.refusal(&make(libc::AF_NETLINK, libc::SOCK_RAW, 0))
            .contains("netlink")
    );
    assert!(
        here.refusal(&make(libc::AF_INET, libc::SOCK_RAW, libc::IPPROTO_TCP))
            .contains("raw IP")
    );
    assert!(
        here.refusal(&make(libc::AF_PACKET, libc::SOCK_RAW, 0))
            .contains("packet")
    );
    // A new network namespace lets nobody have one.
    here.run(|| std::fs::write("/proc/sys/net/ipv4/ping_group_range", "0 0").unwrap());
    assert!(
        here.refusal(&make(libc::AF_INET, libc::SOCK_DGRAM, libc::IPPROTO_ICMP))
            .contains("ICMP")
    );
    // Not every kernel has these.
    if let Ok(vsock) = socket::create(libc::AF_VSOCK, libc::SOCK_STREAM, 0) {
        assert!(here.refusal(&vsock).contains("vsock"));
    }
    assert!(
        here.refusal(&UdpSocket::bind("127.0.0.1:0").unwrap())
            .contains("network namespace")
    );
    let corked = here.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    corked.connect("127.0.0.1:9").unwrap();
    set(&corked, libc::SOL_UDP, 1, 1);
    corked.send(b"half").unwrap();
    assert!(here.refusal(&corked).contains("UDP_CORK"));
    let refused = here.run(|| UdpSocket::bind("127.0.0.1:0").unwrap());
    refused.connect("127.0.0.1:9").unwrap();
    refused.send(b"nobody there").unwrap();
    assert!(here.refusal(&refused).contains("an error waits"));
}

#[test]
fn groups_as_the_kernel_lists_them() {
    let _alone = crate::tests::alone();
    let v4 = "Idx\tDevice    : Count Querier\tGroup    Users Timer\tReporter\n\
        1\tlo        :     1      V3\n\t\t\t\t010000E0     1 0:00000000\t\t0\n\
        2\teth0      :     2      V3\n\t\t\t\tFB0000E0     1 0:00000000\t\t0\n";
    assert_eq!(
        parse_igmp(v4),
        [(1, "224.0.0.1".parse().unwrap()), (2, "224.0.0.251".parse().unwrap())]
    );
    let v6 = "2    eth0            ff0200000000000000000000000000fb     1 00000004 0\n";
    assert_eq!(parse_igmp6(v6), [(2, "ff02::fb".parse().unwrap())]);
    assert!(parse_igmp("x\n\tzz\n1 y\n\t").is_empty() && parse_igmp6("a b\n").is_empty());
}

fn connected(here: &Container, address: &str) -> (TcpListener, OwnedFd, OwnedFd) {
    let listener = here.run(|| TcpListener::bind(address).unwrap());
    let client = here.run(|| TcpStream::connect(address).unwrap());
    let server = listener.accept().unwrap().0;
    (listener, client.into(), server.into())
}

#[test]
fn a_connection_is_read_and_goes_on() {
    let _alone = crate::tests::alone();
    let here = Container::new();
    for address in ["127.0.0.1:97", "[::1]:97"] {
        let (_listener, client, server) = connected(&here, address);
        set(&client, libc::SOL_SOCKET, libc::SO_REUSEADDR, 1);
        socket::send(&client, b"unread", None).unwrap();
        let before = all_options(&client);
        let seen = look::look(here.pid(), &[&client, &server]).unwrap();
        assert_eq!(seen[1].incoming, b"unread");
        assert_eq!((seen[0].written, seen[1].written), (seen[1].received, seen[0].received));
        same(before, all_options(&client));
        socket::send(&client, b" more", None).unwrap();
        let mut room = [0; 11];
        TcpStream::from(server).read_exact(&mut room).unwrap();
        assert_eq!(&room, b"unread more");
    }
}

#[test]
fn a_connection_that_was_left_in_repair_is_put_back() {
    let _alone = crate::tests::alone();
    let here = Container::new();
    let (_listener, client, server) = connected(&here, "127.0.0.1:98");
    let before = tcp::Before::of(&client).unwrap();
    tcp::enter(&client).unwrap();
    assert!(socket::send(&client, b"x", None).is_err());
    before.undo(&client).unwrap();
    socket::send(&client, b"x", None).unwrap();
    TcpStream::from(server).read_exact(&mut [0]).unwrap();
}

#[test]
fn what_is_held_arrives_when_the_hold_is_dropped() {
    let _alone = crate::tests::alone();
    let here = Container::new();
    let (_listener, client, server) = connected(&here, "127.0.0.1:99");
    let hold = Hold::take(here.pid(), [&server].into_iter()).unwrap().unwrap();
    socket::send(&client, b"x", None).unwrap();
    std::thread::sleep(std::time::Duration::from_millis(50));
    assert_eq!(socket::incoming(&server).unwrap(), 0);
    drop(hold);
    assert!(!options::has_filter(&server));
    TcpStream::from(server).read_exact(&mut [0]).unwrap();
}

#[test]
fn a_buried_connection_tells_its_peer_nothing() {
    let _alone = crate::tests::alone();
    let here = Container::new();
    let (_listener, client, server) = connected(&here, "127.0.0.1:100");
    let hold = Hold::take(here.pid(), [&server].into_iter()).unwrap().unwrap();
    drop(server);
    hold.bury();
    // Neither an end nor a reset: both would be seen at once.
    assert_eq!(socket::poll(&client) & (libc::POLLERR | libc::POLLRDHUP), 0);
}
