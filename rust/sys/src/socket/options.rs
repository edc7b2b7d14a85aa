//! Socket options that can be read and set again: one table, walked in both directions.

use std::collections::BTreeMap;
use std::os::fd::{AsFd, AsRawFd};

use nix::errno::Errno;
use serde::{Deserialize, Serialize};

use super::{device_index, device_name};
use crate::error::{Error, Result, check};

/// The value of an option.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Value {
    /// Almost all.
    Number(i64),
    /// Structs of numbers, and bytes.
    Numbers(Vec<i64>),
    /// Names: of a device, of a congestion control.
    Text(String),
}

/// Options by name that are not as in a new socket.
pub type Values = BTreeMap<String, Value>;

/// How the kernel takes and gives a value.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// An int.
    Int,
    /// An unsigned long.
    Long,
    /// Two ints.
    Pair,
    /// A struct timeval.
    Time,
    /// Bytes, at most so many.
    Bytes(usize),
    /// A name in 16 bytes.
    Text,
    /// The number of a network device, which another namespace may number differently.
    Device { big_endian: bool },
    /// A buffer size: read as twice what was set, and kept only when the program has set it (this bit of
    /// SO_BUF_LOCK). This option sets it beyond net.core.*mem_max.
    Buffer { force: i32, lock: i64 },
}

/// Where an option is a wish of the program. Elsewhere it cannot be set, or is what the kernel found out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Of {
    All,
    Streams,
    Datagrams,
}

struct Setting {
    name: &'static str,
    level: i32,
    number: i32,
    form: Form,
    of: Of,
}

const fn setting(name: &'static str, level: i32, number: i32, form: Form) -> Setting {
    Setting {
        name,
        level,
        number,
        form,
        of: Of::All,
    }
}

impl Setting {
    const fn of(self, of: Of) -> Setting {
        Setting { of, ..self }
    }
}

const SO: i32 = libc::SOL_SOCKET;
const IP: i32 = libc::SOL_IP;
const IPV6: i32 = libc::SOL_IPV6;
const TCP: i32 = libc::SOL_TCP;
const UDP: i32 = libc::SOL_UDP;

