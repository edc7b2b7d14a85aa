"""exec in a container that is created and not started, and what becomes of a restore into it."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from support import procs
from support.cli import Container, Torpor, new_id

pytestmark = pytest.mark.requires("root", "command:busybox")


def test_a_created_container_that_was_exec_ed_in_can_be_filled(
    torpor: Torpor, waiter: Callable[..., Container], tmp: Path
) -> None:
    c = waiter()
    c.checkpoint(tmp / "i")
    c.delete()
    created = Container(torpor, c.bundle, new_id()).create()
    assert torpor("exec", created.id, "echo", "early").out == "early\n"
    torpor("restore", "--detach", "--image-path", tmp / "i", created.id)
    created.verify()


def test_a_created_container_with_a_living_exec_is_not_filled(
    torpor: Torpor, waiter: Callable[..., Container], tmp: Path
) -> None:
    c = waiter()
    c.checkpoint(tmp / "i")
    c.delete()
    created = Container(torpor, c.bundle, new_id()).create()
    torpor("exec", "--detach", created.id, "sleep", "1000")
    torpor.fails("restore", "--detach", "--image-path", tmp / "i", created.id, says="(sleep) runs in it, end it first")
    assert created.status == "created"
    torpor("exec", created.id, "killall", "sleep")
    procs.wait_until("the end of sleep", lambda: len(json.loads(torpor("ps", "--format", "json", created.id).out)) == 1)
    torpor("restore", "--detach", "--image-path", tmp / "i", created.id)
    created.verify()
