"""What stands in for `criu` where Podman and CRI-O want one: installed only by `torpor install --podman`, only where
there is no criu.

They ask its version before every checkpoint and restore, even when the runtime does not use CRIU. This answers the
questions and does nothing else: `criu swrk FD` with VERSION and FEATURE_CHECK (criu's rpc.proto, over SOCK_SEQPACKET).
Also here: the files with times that Podman reads after a checkpoint and a restore.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence
    from typing import Any

# The newest that was looked at (client-surface §5.3 wants 3.16 at least).
VERSION = (4, 2, 0)
_FEATURE_CHECK, _VERSION = 9, 10
_WHAT = "this is torpor's stand-in for criu: it answers what version it is, and checkpoints nothing"


def main(argv: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["swrk"] and len(words) == 2 and words[1].isdigit():
        serve(int(words[1]))
        return 0
    if words[:1] in (["--version"], ["-V"]):
        print(f"Version: {'.'.join(map(str, VERSION[:2]))} ({_WHAT})")
        return 0
    sys.stderr.write(f"{_WHAT}\n")
    return 1


def serve(fd: int) -> None:
    """Answer requests until the other side closes."""
    import socket

    with socket.socket(fileno=fd) as s:
        while request := s.recv(1 << 16):
            s.send(answer(request))


def answer(request: bytes) -> bytes:
    """The criu_resp for a criu_req."""
    kind = next((value for field, value in _varints(request) if field == 1), 0)
    if kind == _VERSION:
        major, minor, sublevel = VERSION
        version = _field(1, major) + _field(2, minor) + _field(4, sublevel)
        return _field(1, kind) + _field(2, 1) + _bytes(10, version)
    if kind == _FEATURE_CHECK:
        # mem_track, which Podman wants for --pre-checkpoint, and lazy_pages
        return _field(1, kind) + _field(2, 1) + _bytes(8, _field(1, 1) + _field(2, 0))
    return _field(1, kind) + _field(2, 0) + _bytes(9, _WHAT.encode())


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _field(number: int, value: int) -> bytes:
    return _varint(number << 3) + _varint(value)


def _bytes(number: int, value: bytes) -> bytes:
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varints(data: bytes) -> Iterator[tuple[int, int]]:
    """The fields of a message that are plain numbers, as (field, value)."""
    at = 0

    def number() -> int:
        nonlocal at
        value = shift = 0
        while at < len(data):
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                break
        return value

    while at < len(data):
        tag = number()
        kind = tag & 7
        if kind == 0:
            yield tag >> 3, number()
        elif kind == 2:
            at += number()
        else:
            at += 8 if kind == 1 else 4


# criu's image format, for the one file of it that Podman reads: magic numbers, then a StatsEntry (criu's stats.proto)
_MAGIC = b"\x40\x59\x10\x55" + b"\x06\x33\x09\x57"


def dump_stats(report: Mapping[str, Any]) -> bytes:
    """The file `stats-dump`, for `podman container checkpoint --print-stats`."""
    took = {stage["name"]: int(stage["us"]) for stage in report.get("stages") or []}
    entry = (
        _field(1, took.get("freeze", 0))
        + _field(2, int(report.get("pause_us", 0)))
        + _field(3, took.get("capture", 0))
        + _field(4, took.get("write", 0))
        + _field(5, int(report.get("pages", 0)))
        + _field(6, 0)
        + _field(7, int(report.get("pages", 0)))
        + _field(8, 0)
        + _field(9, 0)
    )
    return _stats(_bytes(1, entry))


def _stats(message: bytes) -> bytes:
    return _MAGIC + len(message).to_bytes(4, "little") + message


if __name__ == "__main__":
    sys.exit(main())
