from __future__ import annotations

from torpor import quick_json

from .common import container, one_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Flag, Parsed

USAGE = "ID"
FLAGS: tuple[Flag, ...] = ()


def execute(config: Config, flags: Parsed) -> int:
    print(quick_json.pretty(container(config, one_id(flags)).state()))
    return 0