/// Numbers are those of include/uapi; names without a prefix of libc are newer than it. An option that sets
/// another one by the way comes before it (IP_TOS before SO_PRIORITY).
const TABLE: &[Setting] = &[
    setting("IP_TOS", IP, 1, Form::Int),
    setting("IP_TTL", IP, 2, Form::Int),
    setting("IP_OPTIONS", IP, 4, Form::Bytes(40)),
    setting("IP_RECVOPTS", IP, 6, Form::Int),
    setting("IP_RETOPTS", IP, 7, Form::Int),
    setting("IP_PKTINFO", IP, 8, Form::Int),
    setting("IP_MTU_DISCOVER", IP, 10, Form::Int),
    setting("IP_RECVERR", IP, 11, Form::Int),
    setting("IP_RECVTTL", IP, 12, Form::Int),
    setting("IP_RECVTOS", IP, 13, Form::Int),
    setting("IP_FREEBIND", IP, 15, Form::Int),
    setting("IP_PASSSEC", IP, 18, Form::Int),
    setting("IP_TRANSPARENT", IP, 19, Form::Int),
    setting("IP_RECVORIGDSTADDR", IP, 20, Form::Int),
    setting("IP_MINTTL", IP, 21, Form::Int),
    setting("IP_CHECKSUM", IP, 23, Form::Int),
    setting("IP_BIND_ADDRESS_NO_PORT", IP, 24, Form::Int),
    setting("IP_RECVFRAGSIZE", IP, 25, Form::Int),
    setting("IP_RECVERR_RFC4884", IP, 26, Form::Int),
    setting("IP_MULTICAST_IF", IP, 32, Form::Int).of(Of::Datagrams),
    setting("IP_MULTICAST_TTL", IP, 33, Form::Int).of(Of::Datagrams),
    setting("IP_MULTICAST_LOOP", IP, 34, Form::Int),
    setting("IP_MULTICAST_ALL", IP, 49, Form::Int),
    setting("IP_UNICAST_IF", IP, 50, Form::Device { big_endian: true }),
    setting("IP_LOCAL_PORT_RANGE", IP, 51, Form::Int),
    setting("IPV6_2292PKTINFO", IPV6, 2, Form::Int),
    setting("IPV6_2292HOPOPTS", IPV6, 3, Form::Int),
    setting("IPV6_2292DSTOPTS", IPV6, 4, Form::Int),
    setting("IPV6_2292RTHDR", IPV6, 5, Form::Int),
    setting("IPV6_2292HOPLIMIT", IPV6, 8, Form::Int),
    setting("IPV6_FLOWINFO", IPV6, 11, Form::Int),
    setting("IPV6_UNICAST_HOPS", IPV6, 16, Form::Int),
    setting("IPV6_MULTICAST_IF", IPV6, 17, Form::Device { big_endian: false }).of(Of::Datagrams),
    setting("IPV6_MULTICAST_HOPS", IPV6, 18, Form::Int).of(Of::Datagrams),
    setting("IPV6_MULTICAST_LOOP", IPV6, 19, Form::Int),
    setting("IPV6_MTU_DISCOVER", IPV6, 23, Form::Int),
    setting("IPV6_RECVERR", IPV6, 25, Form::Int),
    setting("IPV6_V6ONLY", IPV6, 26, Form::Int),
    setting("IPV6_MULTICAST_ALL", IPV6, 29, Form::Int),
    setting("IPV6_ROUTER_ALERT_ISOLATE", IPV6, 30, Form::Int),
    setting("IPV6_RECVERR_RFC4884", IPV6, 31, Form::Int),
    setting("IPV6_FLOWINFO_SEND", IPV6, 33, Form::Int),
    setting("IPV6_RECVPKTINFO", IPV6, 49, Form::Int),
    setting("IPV6_RECVHOPLIMIT", IPV6, 51, Form::Int),
    setting("IPV6_RECVHOPOPTS", IPV6, 53, Form::Int),
    setting("IPV6_HOPOPTS", IPV6, 54, Form::Bytes(256)),
    setting("IPV6_RTHDRDSTOPTS", IPV6, 55, Form::Bytes(256)),
    setting("IPV6_RECVRTHDR", IPV6, 56, Form::Int),
    setting("IPV6_RTHDR", IPV6, 57, Form::Bytes(256)),
    setting("IPV6_RECVDSTOPTS", IPV6, 58, Form::Int),
    setting("IPV6_DSTOPTS", IPV6, 59, Form::Bytes(256)),
    setting("IPV6_RECVPATHMTU", IPV6, 60, Form::Int),
    setting("IPV6_DONTFRAG", IPV6, 62, Form::Int),
    setting("IPV6_RECVTCLASS", IPV6, 66, Form::Int),
    setting("IPV6_TCLASS", IPV6, 67, Form::Int),
    setting("IPV6_AUTOFLOWLABEL", IPV6, 70, Form::Int),
    setting("IPV6_ADDR_PREFERENCES", IPV6, 72, Form::Int),
    setting("IPV6_MINHOPCOUNT", IPV6, 73, Form::Int),
    setting("IPV6_RECVORIGDSTADDR", IPV6, 74, Form::Int),
    setting("IPV6_TRANSPARENT", IPV6, 75, Form::Int),
    setting("IPV6_UNICAST_IF", IPV6, 76, Form::Device { big_endian: true }),
    setting("IPV6_RECVFRAGSIZE", IPV6, 77, Form::Int),
    setting("IPV6_FREEBIND", IPV6, 78, Form::Int),
    setting("TCP_NODELAY", TCP, 1, Form::Int),
    setting("TCP_MAXSEG", TCP, 2, Form::Int),
    setting("TCP_CORK", TCP, 3, Form::Int),
    setting("TCP_KEEPIDLE", TCP, 4, Form::Int),
    setting("TCP_KEEPINTVL", TCP, 5, Form::Int),
    setting("TCP_KEEPCNT", TCP, 6, Form::Int),
    setting("TCP_SYNCNT", TCP, 7, Form::Int),
    setting("TCP_LINGER2", TCP, 8, Form::Int),
    setting("TCP_DEFER_ACCEPT", TCP, 9, Form::Int),
    setting("TCP_WINDOW_CLAMP", TCP, 10, Form::Int),
    setting("TCP_QUICKACK", TCP, 12, Form::Int),
    setting("TCP_CONGESTION", TCP, 13, Form::Text),
    setting("TCP_THIN_LINEAR_TIMEOUTS", TCP, 16, Form::Int),
    setting("TCP_THIN_DUPACK", TCP, 17, Form::Int),
    setting("TCP_USER_TIMEOUT", TCP, 18, Form::Int),
    setting("TCP_FASTOPEN", TCP, 23, Form::Int),
    setting("TCP_NOTSENT_LOWAT", TCP, 25, Form::Int),
    setting("TCP_SAVE_SYN", TCP, 27, Form::Int),
    setting("TCP_FASTOPEN_CONNECT", TCP, 30, Form::Int),
    setting("TCP_FASTOPEN_KEY", TCP, 33, Form::Bytes(32)),
    setting("TCP_FASTOPEN_NO_COOKIE", TCP, 34, Form::Int),
    setting("TCP_INQ", TCP, 36, Form::Int),
    setting("TCP_TX_DELAY", TCP, 37, Form::Int),
    setting("TCP_RTO_MAX_MS", TCP, 44, Form::Int),
    setting("TCP_RTO_MIN_US", TCP, 45, Form::Int),
    setting("TCP_DELACK_MAX_US", TCP, 46, Form::Int),
    setting("UDP_CORK", UDP, 1, Form::Int),
    setting("UDP_ENCAP", UDP, 100, Form::Int),
    setting("UDP_NO_CHECK6_TX", UDP, 101, Form::Int),
    setting("UDP_NO_CHECK6_RX", UDP, 102, Form::Int),
    setting("UDP_SEGMENT", UDP, 103, Form::Int),
    setting("UDP_GRO", UDP, 104, Form::Int),
    setting("SO_DEBUG", SO, 1, Form::Int),
    setting("SO_REUSEADDR", SO, 2, Form::Int),
    setting("SO_DONTROUTE", SO, 5, Form::Int),
    setting("SO_BROADCAST", SO, 6, Form::Int),
    setting(
        "SO_SNDBUF",
        SO,
        7,
        Form::Buffer {
            force: libc::SO_SNDBUFFORCE,
            lock: 1,
        },
    ),
    setting(
        "SO_RCVBUF",
        SO,
        8,
        Form::Buffer {
            force: libc::SO_RCVBUFFORCE,
            lock: 2,
        },
    ),
    setting("SO_KEEPALIVE", SO, 9, Form::Int),
    setting("SO_OOBINLINE", SO, 10, Form::Int),
    setting("SO_NO_CHECK", SO, 11, Form::Int),
    setting("SO_PRIORITY", SO, 12, Form::Int),
    setting("SO_LINGER", SO, 13, Form::Pair),
    setting("SO_REUSEPORT", SO, 15, Form::Int),
    setting("SO_PASSCRED", SO, 16, Form::Int),
    setting("SO_RCVLOWAT", SO, 18, Form::Int),
    setting("SO_RCVTIMEO", SO, 20, Form::Time),
    setting("SO_SNDTIMEO", SO, 21, Form::Time),
    setting("SO_BINDTODEVICE", SO, 25, Form::Text),
    setting("SO_TIMESTAMP", SO, 29, Form::Int),
    setting("SO_PASSSEC", SO, 34, Form::Int),
    setting("SO_TIMESTAMPNS", SO, 35, Form::Int),
    setting("SO_MARK", SO, 36, Form::Int),
    setting("SO_TIMESTAMPING", SO, 37, Form::Int),
    setting("SO_RXQ_OVFL", SO, 40, Form::Int),
    setting("SO_WIFI_STATUS", SO, 41, Form::Int),
    setting("SO_PEEK_OFF", SO, 42, Form::Int),
    setting("SO_NOFCS", SO, 43, Form::Int),
    setting("SO_LOCK_FILTER", SO, 44, Form::Int),
    setting("SO_SELECT_ERR_QUEUE", SO, 45, Form::Int),
    setting("SO_BUSY_POLL", SO, 46, Form::Int),
    setting("SO_MAX_PACING_RATE", SO, 47, Form::Long),
    setting("SO_INCOMING_CPU", SO, 49, Form::Int).of(Of::Streams),
    setting("SO_ZEROCOPY", SO, 60, Form::Int),
    setting("SO_TXTIME", SO, 61, Form::Pair),
    setting("SO_TIMESTAMP_NEW", SO, 63, Form::Int),
    setting("SO_TIMESTAMPNS_NEW", SO, 64, Form::Int),
    setting("SO_PREFER_BUSY_POLL", SO, 69, Form::Int),
    setting("SO_RESERVE_MEM", SO, 73, Form::Int),
    setting("SO_TXREHASH", SO, 74, Form::Int),
    setting("SO_RCVMARK", SO, 75, Form::Int),
    setting("SO_PASSPIDFD", SO, 76, Form::Int),
    setting("SO_RCVPRIORITY", SO, 82, Form::Int),
    setting("SO_PASSRIGHTS", SO, 83, Form::Int),
    setting("SO_INQ", SO, 84, Form::Int),
];

