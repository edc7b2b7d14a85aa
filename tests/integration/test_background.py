"""Background restore of many kinds of programs, and background capture (a copy-on-write twin is read). See test_pager.py."""

import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import procs
from support.cli import Container, Torpor
from support.workloads import Stage

pytestmark = [pytest.mark.requires("root", "command:gcc", "command:busybox"), pytest.mark.timeout(180)]

SOME = [
    "threads",
    "memory",
    "signals",
    "sessions",
    "blocked",
    "rseq",
    "busy",
    "paging",
    "memfd",
    "late",
    "sharing",
    "spaces",
]


def saved(play: Stage, tmp: Path) -> tuple[Container, Path]:
    first = play.start()
    first.verify()
    first.checkpoint(tmp / "image")
    return first, tmp / "image"


@pytest.mark.parametrize("name", SOME)
def test_background_restore(name: str, stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage(name)
    first, image = saved(play, tmp)
    second = play.successor(first)
    second.restore_from(image, "--background")
    second.verify()
    torpor("wait", "--restore", second.id)
    second.verify()
    second.checkpoint(tmp / "again")
    third = play.successor(second)
    third.restore_from(tmp / "again", "--background")
    # A checkpoint waits for the memory that it is to save.
    third.checkpoint(tmp / "third", "--leave-running")
    third.verify()


@pytest.mark.parametrize("name", SOME)
def test_background_capture_leaves_no_trace(name: str, stage: Callable[[str], Stage], tmp: Path) -> None:
    play = stage(name)
    c = play.start()
    for i in range(3):
        before = sorted(c.host_pids())
        c.checkpoint(tmp / f"image{i}", "--leave-running")
        assert sorted(c.host_pids()) == before
        # Some programs replace their children when they look after them.
        c.verify()
    zombies = [p for p in procs.descendants(c.pid) if p.state == "Z"]
    expected = 2 if name == "sessions" else 0
    assert len(zombies) == expected, f"a twin was left: {zombies}"


def test_capture_stop_reads_while_the_container_stands_still(stage: Callable[[str], Stage], tmp: Path) -> None:
    play = stage("paging")
    c = play.start()
    c.checkpoint(tmp / "image", "--leave-running", "--capture=stop")
    c.verify()
    again = play.successor(c)
    again.restore_from(tmp / "image")
    again.verify()


def test_images_taken_while_memory_is_written_are_of_one_instant(stage: Callable[[str], Stage], tmp: Path) -> None:
    """A busy program's threads compute all the time; what is restored goes on without a wrong result."""
    play = stage("busy")
    c = play.start()
    for i in range(5):
        c.checkpoint(tmp / f"image{i}", "--leave-running")
        time.sleep(0.05)
    c.verify()
    c.delete()
    for i in range(5):
        again = play.successor(c)
        again.restore_from(tmp / f"image{i}")
        again.verify()
        again.delete()
