"""All that /proc tells about the processes of a container, in a form that must be the same after a restore.

What may differ is written down here, each with its reason; everything else is a difference.
"""

import contextlib
import os
import re
import time
from collections.abc import Callable, Iterator
from pathlib import Path

Facts = dict[str, str]

_HOST_FILES = "/var/tmp/tp"  # where the tests keep theirs, see conftest.tmp

# Lines of status and fdinfo that are left out, and why.
LEFT_OUT = {
    # Ids of the host's pid namespace; those of the container are compared as the name of the task.
    "Tgid", "Ngid", "Pid", "PPid", "TracerPid", "NStgid", "NSpid", "NSpgid", "NSsid",
    # How much of the memory is present is the kernel's affair: pages of files come back when they are touched.
    "VmPeak", "VmHWM", "VmRSS", "RssAnon", "RssFile", "RssShmem", "VmPTE", "VmSwap", "HugetlbPages",
    # Counters of what happened to this task.
    "voluntary_ctxt_switches", "nonvoluntary_ctxt_switches", "SigQ",
    # How large the table was made: by the highest number that ever was in use.
    "FDSize",
    # Numbers that the kernel gives to mounts and files.
    "mnt_id", "ino", "eventfd-id",
    # Running or sleeping at this moment: compared where it is a setting (stopped, zombie), see `_state`.
    "State",
    # Time goes on: programs check by themselves that a timer has the time left that it should have.
    "it_value", "ticks",
}  # fmt: skip


def snapshot(pids: list[int]) -> dict[str, Facts]:
    """Facts by task, named `pid/tid` as the container numbers them. `pids` are the host's."""
    tasks: dict[str, Facts] = {}
    for pid in pids:
        base = Path(f"/proc/{pid}")
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            inner = _inner(base)
            tasks[f"{inner}"] = dict(_process(base))
            for task in sorted((base / "task").iterdir(), key=lambda t: int(t.name)):
                tasks[f"{inner}/{_inner(task)}"] = dict(_thread(task))
    return tasks


def differences(before: dict[str, Facts], after: dict[str, Facts]) -> list[str]:
    found = [f"{task}: is not there" for task in before.keys() - after.keys()]
    found += [f"{task}: was not there" for task in after.keys() - before.keys()]
    for task in before.keys() & after.keys():
        was, now = before[task], after[task]
        for key in sorted(was.keys() | now.keys()):
            if was.get(key) != now.get(key):
                found.append(f"{task}: {key}: was {was.get(key)!r}, is {now.get(key)!r}")
    return sorted(found)


def check(before: dict[str, Facts], pids: Callable[[], list[int]]) -> None:
    """Raises AssertionError with what differs. Looks a few times: threads come and go while a program works."""
    found: list[str] = []
    for _ in range(5):
        if not (found := differences(before, snapshot(pids()))):
            return
        time.sleep(0.2)
    raise AssertionError("\n".join(found))


def _read(path: Path) -> str:
    return path.read_bytes().decode(errors="replace")


def _inner(base: Path) -> int:
    line = next(line for line in _read(base / "status").splitlines() if line.startswith("NSpid:"))
    return int(line.split()[-1])


def _lines(name: str, text: str) -> Iterator[tuple[str, str]]:
    """`key: value` lines; a key that occurs again is numbered."""
    seen: dict[str, int] = {}
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key in LEFT_OUT:
            continue
        number = seen[key] = seen.get(key, 0) + 1
        yield f"{name} {key}" + (f" {number}" if number > 1 else ""), " ".join(value.split())


def _state(status: str) -> str:
    letter = status.split("State:")[1].split()[0]
    return letter if letter in "TZ" else "alive"


def _process(base: Path) -> Iterator[tuple[str, str]]:
    for name in ("limits", "oom_score_adj", "coredump_filter", "personality", "loginuid", "uid_map", "gid_map", "setgroups", "cmdline", "environ", "auxv"):  # fmt: skip
        with contextlib.suppress(OSError):
            yield name, _read(base / name)
    with contextlib.suppress(OSError):
        yield "autogroup", _read(base / "autogroup").partition("nice")[2].strip()
    for name in ("exe", "cwd", "root"):
        with contextlib.suppress(OSError):
            yield name, _below_root(base, os.readlink(base / name))
    with contextlib.suppress(OSError):
        yield "timers", re.sub(r"\b(pid|tid)[.]\d+", r"\1", _read(base / "timers"))
    yield from _maps(base)
    yield from _descriptors(base)
    yield from _mounts(base)


