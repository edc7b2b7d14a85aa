"""What every test has: abilities are asked for, not guessed; time limits; orphans come to us."""

import json
import os
import shutil
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

sys.path.insert(0, str(Path(__file__).parent))

from support import procs

# CI must have everything that a test asks for, except these: what no machine of ours has, and two programs that are too big to be installed for a test.
MAY_LACK_IN_CI = frozenset({"raise-limits", "command:node", "command:java", "command:javac"})

hypothesis.settings.register_profile("fast", max_examples=50, deadline=None)
hypothesis.settings.register_profile("slow", max_examples=1000, deadline=None)
hypothesis.settings.load_profile(os.environ.get("TORPOR_HYPOTHESIS", "fast"))


def pytest_configure(config: pytest.Config) -> None:
    # nohup and a shell's & have their children ignore these; what we start would inherit that and be another program
    for number, usual in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGQUIT, signal.SIG_DFL),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) is signal.SIG_IGN:
            signal.signal(number, usual)
    procs.become_subreaper()
    global reaper
    reaper = procs.Reaper()


reaper: procs.Reaper


@pytest.fixture
def no_reaper() -> Iterator[None]:
    """For tests that have children of their own, through the Python API or to look at zombies."""
    with reaper.paused():
        yield


_probe: dict[str, Any] | None = None


def probe() -> dict[str, Any]:
    """The table of kernel abilities that the engine itself decides by."""
    global _probe
    if _probe is None:
        from torpor import _core

        _probe = json.loads(_core.probe())
    return _probe


def lacking(ability: str) -> str | None:
    """Say what is missing, or None."""
    if ability == "root":
        return None if os.geteuid() == 0 else "root"
    kind, _, name = ability.partition(":")
    if kind == "command":
        return None if shutil.which(name) else f"the command {name}"
    if ability not in probe():
        raise pytest.UsageError(f"no such ability: {ability!r}; torpor._core.probe() has {sorted(probe())}")
    entry = probe()[ability]
    return None if entry["ok"] else f"{ability} ({entry['how']})"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    for marker in item.iter_markers("requires"):
        for ability in marker.args:
            missing = lacking(ability)
            if missing is None:
                continue
            if os.environ.get("CI") and ability not in MAY_LACK_IN_CI:
                pytest.fail(f"CI must have this: {missing}", pytrace=False)
            pytest.skip(f"lacks {missing}")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    # soak tests run only when asked for by -m
    if "soak" not in (config.getoption("-m") or ""):
        dropped = [i for i in items if i.get_closest_marker("soak")]
        if dropped:
            config.hook.pytest_deselected(items=dropped)
            items[:] = [i for i in items if not i.get_closest_marker("soak")]
