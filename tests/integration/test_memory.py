"""What is particular to memory: how much of it there is in the image and after a restore."""

from collections.abc import Callable
from pathlib import Path

import pytest
from support.cli import Container, Torpor
from support.workloads import Stage

pytestmark = [pytest.mark.requires("root", "command:gcc", "command:busybox"), pytest.mark.timeout(120)]

MIB = 1 << 20


def pss(c: Container) -> int:
    """The memory that all processes of a container need together, in bytes."""
    texts = [Path(f"/proc/{pid}/smaps_rollup").read_text() for pid in c.host_pids()]
    return sum(int(line.split()[1]) << 10 for text in texts for line in text.splitlines() if line.startswith("Pss:"))


@pytest.mark.parametrize("capture", ["stop", "background"])
def test_what_forked_workers_share_is_stored_once_and_shared_again(
    stage: Callable[[str], Stage], tmp: Path, torpor: Torpor, capture: str
) -> None:
    """Ten processes of 24 MiB each that were forked from each other: 240 MiB if each were on its own."""
    play = stage("forked")
    c = play.start()
    c.verify()
    before = pss(c)
    assert before < 40 * MIB
    c.checkpoint(tmp / "image", "--leave-running", f"--capture={capture}")
    assert (tmp / "image" / "checkpoint.img").stat().st_size < 32 * MIB
    copy = play.copy_root()
    c.verify()
    torpor("delete", "--force", c.id)
    again = play.successor(c, copy)
    again.restore_from(tmp / "image")
    again.verify()
    assert pss(again) < before + 4 * MIB


def test_what_mappings_have_beside_bytes_comes_with_memory_that_is_brought_later(
    stage: Callable[[str], Stage], tmp: Path
) -> None:
    """Guards, locks and seals are there before the pages are."""
    play = stage("mappings")
    c = play.start()
    c.verify()
    c.checkpoint(tmp / "image")
    c.delete()
    again = play.successor(c)
    again.restore_from(tmp / "image", "--background")
    again.verify()
    again.verify()
