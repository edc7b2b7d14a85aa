//! ptrace(2) as typed functions. Every one acts on a thread that the calling thread traces.

use crate::error::{Error, Result, check};
use crate::{Pid, RemoteAddr};

pub use libc::user_regs_struct as Regs;

/// `PTRACE_EVENT_STOP`: the stop of a seized task that was interrupted, or of a new child of one.
pub const EVENT_STOP: i32 = libc::PTRACE_EVENT_STOP;

const SETSIGMASK: u32 = 0x420b;
const GETSIGMASK: u32 = 0x420a;
const PEEKSIGINFO: u32 = 0x4209;
const SECCOMP_GET_FILTER: u32 = 0x420c;
const SECCOMP_GET_METADATA: u32 = 0x420d;
const GET_RSEQ_CONFIGURATION: u32 = 0x420f;
const SET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4210;
const GET_SYSCALL_USER_DISPATCH_CONFIG: u32 = 0x4211;
const NT_X86_XSTATE: usize = 0x202;

/// Options of a seized task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Options(i32);

impl Options {
    /// No option.
    pub const NONE: Options = Options(0);
    /// Injected calls are not judged by the task's seccomp filters.
    pub const SUSPEND_SECCOMP: Options = Options(1 << 21);
    /// The task dies with its tracer.
    pub const EXIT_KILL: Options = Options(1 << 20);
    /// Children and threads that the task makes are traced from their first instruction.
    pub const FOLLOW: Options =
        Options(libc::PTRACE_O_TRACEFORK | libc::PTRACE_O_TRACEVFORK | libc::PTRACE_O_TRACECLONE);
    /// System call stops are marked with bit 7.
    const MARK_SYSCALLS: Options = Options(libc::PTRACE_O_TRACESYSGOOD);

    /// Both sets of options.
    #[must_use]
    pub const fn and(self, other: Options) -> Options {
        Options(self.0 | other.0)
    }
}

fn request(name: &'static str, nr: u32, tid: Pid, addr: usize, data: usize) -> Result<i64> {
    // SAFETY: callers pass addresses of live buffers of the size that the request needs.
    let ret = unsafe { libc::ptrace(nr, tid, addr, data) };
    check(ret, name, tid)
}

/// What a task is stopped by at a system call.
pub const SYSCALL_STOP: i32 = libc::SIGTRAP | 0x80;

/// System call stops are always marked. When a tracer dies, a task at such a stop is sent what it is stopped by
/// (include/linux/ptrace.h, ptrace_report_syscall): a plain SIGTRAP would end it, [`SYSCALL_STOP`] is no signal.
fn bits(options: Options) -> usize {
    options.and(Options::MARK_SYSCALLS).0 as usize
}

/// Begins to trace a task without stopping it.
pub fn seize(tid: Pid, options: Options) -> Result<()> {
    request("PTRACE_SEIZE", libc::PTRACE_SEIZE, tid, 0, bits(options)).map(drop)
}

/// Changes the options of a stopped tracee.
pub fn set_options(tid: Pid, options: Options) -> Result<()> {
    request("PTRACE_SETOPTIONS", libc::PTRACE_SETOPTIONS, tid, 0, bits(options)).map(drop)
}

/// Asks a seized task to stop.
pub fn interrupt(tid: Pid) -> Result<()> {
    request("PTRACE_INTERRUPT", libc::PTRACE_INTERRUPT, tid, 0, 0).map(drop)
}

/// Lets a stopped task run, delivering `signal` when it is not 0.
pub fn cont(tid: Pid, signal: i32) -> Result<()> {
    request("PTRACE_CONT", libc::PTRACE_CONT, tid, 0, signal as usize).map(drop)
}

/// Lets a task that was interrupted but stopped for another reason run on to the stop that was asked for. It has
/// to be asked for again: every stop takes back the request (kernel/signal.c, ptrace_stop).
pub fn interrupt_again(tid: Pid, signal: i32) -> Result<()> {
    interrupt(tid)?;
    cont(tid, signal)
}

/// Whether an event tells of a new task that is followed.
pub fn is_birth(event: i32) -> bool {
    [
        libc::PTRACE_EVENT_FORK,
        libc::PTRACE_EVENT_VFORK,
        libc::PTRACE_EVENT_CLONE,
    ]
    .contains(&event)
}

/// As [`cont`], but stops again at the next entry to or exit from a system call.
pub fn cont_to_syscall(tid: Pid, signal: i32) -> Result<()> {
    request("PTRACE_SYSCALL", libc::PTRACE_SYSCALL, tid, 0, signal as usize).map(drop)
}

/// Leaves a task in group-stop while still traced.
pub fn listen(tid: Pid) -> Result<()> {
    request("PTRACE_LISTEN", libc::PTRACE_LISTEN, tid, 0, 0).map(drop)
}

/// Ends the tracing of a stopped task and lets it run.
pub fn detach(tid: Pid, signal: i32) -> Result<()> {
    request("PTRACE_DETACH", libc::PTRACE_DETACH, tid, 0, signal as usize).map(drop)
}

