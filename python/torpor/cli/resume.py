from __future__ import annotations

from .common import container, one_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Flag, Parsed

USAGE = "ID"
FLAGS: tuple[Flag, ...] = ()


def execute(config: Config, flags: Parsed) -> int:
    container(config, one_id(flags)).resume()
    return 0
