"""The one flag parser: Go's rules, since runsc's flags follow them, plus the short names runc has.

    -flag  --flag  --flag=value  --flag value  --bool  --bool=false

Flags come before the first word that is not one; `--` ends them. A flag given twice with the same value counts once
(Podman does that); twice with different values is refused, as nobody can tell which was meant.
"""

from __future__ import annotations

from .errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    Value = bool | int | str | list[str]

# strconv.ParseBool of Go
_BOOLS = {"1": True, "t": True, "true": True, "0": False, "f": False, "false": False}

BOOL, TEXT, NUMBER, LIST, SWITCH = "bool", "text", "number", "list", "switch"


class Flag:
    """One row of a flag table.

    A `switch` is a flag that runsc has as a bool and runc as a word (`--rootless`, `--rootless=auto`, `--rootless
    auto`).
    """

    __slots__ = ("choices", "default", "help", "hidden", "kind", "name", "short")

    def __init__(
        self,
        name: str,
        kind: str,
        help: str,  # noqa: A002
        *,
        default: Value | None = None,
        short: str = "",
        choices: tuple[str, ...] = (),
        hidden: bool = False,
    ) -> None:
        self.name = name
        self.kind = kind
        self.help = help
        self.default: Value = _ZERO[kind] if default is None else default
        self.short = short
        self.choices = choices
        self.hidden = hidden


_ZERO: dict[str, Value] = {BOOL: False, TEXT: "", NUMBER: 0, LIST: [], SWITCH: "false"}


class HelpRequested(Exception):  # noqa: N818  (not an error)
    """`--help` was among the flags."""


class Parsed:
    """The flags of one command line, and the words that follow them."""

    __slots__ = ("args", "given", "values")

    def __init__(self, table: Sequence[Flag]) -> None:
        self.values: dict[str, Value] = {f.name: list(f.default) if f.kind == LIST else f.default for f in table}  # type: ignore[arg-type]
        self.given: set[str] = set()
        self.args: list[str] = []

    def on(self, name: str) -> bool:
        value = self.values[name]
        assert isinstance(value, bool)
        return value

    def text(self, name: str) -> str:
        value = self.values[name]
        assert isinstance(value, str)
        return value

    def number(self, name: str) -> int:
        value = self.values[name]
        assert isinstance(value, int)
        return value

    def words(self, name: str) -> list[str]:
        value = self.values[name]
        assert isinstance(value, list)
        return value


def parse(table: Sequence[Flag], argv: Sequence[str]) -> Parsed:
    """Read the flags at the head of `argv`.

    Raises:
        UsageError: `bad-flag`, with what to do about it.
        HelpRequested: `-h` or `--help` was given and is not a flag of the table.
    """
    names = {f.name: f for f in table} | {f.short: f for f in table if f.short}
    parsed = Parsed(table)
    rest = list(argv)
    while rest:
        word = rest[0]
        if len(word) < 2 or word[0] != "-":
            break
        del rest[0]
        if word == "--":
            break
        name, has_value, value = word.lstrip("-").partition("=")
        if word.startswith("---") or not name:
            raise UsageError(f"bad flag syntax: {word}", code="bad-flag", object=word)
        flag = names.get(name)
        if flag is None:
            if name in ("help", "h"):
                raise HelpRequested
            raise UsageError(f"flag provided but not defined: {_dashed(name)}", code="bad-flag", object=name)
        _store(parsed, flag, name, value if has_value else _next_value(flag, name, rest))
    parsed.args = rest
    return parsed


def assume(table: Sequence[Flag], parsed: Parsed, name: str, text: str) -> bool:
    """Put `text` in the place of a flag's default. False when the table has no such flag.

    Raises:
        UsageError: `bad-flag`, it is no value for that flag.
    """
    for flag in table:
        if flag.name == name:
            if name not in parsed.given:
                parsed.values[name] = _convert(flag, name, text)
            return True
    return False


def _next_value(flag: Flag, name: str, rest: list[str]) -> str:
    if flag.kind == BOOL:
        return "true"
    if flag.kind == SWITCH:
        return rest.pop(0) if rest and rest[0] in flag.choices else "true"
    if not rest:
        # Podman looks for "flag needs an argument" to learn whether a flag exists.
        raise UsageError(f"flag needs an argument: {_dashed(name)}", code="bad-flag", object=name)
    return rest.pop(0)


def _store(parsed: Parsed, flag: Flag, name: str, text: str) -> None:
    value = _convert(flag, name, text)
    if flag.kind == LIST:
        words = parsed.values[flag.name]
        assert isinstance(words, list)
        words.append(text)
    elif flag.name in parsed.given and parsed.values[flag.name] != value:
        raise UsageError(
            f"flag {_dashed(name)} given twice with different values "
            f"({_shown(parsed.values[flag.name])} and {_shown(value)}): give it once",
            code="bad-flag",
            object=name,
        )
    else:
        parsed.values[flag.name] = value
    parsed.given.add(flag.name)


def _convert(flag: Flag, name: str, text: str) -> Value:
    if flag.kind == BOOL:
        truth = _BOOLS.get(text.lower())
        if truth is None:
            raise UsageError(f"invalid value {text!r} for flag {_dashed(name)}: use true or false", code="bad-flag")
        return truth
    if flag.kind == NUMBER:
        try:
            return int(text, 0)
        except ValueError:
            raise UsageError(
                f"invalid value {text!r} for flag {_dashed(name)}: use a number", code="bad-flag"
            ) from None
    if flag.choices and text not in flag.choices:
        raise UsageError(
            f"invalid value {text!r} for flag {_dashed(name)}: use {' or '.join(flag.choices)}", code="bad-flag"
        )
    return text


def _dashed(name: str) -> str:
    return f"-{name}" if len(name) == 1 else f"--{name}"


def _shown(value: Value) -> str:
    return str(value).lower() if isinstance(value, bool) else repr(value)


def describe(table: Sequence[Flag]) -> str:
    """The table as help text, one flag a line."""
    lines = []
    for flag in table:
        if flag.hidden:
            continue
        left = f"--{flag.name}" + (f", -{flag.short}" if flag.short else "")
        if flag.kind in (TEXT, NUMBER, LIST):
            left += {TEXT: " TEXT", NUMBER: " N", LIST: " TEXT..."}[flag.kind]
        default = f" (default {_shown(flag.default)})" if flag.default not in (False, "", [], "false") else ""
        lines.append(f"  {left:<34} {flag.help}{default}")
    return "\n".join(lines)