def _below_root(base: Path, path: str) -> str:
    """Paths as the container sees them: its root has another place on the host after a restore."""
    root = os.readlink(base / "root")
    return path and (path.removeprefix(root.rstrip("/")) or "/")


def _name(base: Path, path: str) -> str:
    """A file that has lost its name is made without one. One that lost the name it was opened by, and has another, is opened by that."""
    return re.sub(r"/[^/]+ [(]deleted[)]$|/sem[.][^/]+$", "/(deleted)", _below_root(base, path))


def _thread(base: Path) -> Iterator[tuple[str, str]]:
    status = _read(base / "status")
    yield "state", _state(status)
    if _state(status) == "Z":
        # What it could do and what signals it had is of no use to it, and not kept.
        return
    yield from _lines("status", status)
    tid = int(base.name)
    with contextlib.suppress(OSError):
        yield (
            "policy",
            f"{os.sched_getscheduler(tid)} {os.sched_getparam(tid).sched_priority} {os.getpriority(os.PRIO_PROCESS, tid)}",
        )


def _maps(base: Path) -> Iterator[tuple[str, str]]:
    """Every mapping with its flags. Device and inode numbers are left out: the files may be copies."""
    found: list[tuple[int, int, str]] = []
    place, what = (0, 0), ""
    with contextlib.suppress(OSError):
        for line in _read(base / "smaps").splitlines():
            words = line.split(maxsplit=5)
            if not words[0].endswith(":"):
                begin, _, end = words[0].partition("-")
                place = int(begin, 16), int(end, 16)
                name = words[5] if len(words) > 5 else ""
                what = f"{words[1]} {words[2] if name.startswith('/') else ''} {_name(base, name)}"
            elif words[0] == "VmFlags:":
                found.append((*place, f"{what} {' '.join(words[1:])}"))
    # The kernel makes one mapping of two anonymous ones that follow each other, unless both were written to by different processes.
    joined: list[tuple[int, int, str]] = []
    for begin, end, text in found:
        if joined and joined[-1][1:] == (begin, text) and " /" not in text:
            begin = joined.pop()[0]
        joined.append((begin, end, text))
    yield from ((f"map {begin:x}-{end:x}", text) for begin, end, text in joined)


def _numbered(pattern: str) -> Callable[[str], str]:
    """Replaces each number that the kernel gave by that of its first use here, so that what is shared stays visible."""
    seen: dict[str, int] = {}
    return lambda text: re.sub(pattern, lambda m: f"[{seen.setdefault(m.group(0), len(seen))}]", text)


# Numbers of files, and in lines about locks the owner as the host numbers it.
_FILE_NUMBERS = re.compile(
    r"\b(ino|sdev|fhandle-type|fhandle-bytes|f_handle):[0-9a-f]+|^(?<=lock:)\d+: |\b\d+ [0-9a-f]{2}:[0-9a-f]{2}:\d+",
    re.MULTILINE,
)


def _descriptors(base: Path) -> Iterator[tuple[str, str]]:
    anonymous = _numbered(r"\[\d+\]")
    with contextlib.suppress(OSError):
        for fd in sorted(os.listdir(base / "fd"), key=int):
            link = _name(base, os.readlink(base / "fd" / fd))
            # Outside of the container: a stream that each container is given by whoever starts it.
            if link.startswith(_HOST_FILES):
                continue
            yield f"fd {fd}", anonymous(link)
            # Sorted: epoll and lock lists have no order of their own.
            text = "\n".join(sorted(_FILE_NUMBERS.sub("", _read(base / "fdinfo" / fd)).splitlines()))
            yield from _lines(f"fd {fd}", text)


def _mounts(base: Path) -> Iterator[tuple[str, str]]:
    group = _numbered(r"(?<=shared:|master:)\d+")
    with contextlib.suppress(OSError):
        for number, line in enumerate(_read(base / "mountinfo").splitlines()):
            left, _, right = line.partition(" - ")
            _, _, _, root, point, options, *optional = left.split()
            kind, _, *super_options = right.split()
            # An overlay names its directories on the host.
            shown = "" if kind == "overlay" else ",".join(super_options)
            yield (
                f"mount {number}",
                f"{root if kind != 'ext4' else ''} {point} {options} {group(' '.join(optional))} {kind} {shown}",
            )