/// The number that came with the last ptrace event.
pub fn event_message(tid: Pid) -> Result<u64> {
    let mut message: u64 = 0;
    request(
        "PTRACE_GETEVENTMSG",
        libc::PTRACE_GETEVENTMSG,
        tid,
        0,
        (&raw mut message) as usize,
    )?;
    Ok(message)
}

/// The general registers.
pub fn regs(tid: Pid) -> Result<Regs> {
    // SAFETY: a register set is plain integers.
    let mut regs: Regs = unsafe { std::mem::zeroed() };
    request("PTRACE_GETREGS", libc::PTRACE_GETREGS, tid, 0, (&raw mut regs) as usize)?;
    Ok(regs)
}

/// Sets the general registers, the segment bases included.
pub fn set_regs(tid: Pid, regs: &Regs) -> Result<()> {
    request(
        "PTRACE_SETREGS",
        libc::PTRACE_SETREGS,
        tid,
        0,
        std::ptr::from_ref(regs) as usize,
    )
    .map(drop)
}

/// The extended state (x87, SSE, AVX, AVX-512, PKRU, AMX) in the layout of XSAVE.
pub fn xstate(tid: Pid) -> Result<Vec<u8>> {
    let mut buf = vec![0u8; 64 * 1024];
    let mut iov = libc::iovec {
        iov_base: buf.as_mut_ptr().cast(),
        iov_len: buf.len(),
    };
    request(
        "PTRACE_GETREGSET",
        libc::PTRACE_GETREGSET,
        tid,
        NT_X86_XSTATE,
        (&raw mut iov) as usize,
    )?;
    buf.truncate(iov.iov_len);
    Ok(buf)
}

/// Sets the extended state from what [`xstate`] gave.
pub fn set_xstate(tid: Pid, state: &[u8]) -> Result<()> {
    let iov = libc::iovec {
        iov_base: state.as_ptr().cast_mut().cast(),
        iov_len: state.len(),
    };
    request(
        "PTRACE_SETREGSET",
        libc::PTRACE_SETREGSET,
        tid,
        NT_X86_XSTATE,
        (&raw const iov) as usize,
    )
    .map(drop)
}

/// The mask of blocked signals. Inside sigsuspend(2) and its like it is the mask that will be put back.
pub fn sigmask(tid: Pid) -> Result<u64> {
    let mut mask: u64 = 0;
    request("PTRACE_GETSIGMASK", GETSIGMASK, tid, 8, (&raw mut mask) as usize)?;
    Ok(mask)
}

/// Sets the mask of blocked signals.
pub fn set_sigmask(tid: Pid, mask: u64) -> Result<()> {
    request("PTRACE_SETSIGMASK", SETSIGMASK, tid, 8, (&raw const mask) as usize).map(drop)
}

/// A `siginfo_t` as the kernel holds it.
pub type SigInfo = [u8; 128];

/// The signal that the task is stopped for.
pub fn siginfo(tid: Pid) -> Result<SigInfo> {
    let mut info: SigInfo = [0; 128];
    request(
        "PTRACE_GETSIGINFO",
        libc::PTRACE_GETSIGINFO,
        tid,
        0,
        info.as_mut_ptr() as usize,
    )?;
    Ok(info)
}

/// Queued signals in their order: those of the thread, or those of its whole process.
pub fn pending(tid: Pid, of_process: bool) -> Result<Vec<SigInfo>> {
    #[repr(C)]
    struct Args {
        offset: u64,
        flags: u32,
        count: i32,
    }
    const BLOCK: usize = 32;
    let mut all = Vec::new();
    loop {
        let args = Args {
            offset: all.len() as u64,
            flags: u32::from(of_process),
            count: BLOCK as i32,
        };
        let mut block = [[0u8; 128]; BLOCK];
        let got = request(
            "PTRACE_PEEKSIGINFO",
            PEEKSIGINFO,
            tid,
            (&raw const args) as usize,
            block.as_mut_ptr() as usize,
        )?;
        let got = usize::try_from(got).unwrap_or(0);
        all.extend_from_slice(&block[..got]);
        if got < BLOCK {
            return Ok(all);
        }
    }
}

/// What rseq(2) was registered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rseq {
    /// Address of the thread's `struct rseq`.
    pub address: RemoteAddr,
    /// Its length in bytes.
    pub length: u32,
    /// The signature before each abort handler.
    pub signature: u32,
}

