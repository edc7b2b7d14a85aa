"""`dev.torpor.checkpoint.NAME` in a spec is the default of --NAME of the verb, for what whoever starts a container may choose."""

import pytest
from torpor import log
from torpor.cli import checkpoint
from torpor.errors import UsageError
from torpor.flags import BOOL, TEXT, Flag, Parsed, parse

TABLE = (
    Flag("image-path", TEXT, ""),
    Flag("compression", TEXT, "", default="none", choices=("none", "zstd")),
    Flag("tcp-established", BOOL, ""),
    Flag("tcp-close", BOOL, ""),
    Flag("save-rootfs", BOOL, ""),
)
PREFIX = "dev.torpor.checkpoint."


@pytest.fixture
def warnings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    said: list[str] = []
    monkeypatch.setattr(log, "warning", said.append)
    monkeypatch.setattr(checkpoint, "FLAGS", TABLE)
    return said


def heed(words: list[str], **annotations: str) -> Parsed:
    flags = parse(TABLE, [*words, "id"])
    checkpoint.heed_annotations({PREFIX + name.replace("_", "-"): value for name, value in annotations.items()}, flags)
    return flags


def test_each_becomes_the_default_of_its_flag(warnings: list[str]) -> None:
    flags = heed([], compression="zstd", save_rootfs="true", tcp_close="true")
    assert flags.text("compression") == "zstd" and flags.on("save-rootfs") and flags.on("tcp-close")
    assert not warnings


def test_a_flag_that_is_given_goes_first(warnings: list[str]) -> None:
    flags = heed(["--compression=none", "--save-rootfs=false"], compression="zstd", save_rootfs="true")
    assert flags.text("compression") == "none" and not flags.on("save-rootfs")


def test_one_annotation_chooses_the_tcp_policy(warnings: list[str]) -> None:
    flags = heed([], tcp="close")
    assert flags.on("tcp-close") and not flags.on("tcp-established")


def test_a_policy_on_the_command_line_replaces_that_of_the_annotation(warnings: list[str]) -> None:
    flags = heed(["--tcp-established"], tcp="close")
    assert flags.on("tcp-established") and not flags.on("tcp-close")


def test_where_the_image_goes_is_not_for_the_container_to_say(warnings: list[str]) -> None:
    flags = heed(["--image-path=/a"], image_path="/b")
    assert flags.text("image-path") == "/a" and "image-path=/b is not supported" in warnings[0]
    assert heed([], image_path="/b").text("image-path") == ""


def test_an_unknown_name_is_told(warnings: list[str]) -> None:
    heed([], nonsense="1")
    assert "nonsense=1" in warnings[0]


def test_a_value_that_the_flag_does_not_take_names_the_annotation(warnings: list[str]) -> None:
    with pytest.raises(UsageError, match=r"annotation dev\.torpor\.checkpoint\.compression=lzma: invalid value"):
        heed([], compression="lzma")


def test_other_annotations_are_nobodys_business(warnings: list[str]) -> None:
    checkpoint.heed_annotations({"dev.torpor.restore": "x", "org.example": "y"}, parse(TABLE, ["id"]))
    assert not warnings
