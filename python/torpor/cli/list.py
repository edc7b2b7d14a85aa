from __future__ import annotations

from torpor import quick_json
from torpor.container import as_oci, load_states
from torpor.errors import UsageError
from torpor.flags import BOOL, TEXT, Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags]"
FLAGS = (
    # runc says table, runsc says text: the same thing
    Flag("format", TEXT, "table, text or json", default="table", short="f", choices=("table", "text", "json")),
    Flag("quiet", BOOL, "ids only", short="q"),
)

_HEAD = ("ID", "PID", "STATUS", "BUNDLE", "CREATED", "OWNER")


def execute(config: Config, flags: Parsed) -> int:
    if flags.args:
        raise UsageError(f"unexpected argument {flags.args[0]!r}")
    states = [as_oci(state) for state in load_states(config.root)]
    if flags.on("quiet"):
        for state in states:
            print(state["id"])
        return 0
    if flags.text("format") == "json":
        print(quick_json.dumps(states))
    else:
        print_table(_HEAD, [[str(state[name.lower()]) for name in _HEAD] for state in states])
    return 0


def print_table(head: Sequence[str], rows: list[list[str]]) -> None:
    """Columns as wide as their widest word, two spaces apart; the last one is not padded."""
    table = [list(head), *rows]
    widths = [max(len(row[i]) for row in table) for i in range(len(head))]
    for row in table:
        print("  ".join(word.ljust(width) for word, width in zip(row, widths, strict=True)).rstrip())
