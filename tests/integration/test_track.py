"""Incremental checkpoints: an image that holds what has changed since its parent, found by tracking or by comparing."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torpor as api
from support import procs
from support.cli import Container, Torpor
from support.workloads import Stage

pytestmark = [pytest.mark.requires("root", "track-writes", "command:gcc", "command:busybox"), pytest.mark.timeout(180)]

AWAY = "all of their memory was compared"


def tracker(torpor: Torpor, c: Container) -> int:
    """The pid of the process that holds the tracking of a container."""
    pid = int(json.loads((torpor.root / c.id / "tracker.json").read_text())["pid"])
    # It was the tracer until its command had its answer.
    procs.wait_until("the tracker", lambda: Path(f"/proc/{pid}/comm").read_text() == "torpor-tracker\n")
    return pid


def size(image: Path) -> int:
    return (image / "checkpoint.img").stat().st_size


def restored(play: Stage, of: Container, image: Path, *flags: str) -> Container:
    of.delete()
    c = play.successor(of)
    c.restore_from(image, *flags)
    return c


def test_a_chain_holds_the_memory_of_each_time(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    """The workload changes its memory in every way that could be missed, after each of four checkpoints."""
    play = stage("tracked")
    c = play.start()
    fds = [sorted(os.listdir(f"/proc/{pid}/fd")) for pid in c.host_pids()]
    c.checkpoint(tmp / "0", "--leave-running", "--track")
    first = tracker(torpor, c)
    assert [sorted(os.listdir(f"/proc/{pid}/fd")) for pid in c.host_pids()] == fds
    c.verify()
    c.verify()
    done = c.checkpoint(tmp / "1", "--leave-running", "--track", "--parent-path", "../0")
    # The memory of one of them was replaced by execve(2) or came by fork(2) since: that is said.
    assert AWAY not in done.err
    assert not procs.alive(first)
    c.verify()  # the third round, which makes new children
    second = tracker(torpor, c)
    done = c.checkpoint(tmp / "2", "--leave-running", "--track", "--parent-path", "../1", "--capture", "background")
    assert "2 of 3 processes were not tracked" in done.err
    assert not procs.alive(second)
    c.verify()
    c.checkpoint(tmp / "3", "--parent-path", "../2")
    procs.wait_until("the tracker to end", lambda: not procs.alive(second))
    # The second holds all of the new children.
    assert all(size(tmp / str(i)) < size(tmp / "0") / 2 for i in (1, 3))
    for i in (3, 2, 1, 0):
        c = restored(play, c, tmp / str(i))
        c.verify()
        c.verify()


def test_memory_in_common_is_one(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    """Five tasks use one address space and one has a copy of it: it is stored, tracked and brought back once."""
    play = stage("spaces")
    c = play.start()
    c.checkpoint(tmp / "0", "--leave-running", "--track", "--capture=background")
    assert size(tmp / "0") < 60 << 20
    c.verify()
    done = c.checkpoint(tmp / "1", "--parent-path", "../0")
    assert AWAY not in done.err
    assert size(tmp / "1") < 4 << 20
    c.delete()
    c = play.successor(c)
    done = c.restore_from(tmp / "1", "--track")
    assert "monotonic" not in done.err and "not tracked" not in done.err
    c.verify()
    c.checkpoint(tmp / "2", "--parent-path", "../1")
    assert size(tmp / "2") < 4 << 20
    c = restored(play, c, tmp / "2", "--background")
    c.verify()
    torpor("wait", "--restore", c.id)
    c.verify()


def test_without_tracking_all_memory_is_compared(stage: Callable[[str], Stage], tmp: Path) -> None:
    play = stage("tracked")
    c = play.start()
    c.checkpoint(tmp / "0", "--leave-running")
    c.verify()
    done = c.checkpoint(tmp / "1", "--leave-running", "--parent-path", "../0")
    assert "3 of 3 processes were not tracked" in done.err
    c.verify()
    done = c.checkpoint(tmp / "2", "--parent-path", "../1", "--capture", "stop")
    assert "3 of 3 processes were not tracked" in done.err
    assert all(size(tmp / str(i)) < size(tmp / "0") / 2 for i in (1, 2))
    for i in (2, 1):
        c = restored(play, c, tmp / str(i))
        c.verify()


@pytest.mark.parametrize("flags", [(), ("--track",)])
def test_a_pre_dump_is_a_parent_and_no_more(
    flags: tuple[str, ...], stage: Callable[[str], Stage], tmp: Path, torpor: Torpor
) -> None:
    play = stage("tracked")
    c = play.start()
    pid = c.pid
    c.checkpoint(tmp / "pre", "--pre-dump", *flags)
    assert c.status == "running" and c.pid == pid
    c.verify()
    done = c.checkpoint(tmp / "last", "--parent-path", "../pre")
    assert AWAY not in done.err
    assert size(tmp / "last") < size(tmp / "pre") / 2
    c.delete()
    again = play.successor(c)
    assert json.loads(torpor("inspect", "--json", tmp / "pre").out)["memory_only"]
    failed = again.restore_from(tmp / "pre", check=False)
    assert "it holds only memory (checkpoint --pre-dump)" in failed.err
    assert torpor.ids() == []
    again.restore_from(tmp / "last")
    again.verify()


def test_a_killed_tracker_harms_nothing(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("tracked")
    c = play.start()
    c.checkpoint(tmp / "0", "--leave-running", "--track")
    os.kill(tracker(torpor, c), 9)
    c.verify()
    done = c.checkpoint(tmp / "1", "--parent-path", "../0")
    assert "3 of 3 processes were not tracked" in done.err
    c = restored(play, c, tmp / "1")
    c.verify()


def test_tracking_goes_on_after_a_restore(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("tracked")
    c = play.start()
    c.verify()
    c.checkpoint(tmp / "0")
    c = restored(play, c, tmp / "0", "--track")
    tracker(torpor, c)
    c.verify()
    done = c.checkpoint(tmp / "1", "--parent-path", "../0")
    assert AWAY not in done.err
    assert size(tmp / "1") < size(tmp / "0") / 2
    for i in (1, 0):
        c = restored(play, c, tmp / str(i))
        c.verify()
        c.verify()


def test_another_parent_than_the_tracked_one_is_compared(stage: Callable[[str], Stage], tmp: Path) -> None:
    play = stage("tracked")
    c = play.start()
    c.checkpoint(tmp / "0", "--leave-running", "--track")
    c.verify()
    c.checkpoint(tmp / "1", "--leave-running", "--track")
    c.verify()
    done = c.checkpoint(tmp / "2", "--parent-path", "../0")
    assert "3 of 3 processes were not tracked" in done.err
    c = restored(play, c, tmp / "2")
    c.verify()


@pytest.mark.parametrize("point", ["capture:kill", "capture:error", "finish:error"])
def test_a_tracking_checkpoint_that_fails_harms_nothing(
    point: str, stage: Callable[[str], Stage], tmp: Path, torpor: Torpor
) -> None:
    """Pages were protected for an image that there never was: that must not be taken for the one before."""
    play = stage("tracked")
    c = play.start()
    c.checkpoint(tmp / "0", "--leave-running", "--track")
    c.verify()
    flags = ("--leave-running", "--track", "--parent-path", "../0")
    assert c.checkpoint(tmp / "1", *flags, check=False, env={"TORPOR_FAILPOINT": point}).code != 0
    assert not (tmp / "1").exists()
    c.verify()
    done = c.checkpoint(tmp / "2", "--parent-path", "../0")
    assert "3 of 3 processes were not tracked" in done.err
    c = restored(play, c, tmp / "2")
    c.verify()


def test_what_cannot_be_a_parent_is_refused(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    c = stage("tracked").start()
    for parent, says in (("../nothing", "checkpoint.img"), (str(tmp), "relative")):
        failed = c.checkpoint(tmp / "1", "--parent-path", parent, check=False)
        assert failed.code != 0 and says in failed.err
    failed = c.checkpoint(tmp / "1", "--track", check=False)
    assert "--track is of use only for a container that goes on" in failed.err
    failed = c.restore_from(tmp / "1", "--track", "--background", check=False)
    assert "--track is not supported with --background" in failed.err
    assert not (tmp / "1").exists()
    c.verify()


def test_the_python_api(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("tracked")
    c = play.start()
    found = api.Container.load(c.id, root=str(torpor.root))
    first = found.checkpoint(str(tmp / "0"), leave_running=True, track=True)
    assert first.inherited_bytes == 0
    c.verify()
    second = found.checkpoint(str(tmp / "1"), parent_path="../0")
    assert second.inherited_bytes > second.bytes
    assert second.warnings == []
    c = restored(play, c, tmp / "1")
    c.verify()


def test_flags_that_change_between_the_look_and_the_stop(stage: Callable[[str], Stage], tmp: Path) -> None:
    """The flags of mappings are read before the container stops. The program changes them, and maps others in their place, all the
    time; each image has those of its own instant."""
    play = stage("flags")
    c = play.start()
    c.checkpoint(tmp / "0", "--leave-running", "--track")
    for i in range(1, 6):
        c.checkpoint(tmp / str(i), "--leave-running", "--track", "--parent-path", f"../{i - 1}")
    c.verify()
    for i in range(6):
        c = restored(play, c, tmp / str(i))
        c.verify()
