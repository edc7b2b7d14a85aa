"""The cgroup of a container, read and written: limits for `update`, numbers for `events`.

Version 1 and 2 name the same things differently; each is written where the container has a directory for it. Not done
through libcgroups, whose `apply` loads a new device filter on version 2 whatever it is asked to change.
"""

from __future__ import annotations

import os

from . import proc
from .errors import KernelError, SpecError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import Any

    Resources = dict[str, Any]


_NO_LIMIT = 2**64 - 1


class Cgroup:
    """The directories a process sits in, by the name of a file that is in one of them."""

    def __init__(self, pid: int) -> None:
        self.directories = list(dict.fromkeys(proc.cgroup_directories(pid)))

    def find(self, *names: str) -> str:
        """The path of the first of these files that exists, "" when none does."""
        for name in names:
            for directory in self.directories:
                path = os.path.join(directory, name)
                if os.path.exists(path):
                    return path
        return ""

    def read(self, *names: str) -> str:
        path = self.find(*names)
        if not path:
            return ""
        try:
            with open(path) as f:
                return f.read().strip()
        except OSError:
            return ""

    def number(self, *names: str) -> int:
        """0 when there is no such file; `max` is the largest number there is."""
        text = self.read(*names)
        if text == "max":
            return _NO_LIMIT
        try:
            return int(text)
        except ValueError:
            return 0

    def table(self, *names: str) -> dict[str, int]:
        """A file of lines `name number`."""
        found = {}
        for line in self.read(*names).splitlines():
            key, _, value = line.partition(" ")
            if value.strip().isdigit():
                found[key] = int(value)
        return found

    def write(self, value: object, *names: str) -> None:
        """Write to the first of these files that exists.

        Raises:
            KernelError: none exists, or the kernel does not take the value.
        """
        path = self.find(*names)
        if not path:
            raise KernelError(f"this machine's cgroups have no {names[0]}", object=names[0])
        try:
            with open(path, "w") as f:
                f.write(str(value))
        except OSError as e:
            raise KernelError(f"cannot write {value} to {path}: {e.strerror}", object=os.path.basename(path)) from None


def update(pid: int, resources: Resources) -> None:
    """Change the limits of the container whose init is `pid`. A field that is absent or 0 is left as it is, as runc
    has it.

    Raises:
        SpecError: `bad-spec`, a value cannot be understood.
        KernelError: the kernel refused; what was set before stays set.
    """
    check(resources)
    cgroup = Cgroup(pid)
    _update_memory(cgroup, resources.get("memory") or {})
    _update_cpu(cgroup, resources.get("cpu") or {})
    pids = (resources.get("pids") or {}).get("limit") or 0
    if pids:
        cgroup.write(pids if pids > 0 else "max", "pids.max")
    weight = (resources.get("blockIO") or {}).get("weight") or 0
    if weight:
        path = cgroup.find("blkio.bfq.weight", "blkio.weight", "io.bfq.weight", "io.weight")
        # io.weight goes from 1 to 10000 where the others go from 10 to 1000
        wide = os.path.basename(path) == "io.weight"
        value = 1 + (weight - 10) * 9999 // 990 if wide else weight
        cgroup.write(value, "blkio.bfq.weight", "blkio.weight", "io.bfq.weight", "io.weight")
    for name, text in (resources.get("unified") or {}).items():
        if "/" in name:
            raise SpecError(f"invalid cgroup file {name!r}", code="bad-spec", object=name)
        cgroup.write(text, name)


_NUMBERS = {
    "memory": ("limit", "reservation", "swap", "kernel", "kernelTCP"),
    "cpu": ("shares", "quota", "period", "burst", "idle", "realtimeRuntime", "realtimePeriod"),
    "pids": ("limit",),
    "blockIO": ("weight",),
}


def check(resources: Any) -> None:
    """Raises SpecError when it is not what OCI calls linux.resources."""
    if not isinstance(resources, dict):
        raise SpecError("resources are not a JSON object", code="bad-spec")
    for section, names in _NUMBERS.items():
        values = resources.get(section) or {}
        if not isinstance(values, dict):
            raise SpecError(f"resources have a {section} that is not an object", code="bad-spec", object=section)
        for name in names:
            value = values.get(name)
            if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
                raise SpecError(f"resources have a {section}.{name} that is not a number", code="bad-spec")


