"""The names of compressions, checked before anything is stopped for them."""

from __future__ import annotations

from .errors import UsageError

HELP = "none, lz4, zstd or zstd:LEVEL (1 to 19); flate-best-speed is lz4"


def check(text: str, what: str = "--compression") -> str:
    """The name itself, or `none` for an empty one.

    Raises:
        UsageError: `bad-flag`, `what` has a value that is not one.
    """
    name, colon, level = text.partition(":")
    if not text or text in ("none", "lz4", "zstd", "flate-best-speed"):
        return text or "none"
    if name == "zstd" and colon and level.isascii() and level.isdecimal() and 1 <= int(level[:4]) <= 19:
        return text
    raise UsageError(f"invalid value {text!r} for {what}: use {HELP}", code="bad-flag", object=what)
