"""What a test must not leave behind: processes, mounts, cgroups, network namespaces, state.

The machine may be busy with other things, so only what can be ours is compared: descendants of the test process (it is a subreaper, so
no orphan escapes), mounts, and cgroup directories, of which those that carry another run's mark are left out.
"""

import contextlib
import os
import re
import subprocess
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from support import procs

# Every container id and every temporary directory of this run carries it.
RUN_MARK = f"tp{os.getpid()}x"
ANY_MARK = re.compile(r"tp\d+x")

# In CI the machine is ours, so anything new is a leak. On a developer's machine others work too: only what carries our mark counts.
STRICT = bool(os.environ.get("CI"))


def is_foreign(text: str) -> bool:
    if not STRICT:
        return RUN_MARK not in text
    marks = ANY_MARK.findall(text)
    return bool(marks) and RUN_MARK not in marks


@dataclass(frozen=True)
class Snapshot:
    processes: frozenset[tuple[int, int]]
    mounts: frozenset[str]
    cgroups: frozenset[str]
    netns: frozenset[str]


def _mounts() -> frozenset[str]:
    lines = Path("/proc/self/mountinfo").read_text().splitlines()
    # id, mount point, type and source say enough, and do not change when something else is mounted
    found = set()
    for line in lines:
        left, _, right = line.partition(" - ")
        f = left.split()
        text = f"{f[0]} {f[4]} {right.split()[0]}"
        if not is_foreign(line):
            found.add(text)
    return frozenset(found)


def _cgroups() -> frozenset[str]:
    found = set()
    for directory, names, _ in os.walk("/sys/fs/cgroup"):
        # the machine's own agent makes a directory for each command it runs
        names[:] = [n for n in names if n != "process_api"]
        paths = [os.path.join(directory, n) for n in names]
        found.update(p for p in paths if not is_foreign(p) and os.path.relpath(p, "/sys/fs/cgroup").count("/"))
    return frozenset(found)


def _netns(processes: list[procs.Process]) -> frozenset[str]:
    found = set()
    for p in processes:
        with contextlib.suppress(OSError):
            found.add(os.readlink(f"/proc/{p.pid}/ns/net"))
    return frozenset(found - {os.readlink("/proc/self/ns/net")})


def snapshot() -> Snapshot:
    below = procs.descendants(os.getpid())
    return Snapshot(frozenset((p.pid, p.start) for p in below), _mounts(), _cgroups(), _netns(below))


def new_since(before: Snapshot, patience: float = 5.0, ignore: Callable[[], Iterable[int]] = tuple) -> list[str]:
    """Name everything that is there now and was not in `before`, after giving what is dying `patience` seconds to be gone.

    Processes that `ignore` names may be new: those of a container that starts and ends some itself.
    """
    deadline = time.monotonic() + patience
    while True:
        procs.reap()
        below = procs.descendants(os.getpid())
        ignored = set(ignore())
        left = [f"process: {p}" for p in below if (p.pid, p.start) not in before.processes and p.pid not in ignored]
        now = Snapshot(frozenset(), _mounts(), _cgroups(), _netns(below))
        left += [f"mount: {m}" for m in sorted(now.mounts - before.mounts)]
        left += [f"cgroup: {c}" for c in sorted(now.cgroups - before.cgroups)]
        left += [f"network namespace: {n}" for n in sorted(now.netns - before.netns)]
        if not left or time.monotonic() > deadline:
            return left
        time.sleep(0.05)


def clean_up_since(before: Snapshot) -> None:
    """Remove what a failed test left, so that the next one starts clean."""
    for freezer in {*_cgroups()} - before.cgroups:
        for name, word in (("cgroup.freeze", "0"), ("freezer.state", "THAWED")):
            with contextlib.suppress(OSError):
                Path(freezer, name).write_text(word)
    for p in procs.descendants(os.getpid()):
        if (p.pid, p.start) not in before.processes and p.pid not in procs.claimed:
            procs.kill_exactly(p)
    time.sleep(0.1)
    procs.reap()
    for mount in sorted(_mounts() - before.mounts, reverse=True):
        subprocess.run(["umount", "-l", mount.split()[1]], check=False, capture_output=True)
    for directory in sorted({*_cgroups()} - before.cgroups, reverse=True):
        with contextlib.suppress(OSError):
            os.rmdir(directory)
