"""Go's flag rules, with runc's short names."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torpor.errors import UsageError
from torpor.flags import BOOL, LIST, NUMBER, SWITCH, TEXT, Flag, HelpRequested, describe, parse

TABLE = (
    Flag("bundle", TEXT, "a directory", short="b"),
    Flag("detach", BOOL, "do not wait", short="d"),
    Flag("preserve-fds", NUMBER, "how many"),
    Flag("env", LIST, "more", short="e"),
    Flag("format", TEXT, "how", default="table", choices=("table", "json")),
    Flag("rootless", SWITCH, "whatever", choices=("true", "false", "auto")),
    Flag("overlay", BOOL, "on unless switched off", default=True),
)


@pytest.mark.parametrize(
    "words", [["-bundle", "x"], ["--bundle", "x"], ["-bundle=x"], ["--bundle=x"], ["-b", "x"], ["-b=x"]]
)
def test_every_spelling_of_a_value(words: list[str]) -> None:
    parsed = parse(TABLE, [*words, "id"])
    assert parsed.text("bundle") == "x"
    assert parsed.args == ["id"]
    assert parsed.given == {"bundle"}


@pytest.mark.parametrize(
    ("word", "value"),
    [("-d", True), ("--detach", True), ("-detach=true", True), ("--detach=1", True), ("--detach=T", True),
     ("--detach=false", False), ("-d=0", False), ("--detach=FALSE", False)],
)  # fmt: skip
def test_every_spelling_of_a_bool(word: str, value: bool) -> None:
    assert parse(TABLE, [word]).on("detach") is value


def test_a_bool_does_not_eat_the_next_word() -> None:
    assert parse(TABLE, ["--detach", "false"]).args == ["false"]


def test_a_default_can_be_switched_off() -> None:
    assert parse(TABLE, []).on("overlay")
    assert not parse(TABLE, ["--overlay=false"]).on("overlay")


def test_flags_end_at_the_first_word_that_is_none() -> None:
    parsed = parse(TABLE, ["-d", "id", "--bundle", "x", "-d"])
    assert parsed.args == ["id", "--bundle", "x", "-d"]
    assert parsed.text("bundle") == ""


def test_flags_end_at_two_dashes() -> None:
    assert parse(TABLE, ["-d", "--", "-b", "x"]).args == ["-b", "x"]


def test_one_dash_is_a_word() -> None:
    assert parse(TABLE, ["-", "-d"]).args == ["-", "-d"]


def test_a_value_may_look_like_a_flag() -> None:
    assert parse(TABLE, ["--bundle", "--detach"]).text("bundle") == "--detach"


def test_an_empty_value() -> None:
    parsed = parse(TABLE, ["--bundle="])
    assert parsed.text("bundle") == "" and "bundle" in parsed.given


def test_a_list_keeps_order() -> None:
    assert parse(TABLE, ["-e", "A=1", "--env=B=2=3", "-e", "A=1"]).words("env") == ["A=1", "B=2=3", "A=1"]


def test_lists_of_two_command_lines_are_not_the_same_list() -> None:
    parse(TABLE, ["-e", "A=1"])
    assert parse(TABLE, []).words("env") == []


@pytest.mark.parametrize(
    ("words", "value", "args"),
    [(["--rootless"], "true", []), (["--rootless=auto"], "auto", []), (["--rootless", "auto", "x"], "auto", ["x"]),
     (["--rootless", "x"], "true", ["x"]), ([], "false", [])],
)  # fmt: skip
def test_a_flag_that_is_a_bool_for_some_and_a_word_for_others(words: list[str], value: str, args: list[str]) -> None:
    parsed = parse(TABLE, words)
    assert (parsed.text("rootless"), parsed.args) == (value, args)


def test_twice_the_same_is_once() -> None:
    assert parse(TABLE, ["--detach", "-d", "--bundle=x", "-b", "x"]).on("detach")


@pytest.mark.parametrize("words", [["-b", "x", "--bundle", "y"], ["-d", "--detach=false"]])
def test_twice_different_is_refused(words: list[str]) -> None:
    with pytest.raises(UsageError, match="given twice with different values") as e:
        parse(TABLE, words)
    assert e.value.code == "bad-flag"


def test_a_missing_value_says_what_podman_looks_for() -> None:
    with pytest.raises(UsageError, match="flag needs an argument: --bundle"):
        parse(TABLE, ["--bundle"])


@pytest.mark.parametrize(
    ("words", "message"),
    [(["--nope"], "flag provided but not defined: --nope"), (["-x"], "not defined: -x"), (["---d"], "bad flag syntax"),
     (["--=x"], "bad flag syntax"), (["--detach=maybe"], "use true or false"), (["--preserve-fds=x"], "use a number"),
     (["--format=xml"], "use table or json")],
)  # fmt: skip
def test_what_is_refused(words: list[str], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse(TABLE, words)


@pytest.mark.parametrize("word", ["-h", "-help", "--help", "--h"])
def test_help(word: str) -> None:
    with pytest.raises(HelpRequested):
        parse(TABLE, ["-d", word, "--nope"])


def test_describe_names_every_flag_and_every_short_name() -> None:
    text = describe(TABLE)
    for flag in TABLE:
        assert f"--{flag.name}" in text
    assert "-b" in text and 'default "table"' not in text and "(default 'table')" in text


@given(st.lists(st.text(max_size=12), max_size=8))
def test_nothing_but_usage_errors(words: list[str]) -> None:
    try:
        parsed = parse(TABLE, words)
    except (UsageError, HelpRequested):
        return
    assert len(parsed.args) <= len(words)


@given(st.text(), st.lists(st.text()))
def test_any_text_survives_as_a_value(value: str, rest: list[str]) -> None:
    parsed = parse(TABLE, [f"--bundle={value}", "--", *rest])
    assert parsed.text("bundle") == value
    assert parsed.args == rest
