"""An image of another processor: its extended registers are fewer, or more, or elsewhere."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli import Torpor
from support.image_edit import blob, edit, read
from support.workloads import Stage

pytestmark = [pytest.mark.requires("root", "command:gcc", "command:busybox"), pytest.mark.timeout(120)]

SWITCHED_ON, IN_USE = 464, 512
AVX, UNKNOWN = 7, 1 << 50


def areas(metadata: dict[str, Any]) -> list[dict[str, int]]:
    return [t["cpu"]["xstate"] for p in metadata["processes"] for t in p["body"]["threads"]]


def words(image: Path, at: int, change: Callable[[int], int]) -> dict[int, bytes]:
    """One word of each thread's area, changed: as blobs to be written."""
    changed = {}
    for area in areas(read(image)):
        word = int.from_bytes(blob(image, area)[at : at + 8], "little")
        changed[area["offset"] + at] = change(word).to_bytes(8, "little")
    return changed


def test_one_with_fewer_registers(stage: Callable[[str], Stage], tmp: Path) -> None:
    play = stage("signals")
    c = play.start()
    c.checkpoint(tmp / "image")
    c.delete()
    if int.from_bytes(blob(tmp / "image", areas(read(tmp / "image"))[0])[SWITCHED_ON:][:8], "little") & AVX != AVX:
        pytest.skip("this processor has no AVX")

    def shorter(metadata: dict[str, Any]) -> None:
        for area in areas(metadata):
            area["len"] = 832

    blobs = words(tmp / "image", SWITCHED_ON, lambda word: AVX)
    blobs |= words(tmp / "image", IN_USE, lambda word: word & AVX)
    edit(tmp / "image", tmp / "old", shorter, blobs=blobs)
    again = play.successor(c)
    again.restore_from(tmp / "old")
    again.verify()
    again.verify()


@pytest.mark.parametrize("case", ["more", "elsewhere", "none"])
def test_one_with_others_is_refused(case: str, stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("signals")
    c = play.start()
    c.checkpoint(tmp / "image")
    c.delete()

    def change(metadata: dict[str, Any]) -> None:
        for area in areas(metadata):
            area["len"] = {"more": area["len"], "elsewhere": area["len"] - 8, "none": 64}[case]

    more = words(tmp / "image", SWITCHED_ON, lambda word: word | UNKNOWN) if case == "more" else {}
    edit(tmp / "image", tmp / "other", change, blobs=more)
    again = play.successor(c)
    again.create()
    says = {
        "more": "has kinds 0x4000000000000, which this one lacks",
        "elsewhere": "in another order",
        "none": "no extended registers",
    }
    torpor.fails("restore", "--image-path", tmp / "other", again.id, says=says[case])
    assert again.status == "created"
