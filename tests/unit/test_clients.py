"""What needs no container: names of images, differences of specs, sizes and times, criu's protocol."""

import copy
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torpor import criu, spec, warm
from torpor.cgroups import check
from torpor.cli.events import duration
from torpor.cli.update import size
from torpor.errors import ImageError, SpecError, UsageError


def images(directory: Path, *names: str) -> Path:
    for name in names:
        (directory / name).mkdir(parents=True)
        (directory / name / "checkpoint.img").write_bytes(b"x")
    return directory


def test_a_name_is_looked_up_in_order(tmp_path: Path) -> None:
    one, two = images(tmp_path / "one", "a", "b"), images(tmp_path / "two", "b", "c")
    where = [str(one), str(two)]
    assert warm.find("a", where) == str(one / "a")
    assert warm.find("b", where) == str(one / "b")
    assert warm.find("c", where) == str(two / "c")


@pytest.mark.parametrize("name", ["..", ".", "a/b", "../a", "/etc", "", "nope", "link", "to-file", "half", "a\0b"])
def test_nothing_else_is_found(tmp_path: Path, name: str) -> None:
    directory = images(tmp_path / "d", "a", "a/b")
    outside = images(tmp_path, "outside")
    (directory / "link").symlink_to(outside / "outside")
    (directory / "half").mkdir()
    (directory / "half" / "checkpoint.img").symlink_to(outside / "outside" / "checkpoint.img")
    (directory / "to-file").write_text("")
    with pytest.raises((ImageError, SpecError)):
        warm.find(name, [str(directory)])


@given(st.text(max_size=30))
def test_no_name_leads_out(tmp_path_factory: pytest.TempPathFactory, name: str) -> None:
    directory = tmp_path_factory.getbasetemp() / "names"
    if not directory.exists():
        images(directory, "a")
    try:
        found = warm.find(name, [str(directory)])
    except (ImageError, SpecError):
        return
    assert os.path.dirname(found) == os.path.realpath(directory)


def test_without_directories_it_is_refused() -> None:
    with pytest.raises(SpecError, match="--restore-from"):
        warm.find("a", [])


def test_what_a_spec_wants() -> None:
    made = spec.default()
    assert warm.wanted(made) == ""
    made["process"]["env"] += ["TORPOR_RESTORE=a", "TORPOR_RESTORE=b"]
    assert warm.wanted(made) == "b", "the last one counts, as in a program"
    made["annotations"] = {"dev.torpor.restore": "c"}
    assert warm.wanted(made) == "c"
    made["annotations"]["io.kubernetes.cri.container-type"] = "container"
    assert warm.wanted(made) == "c"
    made["annotations"]["io.kubernetes.cri.container-type"] = "sandbox"
    assert warm.wanted(made) == "", "a pod's pause container"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["process"].update(user={"uid": 5, "gid": 0}), "user 0:0 in the image, 5:0 here"),
        (lambda s: s["process"]["capabilities"].update(bounding=["CAP_KILL"]), "CAP_AUDIT_WRITE CAP_NET_BIND_SERVICE"),
        (lambda s: s.update(mounts=s["mounts"][1:]), "a mount at /proc in the image"),
        (lambda s: s["linux"].update(namespaces=s["linux"]["namespaces"][1:]), "namespaces of its own differ: pid"),
        (lambda s: s["process"].update(terminal=False), "a terminal in the image, none here"),
    ],
)
def test_differences_are_named(change: Any, says: str) -> None:
    old = spec.default()
    new = copy.deepcopy(old)
    assert warm.differences(old, new) == []
    change(new)
    (found,) = warm.differences(old, new)
    assert says in found


def test_what_may_differ() -> None:
    old = spec.default()
    new = copy.deepcopy(old)
    new["hostname"] = "other"
    new["process"]["args"] = ["other"]
    new["process"]["env"] = []
    new["mounts"].append({"destination": "/more", "type": "tmpfs", "source": "tmpfs"})
    assert warm.differences(old, new) == []


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("1", 1), ("64m", 64 << 20), ("64MB", 64 << 20), ("64MiB", 64 << 20), ("1.5g", 3 << 29), ("-1", -1), ("2 k", 2048), ("0", 0), ("1b", 1)],
)  # fmt: skip
def test_sizes(text: str, bytes_: int) -> None:
    assert size(text, "memory") == bytes_


@pytest.mark.parametrize("text", ["", "m", "-2", "1x", "nan", "inf", "1e99g", "1 2"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UsageError):
        size(text, "memory")


@pytest.mark.parametrize(("text", "seconds"), [("5s", 5), ("5", 5), ("1m30s", 90), ("500ms", 0.5), ("1.5h", 5400)])
def test_durations(text: str, seconds: float) -> None:
    assert duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "s", "5x", "5s5", "..s", "-1s"])
def test_what_is_no_duration(text: str) -> None:
    with pytest.raises(UsageError):
        duration(text)


@pytest.mark.parametrize("bad", [[], {"memory": 5}, {"memory": {"limit": "64m"}}, {"cpu": {"shares": True}}])
def test_bad_resources(bad: Any) -> None:
    with pytest.raises(SpecError):
        check(bad)


@given(st.binary(max_size=64))
def test_criu_answers_whatever_comes(request_: bytes) -> None:
    assert criu.answer(request_)


def test_criu_stats() -> None:
    data = criu.dump_stats({"pages": 300, "pause_us": 5, "stages": [{"name": "freeze", "us": 7}]})
    assert data[:8].hex() == "4059105506330957" and int.from_bytes(data[8:12], "little") == len(data) - 12
