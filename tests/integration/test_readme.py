"""What the README shows works: its blocks after `<!-- tested -->` are run as they stand, and the demo."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from support.bundles import REPO
from support.cli import TORPOR

pytestmark = [pytest.mark.requires("root", "command:busybox")]

BLOCKS = re.findall(r"<!-- tested -->\n```(\w+)\n(.*?)```", (REPO / "README.md").read_text(), re.DOTALL)


def run(argv: list[str], tmp: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PATH": f"{TORPOR.parent}:{os.environ['PATH']}", "XDG_RUNTIME_DIR": str(tmp / "run")}
    (tmp / "here").mkdir()
    # output to files: what stays behind must not hold a pipe of ours open
    with open(tmp / "out", "w") as out, open(tmp / "err", "w") as err:
        done = subprocess.run(
            argv, env=env, cwd=tmp / "here", stdin=subprocess.DEVNULL, stdout=out, stderr=err, check=False, timeout=90
        )
    found = subprocess.CompletedProcess(argv, done.returncode, (tmp / "out").read_text(), (tmp / "err").read_text())
    assert found.returncode == 0, (found.stdout, found.stderr)
    root = tmp / "run" / "torpor"
    assert not root.exists() or not list(root.iterdir()), "containers are left"
    return found


def test_there_are_blocks() -> None:
    assert [kind for kind, _ in BLOCKS] == ["sh", "sh", "python"]


def test_life_without_a_bundle(tmp: Path) -> None:
    done = run(["bash", "-euo", "pipefail", "-c", BLOCKS[0][1]], tmp)
    before, after = map(int, done.stdout.split()[-2:])
    assert after == before + 1, done.stdout


def test_life_with_a_bundle(tmp: Path) -> None:
    done = run(["bash", "-euo", "pipefail", "-c", BLOCKS[1][1]], tmp)
    table = done.stdout.splitlines()
    assert [line.split()[0] for line in table if "running" in line] == ["first", "second", "third"], done.stdout
    numbers = {n: (tmp / "here" / f"{n}.log").read_text().split() for n in ("first", "second", "third")}
    # both went on from the same number, which is one that the first one had
    assert numbers["second"][0] == numbers["third"][0] and numbers["second"][0] in numbers["first"]


def test_python(tmp: Path) -> None:
    (tmp / "readme.py").write_text(BLOCKS[2][1])
    done = run([sys.executable, str(tmp / "readme.py")], tmp)
    first, second = done.stdout.splitlines()
    assert first.startswith("running [") and second.startswith("image-missing - ")


def test_the_demo(tmp: Path) -> None:
    done = run(["bash", str(REPO / "examples" / "demo.sh")], tmp)
    assert "It went on where it was" in done.stdout
    for command in ("torpor run", "torpor checkpoint", "torpor create", "torpor restore"):
        assert f"$ {command}" in done.stdout


def test_make_help_lists_the_targets() -> None:
    done = subprocess.run(["make", "-s", "help"], cwd=REPO, capture_output=True, text=True, check=True)
    for target in ("build", "wheel", "demo", "test", "lint", "bench", "soak", "fmt", "clean"):
        assert f"make {target} " in done.stdout
