"""The host's files are read-only; what the command writes goes to a layer that is thrown away with the container."""

from __future__ import annotations

from torpor import api, create, plan
from torpor.errors import UsageError
from torpor.flags import BOOL, LIST, NUMBER, TEXT, Flag

from .run import attach

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.container import Container
    from torpor.create import Options
    from torpor.flags import Parsed

USAGE = "[flags] [--] COMMAND [ARGS...]"
FLAGS = (
    Flag("root", TEXT, "directory to use as root", default="/"),
    Flag("cwd", TEXT, "working directory (the current one, if the container has it)"),
    Flag("volume", LIST, "SRC[:DST]: a directory of the host that the command may write to; repeatable"),
    Flag("quiet", BOOL, "accepted; torpor says nothing anyway", short="q"),
    Flag("force-overlay", BOOL, "work on a layer above the root", default=True),
    # what attach asks for, and what makes no sense for a container that is gone with its command
    Flag("console-socket", TEXT, "", hidden=True),
    Flag("pid-file", TEXT, "file to write the host's pid of the command to"),
    Flag("pidfd-socket", TEXT, "", hidden=True),
    Flag("preserve-fds", NUMBER, "hand on this many descriptors from 3 upwards"),
    Flag("no-pivot", BOOL, "", hidden=True),
    Flag("no-new-keyring", BOOL, "", hidden=True),
)


def execute(config: Config, flags: Parsed) -> int:
    import os

    if not flags.args:
        raise UsageError("a command is required")
    if not flags.on("force-overlay"):
        raise UsageError(
            "--force-overlay=false is not supported: torpor do never writes to the host's files", code="bad-flag"
        )
    if flags.text("console-socket"):
        raise UsageError("torpor do stays attached: leave --console-socket out", code="bad-flag")
    container_id = api.new_id()
    what = plan.on_host_root(
        config,
        flags.args,
        hostname=container_id,
        cwd=os.path.abspath(flags.text("cwd")) if flags.text("cwd") else "",
        terminal=os.isatty(0) and os.isatty(1),
        volumes=flags.words("volume"),
        lower=flags.text("root"),
    )

    def build(options: Options) -> Container:
        return create.run(config, container_id, what, options)

    return attach(config, flags, what, build)
