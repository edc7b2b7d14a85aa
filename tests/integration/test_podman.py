"""Podman, by conmon, drives torpor as it drives runc, with torpor's stand-in for criu."""

import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import procs
from support.daemons import Failed
from support.podman import Podman

pytestmark = [
    pytest.mark.requires(
        "root", "command:podman", "command:conmon", "command:ip", "command:busybox", "command:unshare"
    ),
    pytest.mark.timeout(150),
]


@pytest.fixture(scope="session")
def engine() -> Iterator[Podman]:
    started = Podman()
    yield started
    started.stop()


@pytest.fixture
def podman(engine: Podman, leak_check: None) -> Iterator[Podman]:
    yield engine
    engine.clean_up()


ALONE = ("--network", "none")


def test_run(podman: Podman) -> None:
    assert podman("run", "--rm", *ALONE, *podman.flags, "box", "echo", "hello") == "hello"
    done = podman.run(podman.argv("run", "--rm", *ALONE, *podman.flags, "box", "sh", "-c", "exit 7"), check=False)
    assert done.returncode == 7
    done = podman.fails("run", "--rm", *ALONE, *podman.flags, "box", "nosuch", says="executable file not found")
    assert done.returncode == 127
    assert podman("run", "--rm", "-t", *ALONE, *podman.flags, "box", "tty") == "/dev/pts/0"


def test_life(podman: Podman) -> None:
    podman.container("cc", *ALONE, "box", "counter")
    podman.wait_log("cc", 2)
    assert podman("exec", "cc", "echo", "inside") == "inside"
    assert podman.run(podman.argv("exec", "cc", "sh", "-c", "exit 3"), check=False).returncode == 3
    assert "counter" in podman("top", "cc")
    assert podman("stats", "--no-stream", "--format", "{{.Name}}", "cc") == "cc"
    podman("pause", "cc")
    assert podman("inspect", "--format", "{{.State.Status}}", "cc") == "paused"
    podman("unpause", "cc")
    podman("update", "--memory", "64m", "cc")
    pid = int(podman("inspect", "--format", "{{.State.Pid}}", "cc"))
    from torpor.cgroups import Cgroup

    assert Cgroup(pid).number("memory.limit_in_bytes", "memory.max") == 64 << 20
    podman("stop", "-t", "5", "cc")
    assert podman("inspect", "--format", "{{.State.ExitCode}}", "cc") == "0"
    podman("start", "cc")
    podman("kill", "cc")
    procs.wait_until("the end", lambda: podman("inspect", "--format", "{{.State.Status}}", "cc") == "exited")


def test_checkpoint_and_restore(podman: Podman) -> None:
    podman.container("cc", *ALONE, "box", "counter")
    for _ in range(2):
        lines = len(podman.wait_log("cc", 3))
        podman("container", "checkpoint", "cc")
        assert podman("inspect", "--format", "{{.State.Status}}", "cc") == "exited"
        podman("container", "restore", "cc")
        found = podman.wait_log("cc", lines + 3)
        assert found == [str(n) for n in range(1, len(found) + 1)], "it went on where it was"


def test_leave_running_again_and_again(podman: Podman) -> None:
    podman.container("cc", *ALONE, "box", "counter")
    for _ in range(3):
        lines = len(podman.wait_log("cc", 2))
        podman("container", "checkpoint", "--leave-running", "cc")
        assert podman("inspect", "--format", "{{.State.Status}}", "cc") == "running"
        podman.wait_log("cc", lines)


def test_the_options_that_ask_for_permission(podman: Podman) -> None:
    podman.container("cc", *ALONE, "box", "counter")
    podman.wait_log("cc", 2)
    stats = podman("container", "checkpoint", "--keep", "--print-stats", "--file-locks", "--tcp-established", "cc")
    assert "frozen_time" in stats
    assert (podman.userdata("cc") / "dump.log").exists()
    podman("container", "restore", "--keep", "--file-locks", "--tcp-established", "cc")
    podman.wait_log("cc", 2)


def test_export_and_import_under_other_names(podman: Podman, tmp: Path) -> None:
    podman.container("cc", *ALONE, "box", "sh", "-c", "echo kept > /file; exec counter")
    podman.wait_log("cc", 3)
    archive = tmp / "checkpoint.tar"
    podman("container", "checkpoint", "--export", str(archive), "--compress", "none", "cc")
    with tarfile.open(archive) as tar:
        names = tar.getnames()
    assert {
        "checkpoint/checkpoint.img",
        "checkpoint/inventory.img",
        "config.dump",
        "spec.dump",
        "rootfs-diff.tar",
    } <= set(names)
    podman("rm", "cc")
    for name in ("one", "two"):
        podman("container", "restore", "--import", str(archive), "--name", name)
        podman.wait_log(name, 4)
        assert podman("exec", name, "cat", "/file") == "kept"


def test_published_port(podman: Podman) -> None:
    podman.container("cc", "-p", "8090:80", "box", "web")

    def answer() -> list[str]:
        try:
            return podman.fetch("http://127.0.0.1:8090/").split()
        except Failed:
            return []

    count = int(procs.wait_until("an answer", answer)[1])
    podman("container", "checkpoint", "cc")
    podman("container", "restore", "cc")
    assert int(procs.wait_until("an answer", answer)[1]) >= count


def test_pre_checkpoint_and_with_previous(podman: Podman, tmp: Path) -> None:
    """The one holds the memory, the other what has changed since; together, in one go or by two archives, they wake up."""
    podman.container("cc", *ALONE, "box", "counter")
    for _ in range(2):
        podman.wait_log("cc", 2)
        podman("container", "checkpoint", "--pre-checkpoint", "cc")
        assert podman("inspect", "--format", "{{.State.Status}}", "cc") == "running"
        lines = len(podman.wait_log("cc"))
        podman("container", "checkpoint", "--with-previous", "cc")
        podman("container", "restore", "cc")
        found = podman.wait_log("cc", lines + 2)
        assert found == [str(n) for n in range(1, len(found) + 1)], "it went on where it was"
    before, after = tmp / "before.tar", tmp / "after.tar"
    podman("container", "checkpoint", "--pre-checkpoint", "--export", str(before), "--compress", "none", "cc")
    lines = len(podman.wait_log("cc"))
    podman("container", "checkpoint", "--with-previous", "--export", str(after), "--compress", "none", "cc")
    podman("rm", "cc")
    podman("container", "restore", "--import-previous", str(before), "--import", str(after), "--name", "one")
    found = podman.wait_log("one", lines + 2)
    assert found == [str(n) for n in range(1, len(found) + 1)], "Podman brings the log along"


def test_new_containers_from_an_image_by_annotation(podman: Podman, tmp: Path) -> None:
    podman.container("cc", *ALONE, "box", "counter")
    podman.wait_log("cc", 5)
    podman("container", "checkpoint", "--keep", "cc")
    shutil.copytree(podman.userdata("cc") / "checkpoint", podman.warm / "one")
    for n in range(2):
        podman.container(f"new{n}", *ALONE, "--annotation", "dev.torpor.restore=one", "-e", f"MY={n}", "box", "counter")
    for n in range(2):
        assert int(podman.wait_log(f"new{n}")[0]) > 5, "it did not begin at 1"
        assert f"MY={n}" in podman("exec", f"new{n}", "cat", "/run/torpor/environ").split("\0")
    podman.fails(
        "run",
        "--rm",
        *ALONE,
        *podman.flags,
        "--annotation",
        "dev.torpor.restore=../one",
        "box",
        "counter",
        says="cannot be a path",
    )
