"""The pager of a container that was restored with `background`: who it is, whether it still works, how it went.

The engine's pager writes its report when it is done; which process it is we note ourselves, in the container's
directory.
"""

from __future__ import annotations

import os
import select

from . import log, proc, quick_json
from .errors import ImageError
from .state import Home

NOTE = "pager.json"
REPORT = "paged-in.json"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any


def note(home: Home, pid: int) -> None:
    """Remember the pager of a container."""
    started = proc.start_time(pid)
    if started is None:
        # It was done before we looked.
        return
    with open(home.file(NOTE), "w", encoding="utf-8") as f:
        f.write(quick_json.dumps({"pid": pid, "start_time": started}))


def wait(home: Home) -> dict[str, Any]:
    """Return when all of the container's memory is there: what the pager reports, empty without one.

    Raises:
        ImageError: `image-corrupt`, a part of the image could not be read: whoever touches that part gets SIGBUS.
    """
    try:
        with open(home.file(NOTE), encoding="utf-8") as f:
            pager = quick_json.loads(f.read())
    except (FileNotFoundError, ValueError):
        pager = None
    if pager is not None and proc.is_alive(pager["pid"], pager["start_time"]):
        _wait_end(pager["pid"])
    try:
        with open(home.file(REPORT), encoding="utf-8") as f:
            report: dict[str, Any] = quick_json.loads(f.read())
    except (FileNotFoundError, ValueError):
        return {}
    if report["error"]:
        raise ImageError(f"part of the memory of {home.id!r} is lost: {report['error']}", code="image-corrupt")
    for warning in report["warnings"]:
        log.warning(warning)
    return report


def _wait_end(pid: int) -> None:
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        select.select([fd], [], [])
    finally:
        os.close(fd)
