"""The flags before the verb, and what a container remembers of them."""

from pathlib import Path

import pytest
from torpor.config import FLAGS, Config, default_root, from_flags
from torpor.errors import UsageError
from torpor.flags import parse


def config(*words: str) -> Config:
    return from_flags(parse(FLAGS, words))


def test_the_root_is_where_runsc_would_put_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    assert default_root() == str(tmp_path / "torpor")
    monkeypatch.delenv("XDG_RUNTIME_DIR")
    assert config().root == "/run/torpor"


def test_a_relative_root_is_made_absolute(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert config("--root", "state").root == str(tmp_path / "state")


def test_what_every_client_sends_is_understood() -> None:
    # go-runc, conmon, CRI-O (client-surface.md §3.1, §5.1, §5.6)
    for words in (
        [
            "--root",
            "/r",
            "--debug",
            "--log",
            "/l",
            "--log-format",
            "json",
            "--systemd-cgroup",
            "--rootless=true",
            "create",
        ],
        ["--systemd-cgroup", "--log-format=json", "--log", "/l", "create"],
        ["--root=/r", "--rootless=auto", "state"],
        ["--rootless", "auto", "--cgroup-manager", "cgroupfs", "list"],
    ):
        parsed = parse(FLAGS, words)
        from_flags(parsed)
        assert len(parsed.args) == 1


@pytest.mark.parametrize("words", [["--cgroup-manager=disabled"], ["--log-format=xml"], ["--network=lan"]])
def test_what_cannot_be_honoured_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError):
        config(*words)


def test_it_is_frozen() -> None:
    with pytest.raises(AttributeError, match="frozen"):
        config().root = "/elsewhere"


def test_a_later_command_need_not_repeat_the_flags() -> None:
    made = config("--systemd-cgroup", "--network=none").remembered()
    config().check_against(made, "c")
    config("--systemd-cgroup").check_against(made, "c")
    config("--cgroup-manager=systemd", "--network", "none", "--debug", "--log=/l").check_against(made, "c")


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--systemd-cgroup=false"], "--systemd-cgroup=true, not false"), (["--network=host"], "--network=none, not host"),
     (["--cgroup-manager=cgroupfs"], "--systemd-cgroup")],
)  # fmt: skip
def test_a_different_value_is_refused(words: list[str], says: str) -> None:
    made = config("--systemd-cgroup", "--network=none").remembered()
    with pytest.raises(UsageError, match=says) as e:
        config(*words).check_against(made, "c")
    assert e.value.code == "bad-flag"


def test_saying_nothing_at_run_is_saying_the_default() -> None:
    made = config().remembered()
    config("--systemd-cgroup=false", "--network=sandbox").check_against(made, "c")
    with pytest.raises(UsageError):
        config("--systemd-cgroup").check_against(made, "c")
