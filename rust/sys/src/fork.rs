//! Forking the tracer: a process of its own that outlives whoever asked for it, and undoes its work when
//! that process is gone.

use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};

use crate::Pid;
use crate::error::{Result, check};

/// Forks. `child` runs in the new process, which ends with the number that it returns; it never comes back.
///
/// The child of a threaded program has one thread and whatever locks others held are held for ever, so
/// `child` must stay clear of everything but this crate, std and malloc (glibc makes its malloc safe over
/// fork). It must not touch Python.
pub fn fork(child: impl FnOnce() -> i32) -> Result<Pid> {
    // SAFETY: the child runs only `child`, under the rules above, and then leaves by _exit.
    let pid = unsafe { libc::fork() };
    if check(pid.into(), "fork", "tracer")? != 0 {
        return Ok(pid);
    }
    let code = std::panic::catch_unwind(std::panic::AssertUnwindSafe(child)).unwrap_or(101);
    // SAFETY: ends the process without running the exit handlers of the program it was forked from.
    unsafe { libc::_exit(code) }
}

/// A child of ours that does nothing and ends with this: it has only what every new process has.
#[derive(Debug)]
pub struct Idler(Pid);

impl Idler {
    /// Makes it.
    pub fn start() -> Result<Idler> {
        fork(|| {
            // SAFETY: plain numbers. It ends with the thread that made it, which waits for nobody.
            unsafe {
                libc::prctl(libc::PR_SET_PDEATHSIG, libc::SIGKILL);
                loop {
                    libc::pause();
                }
            }
        })
        .map(Idler)
    }

    /// Its id.
    pub fn pid(&self) -> Pid {
        self.0
    }
}

impl Drop for Idler {
    fn drop(&mut self) {
        let _ = kill(self.0, libc::SIGKILL);
        // SAFETY: waits for a child of ours and is told nothing.
        unsafe { libc::waitpid(self.0, std::ptr::null_mut(), 0) };
    }
}

/// Makes the calling process its own: new session, a name, default signal handling, no descriptor but those
/// in `keep` and 0-2, which become /dev/null.
pub fn become_independent(name: &std::ffi::CStr, keep: &[RawFd]) -> Result<()> {
    // SAFETY: plain calls on our own process; `name` is a C string.
    unsafe {
        libc::setsid();
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        for signal in 1..=libc::SIGRTMAX() {
            if signal != libc::SIGKILL && signal != libc::SIGSTOP {
                libc::signal(signal, libc::SIG_DFL);
            }
        }
        // A write to a reader that is gone must be an error, not the end of a half done undo.
        libc::signal(libc::SIGPIPE, libc::SIG_IGN);
        // So must one past a file size limit: EFBIG is reported, a killed tracer reports nothing.
        libc::signal(libc::SIGXFSZ, libc::SIG_IGN);
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::pthread_sigmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        let null = libc::open(c"/dev/null".as_ptr(), libc::O_RDWR);
        for fd in 0..3 {
            if !keep.contains(&fd) {
                libc::dup2(null, fd);
            }
        }
    }
    close_all_but(keep)
}

/// Makes the calling process one that stays for long: with a name that says what for, and in the way of no unmount.
pub fn settle(name: &std::ffi::CStr) {
    // SAFETY: plain calls on our own process with C strings; that they may fail harms nobody.
    unsafe {
        libc::prctl(libc::PR_SET_NAME, name.as_ptr());
        libc::chdir(c"/".as_ptr());
    }
}

fn close_all_but(keep: &[RawFd]) -> Result<()> {
    let mut keep: Vec<u32> = keep
        .iter()
        .filter_map(|f| u32::try_from(*f).ok())
        .filter(|f| *f > 2)
        .collect();
    keep.sort_unstable();
    let mut from = 3u32;
    for fd in keep.into_iter().chain([u32::MAX]) {
        if fd > from {
            // SAFETY: plain numbers.
            let ret = unsafe { libc::syscall(libc::SYS_close_range, from, fd - 1, 0) };
            check(ret, "close_range", from)?;
        }
        from = fd.saturating_add(1);
    }
    Ok(())
}

