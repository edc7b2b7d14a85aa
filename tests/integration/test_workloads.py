"""Every workload through every way of checkpoint and restore. Each one checks itself: see tests/workloads/."""

import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import procdiff, procs
from support.cli import Container, Torpor
from support.workloads import WORKLOADS, Redis, Stage

pytestmark = [pytest.mark.requires("root", "command:gcc", "command:busybox"), pytest.mark.timeout(300)]

ALL = [pytest.param(w.name, marks=pytest.mark.requires(*w.needs) if w.needs else ()) for w in WORKLOADS.values()]


def is_gone(pids: list[int]) -> None:
    procs.wait_until("the processes to be gone", lambda: not any(procs.alive(p) for p in pids))


def checkpoint_and_stop(c: Container, image: Path) -> None:
    pids = c.host_pids()
    c.checkpoint(image)
    assert [p.name for p in image.iterdir()] == ["checkpoint.img"]
    assert c.status == "stopped"
    is_gone(pids)


@pytest.mark.parametrize("name", ALL)
def test_checkpoint_restore_and_again(name: str, stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    """Checkpoint, restore, checkpoint the restored one, restore again; then the first image a second time."""
    play = stage(name)
    first = play.start()
    first.verify()
    inner = inner_pids(first)
    before = procdiff.snapshot(first.host_pids())
    checkpoint_and_stop(first, tmp / "image1")
    # the files as they are in the moment of the image, for the second restore
    copy = play.copy_root()
    first.delete()

    second = play.successor(first)
    second.restore_from(tmp / "image1")
    assert second.status == "running"
    assert inner_pids(second) == inner
    if not play.workload.restless:
        procdiff.check(before, second.host_pids)
    second.verify()
    second.verify()
    checkpoint_and_stop(second, tmp / "image2")
    second.delete()

    third = play.successor(second)
    third.restore_from(tmp / "image2")
    third.verify()

    # the first image once more, while the third container runs, by runsc's way: create, then restore
    fourth = play.successor(first, copy)
    fourth.create()
    torpor("restore", "--detach", "--image-path", tmp / "image1", fourth.id)
    assert inner_pids(fourth) == inner
    fourth.verify()
    third.verify()


@pytest.mark.parametrize("name", ALL)
def test_leave_running(name: str, stage: Callable[[str], Stage], tmp: Path) -> None:
    """The same processes go on, again and again, and the last image can be restored beside them."""
    play = stage(name)
    c = play.start()
    c.verify()
    pid, start = c.pid, procs.process(c.pid)
    assert start is not None
    rounds = 10 if play.workload.real else 3
    for i in range(rounds):
        before = stable_pids(c)
        image = tmp / f"image{i}"
        c.checkpoint(image, "--leave-running")
        if i < rounds - 1:
            shutil.rmtree(image)
        now = procs.process(c.pid)
        assert c.status == "running" and c.pid == pid and now is not None and now.start == start.start
        assert before <= set(c.host_pids()), "a process is gone"
        if i == rounds - 1:
            copy = play.copy_root()
        c.verify()
    beside = play.successor(c, copy)
    beside.restore_from(tmp / f"image{rounds - 1}")
    beside.verify()
    c.verify()


def inner_pids(c: Container) -> set[tuple[int, str]]:
    """The pids as the container has them, of the processes that do not come and go."""
    found = set()
    for pid in c.host_pids():
        p = procs.process(pid)
        try:
            status = Path(f"/proc/{pid}/status").read_text()
        except OSError:
            continue
        inner = int(next(line for line in status.splitlines() if line.startswith("NSpid:")).split()[-1])
        # the shells sleep in processes of their own
        if p is not None and p.comm not in ("sleep", "mv"):
            found.add((inner, p.comm))
    return found


def stable_pids(c: Container) -> set[int]:
    return {
        pid
        for pid in c.host_pids()
        if (p := procs.process(pid)) is not None and p.comm not in ("sleep", "mv", "sh", "cat")
    }


# ---- what is particular to some of them -----------------------------------------------------------------------------------------------


@pytest.mark.requires("command:redis-server")
def test_redis_saves_after_a_restore(stage: Callable[[str], Stage], tmp: Path) -> None:
    play = stage("redis")
    c = play.start()
    assert isinstance(c, Redis)
    checkpoint_and_stop(c, tmp / "image")
    c.delete()
    again = play.successor(c)
    again.restore_from(tmp / "image")
    assert isinstance(again, Redis)
    again.verify()
    again.bgsave()
    again.verify()


@pytest.mark.requires("command:redis-server")
@pytest.mark.parametrize("leave_running", [False, True])
def test_redis_while_a_bgsave_child_exists(stage: Callable[[str], Stage], tmp: Path, leave_running: bool) -> None:
    """The child shares all memory with its parent by copy-on-write, and reports through a pipe."""
    play = stage("redis")
    c = play.start()
    assert isinstance(c, Redis)
    c.ask("CONFIG", "SET", "rdb-key-save-delay", 60)  # microseconds a key: some six seconds in all
    c.ask("BGSAVE")
    assert c.saving()
    c._settled()
    assert len(c.host_pids()) == 2
    if leave_running:
        c.checkpoint(tmp / "image", "--leave-running")
        again = c
    else:
        checkpoint_and_stop(c, tmp / "image")
        c.delete()
        restored = play.successor(c)
        restored.restore_from(tmp / "image")
        assert isinstance(restored, Redis)
        again = restored
    assert len(again.host_pids()) == 2, "the child is gone"
    again.verify()
    procs.wait_until("the child to end", lambda: not again.saving(), 60)
    assert "rdb_last_bgsave_status:ok" in again.ask("INFO", "persistence").decode()
    assert (again.bundle / "rootfs" / "wl" / "dump.rdb").stat().st_size > 1_000_000
    again._settled()
    again.verify()


def test_the_counter_goes_on_where_it_was(stage: Callable[[str], Stage], tmp: Path) -> None:
    play = stage("counter")
    c = play.start()
    procs.wait_until("some counting", lambda: int(c.verify().split()[1]) >= 10)
    checkpoint_and_stop(c, tmp / "image")
    stopped_at = int((c.bundle / "rootfs" / "wl" / "count").read_text())
    c.delete()
    again = play.successor(c)
    again.restore_from(tmp / "image")
    count = int(again.verify().split()[1])
    assert stopped_at - 1 <= count <= stopped_at + 20, "it began anew, or the time it slept was counted"


@pytest.mark.requires("time-namespace")
def test_the_clocks_rest_while_it_does_not_exist(stage: Callable[[str], Stage], tmp: Path) -> None:
    """Twice, since the second image is made in a time namespace."""
    play = stage("clocks")
    c = play.start()
    c.verify()
    for i in range(2):
        before = shown(c)
        checkpoint_and_stop(c, tmp / f"image{i}")
        c.delete()
        asleep = 1.5
        time.sleep(asleep)
        c = play.successor(c)
        result = c.restore_from(tmp / f"image{i}")
        assert "monotonic" not in result.err
        c.verify()
        real, monotonic, boottime = (b - a for a, b in zip(before, shown(c), strict=True))
        assert 0 < monotonic <= real - asleep and 0 < boottime <= real - asleep, (real, monotonic, boottime)
    inside = c.torpor("exec", c.id, "cat", "/proc/uptime").out.split()[0]
    assert abs(float(inside) - shown(c)[2]) < asleep, "a process of exec has the same clocks"


def shown(c: Container) -> list[float]:
    """What the clocks workload has seen at last: CLOCK_REALTIME, CLOCK_MONOTONIC, CLOCK_BOOTTIME, in seconds."""
    return [float(word) for word in (c.bundle / "rootfs" / "clocks").read_text().split()]


@pytest.mark.timeout(600)
def test_busy_program_survives_many_checkpoints(stage: Callable[[str], Stage], tmp: Path) -> None:
    """200 times frozen at whatever instruction it was in, of AVX arithmetic or of a clock call in the vdso."""
    c = stage("busy").start()
    for i in range(200):
        image = tmp / "image"
        c.checkpoint(image, "--leave-running")
        shutil.rmtree(image)
        if i % 20 == 19:
            c.verify()


@pytest.mark.timeout(600)
def test_busy_program_survives_many_restores(stage: Callable[[str], Stage], tmp: Path) -> None:
    play = stage("busy")
    c = play.start()
    for i in range(20):
        image = tmp / f"image{i}"
        c.checkpoint(image)
        c.delete()
        c = play.successor(c)
        c.restore_from(image)
        shutil.rmtree(image)
        c.verify()
