"""Fixtures for tests with real processes and containers."""

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support import bundles, leaks
from support.bundles import HostRoot
from support.cli import Container, Torpor, new_id
from support.net import Net
from support.workloads import WORKLOADS, Stage

pytestmark = pytest.mark.requires("root")


@pytest.fixture
def tmp(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A directory on the root file system, named so that other runs' leak checks leave it alone; short, for socket paths."""
    with tempfile.TemporaryDirectory(prefix=f"{leaks.RUN_MARK}-", dir="/var/tmp", ignore_cleanup_errors=True) as name:
        yield Path(name)


@pytest.fixture(autouse=True)
def leak_check(request: pytest.FixtureRequest, tmp: Path) -> Iterator[None]:
    """Fail a test that leaves a process, mount, cgroup, network namespace or state behind."""
    before = leaks.snapshot()
    yield
    marker = request.node.get_closest_marker("leaves_nothing")
    if marker and marker.args and not marker.args[0]:
        leaks.clean_up_since(before)
        return
    left = leaks.new_since(before)
    state = tmp / "state"
    if state.exists():
        left += [f"in the state root: {p.relative_to(state)}" for p in sorted(state.iterdir())]
    if left:
        leaks.clean_up_since(before)
        pytest.fail("left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture
def torpor(leak_check: None, host_root: object, tmp: Path) -> Iterator[Torpor]:
    # set up after host_root, so that containers are gone before the roots they run on are unmounted
    command = Torpor(tmp)
    yield command
    command.clean_up()


@pytest.fixture
def host_root(leak_check: None, tmp: Path) -> Iterator[Callable[..., HostRoot]]:
    """Make a root file system of the host's files under an overlay of its own."""
    made: list[HostRoot] = []

    def make(copy_of: Path | None = None) -> HostRoot:
        made.append(HostRoot(tmp / f"host{len(made)}", copy_of))
        return made[-1]

    yield make
    for root in made:
        root.close()


@pytest.fixture
def stage(torpor: Torpor, tmp: Path, host_root: Callable[..., HostRoot]) -> Callable[[str], Stage]:
    """Prepare one of the programs of tests/workloads by its name."""
    return lambda name: Stage(torpor, tmp, host_root, WORKLOADS[name])


@pytest.fixture
def busybox(tmp: Path) -> Callable[..., Path]:
    """Make a bundle on busybox-static: busybox(["sh", "-c", "..."], terminal=True, ...) -> its directory."""
    count = 0

    def make(args: list[str], *, edit: Callable[[dict[str, Any]], None] | None = None, **more: Any) -> Path:
        nonlocal count
        count += 1
        bundle = tmp / f"bundle{count}"
        bundles.busybox_root(bundle / "rootfs")
        config = bundles.spec(args, **more)
        if edit is not None:
            edit(config)
        return bundles.write(bundle, config)

    return make


@pytest.fixture
def net(leak_check: None) -> Iterator[Net]:
    made = Net(new_id("n")[-8:])
    yield made
    made.close()


# A program that does nothing but answer the workload protocol, for tests that are about something else.
WAITER = """
trap 'n=$((n+1)); echo "OK $n"' USR1
trap 'exit 0' TERM
n=0
echo READY
sleep 1000000 &
while :; do wait $!; done
"""

# Counts ten times a second, in memory; the answer says how far it is.
COUNTER = """
trap 'echo "OK $i"' USR1
trap 'exit 0' TERM
i=0
echo READY
while :; do i=$((i+1)); sleep 0.1; done
"""


@pytest.fixture
def waiter(torpor: Torpor, busybox: Callable[..., Path]) -> Callable[..., Container]:
    """Start a small container that answers SIGUSR1."""

    def make(name: str = "w", **more: Any) -> Container:
        return Container(torpor, busybox(["sh", "-c", WAITER], **more), new_id(name)).run().wait_ready()

    return make
