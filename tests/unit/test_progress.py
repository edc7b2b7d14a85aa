"""The bar and the lines of JSON, without a container."""

import json
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from torpor.progress import MIB, Display, Progress, teller


class Shown:
    def __init__(self) -> None:
        self.now = 100.0
        self.reader, self.fd = os.pipe()

    def display(self, *, lines: bool) -> Display:
        return Display("restore", lines=lines, fd=self.fd, clock=lambda: self.now)

    def text(self) -> str:
        os.set_blocking(self.reader, False)
        try:
            return os.read(self.reader, 1 << 16).decode()
        except BlockingIOError:
            return ""


@contextmanager
def showing() -> Iterator[Shown]:
    shown = Shown()
    try:
        yield shown
    finally:
        os.close(shown.fd)
        os.close(shown.reader)


def test_a_bar_comes_late_and_ends_full() -> None:
    with showing() as shown:
        display = shown.display(lines=False)
        display.tell(Progress("fill", 10 * MIB, 100 * MIB, 0.1))
        assert shown.text() == ""
        shown.now += 0.6
        display.tell(Progress("fill", 50 * MIB, 100 * MIB, 0.5))
        half = shown.text()
        assert half.startswith("\r") and "\n" not in half
        assert re.search(r"restore fill \[#{12}-{12}\]  50 %  50 of 100 MiB, 100 MiB/s", half), half
        display.tell(Progress("fill", 100 * MIB, 100 * MIB, 1.0))
        display.end(1234)
        full = shown.text()
        assert re.search(r"\[#{24}\] 100 %  100 of 100 MiB, 100 MiB/s, pause 1.2 ms\x1b\[K\r\n$", full), full
        display.abandon()
        assert shown.text() == "", "what is done cannot be taken back"


@pytest.mark.parametrize("leave", [Display.end, Display.abandon])
def test_what_was_quick_shows_nothing(leave: Callable[[Display], None]) -> None:
    with showing() as shown:
        display = shown.display(lines=False)
        display.tell(Progress("fill", 1, 1, 0.1))
        shown.now += 9
        leave(display)
        assert shown.text() == ""


def test_a_bar_goes_when_it_came_to_nothing() -> None:
    with showing() as shown:
        display = shown.display(lines=False)
        shown.now += 1
        display.tell(Progress("read", 1, 2, 0.1))
        display.abandon()
        assert shown.text().endswith("\r\x1b[K")


def test_lines_of_json() -> None:
    with showing() as shown:
        display = shown.display(lines=True)
        display.tell(Progress("read", 1, 2, 0.1))
        shown.now += 0.5
        display.end(7)
        assert [json.loads(line) for line in shown.text().splitlines()] == [
            {"verb": "restore", "stage": "read", "bytes": 1, "total": 2, "seconds": 0},
            {"verb": "restore", "done": True, "pause_us": 7, "seconds": 0.5},
        ]


def test_nobody_looks_any_more() -> None:
    reader, fd = os.pipe()
    os.close(reader)
    Display("restore", lines=True, fd=fd).tell(Progress("read", 1, 2, 0.1))
    os.close(fd)


def test_each_stage_has_its_own_rate(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([10.0, 12.0, 14.0, 15.0])
    monkeypatch.setattr("time.monotonic", lambda: next(times))
    told: list[Progress] = []
    tell = teller(told.append)
    tell("read", 50, 100)
    tell("read", 100, 100)
    tell("fill", 30, 100)
    assert [p.rate for p in told] == [25, 25, 30]
