from __future__ import annotations

from torpor.errors import UsageError

from . import main

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Flag, Parsed

USAGE = "[VERB]"
FLAGS: tuple[Flag, ...] = ()


def execute(config: Config, flags: Parsed) -> int:
    if len(flags.args) > 1:
        raise UsageError(f"unexpected argument {flags.args[1]!r}")
    if flags.args:
        print(main.usage_of(flags.args[0], main.load(flags.args[0])))
    else:
        print(main.usage())
    return 0
