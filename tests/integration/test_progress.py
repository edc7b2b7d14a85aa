"""--progress: a bar on a terminal, JSON lines for programs, nothing else; and what a program in Python is told."""

import json
import os
import pty
import re
import signal
import subprocess
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import procs
from support.cli import Container, Torpor
from support.workloads import Stage

pytestmark = [pytest.mark.requires("root", "command:gcc", "command:busybox"), pytest.mark.timeout(120)]

HEAP = 64 << 20


def told(text: str, verb: str) -> dict[str, list[dict[str, Any]]]:
    """Lines of JSON by stage; what ends is under ""."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for line in map(json.loads, text.splitlines()):
        assert line.pop("verb") == verb
        stages.setdefault(line.pop("stage", ""), []).append(line)
    for name, lines in stages.items():
        if name:
            done = [line["bytes"] for line in lines]
            assert done == sorted(done) and done[-1] == lines[-1]["total"], (name, lines)
    assert [end["done"] for end in stages.pop("")] == [True]
    return stages


def on_a_terminal(torpor: Torpor, *args: str | Path) -> tuple[int, str]:
    """The exit code of a command and what it showed."""
    master, slave = pty.openpty()
    process = torpor.popen(*args, stdin=subprocess.DEVNULL, stdout=slave, stderr=slave)
    os.close(slave)
    parts: list[bytes] = []

    def read() -> None:
        try:
            while part := os.read(master, 4096):
                parts.append(part)
        except OSError:
            pass  # the other end is closed: EIO

    reader = threading.Thread(target=read)
    reader.start()
    try:
        code = process.wait(timeout=60)
        reader.join(10)
    finally:
        procs.claimed.discard(process.pid)
        os.close(master)
    return code, b"".join(parts).decode()


def test_for_programs(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    play = stage("paging")
    c = play.start()
    quiet = c.checkpoint(tmp / "quiet", "--leave-running")
    assert quiet.err == quiet.out == "", "nobody asked and nobody looks"
    running = told(c.checkpoint(tmp / "running", "--leave-running", "--progress=json").err, "checkpoint")
    stopped = told(c.checkpoint(tmp / "image", "--progress=json").err, "checkpoint")
    for stages in (running, stopped):
        assert list(stages) == ["capture"] and stages["capture"][-1]["total"] > HEAP
    c.delete()
    again = play.successor(c)
    stages = told(again.restore_from(tmp / "image", "--progress=json").err, "restore")
    assert list(stages) == ["read", "fill"] and min(s[-1]["total"] for s in stages.values()) > HEAP
    again.verify()
    again.delete()
    late = play.successor(c)
    stages = told(late.restore_from(tmp / "image", "--progress=json", "--background").err, "restore")
    assert sum(s[-1]["total"] for s in stages.values()) < HEAP, "what comes later is told of as if it were there"
    late.verify()


def test_a_bar_on_a_terminal(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    c = stage("paging").start()
    command = ("checkpoint", "--leave-running", "--image-path")
    # slow enough to be looked at, on a fast machine too: what takes less than half a second shows no bar
    code, text = on_a_terminal(torpor, *command, tmp / "image", "--compression=zstd:19", c.id)
    assert code == 0
    assert text.endswith("\n") and text.count("\n") == 1, text
    bars = text.rstrip("\r\n").split("\r")[1:]
    shares = [int(re.search(r"^checkpoint capture \[#*-*\] +(\d+) %", bar)[1]) for bar in bars]  # type: ignore[index]
    assert shares == sorted(shares) and shares[-1] == 100 and len(shares) > 2
    assert re.search(r"\[#{24}\] 100 %  \d+ of \d+ MiB, \d+ MiB/s, pause \d+\.\d ms\x1b\[K$", bars[-1]), bars[-1]
    assert on_a_terminal(torpor, *command, tmp / "none", "--progress=none", c.id) == (0, "")
    c.verify()


def test_a_checkpoint_that_is_not_waited_for(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    c = stage("pipes").start()
    args = ("checkpoint", "--image-path", tmp / "image", "--leave-running", "--detach", "--progress=json", c.id)
    torpor.fails(*args, says="--progress")
    c.verify()


def test_who_is_told_is_no_danger(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor, monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """A program that fails when it is told undoes the work."""
    import torpor as api
    from torpor.progress import Progress

    c = stage("paging").start()
    container = api.Container.load(c.id, root=str(torpor.root))
    before = sorted(c.host_pids())

    def listener(progress: Progress) -> None:
        raise ZeroDivisionError(progress)

    # the work waits for it
    monkeypatch.setenv("TORPOR_FAILPOINT", "capture:hang")
    for leave_running in (True, False):
        with pytest.raises(ZeroDivisionError):
            container.checkpoint(str(tmp / "image"), leave_running, on_progress=listener)
        assert not (tmp / "image").exists() and sorted(c.host_pids()) == before
        c.verify()
    monkeypatch.delenv("TORPOR_FAILPOINT")
    told: list[Progress] = []
    container.checkpoint(str(tmp / "image"), True, on_progress=told.append)
    assert told[-1].bytes == told[-1].total > HEAP and told[-1].stage == "capture" and told[-1].rate > 0
    monkeypatch.setenv("TORPOR_FAILPOINT", "fill:hang")
    with pytest.raises(ZeroDivisionError):
        api.restore(str(tmp / "image"), bundle=str(c.bundle), root=str(torpor.root), on_progress=listener)
    monkeypatch.delenv("TORPOR_FAILPOINT")
    assert torpor.ids() == [c.id]


def test_a_command_that_stands_still_does_not_hold_the_container(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:  # fmt: skip
    """Whoever is told may be slow: the tracer does not wait for it."""
    c: Container = stage("paging").start()
    process = torpor.popen("checkpoint", "--image-path", tmp / "image", "--leave-running", "--capture=stop", "--progress=json", c.id,
                           stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith(b"{")
        process.send_signal(signal.SIGSTOP)
        procs.wait_until("the image", (tmp / "image" / "checkpoint.img").is_file, 30)
        c.verify()
        process.send_signal(signal.SIGCONT)
        rest = process.communicate(timeout=30)[1].decode()
        assert process.returncode == 0 and json.loads(rest.splitlines()[-1])["done"] is True
    finally:
        process.kill()
        process.wait()
        procs.claimed.discard(process.pid)
