"""The library with real containers: from threads, beside subprocess and asyncio, and its examples."""

import asyncio
import doctest
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torpor
from torpor import api, container, errors

pytestmark = pytest.mark.requires("root")

COUNT = "import time, itertools\nfor i in itertools.count():\n print(i, flush=True)\n time.sleep(0.02)"


@pytest.fixture
def root(tmp_path: Path) -> Iterator[str]:
    state = tmp_path / "state"
    yield str(state)
    for left in torpor.list_containers(root=str(state)):
        left.delete(force=True)
    assert not state.exists() or list(state.iterdir()) == []
    assert str(state) not in Path("/proc/mounts").read_text()


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Any]:
    with open(tmp_path / "out", "w+") as f:
        yield f


def text(out: Any) -> str:
    return Path(out.name).read_text()


def run(root: str, out: Any, *args: str, **more: Any) -> torpor.Container:
    return torpor.run(args, root=root, stdin=subprocess.DEVNULL, stdout=out, stderr=out, **more)


@pytest.mark.parametrize("module", [torpor, api, container, errors], ids=lambda m: m.__name__)
def test_examples(module: Any) -> None:
    assert doctest.testmod(module, optionflags=doctest.ELLIPSIS).failed == 0


def test_life(root: str, out: Any) -> None:
    with run(
        root, out, "sh", "-c", "trap 'exit 5' TERM; echo up; while :; do sleep 0.01; done", env=dict(os.environ)
    ) as c:
        assert c.status == "running" and c.state()["pid"] == c.pid and c.pid in c.processes()
        assert [other.id for other in torpor.list_containers(root=root)] == [c.id]
        assert torpor.Container.load(c.id[:12], root=root).pid == c.pid
        assert c.exec(["sh", "-c", "echo $A; exit 4"], env={"A": "b"}, stdout=out).wait() == 4
        c.pause()
        assert c.status == "paused"
        with pytest.raises(torpor.StateError, match="container paused"):
            c.exec(["true"])
        c.resume()
        with pytest.raises(TimeoutError):
            c.wait(0.05)
        with pytest.raises(torpor.StateError, match="still running"):
            c.delete()
        c.kill(signal.SIGTERM)
        assert c.wait(10) == 5
        assert c.status == "stopped" and c.state()["pid"] == 0
        assert torpor.Container.load(c.id, root=root).wait() == 5
        with pytest.raises(torpor.StateError, match="container not running"):
            c.kill()
    with pytest.raises(torpor.StateError) as e:
        c.state()
    assert e.value.code == "not-found"
    assert text(out).split() == ["up", "b"]


def test_a_signal_is_128_and_its_number(root: str, out: Any) -> None:
    with run(root, out, "sleep", "100") as c:
        c.kill(signal.SIGKILL)
        assert c.wait() == 137


def test_create_then_start(root: str, out: Any) -> None:
    with torpor.Container.create("c", args=["echo", "started"], root=root, stdout=out) as c:
        assert c.status == "created" and text(out) == ""
        c.start()
        assert c.wait() == 0 and text(out) == "started\n"
        with pytest.raises(torpor.StateError, match="cannot start"):
            c.start()


def test_what_cannot_be_executed_leaves_nothing(root: str, out: Any) -> None:
    with pytest.raises(torpor.TorporError, match="not-there"):
        run(root, out, "not-there")
    with pytest.raises(torpor.StateError, match="invalid container id"):
        run(root, out, "true", container_id="a/b")
    with pytest.raises(torpor.SpecError, match=r"config\.json"):
        torpor.Container.run("c", str(Path(root).parent), root=root)
    with pytest.raises(torpor.UsageError, match="not both"):
        torpor.Container.run("c", "/bundle", args=["true"], root=root)
    assert torpor.list_containers(root=root) == []


