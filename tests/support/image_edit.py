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


def edit(source: Path, target: Path, how: Callable[[dict[str, Any]], object], section: str = "metadata") -> None:
    """Copy the image in directory `source` to the new directory `target`, with one JSON section changed by `how`."""
    data = (source / "checkpoint.img").read_bytes()
    data_len, _, blocks, count, block_size, _, footer_len, magic = _TRAILER.unpack(data[-_TRAILER.size :])
    footer = data[-footer_len:]
    table = footer[: count * _ENTRY.size]
    block_table = footer[len(table) : len(table) + 8 * blocks]

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
    out += entries + block_table + begin + total + struct.pack("<Q8s", footer_len, magic)
    target.mkdir()
    (target / "checkpoint.img").write_bytes(out)
