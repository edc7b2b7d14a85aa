"""Run the launcher, the small static program that builds containers (docs/internals.md §2).

Where a process of it enters the container, it is executed from a sealed memfd: a container's process can then never
reach and overwrite the file on the host through /proc/PID/exe (CVE-2019-5736). Started with posix_spawn, so it is safe
from any thread; waited for by its own pid only.
"""

from __future__ import annotations

import _thread
import errno
import fcntl
import os

from . import log, quick_json
from .errors import LauncherError, from_engine
from .exits import Child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

    Stdio = tuple[int, int, int]

_memfd = -1
_memfd_lock = _thread.allocate_lock()
_ALL_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_FIRST_PRIVATE_FD = 32
# Of these some process enters the container, where it must not lead to the file on the host.
_ENTERING = ("create", "exec")

DEVNULL = -3  # as subprocess.DEVNULL


def path() -> str:
    """Where the launcher is installed."""
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), "_bin", "torpor-launcher")


def run(verb: str, *args: str, stdio: Stdio | None = None, preserve_fds: int = 0) -> dict[str, Any]:
    """Run one verb to its end and return its report.

    Raises:
        TorporError: what the launcher reported, as the subclass for its code.
        LauncherError: it is missing, or ended without a report.
    """
    child, report = _start(verb, args, stdio, preserve_fds)
    log.debug(f"launcher {verb} ended: {child.reap()}")
    return report


def supervise(verb: str, *args: str, stdio: Stdio | None = None, preserve_fds: int = 0) -> tuple[Child, dict[str, Any]]:
    """Run a verb with --supervise: it stays as the container's parent. Returns it, to be waited for, and its report.

    Raises:
        as `run`.
    """
    return _start(verb, (*args, "--supervise"), stdio, preserve_fds)


def output(verb: str) -> str:
    """Run a verb that prints to standard output and return what it printed."""
    read_end, write_end = os.pipe()
    try:
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            child = _spawn([verb], (null, write_end, 2), None)
        finally:
            os.close(null)
            os.close(write_end)
        with open(read_end, encoding="utf-8", closefd=False) as f:
            text = f.read()
    finally:
        os.close(read_end)
    if child.reap() not in (0, None):
        raise LauncherError(f"torpor-launcher {verb} failed")
    return text


def _start(verb: str, args: Sequence[str], stdio: Stdio | None, preserve_fds: int) -> tuple[Child, dict[str, Any]]:
    stdio = stdio or _own_stdio()
    read_end, write_end = os.pipe()
    # Above 0-2 and above what --preserve-fds hands on: the report must not land in the container.
    first = max(_FIRST_PRIVATE_FD, 3 + preserve_fds)
    report_fd = fcntl.fcntl(write_end, fcntl.F_DUPFD_CLOEXEC, first)
    os.close(write_end)
    try:
        try:
            child = _spawn([verb, *args, "--report-fd", str(report_fd)], stdio, report_fd)
        finally:
            os.close(report_fd)
        try:
            line = _read_line(read_end)
        except BaseException:
            # Interrupted while the container was being built: with nobody to report to, the launcher takes it down
            # again.
            os.close(read_end)
            read_end = -1
            child.reap()
            raise
    finally:
        if read_end >= 0:
            os.close(read_end)
    try:
        report = quick_json.loads(line.decode()) if line else None
    except ValueError:
        report = None
    if not isinstance(report, dict):
        status = child.reap()
        raise LauncherError(f"torpor-launcher {verb} ended without a report (status {status})")
    if not report.get("ok"):
        child.reap()
        error = report.get("error") or {}
        message = error.get("message") or f"torpor-launcher {verb} failed"
        raise from_engine(error.get("code", "launcher"), None, error.get("pid"), error.get("object"), message)
    for warning in report.get("warnings") or []:
        log.warning(warning)
    return child, report


def _read_line(fd: int) -> bytes:
    data = b""
    while b"\n" not in data:
        chunk = os.read(fd, 65536)
        if not chunk:
            break
        data += chunk
    return data.split(b"\n", 1)[0]


def _spawn(argv: list[str], stdio: Stdio | None, report_fd: int | None) -> Child:
    image = f"/proc/self/fd/{_sealed_image()}" if argv[0] in _ENTERING else path()
    copies: list[int] = []
    actions: list[tuple[int, int, int]] = []
    try:
        if stdio is not None:
            # Copied out of the way first: one of them may itself be 0, 1 or 2.
            for fd in stdio:
                copies.append(_private_copy(fd))
            actions = [(os.POSIX_SPAWN_DUP2, fd, number) for number, fd in enumerate(copies)]
        if report_fd is not None:
            # dup2 onto itself is how posix_spawn clears close-on-exec
            actions.append((os.POSIX_SPAWN_DUP2, report_fd, report_fd))
        log.debug("launcher " + " ".join(argv))
        pid = os.posix_spawn(
            image,
            ["torpor-launcher", *argv],
            os.environ,
            file_actions=actions,
            # A session of its own: ctrl-C on our terminal is for the container to get from us, not for the launcher to
            # die of.
            setsid=True,
            setsigmask=(),
            setsigdef=range(1, 32),
        )
        return Child(pid)
    except OSError as e:
        if e.errno == errno.ENOENT:
            raise _missing(e) from None
        raise LauncherError(f"cannot run torpor-launcher: {e.strerror}") from None
    finally:
        for fd in copies:
            os.close(fd)


def _own_stdio() -> Stdio | None:
    """None when 0-2 are there to be inherited. A daemon that closed them must not give our pipe to its container."""
    fds = [0, 1, 2]
    for fd in fds:
        try:
            os.fstat(fd)
        except OSError:
            fds[fd] = DEVNULL
    return (fds[0], fds[1], fds[2]) if DEVNULL in fds else None


def _private_copy(fd: int) -> int:
    if fd != DEVNULL:
        return fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _FIRST_PRIVATE_FD)
    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    try:
        return fcntl.fcntl(null, fcntl.F_DUPFD_CLOEXEC, _FIRST_PRIVATE_FD)
    finally:
        os.close(null)


def _sealed_image() -> int:
    """The launcher's bytes in a memfd that nobody can write to. Made once per process."""
    global _memfd
    with _memfd_lock:
        if _memfd < 0:
            _memfd = _make_sealed_image()
        return _memfd


def _missing(e: OSError) -> LauncherError:
    return LauncherError(f"torpor is installed without its launcher ({path()}: {e.strerror}): reinstall the wheel")


def _make_sealed_image() -> int:
    try:
        source = os.open(path(), os.O_RDONLY | os.O_CLOEXEC)
    except OSError as e:
        raise _missing(e) from None
    try:
        low = os.memfd_create("torpor-launcher", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            image = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, _FIRST_PRIVATE_FD)
        finally:
            os.close(low)
        offset, size = 0, os.fstat(source).st_size
        while offset < size:
            offset += os.sendfile(image, source, offset, size - offset)
        fcntl.fcntl(image, fcntl.F_ADD_SEALS, _ALL_SEALS)
        return image
    finally:
        os.close(source)
