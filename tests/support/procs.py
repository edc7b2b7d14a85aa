"""Processes as /proc shows them. Only our own descendants are ever looked for, waited for or killed."""

import contextlib
import ctypes
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")

PR_SET_CHILD_SUBREAPER = 36


def become_subreaper() -> None:
    """Have every orphan below this process handed to it, as a containerd shim does: nothing can escape the leak check."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_CHILD_SUBREAPER)")


@dataclass(frozen=True)
class Process:
    """One line of /proc/PID/stat."""

    pid: int
    comm: str
    state: str
    ppid: int
    pgrp: int
    session: int
    start: int

    @property
    def command(self) -> str:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{self.pid}/cmdline").read_bytes().split(b"\0")
            return " ".join(w.decode(errors="replace") for w in words if w)[:200]
        return ""

    def __str__(self) -> str:
        return f"pid {self.pid} ({self.comm}) state {self.state} parent {self.ppid} [{self.command}]"


def process(pid: int) -> Process | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    head, _, tail = text.rpartition(")")
    comm = head.partition("(")[2]
    f = tail.split()
    return Process(pid, comm, f[0], int(f[1]), int(f[2]), int(f[3]), int(f[19]))


def everyone() -> Iterator[Process]:
    for name in os.listdir("/proc"):
        if name.isdigit() and (p := process(int(name))) is not None:
            yield p


def descendants(root: int) -> list[Process]:
    """All processes below `root`, parents before children."""
    children: dict[int, list[Process]] = {}
    for p in everyone():
        children.setdefault(p.ppid, []).append(p)
    found: list[Process] = []
    todo = [root]
    while todo:
        for child in children.get(todo.pop(), []):
            found.append(child)
            todo.append(child.pid)
    return found


def alive(pid: int) -> bool:
    """True while the process exists and is not a zombie."""
    p = process(pid)
    return p is not None and p.state not in "ZX"


# Children that somebody else is going to wait for (a Popen object of ours), and the lock that makes starting one and noting it one step.
claimed: set[int] = set()
claiming = threading.RLock()


def reap() -> None:
    """Collect orphans that became ours, but no child that a Popen object waits for."""
    with claiming:
        while True:
            try:
                first = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            except ChildProcessError:
                return
            if first is None:
                return
            if first.si_pid in claimed:
                # it hides those behind it
                break
            # its Popen object may have waited for it, and given up its claim, since the line above
            with contextlib.suppress(ChildProcessError):
                os.waitpid(first.si_pid, os.WNOHANG)
        me = os.getpid()
        for p in everyone():
            if p.ppid == me and p.state == "Z" and p.pid not in claimed:
                with contextlib.suppress(ChildProcessError):
                    os.waitpid(p.pid, os.WNOHANG)


class Reaper:
    """Collects orphans all the time, as every subreaper must: init of a pid namespace cannot end while a zombie of it is not reaped."""

    def __init__(self) -> None:
        self._paused = 0
        threading.Thread(target=self._run, daemon=True, name="reaper").start()

    def _run(self) -> None:
        while True:
            time.sleep(0.02)
            with claiming:
                if not self._paused:
                    reap()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """For tests that wait for children themselves."""
        with claiming:
            self._paused += 1
        try:
            yield
        finally:
            with claiming:
                self._paused -= 1


def kill_exactly(p: Process) -> None:
    """SIGKILL this very process, not one that got its number later."""
    try:
        fd = os.pidfd_open(p.pid)
    except OSError:
        return
    try:
        now = process(p.pid)
        if now is not None and now.start == p.start:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(fd, signal.SIGKILL)
    finally:
        os.close(fd)


def wait_until(what: str, check: Callable[[], T], timeout: float = 20.0, every: float = 0.01) -> T:
    """Poll until `check` returns something true, and return that."""
    deadline = time.monotonic() + timeout
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {timeout:.0f} s for {what}")
        time.sleep(every)
        every = min(every * 1.5, 0.1)