const SO_BUF_LOCK: i32 = 72;

/// getsockopt(2) into `room`; the length of the value.
pub fn get(socket: &impl AsFd, level: i32, number: i32, room: &mut [u8]) -> Result<usize> {
    let fd = socket.as_fd().as_raw_fd();
    let mut len = room.len() as libc::socklen_t;
    // SAFETY: room and its length.
    let ret = unsafe { libc::getsockopt(fd, level, number, room.as_mut_ptr().cast(), &raw mut len) };
    check(ret.into(), "getsockopt", format!("{level}, {number}"))?;
    Ok(len as usize)
}

/// setsockopt(2). `name` is for the error.
pub fn set(socket: &impl AsFd, level: i32, number: i32, value: &[u8], name: &str) -> Result<()> {
    let fd = socket.as_fd().as_raw_fd();
    // SAFETY: a value and its length.
    let ret = unsafe { libc::setsockopt(fd, level, number, value.as_ptr().cast(), value.len() as u32) };
    check(ret.into(), "setsockopt", name).map(drop)
}

/// An option of SOL_SOCKET that is an int.
pub fn int(socket: &impl AsFd, number: i32) -> Result<i32> {
    let mut room = [0; 4];
    get(socket, SO, number, &mut room)?;
    Ok(i32::from_ne_bytes(room))
}

