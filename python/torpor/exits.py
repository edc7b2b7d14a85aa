"""Wait for a process to end and learn how it did, whoever's child it is."""

from __future__ import annotations

import _thread
import fcntl
import os
import select
import struct
import time

from . import proc

# <linux/pidfd.h>, kernel 6.15: the exit status outlives the process for those who hold a pidfd.
_PIDFD_GET_INFO = 0xC040FF0B  # _IOWR(0xFF, 11, struct pidfd_info), 64 bytes in its first version
_PIDFD_INFO_EXIT = 1 << 3


class Exit:
    """A handle on a process that may be nobody's child here. Opened early, it still knows the status after others have
    reaped it.
    """

    __slots__ = ("_fd", "pid", "start_time")

    def __init__(self, pid: int, start_time: int) -> None:
        self.pid = pid
        self.start_time = start_time
        try:
            self._fd = os.pidfd_open(pid)
        except (ProcessLookupError, OSError):
            self._fd = -1
        if self._fd >= 0 and proc.start_time(pid) not in (start_time, None):
            # the number belongs to another process by now
            os.close(self._fd)
            self._fd = -1

    def fileno(self) -> int:
        return self._fd

    def wait(self, timeout: float | None = None) -> bool:
        """True when it has ended, False when the time is over first."""
        if self._fd < 0:
            return True
        poller = select.poll()
        poller.register(self._fd, select.POLLIN)
        return bool(poller.poll(None if timeout is None else max(0, int(timeout * 1000))))

    def status(self) -> int | None:
        """Exit code or 128 + signal, after `wait` said True. None when it cannot be known: ended unseen, or reaped on
        an old kernel.
        """
        for _ in range(50):
            found = self._from_pidfd()
            if found is None:
                found = proc.exit_status_of_zombie(self.pid, self.start_time)
            if found is not None:
                return found
            if self._fd < 0 or proc.start_time(self.pid) != self.start_time:
                # gone between the two looks, or long before
                return self._from_pidfd()
            time.sleep(0.002)
        return None

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Exit:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _from_pidfd(self) -> int | None:
        if self._fd < 0:
            return None
        info = bytearray(64)
        struct.pack_into("=Q", info, 0, _PIDFD_INFO_EXIT)
        try:
            fcntl.ioctl(self._fd, _PIDFD_GET_INFO, info)
        except OSError:
            return None
        (mask,) = struct.unpack_from("=Q", info, 0)
        if not mask & _PIDFD_INFO_EXIT:
            return None
        (status,) = struct.unpack_from("=i", info, 60)
        return proc.from_wait_status(status)


class Child:
    """A child of ours, waited for by its own pid only. Its exit status is known even when somebody else reaped it, as a
    program does that waits for any child, or ignores SIGCHLD (from Linux 6.15 on)."""

    __slots__ = ("_end", "_lock", "_status", "pid")

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self._end = Exit(pid, proc.start_time(pid) or 0)
        self._lock = _thread.allocate_lock()
        self._status: int | None = None

    def fileno(self) -> int:
        """Readable when the child has ended; -1 when it has ended already."""
        return self._end.fileno()

    def wait(self, timeout: float | None = None) -> bool:
        """True when it has ended, False when the time is over first."""
        return self._end.wait(timeout)

    def reap(self) -> int | None:
        """Wait for it and forget it: its exit code, or 128 + signal. None when nobody can know it."""
        self._end.wait()
        with self._lock:
            if self._status is None:
                try:
                    self._status = proc.from_wait_status(os.waitpid(self.pid, 0)[1])
                except ChildProcessError:
                    self._status = self._end.status()
                self._end.close()
            return self._status
