from __future__ import annotations

from torpor import launcher, quick_json
from torpor.errors import UsageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Flag, Parsed

USAGE = ""
FLAGS: tuple[Flag, ...] = ()


def execute(config: Config, flags: Parsed) -> int:
    if flags.args:
        raise UsageError(f"unexpected argument {flags.args[0]!r}")
    from torpor import __version__

    found = quick_json.loads(launcher.output("features"))
    # Docker and containerd learn from the first one whether a runtime can checkpoint at all.
    found.setdefault("annotations", {}).update(
        {"org.opencontainers.runc.checkpoint.enabled": "true", "dev.torpor.version": __version__}
    )
    print(quick_json.pretty(found))
    return 0
