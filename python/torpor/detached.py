"""A checkpoint that was left to its tracer when the container ran again: who does it, and how it went.

The tracer holds the container's lock until it is done, and leaves its result in the container's directory.
"""

from __future__ import annotations

from . import proc, quick_json
from .errors import InterruptedCheckpoint, from_engine
from .state import Home

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

NOTE = "checkpointing.json"
REPORT = "checkpointed.json"


def begin(home: Home, lock: int, made: list[str]) -> dict[str, Any]:
    """What the engine is told. The result of an earlier one goes. Called under the lock."""
    forget(home)
    return {"report": home.file(REPORT), "lock": lock, "made": made}


def forget(home: Home) -> None:
    """Remove what an earlier one has left."""
    import os

    for name in (NOTE, REPORT):
        try:
            os.unlink(home.file(name))
        except FileNotFoundError:
            pass


def note(home: Home, image_path: str, tracer: int, init: int) -> None:
    """Remember one that goes on without us."""
    home.write_text(NOTE, quick_json.dumps({"image_path": image_path, "tracer": tracer, "init": init}))


def wait(home: Home) -> tuple[str, dict[str, Any]] | None:
    """Return when it is done: the image's directory and the report. None when the last checkpoint was not detached.

    Raises:
        what `Container.checkpoint` raises; InterruptedCheckpoint: `tracer-died`, it was killed.
    """
    with home:
        noted = _read(home, NOTE)
        result = _read(home, REPORT)
        if noted is None:
            return None
        if result is None:
            _put_right(noted["init"])
            raise InterruptedCheckpoint(
                "the tracer process was killed; the container was left as it was", code="tracer-died"
            )
    if "Failed" in result:
        raise from_engine(**result["Failed"])
    return noted["image_path"], result["Done"]


def _put_right(init: int) -> None:
    from . import _core

    if proc.start_time(init) is not None:
        _core.put_right(init)


def _read(home: Home, name: str) -> dict[str, Any] | None:
    try:
        with open(home.file(name), encoding="utf-8") as f:
            found: dict[str, Any] = quick_json.loads(f.read())
            return found
    except (FileNotFoundError, ValueError):
        return None