/// A pair of connected stream sockets, both close-on-exec.
pub fn socket_pair() -> Result<(OwnedFd, OwnedFd)> {
    let mut fds = [0; 2];
    // SAFETY: room for two descriptors.
    let ret = unsafe {
        libc::socketpair(
            libc::AF_UNIX,
            libc::SOCK_STREAM | libc::SOCK_CLOEXEC,
            0,
            fds.as_mut_ptr(),
        )
    };
    check(ret.into(), "socketpair", "tracer")?;
    // SAFETY: the kernel just gave us both.
    Ok(unsafe { (OwnedFd::from_raw_fd(fds[0]), OwnedFd::from_raw_fd(fds[1])) })
}

/// Waits until `fd` can be read or its other end is gone. True for the latter.
pub fn wait_hangup(fd: &OwnedFd) -> bool {
    let mut poll = libc::pollfd {
        fd: fd.as_raw_fd(),
        events: libc::POLLRDHUP,
        revents: 0,
    };
    loop {
        // SAFETY: one valid pollfd.
        let ret = unsafe { libc::poll(&raw mut poll, 1, -1) };
        if ret > 0 {
            return true;
        }
        if ret < 0 && nix::errno::Errno::last() != nix::errno::Errno::EINTR {
            return true;
        }
    }
}

/// Waits for the end of a child of ours; its raw wait status.
pub fn wait_child(pid: Pid) -> Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: status is a valid place for the result.
        let ret = unsafe { libc::waitpid(pid, &raw mut status, 0) };
        if ret < 0 && nix::errno::Errno::last() == nix::errno::Errno::EINTR {
            continue;
        }
        check(ret.into(), "waitpid", pid)?;
        return Ok(status);
    }
}

/// Sends a signal to a process.
pub fn kill(pid: Pid, signal: i32) -> Result<()> {
    // SAFETY: plain numbers.
    check(unsafe { libc::kill(pid, signal) }.into(), "kill", pid).map(drop)
}

/// Sends a signal to a thread.
pub fn kill_thread(pid: Pid, tid: Pid, signal: i32) -> Result<()> {
    // SAFETY: plain numbers.
    let ret = unsafe { libc::syscall(libc::SYS_tgkill, pid, tid, signal) };
    check(ret, "tgkill", tid).map(drop)
}

/// Replaces the calling process by a program. Returns only when that fails.
pub fn exec(program: &std::ffi::CStr, args: &[std::ffi::CString]) -> crate::Error {
    let mut argv: Vec<*const libc::c_char> = args.iter().map(|a| a.as_ptr()).collect();
    argv.push(std::ptr::null());
    let env = [std::ptr::null()];
    // SAFETY: both arrays end in null and hold C strings that live over the call.
    unsafe { libc::execve(program.as_ptr(), argv.as_ptr(), env.as_ptr()) };
    crate::Error::last("execve", program.to_string_lossy())
}

/// Ends the calling process at once, whatever its other threads do.
pub fn exit_now(code: i32) -> ! {
    // SAFETY: never returns and runs no code of ours.
    unsafe { libc::_exit(code) }
}

/// Reads what there is, waiting at most `ms` milliseconds. Empty at the end, `None` when the time ran out.
pub fn read_for(file: &std::fs::File, ms: i32) -> Result<Option<Vec<u8>>> {
    let mut poll = libc::pollfd {
        fd: file.as_raw_fd(),
        events: libc::POLLIN,
        revents: 0,
    };
    // SAFETY: one valid pollfd.
    if unsafe { libc::poll(&raw mut poll, 1, ms) } <= 0 {
        return Ok(None);
    }
    let mut bytes = vec![0; 64 * 1024];
    let mut reader = file;
    let got = std::io::Read::read(&mut reader, &mut bytes).map_err(|e| crate::Error::io("read", "tracer", &e))?;
    bytes.truncate(got);
    Ok(Some(bytes))
}

/// Waits for one byte; `None` when the other end was closed without one.
pub fn read_byte(fd: &OwnedFd) -> Option<u8> {
    let mut byte = 0u8;
    loop {
        // SAFETY: room for one byte.
        let got = unsafe { libc::read(fd.as_raw_fd(), (&raw mut byte).cast(), 1) };
        if got < 0 && nix::errno::Errno::last() == nix::errno::Errno::EINTR {
            continue;
        }
        return (got == 1).then_some(byte);
    }
}

/// Writes one byte.
pub fn write_byte(fd: &OwnedFd) -> Result<()> {
    // SAFETY: one byte to read.
    let ret = unsafe { libc::write(fd.as_raw_fd(), b"c".as_ptr().cast(), 1) };
    check(ret as i64, "write", "guard").map(drop)
}
