"""Words after the flags become the command; `sh` when there are none. A config.json that exists is not overwritten."""

from __future__ import annotations

import os

from torpor import quick_json, spec
from torpor.errors import SpecError, UsageError
from torpor.flags import BOOL, TEXT, Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags] [COMMAND ARGS...]"
FLAGS = (
    Flag("bundle", TEXT, "directory to write config.json to", default=".", short="b"),
    Flag("cwd", TEXT, "working directory in the container", default="/"),
    Flag("netns", TEXT, "path of a network namespace to use"),
    Flag("rootless", BOOL, "a spec for a container without root", hidden=True),
)


def execute(config: Config, flags: Parsed) -> int:
    if flags.on("rootless"):
        raise UsageError("--rootless is not supported yet: torpor needs root", code="bad-flag", object="--rootless")
    made = spec.default(flags.args or ("sh",), cwd=flags.text("cwd"), netns=flags.text("netns"))
    path = os.path.join(flags.text("bundle"), "config.json")
    try:
        with open(path, "x", encoding="utf-8") as f:
            f.write(quick_json.pretty(made) + "\n")
    except FileExistsError:
        raise SpecError(f"{path} already exists: remove it first", code="bad-bundle", object=path) from None
    return 0
