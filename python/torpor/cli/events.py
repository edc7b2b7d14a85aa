"""One JSON object a line: numbers every --interval, and `oom` when the kernel killed a process for want of memory. With
--stats the numbers are printed once. Otherwise it goes on until the container has ended."""

from __future__ import annotations

import time

from torpor import quick_json
from torpor.errors import UsageError
from torpor.flags import BOOL, TEXT, Flag

from .common import container, one_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags] ID"
FLAGS = (
    # runc has a duration, runsc seconds
    Flag("interval", TEXT, "time between two lines, as 5s, 500ms or 5", default="5s"),
    Flag("stats", BOOL, "print the numbers once and leave"),
)


def execute(config: Config, flags: Parsed) -> int:
    container_id = one_id(flags)
    interval = duration(flags.text("interval"))
    if interval <= 0:
        raise UsageError("--interval must be more than 0", code="bad-flag")
    found = container(config, container_id)
    from torpor import cgroups
    from torpor.exits import Exit

    state = found.running("events")

    def say(kind: str, data: object = None) -> None:
        line = {"type": kind, "id": found.id} | ({"data": data} if data is not None else {})
        print(quick_json.dumps(line), flush=True)

    if flags.on("stats"):
        say("stats", found.stats())
        return 0
    with Exit(state.pid, state.start_time) as end:
        killed = cgroups.out_of_memory_kills(state.pid)
        next_line = time.monotonic() + interval
        while True:
            # An interval may be long, but a death should not be told late.
            if end.wait(min(1.0, max(0.0, next_line - time.monotonic()))):
                return 0
            now = cgroups.out_of_memory_kills(state.pid)
            if now > killed:
                say("oom")
            killed = now
            if time.monotonic() >= next_line:
                say("stats", cgroups.stats(state.pid))
                next_line += interval


_UNITS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def duration(text: str) -> float:
    """Seconds: a plain number, or Go's 1h2m3.5s."""
    seconds, rest, matched = 0.0, text.strip(), False
    if rest.isdigit():
        return float(rest)
    while rest:
        digits = len(rest) - len(rest.lstrip("0123456789."))
        unit = next((u for u in ("ns", "us", "µs", "ms", "s", "m", "h") if rest.startswith(u, digits)), "")
        try:
            seconds += float(rest[:digits]) * _UNITS[unit]
        except (ValueError, KeyError):
            raise UsageError(f"invalid duration {text!r}: use 5s or 500ms", code="bad-flag") from None
        rest, matched = rest[digits + len(unit) :], True
    if not matched:
        raise UsageError("invalid duration '': use 5s or 500ms", code="bad-flag")
    return seconds
