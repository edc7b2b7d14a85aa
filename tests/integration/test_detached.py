"""checkpoint --detach: the command goes when the container runs again. And what a program may do while its twin is read."""

import json
import os
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest
from support import procs
from support.cli import Container, Torpor
from support.workloads import Stage

pytestmark = [pytest.mark.requires("root", "command:gcc", "command:busybox"), pytest.mark.timeout(180)]

DETACH = ("--leave-running", "--detach")


def tracer(torpor: Torpor, c: Container) -> int:
    """The pid of the process that completes a detached checkpoint."""
    return int(json.loads((torpor.root / c.id / "checkpointing.json").read_text())["tracer"])


def test_the_image_is_completed_after_the_command(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("paging")
    c = play.start()
    c.checkpoint(tmp / "image", *DETACH)
    c.verify()
    torpor("wait", "--checkpoint", c.id)
    assert (tmp / "image" / "checkpoint.img").is_file()
    torpor("wait", "--checkpoint", c.id)
    c.delete()
    again = play.successor(c)
    again.restore_from(tmp / "image")
    again.verify()
    # a checkpoint that was waited for has nothing to say afterwards
    again.checkpoint(tmp / "second", "--leave-running")
    torpor("wait", "--checkpoint", again.id)


@pytest.mark.parametrize("at", ["capture", "finish"])
def test_a_failure_is_told_to_who_waits(at: str, stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    c = stage("pipes").start()
    c.checkpoint(tmp / "new" / "image", *DETACH, env={"TORPOR_FAILPOINT": f"{at}:error"})
    for _ in range(2):
        torpor.fails("wait", "--checkpoint", c.id, says="failpoint")
    assert not (tmp / "new").exists(), "directories that were made for the image are left"
    c.verify()
    c.checkpoint(tmp / "new", *DETACH)
    torpor("wait", "--checkpoint", c.id)


def test_a_failure_before_the_container_runs_is_the_commands(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:  # fmt: skip
    c = stage("pipes").start()
    env = {"TORPOR_FAILPOINT": "collect:error"}
    torpor.fails("checkpoint", "--image-path", tmp / "new", *DETACH, c.id, says="failpoint", env=env)
    assert not (tmp / "new").exists()
    torpor("wait", "--checkpoint", c.id)
    c.verify()


def test_the_tracer_is_killed_when_nobody_waits(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    c = stage("alone").start()
    before = sorted(c.host_pids())
    c.checkpoint(tmp / "image", *DETACH, env={"TORPOR_FAILPOINT": "capture:hang"})
    os.kill(tracer(torpor, c), signal.SIGKILL)
    torpor.fails("wait", "--checkpoint", c.id, says="killed")
    assert not (tmp / "image" / "checkpoint.img").exists()
    assert sorted(c.host_pids()) == before, "a twin is left"
    c.verify()
    c.checkpoint(tmp / "again", "--leave-running")
    c.verify()


def test_what_does_not_go_together_is_refused(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    c = stage("pipes").start()
    torpor.fails("checkpoint", "--image-path", tmp / "image", "--detach", c.id, says="--leave-running")
    torpor.fails("checkpoint", "--image-path", tmp / "image", *DETACH, "--stats", c.id, says="--stats")
    assert not (tmp / "image").exists()
    c.verify()


def test_from_python(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    import torpor as api

    c = stage("pipes").start()
    container = api.Container.load(c.id, root=str(torpor.root))
    pending = container.checkpoint_detached(str(tmp / "image"))
    assert 0 < pending.pause_seconds < 60
    saved = pending.wait()
    assert saved.path == str(tmp / "image") and saved.bytes == (tmp / "image" / "checkpoint.img").stat().st_size
    c.verify()
    container.checkpoint(str(tmp / "later"), leave_running=True)
    with pytest.raises(api.StateError):
        pending.wait()


def test_stats(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("pipes")
    c = play.start()
    out = c.checkpoint(tmp / "image", "--leave-running", "--stats").out
    rows = dict(re.split(r"\s{2,}", line, maxsplit=1) for line in out.splitlines())
    assert {"freeze", "collect", "capture", "write", "finish", "pause", "pages: data"} <= set(rows)
    assert int(rows["bytes"]) == (tmp / "image" / "checkpoint.img").stat().st_size
    assert 0 < float(rows["pause"].split()[0]) < float(rows["all stages"].split()[0]) + 1
    c.delete()
    again = play.successor(c)
    err = again.restore_from(tmp / "image", "--stats").err
    assert {"read", "plan", "build", "fill", "resume", "bytes"} <= {line.split()[0] for line in err.splitlines()}, err
    again.verify()


# ---- while the twin is read
# ------------------------------------------------------------------------------------------------------------------------------


@contextmanager
def while_twin_is_read(torpor: Torpor, c: Container, tmp: Path) -> Iterator[Path]:
    """The tracer stands still inside, with its twins; the directory of the image that will be."""
    before = len(c.host_pids())
    for number in range(5):
        image = tmp / f"image{number}"
        c.checkpoint(image, *DETACH)
        pid = tracer(torpor, c)
        try:
            os.kill(pid, signal.SIGSTOP)
        except ProcessLookupError:
            continue
        try:
            if len(c.host_pids()) > before and not (image / "checkpoint.img").exists():
                yield image
                return
        finally:
            # it may have been about to end
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)
        torpor("wait", "--checkpoint", c.id)
    pytest.fail("the twin was gone before it could be looked at, five times")


def test_a_program_does_not_notice_its_twin(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("alone")
    c = play.start()

    def seen() -> tuple[str, str]:
        rollup = Path(f"/proc/{c.pid}/smaps_rollup").read_text()
        private = re.search(r"^Private_Dirty:\s+(\d+) kB$", rollup, re.M)
        assert private
        return Path(f"/proc/{c.pid}/maps").read_text(), private[1]

    c.verify()
    maps, private = seen()
    with while_twin_is_read(torpor, c, tmp) as image:
        c.verify()
        c.verify()
    torpor("wait", "--checkpoint", c.id)
    c.verify()
    now = seen()
    assert now[0] == maps
    assert abs(int(now[1]) - int(private)) <= 512, "its memory is still shared with somebody"
    c.delete()
    again = play.successor(c)
    again.restore_from(image)
    again.verify()


def test_a_program_executes_another_while_its_twin_is_read(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:  # fmt: skip
    play = stage("alone")
    c = play.start()
    with while_twin_is_read(torpor, c, tmp) as image:
        torpor("kill", c.id, "USR2")
        assert c.next_line() == "AGAIN"
    torpor("wait", "--checkpoint", c.id)
    assert [p for p in procs.descendants(c.pid) if p.state == "Z"] == []
    c.delete()
    again = play.successor(c)
    again.restore_from(image)
    again.verify()


@pytest.mark.parametrize("how", ["TERM", "KILL", "group"])
def test_a_program_ends_while_its_twin_is_read(how: str, stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:  # fmt: skip
    """The end of init is that of its pid namespace, twins included: there is no image, and it is said."""
    c = stage("alone").start()
    with while_twin_is_read(torpor, c, tmp) as image:
        if how == "group":
            assert os.getpgid(c.pid) == c.pid
            os.killpg(c.pid, signal.SIGKILL)
        else:
            torpor("kill", c.id, how)
    torpor.wait_status(c.id, "stopped")
    torpor.fails("wait", "--checkpoint", c.id)
    assert not (image / "checkpoint.img").exists()


def test_processes_of_the_group_are_killed_while_twins_are_read(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:  # fmt: skip
    """A twin is in a session of its own: what kills the group of its original misses it."""
    play = stage("alone")
    c = play.start()
    c.verify()
    child = next(p.pid for p in procs.descendants(c.pid))
    assert os.getpgid(child) == child and os.getpgid(c.pid) == c.pid
    with while_twin_is_read(torpor, c, tmp) as image:
        os.killpg(c.pid, signal.SIGSTOP)
        os.killpg(c.pid, signal.SIGCONT)
        group = [p.pid for p in procs.descendants(c.pid) if os.getpgid(p.pid) == child]
        assert len(group) == 2
        os.killpg(child, signal.SIGKILL)
        procs.wait_until(
            "the group to die", lambda: all((p := procs.process(pid)) is None or p.state == "Z" for pid in group), 10
        )
    torpor("wait", "--checkpoint", c.id)
    c.delete()
    again = play.successor(c)
    again.restore_from(image)
    again.verify()


def limit_memory(torpor: Torpor, c: Container, room: int) -> None:
    """So much more than it has now."""
    from torpor.cgroups import Cgroup

    cgroup = Cgroup(c.pid)
    used = cgroup.number("memory.usage_in_bytes", "memory.current")
    assert used
    torpor("update", "--memory", str(used + room), c.id)


def test_memory_is_used_up_while_the_twin_is_read(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    """Pages that the program changes meanwhile are there twice: at the limit the twin is killed before anybody else."""
    c = stage("alone").start()
    c.verify()
    before = sorted(c.host_pids())

    def died(pid: int) -> bool:
        return (p := procs.process(pid)) is None or p.state == "Z"

    with while_twin_is_read(torpor, c, tmp) as image:
        twins = set(c.host_pids()) - set(before)
        assert {Path(f"/proc/{pid}/oom_score_adj").read_text() for pid in twins} == {"1000\n"}
        limit_memory(torpor, c, 8 << 20)
        # more than there is; the next after the twin of most memory
        hog = "echo 1000 > /proc/self/oom_score_adj; exec dd if=/dev/zero of=/dev/null bs=64M count=1"
        torpor("exec", c.id, "sh", "-c", hog, check=False)
        procs.wait_until("a twin to be killed", lambda: any(map(died, twins)), 30)
    torpor.fails("wait", "--checkpoint", c.id, says=["copy of its memory", "killed", "--capture=stop"])
    assert not (image / "checkpoint.img").exists()
    assert sorted(c.host_pids()) == before
    c.verify()
    c.checkpoint(tmp / "stop", "--leave-running", "--capture=stop")
    c.verify()


def test_the_limit_of_memory_kills_the_program_while_its_twin_is_read(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:  # fmt: skip
    c = stage("alone").start()
    with while_twin_is_read(torpor, c, tmp) as image:
        limit_memory(torpor, c, 8 << 20)
        # the next after the twins
        Path(f"/proc/{c.pid}/oom_score_adj").write_text("999")
        torpor("exec", c.id, "dd", "if=/dev/zero", "of=/dev/null", "bs=512M", "count=1", check=False)
    torpor.wait_status(c.id, "stopped")
    torpor.fails("wait", "--checkpoint", c.id)
    assert not (image / "checkpoint.img").exists()
