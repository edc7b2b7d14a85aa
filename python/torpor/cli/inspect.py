from __future__ import annotations

from torpor import api, quick_json
from torpor.errors import UsageError
from torpor.flags import BOOL, TEXT, Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags] DIR"
FLAGS = (
    Flag("json", BOOL, "as JSON"),
    Flag("image-path", TEXT, "the same as DIR", hidden=True),
    Flag("verify", BOOL, "read and check every byte of the image"),
)


def execute(config: Config, flags: Parsed) -> int:
    directories = flags.args or ([flags.text("image-path")] if flags.text("image-path") else [])
    if len(directories) != 1:
        raise UsageError("one image directory is required")
    found = api.inspect(directories[0])
    if flags.on("verify"):
        api.engine().verify(directories[0])
    if flags.on("json"):
        print(quick_json.pretty(found))
    else:
        print("\n".join(_lines(found)))
    return 0


def _lines(value: Any, indent: str = "") -> list[str]:
    """A value as indented text, for people."""
    lines = []
    for name, item in value.items() if isinstance(value, dict) else enumerate(value):
        label = f"{indent}{name}:" if isinstance(value, dict) else f"{indent}-"
        if isinstance(item, (dict, list)) and item:
            lines += [label, *_lines(item, indent + "  ")]
        else:
            lines.append(f"{label} {item if not isinstance(item, (dict, list)) else 'none'}")
    return lines
