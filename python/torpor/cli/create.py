"""With words after the id and no --bundle, the container is made on the host's own files."""

from __future__ import annotations

from torpor import api
from torpor import create as creation

from .common import START_FLAGS, start_options
from .run import id_and_plan

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags] ID [COMMAND ARGS...]"
FLAGS = START_FLAGS


def execute(config: Config, flags: Parsed) -> int:
    container_id, what = id_and_plan(config, flags, attached=False)
    api.check_console(what, flags.text("console-socket"), attached=False)
    creation.create(config, container_id, what, start_options(flags, supervise=False))
    return 0
