"""The wheel stands alone: a clean virtual environment, no compiler, no libseccomp, nothing on PATH."""

import json
import os
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from support.bundles import REPO
from support.cli import new_id

pytestmark = [pytest.mark.requires("root")]


@pytest.fixture(scope="module")
def wheel() -> Path:
    [found] = (REPO / "dist").glob("torpor-*.whl")
    return found


@pytest.fixture(scope="module")
def clean(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel and nothing else in it; no index is asked."""
    venv = tmp_path_factory.mktemp("venv") / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    subprocess.run(
        [venv / "bin" / "pip", "install", "--quiet", "--no-index", "--disable-pip-version-check", str(wheel)],
        check=True,
    )
    return venv


def test_what_is_in_it(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as z:
        assert z.testzip() is None
        names = z.namelist()
        [launcher] = [i for i in z.infolist() if i.filename == "torpor/_bin/torpor-launcher"]
    assert launcher.external_attr >> 16 & 0o111, "the launcher is not executable"
    assert "torpor/py.typed" in names and "torpor/_core.pyi" in names and "torpor/_core.abi3.so" in names
    assert not [n for n in names if n.startswith(("tests", "rust")) or n.endswith((".rs", ".pyc"))]
    assert "cp311-abi3" in wheel.name


def test_version_and_import_with_an_empty_environment(clean: Path) -> None:
    done = subprocess.run(
        [clean / "bin" / "torpor", "--version"], env={"PATH": ""}, capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("torpor version ")
    code = (
        "import torpor, torpor._core, json; print(torpor.__version__, json.loads(torpor._core.build_info())['profile'])"
    )
    done = subprocess.run(
        [clean / "bin" / "python", "-I", "-c", code], env={}, capture_output=True, text=True, check=True
    )
    assert done.stdout.split()[1] == "release"
    done = subprocess.run(
        [clean / "bin" / "python", "-m", "torpor", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("torpor version ")


def test_nothing_in_it_needs_a_library_that_may_be_missing(clean: Path) -> None:
    site = next((clean / "lib").glob("python3*")) / "site-packages" / "torpor"
    launcher = subprocess.run(["ldd", site / "_bin" / "torpor-launcher"], capture_output=True, text=True, check=False)
    assert "not a dynamic executable" in launcher.stderr or "statically linked" in launcher.stdout, launcher
    core = subprocess.run(["ldd", site / "_core.abi3.so"], capture_output=True, text=True, check=True).stdout
    libraries = {line.split()[0].split("/")[-1] for line in core.splitlines()}
    assert libraries <= {
        "linux-vdso.so.1",
        "libc.so.6",
        "libgcc_s.so.1",
        "libm.so.6",
        "libpthread.so.0",
        "libdl.so.2",
        "ld-linux-x86-64.so.2",
    }, libraries


def test_it_depends_on_no_other_package(clean: Path) -> None:
    done = subprocess.run(
        [clean / "bin" / "pip", "list", "--format", "json", "--disable-pip-version-check"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert {p["name"] for p in json.loads(done.stdout)} <= {"torpor", "pip", "setuptools"}


def test_a_container_runs_sleeps_and_wakes_from_the_clean_environment(
    clean: Path, tmp: Path, busybox: Callable[..., Path]
) -> None:
    bundle = busybox(["sh", "-c", "echo up; while [ ! -e /go ]; do sleep 0.05; done; echo woken; exit 3"])
    first, second = new_id(), new_id()

    def torpor(*words: str | Path, check: bool = True) -> int:
        with open(tmp / "out", "ab") as out:
            argv = [clean / "bin" / "torpor", "--root", tmp / "state", *words]
            done = subprocess.run(argv, env={}, stdin=subprocess.DEVNULL, stdout=out, stderr=out, check=False)
        assert not check or done.returncode == 0, (words, (tmp / "out").read_text())
        return done.returncode

    torpor("run", "--detach", "--bundle", bundle, first)
    deadline = time.monotonic() + 10
    while "up" not in (tmp / "out").read_text() and time.monotonic() < deadline:
        time.sleep(0.02)
    torpor("checkpoint", "--image-path", tmp / "image", first)
    torpor("delete", first)
    (bundle / "rootfs" / "go").touch()
    assert torpor("restore", "--image-path", tmp / "image", "--bundle", bundle, second, check=False) == 3
    assert (tmp / "out").read_text() == "up\nwoken\n"


def test_the_command_starts_quickly_and_imports_little(clean: Path) -> None:
    """No timing: what is imported is counted. argparse, subprocess, asyncio and the like cost more than the command itself."""
    code = (
        "import sys; sys.argv = ['torpor', 'list']; from torpor.cli.main import main; main(); "
        "print(sorted(set(sys.modules) & {'argparse', 'subprocess', 'asyncio', 'typing', 'dataclasses', 'inspect', 'socket', 'tempfile', 'logging', 'torpor._core'}))"
    )
    done = subprocess.run([clean / "bin" / "python", "-I", "-S", "-c", f"import sys; sys.path.insert(0, {str(next((clean / 'lib').glob('python3*')) / 'site-packages')!r}); {code}"], capture_output=True, text=True, check=True, env={"XDG_RUNTIME_DIR": str(clean)})  # fmt: skip
    assert done.stdout.splitlines()[-1] == "[]", done.stdout
    assert os.path.exists(clean)