/// An option that is an int; `None` when this kind of socket has none.
pub fn int_at_level(socket: &impl AsFd, level: i32, number: i32) -> Result<Option<i32>> {
    let mut room = [0; 4];
    match get(socket, level, number, &mut room) {
        Err(e) if matches!(e.errno(), Some(Errno::ENOPROTOOPT | Errno::EOPNOTSUPP)) => Ok(None),
        len => len.map(|_| Some(i32::from_ne_bytes(room))),
    }
}

/// The memory of what a socket has received and nobody has read (SO_MEMINFO).
pub fn received(socket: &impl AsFd) -> Result<u32> {
    const SO_MEMINFO: i32 = 55;
    let mut room = [0; 4];
    get(socket, SO, SO_MEMINFO, &mut room)?;
    Ok(u32::from_ne_bytes(room))
}

/// Sets an option of SOL_SOCKET that is an int.
pub fn set_int(socket: &impl AsFd, number: i32, value: i32, name: &str) -> Result<()> {
    set(socket, SO, number, &value.to_ne_bytes(), name)
}

/// Whether a packet filter is attached (SO_ATTACH_FILTER, SO_ATTACH_BPF).
pub fn has_filter(socket: &impl AsFd) -> bool {
    const SO_GET_FILTER: i32 = 26;
    // Without room the length is the number of instructions. Those of eBPF are not shown: EACCES.
    get(socket, SO, SO_GET_FILTER, &mut []).map_or_else(|e| e.errno() == Some(Errno::EACCES), |len| len > 0)
}

