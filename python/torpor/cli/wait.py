"""Prints {"id", "exitStatus"} when the container has ended. exitStatus is null when nobody can know it any more: it
ended before anyone looked, or the kernel is older than 6.15."""

from __future__ import annotations

from torpor import quick_json
from torpor.errors import UsageError
from torpor.flags import BOOL, NUMBER, Flag

from .common import container, one_id

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags] ID"
FLAGS = (
    Flag("checkpoint", BOOL, "wait for a checkpoint that is being written, instead, and fail if a detached one has"),
    Flag("restore", BOOL, "wait for a restore that is at work, instead"),
    Flag("rootpid", NUMBER, "wait for the process with this host pid, instead", default=-1),
    Flag("pid", NUMBER, "wait for the process with this pid in the container, instead", default=-1),
)


def execute(config: Config, flags: Parsed) -> int:
    found = container(config, one_id(flags))
    if flags.on("checkpoint"):
        found.wait_checkpoint()
        return 0
    if flags.on("restore"):
        # It holds the container's lock until the program runs.
        with found.home:
            pass
        found.wait_restored()
        return 0
    if flags.number("rootpid") >= 0 and flags.number("pid") >= 0:
        raise UsageError("give either --pid or --rootpid")
    if flags.number("pid") >= 0:
        status = found.wait_process(found.host_pid(flags.number("pid")))
    elif flags.number("rootpid") >= 0:
        status = found.wait_process(flags.number("rootpid"))
    else:
        status = found.wait()
    print(quick_json.dumps({"id": found.id, "exitStatus": status}))
    return 0
