"""IMAGE-DIR is the last image of a chain that --parent-path made. NEW-DIR, made when it is missing, gets one image with
the same state that needs no other. The images of the chain stay as they are."""

from __future__ import annotations

from torpor import api, compression
from torpor.errors import UsageError
from torpor.flags import TEXT, Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags] IMAGE-DIR NEW-DIR"
FLAGS = (Flag("compression", TEXT, compression.HELP, default="none"),)


def execute(config: Config, flags: Parsed) -> int:
    if len(flags.args) != 2:
        raise UsageError("two directories are required: that of the image and that of the new one")
    image, new = flags.args
    api.squash(image, new, compression=compression.check(flags.text("compression")))
    return 0
