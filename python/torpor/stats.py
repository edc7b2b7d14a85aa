"""What a checkpoint or a restore took, for people."""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

# Keys of a report and what they are called; those that a report lacks are left out.
_PAGES = (
    ("pages", "data"),
    ("zero_pages", "zero, not stored"),
    ("shared_pages", "same as another, stored once"),
    ("inherited_pages", "in a parent image"),
)


def table(report: dict[str, Any]) -> str:
    """Stages in milliseconds, bytes, pages by kind, the pause: one line each."""
    rows = [(stage["name"], _milliseconds(stage["us"])) for stage in report.get("stages") or []]
    rows.append(("all stages", _milliseconds(sum(stage["us"] for stage in report.get("stages") or []))))
    if "pause_us" in report:
        rows.append(("pause", _milliseconds(report["pause_us"])))
    rows.append(("tasks", str(report["tasks"])))
    rows.append(("bytes", str(report["bytes"])))
    for key, name in _PAGES:
        if key in report:
            rows.append((f"pages: {name}", str(report[key])))
    width = max(len(name) for name, _ in rows)
    right = max(len(value) for _, value in rows)
    return "".join(f"{name:{width}}  {value:>{right}}\n" for name, value in rows)


def _milliseconds(us: int) -> str:
    return f"{us / 1000:.1f} ms"
