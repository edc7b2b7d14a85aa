"""containerd, by its shim and ctr, drives torpor as it drives runc."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import procs
from support.cli import TORPOR
from support.containerd import IMAGE, Containerd
from support.leaks import RUN_MARK

pytestmark = [
    pytest.mark.requires("root", "command:containerd", "command:ctr", "command:busybox", "command:unshare"),
    pytest.mark.timeout(120),
]


@pytest.fixture(scope="session")
def daemon() -> Iterator[Containerd]:
    started = Containerd()
    yield started
    started.stop()


@pytest.fixture
def ctr(daemon: Containerd, leak_check: None) -> Iterator[Containerd]:
    yield daemon
    daemon.clean_up()


# Counts in a file of its rootfs: ctr's --log-uri needs more than a path, and its FIFOs go away with it.
COUNT = "i=0; while :; do i=$((i+1)); echo $i > /tmp/new; mv /tmp/new /tmp/count; sleep 0.1; done"


def count(ctr: Containerd, name: str) -> int:
    path = Path(f"/proc/{ctr.pid(name)}/root/tmp/count")

    def look() -> str:
        return path.read_text().strip() if path.exists() else ""

    return int(procs.wait_until("a count", look))


def wait_count(ctr: Containerd, name: str, more_than: int) -> int:
    return procs.wait_until(f"more than {more_than}", lambda: (n := count(ctr, name)) > more_than and n)


def test_run(ctr: Containerd) -> None:
    name = f"{RUN_MARK}-run"
    flags = [
        "--rm",
        "--runc-binary",
        str(TORPOR),
        "--runc-root",
        str(ctr.directory / "runc"),
        "--cgroup",
        f"{ctr.cgroup}/{name}",
    ]
    assert ctr("run", *flags, IMAGE, name, "echo", "hello") == "hello"
    done = ctr.run(["ctr", "-a", str(ctr.socket), "run", *flags, IMAGE, name, "sh", "-c", "exit 7"], check=False)
    assert done.returncode == 7


def test_start_from_an_image_by_annotation(ctr: Containerd, tmp_path: Path) -> None:
    """As a pod annotation comes to torpor: in the spec that containerd hands on."""
    images, runtime = tmp_path / "images", tmp_path / "torpor.sh"
    runtime.write_text(f'#!/bin/sh\nexec {TORPOR} --restore-from {images} "$@"\n')
    runtime.chmod(0o755)
    common = ["--runc-binary", str(runtime), "--runc-root", str(ctr.directory / "runc")]
    source, copy = f"{RUN_MARK}-source", f"{RUN_MARK}-copy"
    ctr.start_container(source, "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i > /dev/shm/count; sleep 0.1; done")
    ctr("tasks", "checkpoint", "--image-path", str(images / "warm"), "--work-path", str(tmp_path / "work"), source)
    last = int(Path(f"/proc/{ctr.pid(source)}/root/dev/shm/count").read_text())
    annotation = ["--annotation", "dev.torpor.restore=warm", "--cgroup", f"{ctr.cgroup}/{copy}"]
    ctr("run", "-d", *common, *annotation, IMAGE, copy, "sh")
    shown = Path(f"/proc/{ctr.pid(copy)}/root/dev/shm/count")
    procs.wait_until("the copy to count on", lambda: int(shown.read_text().strip() or 0) > last)
    assert Path(f"/proc/{ctr.pid(copy)}/root/run/torpor/environ").exists()


def test_life(ctr: Containerd) -> None:
    name = f"{RUN_MARK}-life"
    ctr.start_container(name, "sh", "-c", COUNT)
    assert ctr.tasks() == {name: "RUNNING"}
    assert ctr("tasks", "exec", "--exec-id", "one", name, "echo", "inside") == "inside"
    assert str(ctr.pid(name)) in ctr("tasks", "ps", name)
    assert "memory.usage_in_bytes" in ctr("tasks", "metrics", name) or "memory" in ctr("tasks", "metrics", name)
    ctr("tasks", "pause", name)
    assert ctr.tasks() == {name: "PAUSED"}
    before = count(ctr, name)
    ctr("tasks", "resume", name)
    wait_count(ctr, name, before)
    ctr("tasks", "kill", "-s", "KILL", name)
    procs.wait_until("the end", lambda: ctr.tasks()[name] == "STOPPED")


def test_task_checkpoint_to_a_directory(ctr: Containerd, tmp: Path) -> None:
    name = f"{RUN_MARK}-dir"
    ctr.start_container(name, "sh", "-c", COUNT)
    seen = count(ctr, name)
    ctr("tasks", "checkpoint", "--image-path", str(tmp / "image"), "--work-path", str(tmp / "work"), name)
    assert sorted(os.listdir(tmp / "image")) == ["checkpoint.img", "inventory.img"]
    assert "dump.log" in os.listdir(tmp / "work")
    assert ctr.tasks() == {name: "RUNNING"}
    wait_count(ctr, name, seen)


def test_task_checkpoint_that_ends_it(ctr: Containerd) -> None:
    name = f"{RUN_MARK}-exit"
    ctr.start_container(name, "sh", "-c", COUNT)
    count(ctr, name)
    ctr("tasks", "checkpoint", "--exit", name)
    procs.wait_until("the end", lambda: ctr.tasks()[name] == "STOPPED")


def test_checkpoint_and_live_restore(ctr: Containerd) -> None:
    name, reference = f"{RUN_MARK}-live", f"{RUN_MARK}/checkpoint:1"
    ctr.start_container(name, "sh", "-c", COUNT)
    seen = wait_count(ctr, name, 5)
    ctr("containers", "checkpoint", "--image", "--rw", "--task", name, reference)
    assert ctr.tasks() == {name: "RUNNING"}
    wait_count(ctr, name, seen)
    ctr("tasks", "kill", "-s", "KILL", name)
    procs.wait_until("the end", lambda: ctr.tasks()[name] == "STOPPED")
    ctr("tasks", "rm", name)
    ctr("containers", "rm", name)
    again = f"{RUN_MARK}-again"
    with procs.claiming:
        import subprocess

        client = subprocess.Popen(
            ["ctr", "-a", str(ctr.socket), "containers", "restore", "--rw", "--live", again, reference],
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        )  # fmt: skip
        procs.claimed.add(client.pid)
    try:
        procs.wait_until("the restored task", lambda: ctr.tasks().get(again) == "RUNNING")
        assert wait_count(ctr, again, seen) < seen + 200
        ctr("tasks", "kill", "-s", "KILL", again)
    finally:
        client.wait(20)
        procs.claimed.discard(client.pid)
        assert client.stderr is not None
        client.stderr.close()
    ctr("image", "rm", reference)
