"""An image of another kernel: one whose vdso has other bytes and other places for its functions."""

import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli import Container, Torpor
from support.image_edit import blob, edit, read
from support.workloads import Stage

pytestmark = [pytest.mark.requires("root", "command:gcc", "command:busybox"), pytest.mark.timeout(300)]

SYMBOL = struct.Struct("<IBBHQQ")
FUNCTION = 2
TRAP = b"\x0f\x0b"  # ud2
RIP = 16


def other_digest(metadata: dict[str, Any]) -> None:
    metadata["vdso"]["digest"] = "0123456789abcdef"


def symbols(code: bytes) -> dict[int, tuple[str, int, int]]:
    """Functions: where each symbol is, its name, where the function begins, how long it is."""
    (headers, count) = struct.unpack_from("<Q", code, 32)[0], struct.unpack_from("<H", code, 56)[0]
    segments = [struct.unpack_from("<IIQQQQQQ", code, headers + 56 * n) for n in range(count)]
    start = next(s[2] for s in segments if s[0] == 2)
    dynamic = {}
    while (entry := struct.unpack_from("<QQ", code, start))[0]:
        dynamic[entry[0]] = entry[1]
        start += 16
    names, table = dynamic[5], dynamic[6]
    found = {}
    for at in range(table, names - SYMBOL.size + 1, SYMBOL.size):
        name, info, _, _, value, size = SYMBOL.unpack_from(code, at)
        if info & 15 == FUNCTION:
            end = code.index(b"\0", names + name)
            found[at] = (code[names + name : end].decode(), value, size)
    return found


def other(code: bytes, by: int) -> bytes:
    """A vdso whose functions are `by` bytes farther and all end the program when they are called."""
    out = bytearray(code)
    functions = symbols(code)
    begin, end = min(f[1] for f in functions.values()), max(f[1] + f[2] for f in functions.values())
    out[begin:end] = TRAP * ((end - begin) // 2) + b"\xcc" * ((end - begin) % 2)
    for at, (_, value, _) in functions.items():
        struct.pack_into("<Q", out, at + 8, value + by)
    return bytes(out)


def saved(c: Container, image: Path) -> None:
    c.checkpoint(image)
    c.delete()


@pytest.mark.parametrize(("name", "flags"), [("vdso", []), ("vdso", ["--background"]), ("spaces", [])])
def test_functions_at_other_places_lead_to_those_of_this_kernel(
    name: str, flags: list[str], stage: Callable[[str], Stage], tmp: Path
) -> None:
    play = stage(name)
    c = play.start()
    c.verify()
    saved(c, tmp / "image")
    where = read(tmp / "image")["vdso"]["code"]
    code = blob(tmp / "image", where)
    edit(tmp / "image", tmp / "other", other_digest, blobs={where["offset"]: other(code, by=17)})
    second = play.successor(c)
    result = second.restore_from(tmp / "other", *flags)
    assert "vdso" not in result.err
    if flags:
        second.torpor("wait", "--restore", second.id)
    second.verify()
    # Its memory holds jumps into the vdso now, which must be where it was.
    saved(second, tmp / "image2")
    third = play.successor(second)
    third.restore_from(tmp / "image2")
    third.verify()
    # And once more on another kernel: jumps lead to jumps, which must be where these functions were.
    saved(third, tmp / "image3")
    where = read(tmp / "image3")["vdso"]["code"]
    edit(tmp / "image3", tmp / "other3", other_digest, blobs={where["offset"]: other(code, by=0)})
    fourth = play.successor(third)
    fourth.restore_from(tmp / "other3")
    fourth.verify()


def in_vdso(image: Path) -> list[int]:
    """Where threads stand in the vdso, from its beginning."""
    found = []
    for process in read(image)["processes"]:
        start, length = process["body"]["memory"]["kernel"][-1]
        places = [thread["cpu"]["regs"][RIP] - start for thread in process["body"]["threads"]]
        found += [at for at in places if 0 <= at < length]
    return found


def test_who_is_inside_the_old_one_runs_on_in_it(stage: Callable[[str], Stage], tmp: Path) -> None:
    """A thread of this program reads clocks all the time."""
    play = stage("busy")
    c = play.start()
    inside = 0
    for n in range(6):
        for m in range(30):
            image = tmp / f"image{n}.{m}"
            c.checkpoint(image, "--leave-running")
            if in_vdso(image):
                break
        edit(image, tmp / f"other{n}", other_digest)
        beside = play.successor(c)
        result = beside.restore_from(tmp / f"other{n}")
        if in_vdso(image):
            inside += 1
            entries = {f[1] for f in symbols(blob(image, read(image)["vdso"]["code"])).values()}
            assert set(in_vdso(image)) <= entries or "inside another kernel's vdso" in result.err
        beside.verify()
        beside.delete()
    assert inside > 0, "it was never seen in the vdso"


def test_an_image_without_its_vdso_is_refused(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("vdso")
    c = play.start()
    saved(c, tmp / "image")

    def without(metadata: dict[str, Any]) -> None:
        other_digest(metadata)
        del metadata["vdso"]["code"]

    edit(tmp / "image", tmp / "other", without)
    again = play.successor(c)
    again.create()
    torpor.fails("restore", "--image-path", tmp / "other", again.id, says="vdso: the image was made on another kernel")
    assert again.status == "created"


def test_a_vdso_that_is_none_is_refused(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("vdso")
    c = play.start()
    saved(c, tmp / "image")
    where = read(tmp / "image")["vdso"]["code"]
    for n, wrong in enumerate((b"\xff" * 64, bytes(where["len"]))):
        edit(tmp / "image", tmp / f"other{n}", other_digest, blobs={where["offset"]: wrong})
        again = play.successor(c)
        again.create()
        torpor.fails("restore", "--image-path", tmp / f"other{n}", again.id, says="vdso offers no functions")
        assert again.status == "created"
