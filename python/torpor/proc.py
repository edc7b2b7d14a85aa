"""What /proc says about a process: is it the one we mean, does it live, how did it end, what shares its cgroup."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator


class Stat:
    """Fields of /proc/PID/stat that are used here (man proc_pid_stat)."""

    __slots__ = ("exit_code", "fields", "ppid", "start_time", "state", "tty_nr")

    def __init__(self, text: str) -> None:
        # comm may hold spaces and brackets; only its last `)` is certain
        self.fields = text[text.rindex(")") + 2 :].split()
        self.state = self.fields[0]
        self.ppid = int(self.fields[1])
        self.tty_nr = int(self.fields[4])
        self.start_time = int(self.fields[19])
        self.exit_code = int(self.fields[49])


def stat(pid: int) -> Stat | None:
    """None when there is no such process."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as f:
            return Stat(f.read())
    except (FileNotFoundError, ProcessLookupError):
        return None


def start_time(pid: int) -> int | None:
    """When it began, in clock ticks since boot: with the pid, this names a process for good."""
    found = stat(pid)
    return found.start_time if found else None


def comm(pid: int) -> str:
    """The name of a process, "" when there is none."""
    try:
        with open(f"/proc/{pid}/comm", encoding="utf-8", errors="replace") as f:
            return f.read().rstrip("\n")
    except OSError:
        return ""


def is_alive(pid: int, started: int) -> bool:
    """Whether this very process still runs. A zombie does not, unless a thread of it lives on after its leader left."""
    found = stat(pid)
    if found is None or found.start_time != started:
        return False
    if found.state not in "ZXx":
        return True
    try:
        return len(os.listdir(f"/proc/{pid}/task")) > 1
    except OSError:
        return False


def exit_status_of_zombie(pid: int, started: int) -> int | None:
    """How a process ended that nobody has waited for yet: its exit code, or 128 + signal."""
    found = stat(pid)
    if found is None or found.start_time != started or found.state != "Z":
        return None
    return from_wait_status(found.exit_code)


def from_wait_status(status: int) -> int:
    """A wait status as a shell shows it."""
    if os.WIFSIGNALED(status):
        return 128 + os.WTERMSIG(status)
    return os.WEXITSTATUS(status)


def innermost_pid(pid: int) -> int:
    """The pid that a process has in its own pid namespace."""
    return _last_number_of(pid, "NSpid:") or pid


def tracer(pid: int) -> int:
    """The process that traces this one, 0 when there is none."""
    return _last_number_of(pid, "TracerPid:")


def _last_number_of(pid: int, field: str) -> int:
    try:
        with open(f"/proc/{pid}/status", encoding="utf-8", errors="replace") as f:
            for line in f:
                if line.startswith(field):
                    return int(line.split()[-1])
    except (FileNotFoundError, ProcessLookupError):
        pass
    return 0


def cgroup_processes(pid: int) -> list[int]:
    """All processes in the cgroup of `pid` and in those below it. [pid] when it has no cgroup of its own."""
    for directory in cgroup_directories(pid):
        found: list[int] = []
        for path, _, files in os.walk(directory):
            if "cgroup.procs" in files:
                try:
                    with open(os.path.join(path, "cgroup.procs")) as f:
                        found += [int(line) for line in f]
                except OSError:
                    continue
        if pid in found:
            return sorted(set(found))
    return [pid]


def cgroup_directories(pid: int) -> Iterator[str]:
    """Directories of the hierarchies in which `pid` sits in another cgroup than we do: those are the container's
    own.
    """
    ours = _cgroups("self")
    for controllers, path in _cgroups(str(pid)).items():
        if path in ("/", ours.get(controllers)):
            continue
        for mount_root, mount_point in _cgroup_mounts(controllers):
            if path == mount_root or mount_root == "/" or path.startswith(mount_root + "/"):
                relative = path if mount_root == "/" else path[len(mount_root) :]
                yield mount_point + relative


def _cgroups(who: str) -> dict[str, str]:
    try:
        with open(f"/proc/{who}/cgroup") as f:
            rows = [line.rstrip("\n").split(":", 2) for line in f]
    except (FileNotFoundError, ProcessLookupError):
        return {}
    return {row[1]: row[2] for row in rows}


def _cgroup_mounts(controllers: str) -> Iterator[tuple[str, str]]:
    wanted = set(controllers.split(",")) if controllers else set()
    with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as f:
        for line in f:
            left, _, right = line.rstrip("\n").partition(" - ")
            kind, _, options = right.split(" ", 2)
            if (kind == "cgroup2" and not wanted) or (
                kind == "cgroup" and wanted and wanted <= set(options.split(","))
            ):
                fields = left.split(" ")
                yield fields[3], fields[4]
