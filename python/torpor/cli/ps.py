"""Pids are the host's. Words after the id are given to the host's ps program, of whose output the lines of the
container are shown."""

from __future__ import annotations

from torpor import quick_json
from torpor.errors import UsageError
from torpor.flags import TEXT, Flag

from .common import container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags] ID [PS-OPTIONS...]"
FLAGS = (Flag("format", TEXT, "table or json", default="table", short="f", choices=("table", "json")),)

_HEAD = ("UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD")


def execute(config: Config, flags: Parsed) -> int:
    if not flags.args:
        raise UsageError("a container id is required")
    container_id, *options = flags.args
    found = container(config, container_id)
    # runc shows an empty table for what has ended, and its clients ask without knowing.
    pids = [] if found.status == "stopped" else found.processes()
    if flags.text("format") == "json":
        print(quick_json.dumps(pids))
    elif options:
        _ask_ps(pids, options)
    else:
        from torpor import process_table

        from .list import print_table

        print_table(_HEAD, process_table.rows(pids))
    return 0


def _ask_ps(pids: list[int], options: list[str]) -> None:
    import subprocess

    try:
        done = subprocess.run(["ps", *options], check=True, capture_output=True, text=True)
    except FileNotFoundError:
        raise UsageError("there is no ps program on this machine: leave its options out") from None
    except subprocess.CalledProcessError as e:
        raise UsageError(
            f"ps {' '.join(options)}: {e.stderr.strip().splitlines()[0] if e.stderr.strip() else 'failed'}"
        ) from None
    head, *lines = done.stdout.splitlines()
    column = head.split().index("PID") if "PID" in head.split() else -1
    if column < 0:
        raise UsageError("the ps options must show a PID column")
    print(head)
    wanted = {str(pid) for pid in pids}
    for line in lines:
        fields = line.split()
        if len(fields) > column and fields[column] in wanted:
            print(line)
