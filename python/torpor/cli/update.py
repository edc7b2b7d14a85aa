"""Sizes may end in k, m, g or t; -1 takes a limit away. With --resources, a file (or - for standard input) with an OCI
linux.resources object says it all, and the other flags are not looked at. What is not named stays as it is."""

from __future__ import annotations

from torpor.errors import UsageError
from torpor.flags import NUMBER, TEXT, Flag

from .common import container, one_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags] ID"
FLAGS = (
    Flag("resources", TEXT, "file with an OCI linux.resources object; - is standard input", short="r"),
    Flag("memory", TEXT, "memory limit"),
    Flag("memory-reservation", TEXT, "memory that is left to it when others want some"),
    Flag("memory-swap", TEXT, "limit of memory and swap together"),
    Flag("kernel-memory", TEXT, "accepted and ignored: kernels have no such limit any more", hidden=True),
    Flag("kernel-memory-tcp", TEXT, "memory limit for TCP buffers", hidden=True),
    Flag("cpu-period", NUMBER, "CPU period in microseconds"),
    Flag("cpu-quota", NUMBER, "CPU time in a period, in microseconds"),
    Flag("cpu-burst", NUMBER, "CPU time that may be saved up, in microseconds"),
    Flag("cpu-share", NUMBER, "weight against other containers"),
    Flag("cpu-rt-period", NUMBER, "real-time period in microseconds"),
    Flag("cpu-rt-runtime", NUMBER, "real-time CPU time in a period, in microseconds"),
    Flag("cpu-idle", NUMBER, "1: run only when nobody else wants to"),
    Flag("cpuset-cpus", TEXT, "processors it may use, as 0-2,4"),
    Flag("cpuset-mems", TEXT, "memory nodes it may use"),
    Flag("pids-limit", NUMBER, "most processes"),
    Flag("blkio-weight", NUMBER, "weight of its disk I/O, 10 to 1000"),
    Flag("l3-cache-schema", TEXT, "not supported", hidden=True),
    Flag("mem-bw-schema", TEXT, "not supported", hidden=True),
)

_SIZES = (("memory", "limit"), ("memory-reservation", "reservation"), ("memory-swap", "swap"),
          ("kernel-memory-tcp", "kernelTCP"))  # fmt: skip
_CPU = (
    ("cpu-period", "period"),
    ("cpu-quota", "quota"),
    ("cpu-burst", "burst"),
    ("cpu-share", "shares"),
    ("cpu-rt-period", "realtimePeriod"),
    ("cpu-rt-runtime", "realtimeRuntime"),
    ("cpu-idle", "idle"),
)


def execute(config: Config, flags: Parsed) -> int:
    container_id = one_id(flags)
    for name in ("l3-cache-schema", "mem-bw-schema"):
        if flags.text(name):
            raise UsageError(
                f"--{name} is not supported: torpor does not set Intel RDT", code="bad-flag", object=f"--{name}"
            )
    found = container(config, container_id)
    found.update(_from_file(flags.text("resources")) if flags.text("resources") else _from_flags(flags))
    return 0


def _from_file(path: str) -> dict[str, Any]:
    import json
    import sys

    where = "standard input" if path == "-" else path
    try:
        if path == "-":
            text = sys.stdin.read()
        else:
            with open(path, encoding="utf-8") as f:
                text = f.read()
        found = json.loads(text)
    except OSError as e:
        raise UsageError(f"cannot read --resources {path}: {e.strerror}", code="bad-flag") from None
    except ValueError as e:
        raise UsageError(f"--resources: {where} is not JSON: {e}", code="bad-flag") from None
    if not isinstance(found, dict):
        raise UsageError(f"--resources: {where} is not a JSON object", code="bad-flag")
    return found


def _from_flags(flags: Parsed) -> dict[str, Any]:
    cpu: dict[str, Any] = {key: flags.number(name) for name, key in _CPU if name in flags.given}
    cpu |= {key: flags.text(f"cpuset-{key}") for key in ("cpus", "mems") if flags.text(f"cpuset-{key}")}
    resources: dict[str, Any] = {
        "memory": {key: size(flags.text(name), name) for name, key in _SIZES if flags.text(name)},
        "cpu": cpu,
    }
    if "pids-limit" in flags.given:
        resources["pids"] = {"limit": flags.number("pids-limit")}
    if "blkio-weight" in flags.given:
        resources["blockIO"] = {"weight": flags.number("blkio-weight")}
    return resources


_UNITS = {"": 1, "b": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}


def size(text: str, name: str) -> int:
    """A number of bytes, as Docker's units package reads it: 64m, 64MB, 1.5GiB, -1."""
    if text == "-1":
        return -1
    number = text.rstrip("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ ")
    unit = text[len(number) :].strip().lower()
    factor = _UNITS.get(unit if unit in _UNITS else unit.removesuffix("b").removesuffix("i"))
    try:
        if factor is None:
            raise ValueError
        value = float(number)
        if not 0 <= value < 2**63:
            raise ValueError
        return int(value * factor)
    except ValueError:
        raise UsageError(f"invalid size {text!r} for flag --{name}: use 64m or 1g", code="bad-flag") from None