/// The thread's rseq registration; `None` when it has none or the kernel (before 5.13) cannot tell.
pub fn rseq(tid: Pid) -> Result<Option<Rseq>> {
    #[repr(C)]
    struct Config {
        address: u64,
        size: u32,
        signature: u32,
        flags: u32,
        pad: u32,
    }
    let mut config = Config {
        address: 0,
        size: 0,
        signature: 0,
        flags: 0,
        pad: 0,
    };
    let ret = request(
        "PTRACE_GET_RSEQ_CONFIGURATION",
        GET_RSEQ_CONFIGURATION,
        tid,
        std::mem::size_of::<Config>(),
        (&raw mut config) as usize,
    );
    match ret {
        Ok(_) if config.address != 0 => Ok(Some(Rseq {
            address: config.address,
            length: config.size,
            signature: config.signature,
        })),
        Ok(_) => Ok(None),
        Err(e) if e.errno() == Some(nix::errno::Errno::EIO) => Ok(None),
        Err(e) => Err(e),
    }
}

/// How a thread's system calls are dispatched to itself (prctl(2), PR_SET_SYSCALL_USER_DISPATCH): all but those from
/// `len` bytes from `offset` on, while the byte at `selector` says so.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dispatch {
    /// Address of the byte; 0 where there is none.
    pub selector: RemoteAddr,
    /// Where calls are let through.
    pub offset: u64,
    /// How much of it; counted around the end of the address space where it is the other way round (6.16).
    pub len: u64,
}

/// `struct ptrace_sud_config`: mode, selector, offset, len.
type DispatchConfig = [u64; 4];

/// That of a thread; `None` where it has none or the kernel (before 6.4) cannot tell.
pub fn dispatch(tid: Pid) -> Result<Option<Dispatch>> {
    let mut config: DispatchConfig = [0; 4];
    let ret = request(
        "PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG",
        GET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        std::mem::size_of::<DispatchConfig>(),
        config.as_mut_ptr() as usize,
    );
    let [mode, selector, offset, len] = config;
    match ret {
        Ok(_) => Ok((mode != 0).then_some(Dispatch { selector, offset, len })),
        Err(e) if e.errno() == Some(nix::errno::Errno::EIO) => Ok(None),
        Err(e) => Err(e),
    }
}

/// Switches that of a thread on or off.
pub fn set_dispatch(tid: Pid, dispatch: Option<Dispatch>) -> Result<()> {
    // PR_SYS_DISPATCH_OFF, PR_SYS_DISPATCH_EXCLUSIVE_ON, PR_SYS_DISPATCH_INCLUSIVE_ON. The kernel notes the last as the
    // second with the rest of the address space (kernel/entry/syscall_user_dispatch.c).
    let config: DispatchConfig = match dispatch {
        None => [0; 4],
        Some(d) if d.offset != 0 && d.offset.wrapping_add(d.len) <= d.offset => {
            [2, d.selector, d.offset.wrapping_add(d.len), d.len.wrapping_neg()]
        }
        Some(d) => [1, d.selector, d.offset, d.len],
    };
    request(
        "PTRACE_SET_SYSCALL_USER_DISPATCH_CONFIG",
        SET_SYSCALL_USER_DISPATCH_CONFIG,
        tid,
        std::mem::size_of::<DispatchConfig>(),
        config.as_ptr() as usize,
    )
    .map(drop)
}

/// One seccomp filter: its classic BPF program, 8 bytes an instruction, and its SECCOMP_FILTER_FLAG_LOG.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SeccompFilter {
    /// The program.
    pub program: Vec<u8>,
    /// Flags that the filter was installed with, as far as the kernel tells.
    pub flags: u64,
}

/// The thread's `index`-th filter, 0 being the one installed last; `None` past the end.
pub fn seccomp_filter(tid: Pid, index: u64) -> Result<Option<SeccompFilter>> {
    let count = request("PTRACE_SECCOMP_GET_FILTER", SECCOMP_GET_FILTER, tid, index as usize, 0);
    let count = match count {
        Ok(n) => usize::try_from(n).unwrap_or(0),
        Err(e) if e.errno() == Some(nix::errno::Errno::ENOENT) => return Ok(None),
        Err(e) => return Err(e),
    };
    let mut program = vec![0u8; count * 8];
    request(
        "PTRACE_SECCOMP_GET_FILTER",
        SECCOMP_GET_FILTER,
        tid,
        index as usize,
        program.as_mut_ptr() as usize,
    )?;
    let mut metadata = [index, 0u64];
    request(
        "PTRACE_SECCOMP_GET_METADATA",
        SECCOMP_GET_METADATA,
        tid,
        16,
        metadata.as_mut_ptr() as usize,
    )?;
    Ok(Some(SeccompFilter {
        program,
        flags: metadata[1],
    }))
}

/// The thread's robust futex list: head address and length (get_robust_list(2)).
pub fn robust_list(tid: Pid) -> Result<(RemoteAddr, u64)> {
    let mut head: u64 = 0;
    let mut len: u64 = 0;
    // SAFETY: both results have a valid place.
    let ret = unsafe { libc::syscall(libc::SYS_get_robust_list, tid, &raw mut head, &raw mut len) };
    check(ret, "get_robust_list", tid)?;
    Ok((head, len))
}

/// True when the error says that the task is gone.
pub fn is_gone(error: &Error) -> bool {
    error.errno() == Some(nix::errno::Errno::ESRCH)
}