def test_checkpoint_and_restore(root: str, out: Any, tmp_path: Path) -> None:
    image = str(tmp_path / "deep" / "image")
    with run(root, out, sys.executable, "-c", COUNT) as c:
        while text(out).count("\n") < 5:
            time.sleep(0.01)
        kept = c.checkpoint(image, leave_running=True)
        assert kept.tasks == 1 and kept.bytes > 4096 and 0 < kept.pause_seconds < 5 and Path(kept.path).is_dir()
        assert c.status == "running"
        with pytest.raises(torpor.ImageError) as e:
            c.checkpoint(image)
        assert e.value.code == "image-exists" and c.status == "running"
        last = c.checkpoint(str(tmp_path / "second"))
        assert c.status == "stopped" and c.wait() == 0
        with pytest.raises(torpor.StateError, match="container not running"):
            c.checkpoint(str(tmp_path / "third"))
        assert not (tmp_path / "third").exists()
        seen = int(text(out).split()[-1])
    with open(tmp_path / "again", "w+") as again, open(tmp_path / "other", "w+") as other:
        with torpor.restore(last, root=root, stdin=subprocess.DEVNULL, stdout=again, stderr=again) as one:
            with torpor.restore(image, root=root, stdin=subprocess.DEVNULL, stdout=other, stderr=other) as two:
                for file in (again, other):
                    while text(file).count("\n") < 3:
                        time.sleep(0.01)
                assert one.status == two.status == "running"
        first = int(text(again).split()[0])
        assert first in (seen, seen + 1)
    assert torpor.inspect(image)["tasks"] == 1


def test_many_threads_at_once(root: str, out: Any) -> None:
    def one(number: int) -> tuple[int | None, int]:
        with run(root, out, "sh", "-c", f"exit {number}") as c:
            done = subprocess.run(["sh", "-c", f"exit {number}"]).returncode
            return c.wait(), done

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(one, range(16))) == [(n, n) for n in range(16)]


def test_several_threads_wait_for_one_container(root: str, out: Any) -> None:
    found: list[int | None] = []
    with run(root, out, "sh", "-c", "sleep 0.3; exit 7") as c:
        threads = [threading.Thread(target=lambda: found.append(c.wait())) for _ in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(10)
    assert found == [7] * 5


def test_beside_asyncio(root: str, out: Any) -> None:
    async def both() -> tuple[int | None, int | None]:
        c = await asyncio.to_thread(run, root, out, "sh", "-c", "sleep 0.1; exit 3")
        child = await asyncio.create_subprocess_exec("sh", "-c", "exit 4")
        found = await asyncio.gather(asyncio.to_thread(c.wait), child.wait())
        await asyncio.to_thread(c.delete)
        return found[0], found[1]

    assert asyncio.run(both()) == (3, 4)


WAITS_FOR_ANY_CHILD = """
import contextlib, os, subprocess, sys, torpor
with torpor.run(("sh", "-c", "exit 9"), root=sys.argv[1], stdin=subprocess.DEVNULL) as c:
    with contextlib.suppress(ChildProcessError):
        while True:
            os.waitpid(-1, 0)
    assert c.wait() == 9
"""


def test_a_program_that_waits_for_any_child(root: str) -> None:
    """In a process of its own: pytest is a subreaper, orphans of other tests would be waited for too."""
    subprocess.run([sys.executable, "-c", WAITS_FOR_ANY_CHILD, root], check=True, timeout=60)


def test_signal_handlers_and_descriptors_are_left_alone(root: str, out: Any) -> None:
    run(root, out, "true").delete(force=True)
    handlers = {n: signal.getsignal(n) for n in signal.valid_signals()}
    descriptors = sorted(p.name for p in Path("/proc/self/fd").iterdir())
    with run(root, out, "true") as c:
        c.wait()
    assert {n: signal.getsignal(n) for n in signal.valid_signals()} == handlers
    assert sorted(p.name for p in Path("/proc/self/fd").iterdir()) == descriptors
