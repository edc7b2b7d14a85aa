"""The pager of a background restore: what it brings, in which order, and what becomes of a program when it cannot."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import procs
from support.cli import Container, Torpor
from support.workloads import Stage

pytestmark = [pytest.mark.requires("root", "command:gcc", "command:busybox"), pytest.mark.timeout(180)]

# Nothing is brought but what is touched, until the container has ended.
ONLY_FAULTS = {"TORPOR_FAILPOINT": "page:hang"}
PROGRAMS = ["paging", "late"]


def pager(torpor: Torpor, c: Container) -> int:
    """The pid of the process that brings a container's memory."""
    note = json.loads((torpor.root / c.id / "pager.json").read_text())
    return int(note["pid"])


def report(torpor: Torpor, c: Container) -> dict[str, Any]:
    torpor("wait", "--restore", c.id)
    found: dict[str, Any] = json.loads((torpor.root / c.id / "paged-in.json").read_text())
    return found


def saved(play: Stage, tmp: Path) -> tuple[Container, Path]:
    first = play.start()
    first.verify()
    first.checkpoint(tmp / "image")
    return first, tmp / "image"


@pytest.mark.parametrize("name", PROGRAMS)
def test_every_page_is_brought_when_it_is_touched(name: str, stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:  # fmt: skip
    """With nobody filling, each touch is a fault: by the program, its children, in memory that was moved or given up."""
    play = stage(name)
    first, image = saved(play, tmp)
    second = play.successor(first)
    second.restore_from(image, "--background", env=ONLY_FAULTS)
    for _ in range(2):
        second.verify()
    assert procs.alive(pager(torpor, second)), "the pager is to hang in this test"
    torpor("kill", second.id, "TERM")
    torpor.wait_status(second.id, "stopped")
    assert report(torpor, second)["faults"] > 10


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_container_ends_with_its_pager_rather_than_find_zeroes(name: str, stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:  # fmt: skip
    play = stage(name)
    first, image = saved(play, tmp)
    second = play.successor(first)
    second.restore_from(image, "--background", env={"TORPOR_FAILPOINT": "page:kill"})
    torpor.wait_status(second.id, "stopped")
    assert "FAIL" not in second.text()


def test_a_child_ends_with_the_pager_too(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    """A child made meanwhile has a descriptor that came to the pager later: its end must not give the child zeroes."""
    play = stage("paging")
    first, image = saved(play, tmp)
    second = play.successor(first)
    second.restore_from(image, "--background", env=ONLY_FAULTS)
    torpor("kill", second.id, "USR1")
    procs.wait_until("a child", lambda: len(second.host_pids()) > 1)
    os.kill(pager(torpor, second), 9)
    torpor.wait_status(second.id, "stopped")
    assert "FAIL" not in second.text()


def damage(path: Path) -> None:
    with open(path, "r+b") as f:
        f.seek(path.stat().st_size // 2)
        byte = f.read(1)
        f.seek(-1, os.SEEK_CUR)
        f.write(bytes([byte[0] ^ 1]))


def ends_without_a_wrong_byte(torpor: Torpor, c: Container) -> None:
    torpor("kill", c.id, "USR1", check=False)
    torpor.wait_status(c.id, "stopped")
    assert "OK" not in c.text(), "it read bytes that were not there"
    assert "FAIL" not in c.text(), "it read other bytes"


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_damaged_page_is_a_sigbus_and_an_error(name: str, stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:  # fmt: skip
    play = stage(name)
    first, image = saved(play, tmp)
    damage(image / "checkpoint.img")
    second = play.successor(first)
    second.restore_from(image, "--background")
    torpor.fails("wait", "--restore", second.id, says=["lost", "wrong checksum"])
    # nor is it saved
    torpor.fails("checkpoint", "--image-path", tmp / "again", "--leave-running", second.id, says="lost")
    ends_without_a_wrong_byte(torpor, second)


def test_reads_that_fail_are_a_sigbus_and_an_error(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("paging")
    first, image = saved(play, tmp)
    second = play.successor(first)
    second.restore_from(image, "--background", env={"TORPOR_FAILPOINT": "page:error"})
    torpor.fails("wait", "--restore", second.id, says=["lost", "failpoint"])
    ends_without_a_wrong_byte(torpor, second)


def test_an_image_that_is_cut_off_meanwhile(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("paging")
    first, image = saved(play, tmp)
    second = play.successor(first)
    second.restore_from(image, "--background", env=ONLY_FAULTS)
    os.truncate(image / "checkpoint.img", 4096)
    ends_without_a_wrong_byte(torpor, second)
    torpor.fails("wait", "--restore", second.id, says=["lost", "shorter"])


def test_an_image_that_is_removed_meanwhile(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    """Its file stays open: nothing is lost."""
    play = stage("late")
    first, image = saved(play, tmp)
    second = play.successor(first)
    second.restore_from(image, "--background", env=ONLY_FAULTS)
    shutil.rmtree(image)
    second.verify()
    torpor("kill", second.id, "TERM")
    torpor.wait_status(second.id, "stopped")
    assert report(torpor, second)["error"] == ""


def test_several_restores_from_one_image_at_once(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("late")
    first, image = saved(play, tmp)
    clones = [play.successor(first) for _ in range(4)]
    commands = []
    for c in clones:
        words = ["restore", "--detach", "--background", "--image-path", image, "--bundle", c.bundle, c.id]
        with open(c.output, "ab") as out:
            commands.append(torpor.popen(*words, stdin=-3, stdout=out, stderr=-2))
    for c, command in zip(clones, commands, strict=True):
        code = command.wait(60)
        procs.claimed.discard(command.pid)
        assert code == 0, c.text()
    for c in clones:
        c.verify()
    for c in clones:
        assert report(torpor, c)["error"] == ""
        c.verify()


@pytest.mark.parametrize("flags", [["--leave-running"], ["--leave-running", "--capture=stop"], []])
def test_a_checkpoint_taken_while_memory_is_brought(flags: list[str], stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:  # fmt: skip
    play = stage("late")
    first, image = saved(play, tmp)
    second = play.successor(first)
    second.restore_from(image, "--background")
    second.checkpoint(tmp / "again", *flags)
    if flags:
        second.verify()
    third = play.successor(first)
    third.restore_from(tmp / "again")
    third.verify()


# ---- the working set
# ------------------------------------------------------------------------------------------------------------------------


def test_what_was_touched_first_is_brought_first(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("late")
    first, image = saved(play, tmp)
    second = play.successor(first)
    second.restore_from(image, "--background", "--record-working-set")
    second.verify()
    recorded = report(torpor, second)
    note = json.loads((image / "checkpoint.working-set").read_text())
    assert recorded["recorded"] == len(note["pages"]) > 4
    assert recorded["prefetched"] == 0
    second.delete()

    # an order that nobody else would choose, to see that it is this file that decides
    note["pages"].reverse()
    (image / "checkpoint.working-set").write_text(json.dumps(note))
    third = play.successor(first)
    third.restore_from(image, "--background")
    brought = report(torpor, third)
    third.verify()
    early, order = note["pages"], brought["first"]
    # some may be waited for before their turn
    assert 0 < brought["prefetched"] <= len(early)
    assert brought["prefetched"] + brought["faults"] >= len(early)
    positions = [early.index(page) for page in order if page in early]
    assert positions == sorted(positions) and len(positions) == min(brought["prefetched"], len(order))
    assert all(page in early for page in order[: len(positions)]), "something else came before the working set"


def test_a_working_set_of_another_image_is_not_used(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("paging")
    first, image = saved(play, tmp)
    (image / "checkpoint.working-set").write_text(json.dumps({"image": "0" * 32, "pages": [[0, 4096]] * 9}))
    second = play.successor(first)
    second.restore_from(image, "--background")
    assert report(torpor, second)["prefetched"] == 0
    second.verify()


@pytest.mark.parametrize(
    "content", ["", "no json", '{"image": 1}', '{"image": "DIGEST", "pages": [[7, 1], [0, 18446744073709551615]]}']
)
def test_a_working_set_that_makes_no_sense_does_no_harm(content: str, stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:  # fmt: skip
    play = stage("paging")
    first, image = saved(play, tmp)
    digest = json.loads(torpor("inspect", "--json", image).out)["digest"]
    (image / "checkpoint.working-set").write_text(content.replace("DIGEST", digest))
    second = play.successor(first)
    second.restore_from(image, "--background")
    assert report(torpor, second)["error"] == ""
    second.verify()


def test_recording_needs_a_background_restore(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("pipes")
    first, image = saved(play, tmp)
    c = play.successor(first)
    torpor.fails("restore", "--detach", "--record-working-set", "--image-path", image, "--bundle", c.bundle, c.id, says="--background")  # fmt: skip
    assert c.id not in torpor.ids()


# ---- huge pages
# -----------------------------------------------------------------------------------------------------------------------------


def huge_bytes(c: Container) -> int:
    sizes = re.findall(r"^AnonHugePages:\s+(\d+) kB$", Path(f"/proc/{c.pid}/smaps").read_text(), re.M)
    return sum(map(int, sizes)) * 1024


@pytest.mark.skipif(
    "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text(), reason="no huge pages on this machine"
)
@pytest.mark.parametrize("flags", [["--background"], []])
def test_huge_pages_are_huge_again(flags: list[str], stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("late")
    first = play.start()
    before = huge_bytes(first)
    if before < 4 << 20:
        pytest.skip(f"the kernel gave the program only {before} bytes of huge pages")
    first.checkpoint(tmp / "image")
    second = play.successor(first)
    second.restore_from(tmp / "image", *flags)
    if flags:
        assert report(torpor, second)["huge"] > 0
    assert huge_bytes(second) >= before // 2, "memory of huge pages came back in small ones"
    second.verify()
