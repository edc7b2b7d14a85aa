"""Random cycles of everything that saves and wakes up memory, on a program that writes checksummed memory from four threads all the time."""

import os
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from support.cli import Container, Torpor
from support.workloads import Stage

ROUNDS = int(os.environ.get("TORPOR_SOAK_ROUNDS", "0"))
SEED = int(os.environ.get("TORPOR_SOAK_SEED", "1"))

pytestmark = [
    pytest.mark.requires("root", "command:gcc", "command:busybox"),
    pytest.mark.timeout(max(120, ROUNDS * 10)),
]


class Cycle:
    """One container after another; each step leaves `c` running."""

    def __init__(self, play: Stage, tmp: Path, torpor: Torpor) -> None:
        self.play = play
        self.tmp = tmp
        self.torpor = torpor
        self.c: Container = play.start()
        self.count = 0

    def image(self) -> Path:
        self.count += 1
        return self.tmp / f"soak{self.count}"

    def wake_up(self, image: Path, *flags: str) -> None:
        self.c.delete()
        self.c = self.play.successor(self.c)
        self.c.restore_from(image, *flags)

    def sleep_and_wake(self) -> None:
        image = self.image()
        self.c.checkpoint(image)
        self.wake_up(image)

    def sleep_and_wake_at_once(self) -> None:
        image = self.image()
        self.c.checkpoint(image)
        self.wake_up(image, "--background")

    def record(self) -> None:
        image = self.image()
        self.c.checkpoint(image)
        self.wake_up(image, "--background", "--record-working-set")
        self.torpor("wait", "--restore", self.c.id)
        self.wake_up(image, "--background")

    def save_in_background(self) -> None:
        self.c.checkpoint(self.image(), "--leave-running")

    def save_standing_still(self) -> None:
        self.c.checkpoint(self.image(), "--leave-running", "--capture=stop")

    def save_detached_and_go_back(self) -> None:
        image = self.image()
        self.c.checkpoint(image, "--leave-running", "--detach")
        self.c.verify()
        self.torpor("wait", "--checkpoint", self.c.id)
        self.wake_up(image)

    def go_back(self) -> None:
        """To a moment before now: what was written since is forgotten."""
        image = self.image()
        self.c.checkpoint(image, "--leave-running")
        self.c.verify()
        self.wake_up(image, random.choice(["--background", "--detach"]))

    def pre_dump(self) -> None:
        """Memory in advance, and then only what has changed since."""
        before, image = self.image(), self.image()
        self.c.checkpoint(before, "--pre-dump")
        self.c.verify()
        self.c.checkpoint(image, "--parent-path", f"../{before.name}")
        self.wake_up(image, random.choice(["--background", "--detach"]))

    def track(self) -> None:
        """A chain of three, goes on after a restore, and is folded into one."""
        first, second, third = self.image(), self.image(), self.image()
        self.c.checkpoint(first, "--leave-running", "--track")
        self.c.verify()
        self.c.checkpoint(second, "--parent-path", f"../{first.name}")
        self.wake_up(second, "--track")
        self.c.verify()
        self.c.checkpoint(third, "--parent-path", f"../{second.name}")
        whole = self.image()
        self.torpor("squash", third, whole)
        self.wake_up(random.choice([third, whole]), random.choice(["--background", "--detach"]))

    def pause(self) -> None:
        self.torpor("pause", self.c.id)
        image = self.image()
        self.c.checkpoint(image)
        self.wake_up(image)

    STEPS = (
        sleep_and_wake, sleep_and_wake_at_once, record, save_in_background, save_standing_still, save_detached_and_go_back,
        go_back, pre_dump, track, pause,
    )  # fmt: skip


def run(cycle: Cycle, rounds: int) -> None:
    chosen = random.Random(SEED)
    random.seed(SEED)
    # each once, then as it comes
    steps = list(Cycle.STEPS)
    steps += [chosen.choice(Cycle.STEPS) for _ in range(rounds - len(steps))]
    chosen.shuffle(steps)
    for number, step in enumerate(steps):
        try:
            step(cycle)
            cycle.c.verify()
        except AssertionError as e:
            raise AssertionError(f"round {number} of seed {SEED}, {step.__name__}: {e}") from e
        for image in cycle.tmp.glob("soak*"):
            for file in image.iterdir():
                file.unlink()
            image.rmdir()


def test_a_short_soak(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    run(Cycle(stage("churn"), tmp, torpor), len(Cycle.STEPS))


@pytest.mark.soak
@pytest.mark.skipif(ROUNDS == 0, reason="only with TORPOR_SOAK_ROUNDS: make soak")
def test_a_long_soak(stage: Callable[[str], Stage], tmp: Path, torpor: Torpor) -> None:
    run(Cycle(stage("churn"), tmp, torpor), ROUNDS)
