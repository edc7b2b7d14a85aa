"""Changes what an image says and makes its checksums right again, from docs/image-format.md alone: what a forger would do."""

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import xxhash

_ENTRY = struct.Struct("<IIQQQ32s")
_TRAILER = struct.Struct("<QQQII16sQ8s")


def _padding(length: int) -> bytes:
    return bytes(-length % 8)


def read(source: Path, section: str = "metadata") -> dict[str, Any]:
    """One JSON section of the image in directory `source`."""
    found: list[dict[str, Any]] = []
    _edited((source / "checkpoint.img").read_bytes(), found.append, section)
    return found[0]


def blob(source: Path, ref: dict[str, int]) -> bytes:
    """The bytes that a JSON section refers to."""
    data = (source / "checkpoint.img").read_bytes()
    return data[ref["offset"] : ref["offset"] + ref["len"]]


def edit(
    source: Path,
    target: Path,
    how: Callable[[dict[str, Any]], object],
    section: str = "metadata",
    blobs: dict[int, bytes] | None = None,
) -> None:
    """Copy the image in directory `source` to the new directory `target`, with one JSON section changed by `how`, and other bytes at
    some places of its data area."""
    data = bytearray((source / "checkpoint.img").read_bytes())
    for offset, content in (blobs or {}).items():
        data[offset : offset + len(content)] = content
    out = _edited(bytes(data), how, section)
    target.mkdir()
    (target / "checkpoint.img").write_bytes(out)


def _edited(data: bytes, how: Callable[[dict[str, Any]], object], section: str) -> bytes:
    data_len, _, blocks, count, block_size, _, footer_len, magic = _TRAILER.unpack(data[-_TRAILER.size :])
    footer = data[-footer_len:]
    table = footer[: count * _ENTRY.size]
    starts = range(4096, 4096 + data_len, block_size)
    ends = [min(start + block_size, 4096 + data_len) for start in starts]
    digests = [xxhash.xxh3_64_intdigest(data[a:b]) for a, b in zip(starts, ends, strict=True)]
    block_table = b"".join(digest.to_bytes(8, "little") for digest in digests)
    assert len(block_table) == 8 * blocks

    out = bytearray(data[: 4096 + data_len])
    entries = bytearray()
    for kind, flags, offset, length, digest, name in _ENTRY.iter_unpack(table):
        content = data[offset : offset + length]
        if name.rstrip(b"\0").decode() == section:
            document = json.loads(content)
            how(document)
            content = json.dumps(document).encode()
            digest = xxhash.xxh3_64_intdigest(content)
        out += _padding(len(out))
        entries += _ENTRY.pack(kind, flags, len(out), len(content), digest, name)
        out += content
    out += _padding(len(out))
    file_len = len(out) + footer_len
    begin = struct.pack("<QQQII", data_len, file_len, blocks, count, block_size)
    total = xxhash.xxh3_128_intdigest(data[:4096] + bytes(entries) + block_table + begin).to_bytes(16, "little")
    return bytes(out + entries + block_table + begin + total + struct.pack("<Q8s", footer_len, magic))
