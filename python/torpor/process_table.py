"""The lines of `ps -ef` for given processes, read from /proc: minimal images of hosts have no ps."""

from __future__ import annotations

import os
import time

from . import proc


def rows(pids: list[int]) -> list[list[str]]:
    """UID PID PPID C STIME TTY TIME CMD of each process that still exists."""
    ticks = os.sysconf("SC_CLK_TCK")
    booted = time.time() - _uptime()
    found = []
    for pid in pids:
        stat = proc.stat(pid)
        if stat is None:
            continue
        used = (int(stat.fields[11]) + int(stat.fields[12])) / ticks
        started = booted + stat.start_time / ticks
        lived = max(time.time() - started, 1)
        found.append(
            [
                _user(pid),
                str(pid),
                str(stat.ppid),
                str(min(99, int(used * 100 / lived))),
                _when(started),
                _terminal(stat.tty_nr),
                f"{int(used) // 3600:02d}:{int(used) // 60 % 60:02d}:{int(used) % 60:02d}",
                _command(pid),
            ]
        )
    return found


def _uptime() -> float:
    with open("/proc/uptime") as f:
        return float(f.read().split()[0])


def _user(pid: int) -> str:
    import pwd

    try:
        uid = os.stat(f"/proc/{pid}").st_uid
    except FileNotFoundError:
        return "?"
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return str(uid)


def _when(started: float) -> str:
    today = time.strftime("%Y%j") == time.strftime("%Y%j", time.localtime(started))
    return time.strftime("%H:%M" if today else "%b%d", time.localtime(started))


def _terminal(number: int) -> str:
    """tty_nr as a name; majors from Documentation/admin-guide/devices.txt."""
    major, minor = os.major(number), os.minor(number)
    if 136 <= major <= 143:
        return f"pts/{(major - 136) * 256 + minor}"
    return f"tty{minor}" if major == 4 else "?"


def _command(pid: int) -> str:
    try:
        with open(f"/proc/{pid}/cmdline", encoding="utf-8", errors="replace") as f:
            words = f.read().rstrip("\0")
        if words:
            return words.replace("\0", " ")
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as f:
            return f"[{f.read().strip()}]"
    except OSError:
        return "?"
