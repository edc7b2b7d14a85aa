//! The calls behind socket state, on sockets of this process.
#![allow(clippy::unwrap_used, reason = "a test that panics has failed, as it should")]

use std::os::fd::AsFd;
use std::os::unix::net::{UnixDatagram, UnixListener, UnixStream};

use torpor_sys::socket::options::{self, Value, Values};
use torpor_sys::socket::{self, Address, Place, diag};
use torpor_sys::{Error, fd};

#[test]
fn addresses_go_there_and_back() {
    let ends = [
        (libc::AF_INET, Address::Inet("127.0.0.1:0".parse().unwrap())),
        (libc::AF_INET6, Address::Inet("[::1]:0".parse().unwrap())),
        (libc::AF_UNIX, Address::Unix(b"\0torpor\xff\0address".to_vec())),
    ];
    for (family, address) in ends {
        let socket = socket::create(family, libc::SOCK_DGRAM, 0).unwrap();
        socket::bind(&socket, &address).unwrap();
        match (socket::local(&socket).unwrap(), address) {
            (Address::Inet(local), Address::Inet(wanted)) => assert_eq!(local.ip(), wanted.ip()),
            (local, wanted) => assert_eq!(local, wanted),
        }
        assert_eq!(socket::peer(&socket).unwrap(), None);
    }
}

#[test]
fn unix_sockets_are_listed_with_their_peers() {
    let ino = |socket: &dyn AsFd| fd::stat(socket.as_fd()).unwrap().ino;
    let (a, b) = UnixStream::pair().unwrap();
    let (lone, gone) = UnixDatagram::pair().unwrap();
    drop(gone);
    let path = std::env::temp_dir().join(format!("torpor-sys-diag-{}", std::process::id()));
    let listener = UnixListener::bind(&path).unwrap();
    let client = UnixStream::connect(&path).unwrap();
    std::fs::remove_file(&path).unwrap();
    b.shutdown(std::net::Shutdown::Write).unwrap();
    let all = diag::unix_sockets().unwrap();
    let find = |socket: &dyn AsFd| all.iter().find(|s| s.ino == ino(socket)).unwrap();
    assert_eq!((find(&a).peer, find(&b).peer), (Some(ino(&b)), Some(ino(&a))));
    assert_eq!((find(&a).shutdown, find(&b).shutdown), (1, 2));
    assert_eq!((find(&lone).peer, find(&lone).kind), (Some(0), libc::SOCK_DGRAM));
    assert_eq!(find(&client).peer, Some(0));
    assert_eq!(
        (find(&listener).is_listening, &find(&listener).waiting),
        (true, &vec![ino(&client)])
    );
}

#[test]
fn a_look_takes_nothing() {
    let (a, b) = socket::pair(libc::SOCK_STREAM).unwrap();
    socket::send(&a, b"hello", None).unwrap();
    for _ in 0..2 {
        let mut room = [0; 5];
        let seen = socket::peek(&b, &mut room).unwrap().unwrap();
        assert_eq!((seen.len, seen.has_control, &room), (5, false, b"hello"));
    }
    assert_eq!(socket::incoming(&b).unwrap(), 5);
    assert_eq!(socket::poll(&b) & libc::POLLIN, libc::POLLIN);
}

#[test]
fn binding_a_file_leaves_nothing_else_behind() {
    let dir = std::env::temp_dir().join(format!("torpor-sys-bind-{}", std::process::id()));
    let _ = std::fs::remove_dir_all(&dir);
    std::fs::create_dir(&dir).unwrap();
    let cwd = std::env::current_dir().unwrap();
    let directory = fd::open(dir.to_str().unwrap(), libc::O_PATH).unwrap();
    let place = Place {
        directory: directory.as_fd(),
        name: "there",
        mode: 0o640,
        uid: 1,
        gid: 2,
    };
    for name in [&b"/elsewhere/at/all"[..], b"near", b"./../../up", b"/../x"] {
        let socket = socket::create(libc::AF_UNIX, libc::SOCK_DGRAM, 0).unwrap();
        socket::bind_file(&socket, name, Some(&place)).unwrap();
        assert_eq!(socket::local(&socket).unwrap(), Address::Unix(name.to_vec()));
        let id = fd::stat(socket::bound_file(&socket).unwrap()).unwrap();
        assert_eq!((id.mode, id.uid, id.gid), (libc::S_IFSOCK | 0o640, 1, 2));
        assert_eq!(id, fd::stat_path(dir.join("there").to_str().unwrap()).unwrap());
        let nowhere = socket::create(libc::AF_UNIX, libc::SOCK_DGRAM, 0).unwrap();
        socket::bind_file(&nowhere, name, None).unwrap();
        assert_eq!(fd::stat(socket::bound_file(&nowhere).unwrap()).unwrap().nlink, 0);
    }
    let taken = socket::create(libc::AF_UNIX, libc::SOCK_DGRAM, 0).unwrap();
    assert!(
        socket::bind_file(&taken, &[b'x'; 200], Some(&place)).is_err(),
        "longer than a name may be"
    );
    let left: Vec<_> = std::fs::read_dir(&dir)
        .unwrap()
        .map(|e| e.unwrap().file_name())
        .collect();
    assert_eq!(left, ["there"]);
    assert_eq!(std::env::current_dir().unwrap(), cwd);
    assert!(std::path::Path::new("/proc/self").exists(), "the root is as before");
    std::fs::remove_dir_all(&dir).unwrap();
}

#[test]
fn options_that_nobody_knows_are_not_applied() {
    let socket = socket::create(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
    let with = |name: &str, value| options::apply(&socket, &Values::from([(name.to_owned(), value)]));
    assert!(matches!(
        with("SO_NONSENSE", Value::Number(1)),
        Err(Error::Parse { .. })
    ));
    assert!(matches!(with("SO_LINGER", Value::Number(1)), Err(Error::Parse { .. })));
    assert!(matches!(
        with("TCP_CONGESTION", Value::Text("none such".into())),
        Err(Error::Call { .. })
    ));
    with("SO_KEEPALIVE", Value::Number(1)).unwrap();
    let new = socket::create(libc::AF_INET, libc::SOCK_STREAM, 0).unwrap();
    let values = options::differing(&socket, &new).unwrap();
    assert_eq!(values, Values::from([("SO_KEEPALIVE".to_owned(), Value::Number(1))]));
}
