//! A filter that keeps everything from a TCP socket for a while, as if the network had lost it: no reset is sent and
//! the peer tries again. It ends by itself, so that nobody has to be alive to remove it.

use std::os::fd::{AsFd, AsRawFd, FromRawFd, OwnedFd};

use crate::error::{Result, check};
use crate::socket::options;

/// `code, registers (destination | source << 4), jump, number` of an eBPF instruction.
const fn instruction(code: u8, registers: u8, jump: i16, number: i32) -> [u8; 8] {
    let (jump, number) = (jump.to_le_bytes(), number.to_le_bytes());
    [
        code, registers, jump[0], jump[1], number[0], number[1], number[2], number[3],
    ]
}

/// Drops until CLOCK_MONOTONIC shows `until` (nanoseconds), and lets pass from then on.
fn program(until: u64) -> Vec<u8> {
    const CALL: u8 = 0x85;
    const KTIME_GET_NS: i32 = 5;
    const LOAD: u8 = 0x18;
    const JUMP_IF_GREATER: u8 = 0x2d;
    const SET: u8 = 0xb7;
    const EXIT: u8 = 0x95;
    let half = |shift: u32| (until >> shift) as u32 as i32;
    [
        instruction(CALL, 0, 0, KTIME_GET_NS),
        instruction(LOAD, 1, 0, half(0)),
        instruction(0, 0, 0, half(32)),
        instruction(JUMP_IF_GREATER, 1 << 4, 2, 0),
        instruction(SET, 0, 0, 0),
        instruction(EXIT, 0, 0, 0),
        instruction(SET, 0, 0, -1),
        instruction(EXIT, 0, 0, 0),
    ]
    .concat()
}

/// Loads such a program (bpf(2), BPF_PROG_LOAD).
fn load(until: u64) -> Result<OwnedFd> {
    const BPF_PROG_LOAD: i32 = 5;
    const SOCKET_FILTER: u32 = 1;
    let code = program(until);
    // The beginning of union bpf_attr: type, count, instructions, license.
    let mut attributes = [0u8; 48];
    attributes[0..4].copy_from_slice(&SOCKET_FILTER.to_ne_bytes());
    attributes[4..8].copy_from_slice(&(code.len() as u32 / 8).to_ne_bytes());
    attributes[8..16].copy_from_slice(&(code.as_ptr() as u64).to_ne_bytes());
    attributes[16..24].copy_from_slice(&(c"Apache-2.0".as_ptr() as u64).to_ne_bytes());
    // SAFETY: the attributes and what they point to outlive the call.
    let fd = unsafe { libc::syscall(libc::SYS_bpf, BPF_PROG_LOAD, attributes.as_ptr(), attributes.len()) };
    let fd = check(fd, "bpf", "BPF_PROG_LOAD")? as i32;
    // SAFETY: the kernel just gave us this descriptor.
    Ok(unsafe { OwnedFd::from_raw_fd(fd) })
}

fn monotonic() -> Result<u64> {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: room for the time.
    let ret = unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    check(ret.into(), "clock_gettime", "CLOCK_MONOTONIC")?;
    Ok(now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64)
}

/// Keeps everything from these sockets for `ms` milliseconds from now on, or longer than was said before.
pub fn stall<S: AsFd>(sockets: &[S], ms: u64) -> Result<()> {
    let program = load(monotonic()? + ms * 1_000_000)?;
    let number = program.as_raw_fd().to_ne_bytes();
    sockets
        .iter()
        .try_for_each(|s| options::set(s, libc::SOL_SOCKET, libc::SO_ATTACH_BPF, &number, "SO_ATTACH_BPF"))
}

/// Lets everything pass again.
pub fn release<S: AsFd>(sockets: &[S]) -> Result<()> {
    let remove = |s: &S| match options::set_int(s, libc::SO_DETACH_FILTER, 0, "SO_DETACH_FILTER") {
        // It has none.
        Err(e) if e.errno() == Some(nix::errno::Errno::ENOENT) => Ok(()),
        other => other,
    };
    let mut first_error = Ok(());
    for socket in sockets {
        first_error = first_error.and(remove(socket));
    }
    first_error
}
