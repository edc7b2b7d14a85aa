"""Real programs from Debian's packages, at work while they are put to sleep and woken up: tests/programs/."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support import bundles
from support.bundles import DOCKER_CAPS, HostRoot
from support.cli import Container, Torpor, new_id

pytestmark = [pytest.mark.requires("root"), pytest.mark.timeout(300)]

SOURCES = bundles.REPO / "tests" / "programs"
PYTHON = "/usr/bin/python3.11"


def program(name: str, *args: str, needs: str, rounds: int = 3) -> object:
    marks = pytest.mark.requires("command:python3.11", *(f"command:{c}" for c in needs.split()))
    return pytest.param(args, rounds, id=name, marks=marks)


PROGRAMS = [
    program("postgres", PYTHON, "/wl/postgres.py", needs="psql pgbench", rounds=10),
    program("redis", PYTHON, "/wl/redis_clients.py", needs="redis-server"),
    program("sqlite", PYTHON, "/wl/sqlite_wal.py", needs=""),
    program("asyncio", PYTHON, "/wl/asyncio_program.py", needs=""),
    program("supervisor", PYTHON, "/wl/supervisor.py", needs=""),
    program("tmux", PYTHON, "/wl/tmux_vim.py", needs="tmux vim"),
    program("node", "/usr/bin/node", "/wl/node.js", needs="node"),
    program("java", "/usr/bin/java", "-Xmx256m", "/wl/Program.java", needs="java javac"),
]


@pytest.mark.parametrize(("args", "rounds"), PROGRAMS)
def test_it_goes_on(
    args: tuple[str, ...], rounds: int, torpor: Torpor, tmp: Path, host_root: Callable[..., HostRoot]
) -> None:
    """Checkpoint and restore, again and again, on the same files; every other time the program goes on by itself first."""
    root = host_root()
    for source in SOURCES.iterdir():
        shutil.copy2(source, root.path / "wl")
    config = bundles.spec(args, rootfs=root.path, caps=DOCKER_CAPS, env=["PYTHONUNBUFFERED=1"])
    config["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 4096, "hard": 4096}]
    (tmp / "bundle").mkdir()
    bundle = bundles.write(tmp / "bundle", config)
    c = Container(torpor, bundle, new_id("p")).run().wait_ready()
    c.verify()
    for n in range(rounds):
        if n % 2 == 0:
            c.checkpoint(tmp / f"beside{n}", "--leave-running")
            c.verify()
        # postgres and sqlite write all the time: only files of the very moment go with an image
        c.checkpoint(tmp / f"image{n}")
        c.delete()
        c = Container(torpor, bundle, new_id("p"))
        c.restore_from(tmp / f"image{n}")
        c.verify()
        for image in (tmp / f"beside{n}", tmp / f"image{n}"):
            shutil.rmtree(image, ignore_errors=True)
    c.verify()
