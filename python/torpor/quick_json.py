"""JSON without `import json`, which compiles regular expressions that torpor has no use for (3 ms a command).

The C functions below are what the standard module calls as well. They are private to CPython, so whatever is not as
expected there leads to the standard module.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SPACE = " \t\n\r"


class _Rules:
    """What the C scanner asks for, as json.JSONDecoder has it."""

    strict = True
    object_hook = None
    object_pairs_hook = None
    parse_float = float
    parse_int = int
    parse_constant = {"NaN": float("nan"), "Infinity": float("inf"), "-Infinity": float("-inf")}.__getitem__


try:
    from _json import encode_basestring_ascii, make_encoder, make_scanner

    _rules: Any = _Rules()
    _scan = make_scanner(_rules)
    _nothing: Any = None
    _encode = make_encoder(_nothing, _nothing, encode_basestring_ascii, None, ": ", ", ", False, False, True)
    _works = "".join(_encode(_scan('{"a": [1]}', 0)[0], 0)) == '{"a": [1]}'
except Exception:  # another interpreter, or another CPython
    _works = False


def loads(text: str) -> Any:
    """As json.loads. Bytes are the caller's to decode: json.loads guesses at encodings, which takes all of the module.

    Raises:
        ValueError: it is not JSON.
    """
    if _works:
        # The scanner does not skip the space before the value.
        start = len(text) - len(text.lstrip(_SPACE))
        try:
            value, end = _scan(text, start)
        except Exception:
            # Of CPython 3.11 it cannot say what is wrong: it looks for the exception in json.decoder, and raises
            # SystemError when that was not imported.
            pass
        else:
            if not text[end:].strip(_SPACE):
                return value
    import json

    return json.loads(text)


def dumps(value: object) -> str:
    """As json.dumps, for dictionaries, lists and plain values that do not hold themselves.

    Raises:
        TypeError: something in it has no JSON form.
    """
    if not _works:
        import json

        return json.dumps(value)
    return "".join(_encode(value, 0))


def pretty(value: object, margin: str = "") -> str:
    """As json.dumps with indent=2, for what `dumps` takes. Keys are strings.

    Raises:
        TypeError: something in it has no JSON form.
    """
    inner = margin + "  "
    if isinstance(value, dict) and value:
        lines = [f"{dumps(key)}: {pretty(item, inner)}" for key, item in value.items()]
        begin, end = "{}"
    elif isinstance(value, list | tuple) and value:
        lines = [pretty(item, inner) for item in value]
        begin, end = "[]"
    else:
        return dumps(value)
    return f"{begin}\n{inner}" + f",\n{inner}".join(lines) + f"\n{margin}{end}"