/// Lets a socket send `size` bytes before anybody reads them. The answer undoes it.
pub fn widen(socket: &impl AsFd, size: usize) -> Result<(i32, i32)> {
    let before = (int(socket, libc::SO_SNDBUF)?, int(socket, SO_BUF_LOCK)?);
    let size = size
        .saturating_mul(4)
        .saturating_add(1 << 20)
        .try_into()
        .unwrap_or(i32::MAX / 2);
    set_int(socket, libc::SO_SNDBUFFORCE, size, "SO_SNDBUFFORCE")?;
    Ok(before)
}

/// Undoes [`widen`].
pub fn narrow(socket: &impl AsFd, (size, locks): (i32, i32)) -> Result<()> {
    set_int(socket, libc::SO_SNDBUFFORCE, size / 2, "SO_SNDBUFFORCE")?;
    set_int(socket, SO_BUF_LOCK, locks, "SO_BUF_LOCK")
}

/// Sets the sizes of both buffers (send, receive), as getsockopt(2) shows them, beyond all limits.
pub fn force_buffers(socket: &impl AsFd, (send, receive): (i32, i32)) -> Result<()> {
    set_int(socket, libc::SO_SNDBUFFORCE, send / 2, "SO_SNDBUFFORCE")?;
    set_int(socket, libc::SO_RCVBUFFORCE, receive / 2, "SO_RCVBUFFORCE")
}

/// Which buffers have a size that the program has set; the kernel lets others grow.
pub fn buffer_locks(socket: &impl AsFd) -> Result<i32> {
    int(socket, SO_BUF_LOCK)
}

/// Sets what [`buffer_locks`] reads.
pub fn set_buffer_locks(socket: &impl AsFd, locks: i32) -> Result<()> {
    set_int(socket, SO_BUF_LOCK, locks, "SO_BUF_LOCK")
}

fn int_at(bytes: &[u8], at: usize) -> i64 {
    bytes
        .get(at..)
        .and_then(|b| b.first_chunk())
        .map_or(0, |b| i32::from_ne_bytes(*b).into())
}

fn long_at(bytes: &[u8], at: usize) -> i64 {
    bytes
        .get(at..)
        .and_then(|b| b.first_chunk())
        .map_or(0, |b| i64::from_ne_bytes(*b))
}

impl Setting {
    /// The value; `None` when the socket has no such option, or its value is not worth keeping.
    fn read(&self, socket: &impl AsFd) -> Result<Option<Value>> {
        let mut room = [0; 256];
        let size = match self.form {
            Form::Int | Form::Device { .. } | Form::Buffer { .. } => 4,
            Form::Long | Form::Pair => 8,
            Form::Time | Form::Text => 16,
            Form::Bytes(most) => most,
        };
        let len = match get(socket, self.level, self.number, &mut room[..size]) {
            Ok(len) => len.min(size),
            Err(e) => {
                let absent = [Errno::ENOPROTOOPT, Errno::EOPNOTSUPP, Errno::EINVAL, Errno::ENOTCONN];
                return if e.errno().is_some_and(|n| absent.contains(&n)) {
                    Ok(None)
                } else {
                    Err(e)
                };
            }
        };
        let bytes = &room[..len];
        Ok(Some(match self.form {
            Form::Int => Value::Number(int_at(bytes, 0)),
            Form::Long => Value::Number(long_at(bytes, 0)),
            Form::Pair => Value::Numbers(vec![int_at(bytes, 0), int_at(bytes, 4)]),
            Form::Time => Value::Numbers(vec![long_at(bytes, 0), long_at(bytes, 8)]),
            Form::Bytes(_) => Value::Numbers(bytes.iter().map(|b| i64::from(*b)).collect()),
            Form::Text => {
                let text = bytes.split(|b| *b == 0).next().unwrap_or_default();
                Value::Text(String::from_utf8_lossy(text).into_owned())
            }
            Form::Device { big_endian } => {
                let index = int_at(bytes, 0) as u32;
                let index = if big_endian { u32::from_be(index) } else { index };
                Value::Text(if index == 0 {
                    String::new()
                } else {
                    device_name(socket, index)?
                })
            }
            Form::Buffer { lock, .. } => {
                if i64::from(int(socket, SO_BUF_LOCK)?) & lock == 0 {
                    return Ok(None);
                }
                Value::Number(int_at(bytes, 0))
            }
        }))
    }