def _update_memory(cgroup: Cgroup, memory: dict[str, int]) -> None:
    limit, swap = memory.get("limit") or 0, memory.get("swap") or 0
    if limit == -1 and not swap:
        swap = -1
    if cgroup.find("memory.max"):
        if swap:
            cgroup.write("max" if swap < 0 else _swap_alone(cgroup, swap, limit), "memory.swap.max")
        if limit:
            cgroup.write("max" if limit < 0 else limit, "memory.max")
        if memory.get("reservation"):
            cgroup.write("max" if memory["reservation"] < 0 else memory["reservation"], "memory.low")
        return
    both = [(limit, "memory.limit_in_bytes"), (swap, "memory.memsw.limit_in_bytes")]
    # memsw may never be below limit, not even between the two writes
    if swap == -1 or cgroup.number("memory.limit_in_bytes") < swap:
        both.reverse()
    for value, name in both:
        if value:
            cgroup.write(value, name)
    for key, name in (
        ("reservation", "memory.soft_limit_in_bytes"),
        ("kernelTCP", "memory.kmem.tcp.limit_in_bytes"),
    ):
        if memory.get(key):
            cgroup.write(memory[key], name)


def _swap_alone(cgroup: Cgroup, both: int, limit: int) -> int:
    """OCI counts memory and swap together, version 2 swap by itself."""
    memory = limit or cgroup.number("memory.max")
    if memory < 0 or memory > both:
        raise SpecError(
            f"memory.swap {both} counts memory too, so it cannot be below the memory limit"
            f" ({'none' if memory < 0 or memory == _NO_LIMIT else memory}): give both",
            code="bad-spec",
            object="memory.swap",
        )
    return both - memory


