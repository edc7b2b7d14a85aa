"""Compressed images: every way into and out of them, and what folds a chain into one."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cli import Torpor
from support.workloads import Stage

pytestmark = [pytest.mark.requires("root", "command:gcc", "command:busybox"), pytest.mark.timeout(180)]


@pytest.mark.parametrize("name", ["memory", "memfd", "paging"])
@pytest.mark.parametrize("how", ["lz4", "zstd:1"])
def test_restore_at_once_and_in_the_background(
    name: str, how: str, stage: Callable[[str], Stage], tmp: Path, torpor: Torpor
) -> None:
    play = stage(name)
    first = play.start()
    first.verify()
    # From a twin, then from a container that stands still.
    first.checkpoint(tmp / "running", "--leave-running", f"--compression={how}")
    first.verify()
    first.checkpoint(tmp / "plain", "--leave-running")
    first.checkpoint(tmp / "image", f"--compression={how}")
    torpor("inspect", "--verify", tmp / "image")
    sizes = [(tmp / image / "checkpoint.img").stat().st_size for image in ("image", "plain")]
    # memfd holds noise: it is stored as it is.
    assert name == "memfd" or sizes[0] < sizes[1]
    found = json.loads(torpor("inspect", "--json", tmp / "image").out)
    assert (found["compression"], found["parent"], len(found["chain"])) == (how.partition(":")[0], None, 1)
    second = play.successor(first)
    second.restore_from(tmp / "image", "--background")
    second.verify()
    torpor("wait", "--restore", second.id)
    second.checkpoint(tmp / "again", "--compression=flate-best-speed")
    third = play.successor(second)
    third.restore_from(tmp / "again")
    third.verify()


def test_every_fault_is_served_from_a_compressed_image(
    stage: Callable[[str], Stage], tmp: Path, torpor: Torpor
) -> None:
    play = stage("paging")
    first = play.start()
    first.verify()
    first.checkpoint(tmp / "image", "--compression=zstd")
    second = play.successor(first)
    # Nobody fills: each touch is a fault.
    second.restore_from(tmp / "image", "--background", env={"TORPOR_FAILPOINT": "page:hang"})
    second.verify(timeout=60)
    os.kill(json.loads((torpor.root / second.id / "pager.json").read_text())["pid"], 9)
    torpor.wait_status(second.id, "stopped")


def test_a_damaged_compressed_image_is_refused(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("memory")
    first = play.start()
    first.verify()
    first.checkpoint(tmp / "image", "--compression=lz4")
    path = tmp / "image" / "checkpoint.img"
    with open(path, "r+b") as f:
        f.seek(path.stat().st_size // 2)
        byte = f.read(1)
        f.seek(-1, 1)
        f.write(bytes([byte[0] ^ 1]))
    torpor.fails("restore", "--image-path", tmp / "image", "--bundle", first.bundle, "-d", "other", says="damaged")
    torpor.fails("inspect", "--verify", tmp / "image", says="damaged")
    torpor.fails("squash", tmp / "image", tmp / "new", says="damaged")
    assert not (tmp / "new").exists()


def test_squash_writes_the_same_state(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("memfd")
    first = play.start()
    first.verify()
    first.checkpoint(tmp / "image", "--compression=lz4")
    torpor("squash", "--compression=zstd", tmp / "image", tmp / "new")
    torpor.fails("squash", tmp / "image", tmp / "new", says="already exists")
    old, new = (json.loads(torpor("inspect", "--json", tmp / name).out) for name in ("image", "new"))
    assert old["header"]["uuid"] != new["header"]["uuid"] and new["compression"] == "zstd"
    assert old["processes"] == new["processes"]
    (tmp / "image" / "checkpoint.img").unlink()
    second = play.successor(first)
    second.restore_from(tmp / "new")
    second.verify()