    fn write(&self, socket: &impl AsFd, value: &Value) -> Result<()> {
        let (number, bytes) = self.encode(socket, value)?;
        set(
            socket,
            self.level,
            number,
            &bytes,
            &format!("{} = {value:?}", self.name),
        )
    }

    fn encode(&self, socket: &impl AsFd, value: &Value) -> Result<(i32, Vec<u8>)> {
        let int = |n: &i64| (*n as i32).to_ne_bytes();
        let bytes = match (self.form, value) {
            (Form::Int, Value::Number(n)) => int(n).to_vec(),
            (Form::Long, Value::Number(n)) => n.to_ne_bytes().to_vec(),
            (Form::Buffer { force, .. }, Value::Number(n)) => return Ok((force, int(&(n / 2)).to_vec())),
            (Form::Pair, Value::Numbers(all)) => all.iter().flat_map(int).collect(),
            (Form::Time, Value::Numbers(all)) => all.iter().flat_map(|n| n.to_ne_bytes()).collect(),
            (Form::Bytes(_), Value::Numbers(all)) => all.iter().map(|n| *n as u8).collect(),
            (Form::Text, Value::Text(text)) => text.clone().into_bytes(),
            (Form::Device { big_endian }, Value::Text(name)) => {
                let index = if name.is_empty() {
                    0
                } else {
                    device_index(socket, name)?
                };
                if big_endian {
                    index.to_be_bytes().to_vec()
                } else {
                    index.to_ne_bytes().to_vec()
                }
            }
            _ => {
                return Err(Error::Parse {
                    file: self.name.into(),
                    text: format!("{value:?}"),
                });
            }
        };
        Ok((self.number, bytes))
    }
}

/// The options that a kind of socket has.
fn settings_of(socket: &impl AsFd) -> Result<impl Iterator<Item = &'static Setting>> {
    const IPPROTO_MPTCP: i32 = 262;
    let domain = int(socket, libc::SO_DOMAIN)?;
    let protocol = int(socket, libc::SO_PROTOCOL)?;
    let is_tcp = protocol == libc::IPPROTO_TCP || protocol == IPPROTO_MPTCP;
    let is_stream = int(socket, libc::SO_TYPE)? == libc::SOCK_STREAM;
    let fits = move |s: &&Setting| {
        let level = match s.level {
            SO => true,
            IP => domain == libc::AF_INET || domain == libc::AF_INET6,
            IPV6 => domain == libc::AF_INET6,
            TCP => is_tcp,
            _ => protocol == libc::IPPROTO_UDP,
        };
        level && (s.of == Of::All || is_stream == (s.of == Of::Streams))
    };
    Ok(TABLE.iter().filter(fits))
}

/// The options in which a socket differs from a new one of its kind.
pub fn differing(socket: &impl AsFd, new: &impl AsFd) -> Result<Values> {
    let mut values = Values::new();
    for setting in settings_of(socket)? {
        if let Some(value) = setting.read(socket)?
            && setting.read(new)?.as_ref() != Some(&value)
        {
            values.insert(setting.name.into(), value);
        }
    }
    Ok(values)
}

/// Gives a new socket these options. One that another option has changed by the way is put back.
pub fn apply(socket: &impl AsFd, values: &Values) -> Result<()> {
    if let Some(name) = values.keys().find(|n| !TABLE.iter().any(|s| s.name == n.as_str())) {
        return Err(Error::Parse {
            file: "socket option".into(),
            text: name.clone(),
        });
    }
    let mut wanted = Vec::new();
    for setting in settings_of(socket)? {
        wanted.push((setting, values.get(setting.name).cloned().or(setting.read(socket)?)));
    }
    for (setting, value) in wanted {
        if let Some(value) = value
            && setting.read(socket)?.as_ref() != Some(&value)
        {
            setting.write(socket, &value)?;
        }
    }
    Ok(())
}