def _update_cpu(cgroup: Cgroup, cpu: dict[str, Any]) -> None:
    shares, quota, period = cpu.get("shares") or 0, cpu.get("quota") or 0, cpu.get("period") or 0
    if cgroup.find("cpu.max"):
        if shares:
            cgroup.write(1 + (max(shares, 2) - 2) * 9999 // 262142, "cpu.weight")
        if quota or period:
            old_quota, _, old_period = cgroup.read("cpu.max").partition(" ")
            new_quota = "max" if quota < 0 else quota or old_quota
            cgroup.write(f"{new_quota} {period or old_period}", "cpu.max")
    else:
        if shares:
            cgroup.write(shares, "cpu.shares")
        _quota_and_period(cgroup, quota, period)
        for key, name in (("realtimePeriod", "cpu.rt_period_us"), ("realtimeRuntime", "cpu.rt_runtime_us")):
            if cpu.get(key):
                cgroup.write(cpu[key], name)
    if cpu.get("burst") is not None:
        cgroup.write(cpu["burst"], "cpu.cfs_burst_us", "cpu.max.burst")
    if cpu.get("idle") is not None:
        cgroup.write(cpu["idle"], "cpu.idle")
    for key, name in (("cpus", "cpuset.cpus"), ("mems", "cpuset.mems")):
        if cpu.get(key):
            cgroup.write(cpu[key], name)


def _quota_and_period(cgroup: Cgroup, quota: int, period: int) -> None:
    todo = [(period, "cpu.cfs_period_us"), (quota, "cpu.cfs_quota_us")]
    todo = [(value, name) for value, name in todo if value]
    try:
        for value, name in todo:
            cgroup.write(value, name)
    except KernelError:
        # A period can be too short for the quota of now and right for the new one.
        if len(todo) < 2:
            raise
        for value, name in reversed(todo):
            cgroup.write(value, name)


# ---- numbers
# ------------------------------------------------------------------------------------------------------------------


def stats(pid: int) -> dict[str, Any]:
    """What `events --stats` prints as data: runc's names (libcontainer's Stats)."""
    cgroup = Cgroup(pid)
    return {
        "cpu": _cpu_stats(cgroup),
        "cpuset": {},
        "memory": _memory_stats(cgroup),
        "pids": {"current": cgroup.number("pids.current"), "limit": _limit(cgroup, "pids.max")},
        "blkio": {},
        "hugetlb": {},
        "intel_rdt": {},
        "network_interfaces": _interfaces(pid),
    }


def _cpu_stats(cgroup: Cgroup) -> dict[str, Any]:
    stat = cgroup.table("cpu.stat")
    throttling = {
        "periods": stat.get("nr_periods", 0),
        "throttledPeriods": stat.get("nr_throttled", 0),
        "throttledTime": stat.get("throttled_time", stat.get("throttled_usec", 0) * 1000),
    }
    if "usage_usec" in stat:
        usage: dict[str, Any] = {
            "total": stat["usage_usec"] * 1000,
            "kernel": stat.get("system_usec", 0) * 1000,
            "user": stat.get("user_usec", 0) * 1000,
        }
    else:
        ticks = cgroup.table("cpuacct.stat")
        tick = 1_000_000_000 // os.sysconf("SC_CLK_TCK")
        usage = {
            "total": cgroup.number("cpuacct.usage"),
            "percpu": [int(word) for word in cgroup.read("cpuacct.usage_percpu").split()],
            "percpu_kernel": [int(word) for word in cgroup.read("cpuacct.usage_percpu_sys").split()],
            "percpu_user": [int(word) for word in cgroup.read("cpuacct.usage_percpu_user").split()],
            "kernel": ticks.get("system", 0) * tick,
            "user": ticks.get("user", 0) * tick,
        }
    return {"usage": usage, "throttling": throttling}


def _memory_stats(cgroup: Cgroup) -> dict[str, Any]:
    raw = cgroup.table("memory.stat")

    def entry(prefix: str) -> dict[str, int]:
        return {
            "limit": cgroup.number(f"{prefix}.limit_in_bytes"),
            "usage": cgroup.number(f"{prefix}.usage_in_bytes"),
            "max": cgroup.number(f"{prefix}.max_usage_in_bytes"),
            "failcnt": cgroup.number(f"{prefix}.failcnt"),
        }

    if not cgroup.find("memory.current"):
        return {
            "cache": raw.get("cache", 0),
            "usage": entry("memory"),
            "swap": entry("memory.memsw"),
            "kernel": entry("memory.kmem"),
            "kernelTCP": entry("memory.kmem.tcp"),
            "raw": raw,
        }
    used, swapped = cgroup.number("memory.current"), cgroup.number("memory.swap.current")
    most, most_swap = cgroup.number("memory.max"), cgroup.number("memory.swap.max")
    return {
        "cache": raw.get("file", 0),
        "usage": {"limit": most, "usage": used, "max": cgroup.number("memory.peak"), "failcnt": 0},
        "swap": {"limit": min(most + most_swap, 2**64 - 1), "usage": used + swapped, "max": 0, "failcnt": 0},
        "kernel": {"limit": 0, "usage": raw.get("kernel", 0), "max": 0, "failcnt": 0},
        "kernelTCP": {"limit": 0, "usage": raw.get("sock", 0), "max": 0, "failcnt": 0},
        "raw": raw,
    }


def _limit(cgroup: Cgroup, name: str) -> int:
    """0 is what runc prints for no limit."""
    value = cgroup.number(name)
    return 0 if value == 2**64 - 1 else value


def _interfaces(pid: int) -> list[dict[str, Any]] | None:
    """Traffic of the container's network interfaces, which runsc prints; None where it shares ours."""
    try:
        if os.readlink(f"/proc/{pid}/ns/net") == os.readlink("/proc/self/ns/net"):
            return None
        with open(f"/proc/{pid}/net/dev") as f:
            return list(_parse_interfaces(f.readlines()[2:]))
    except OSError:
        return None


def _parse_interfaces(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        name, _, rest = line.partition(":")
        fields = [int(word) for word in rest.split()]
        if name.strip() != "lo":
            yield {
                "Name": name.strip(),
                "RxBytes": fields[0],
                "RxPackets": fields[1],
                "RxErrors": fields[2],
                "RxDropped": fields[3],
                "TxBytes": fields[8],
                "TxPackets": fields[9],
                "TxErrors": fields[10],
                "TxDropped": fields[11],
            }


def out_of_memory_kills(pid: int) -> int:
    """How many processes of the container the kernel has killed for want of memory."""
    cgroup = Cgroup(pid)
    return cgroup.table("memory.oom_control").get("oom_kill") or cgroup.table("memory.events").get("oom_kill", 0)
