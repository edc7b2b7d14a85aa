"""How far a checkpoint or a restore is: a bar for people, lines of JSON for programs."""

from __future__ import annotations

import os
import time

from . import quick_json

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

# What ends sooner needs no bar.
SHOWN_AFTER = 0.5
WIDTH = 24
MIB = 1 << 20


class Progress:
    """How far a stage is."""

    __slots__ = ("bytes", "seconds", "stage", "total")

    def __init__(self, stage: str, done: int, total: int, seconds: float) -> None:
        # "capture" of a checkpoint; "read" (the image is read and checked), then "fill" of a restore.
        self.stage = stage
        # Bytes that are done, and bytes in all as far as is known.
        self.bytes = done
        self.total = total
        # Since the stage began.
        self.seconds = seconds

    def __repr__(self) -> str:
        return f"<torpor.Progress {self.stage}: {self.bytes} of {self.total} bytes>"

    @property
    def rate(self) -> float:
        """Bytes a second, since the beginning of the stage."""
        return self.bytes / self.seconds if self.seconds > 0 else 0.0


def teller(listener: Callable[[Progress], object]) -> Callable[[str, int, int], None]:
    """What the engine is to call so that `listener` is told."""
    current, since, last = "", 0.0, time.monotonic()

    def tell(stage: str, done: int, total: int) -> None:
        nonlocal current, since, last
        if stage != current:
            # It began when the one before ended.
            current, since = stage, last
        last = time.monotonic()
        listener(Progress(stage, done, total, last - since))

    return tell


class Display:
    """Shows the progress of one command on stderr, as a bar or as `lines` of JSON."""

    def __init__(self, verb: str, *, lines: bool, fd: int = 2, clock: Callable[[], float] = time.monotonic) -> None:
        self._verb = verb
        self._lines = lines
        self._fd = fd
        self._clock = clock
        self._start = clock()
        self._last: Progress | None = None
        self._shown = False

    def tell(self, progress: Progress) -> None:
        self._last = progress
        if self._lines:
            self._line(stage=progress.stage, bytes=progress.bytes, total=progress.total)
        elif self._clock() - self._start >= SHOWN_AFTER:
            self._shown = True
            self._write(f"\r{bar(self._verb, progress)}\x1b[K")

    def end(self, pause_us: int | None = None) -> None:
        """All is done. A checkpoint says how long the container stood still."""
        if self._lines:
            self._line(done=True, **({} if pause_us is None else {"pause_us": pause_us}))
        elif self._shown and self._last is not None:
            pause = "" if pause_us is None else f", pause {pause_us / 1000:.1f} ms"
            # Return: the terminal may be raw.
            self._write(f"\r{bar(self._verb, self._last)}{pause}\x1b[K\r\n")
        self._shown = False

    def abandon(self) -> None:
        """It came to nothing: the line is for the error."""
        if self._shown:
            self._write("\r\x1b[K")

    def _line(self, **fields: object) -> None:
        seconds = round(self._clock() - self._start, 3)
        self._write(quick_json.dumps({"verb": self._verb, **fields, "seconds": seconds}) + "\n")

    def _write(self, text: str) -> None:
        try:
            os.write(self._fd, text.encode())
        except OSError:
            pass  # nobody looks any more


def bar(verb: str, progress: Progress) -> str:
    done, total = progress.bytes, max(progress.total, 1)
    picture = ("#" * (WIDTH * done // total)).ljust(WIDTH, "-")
    numbers = f"{done / MIB:.0f} of {total / MIB:.0f} MiB, {progress.rate / MIB:.0f} MiB/s"
    return f"{verb} {progress.stage} [{picture}] {100 * done // total:3} %  {numbers}"
