"""SIGNAL is a name with or without SIG, or a number; TERM when it is not given."""

from __future__ import annotations

from torpor.errors import UsageError
from torpor.flags import BOOL, NUMBER, Flag

from .common import container

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Parsed

# SIGRTMAX on x86-64 (signal(7))
_LAST = 64

USAGE = "[flags] ID [SIGNAL]"
FLAGS = (
    Flag("all", BOOL, "every process in the container", short="a"),
    Flag("pid", NUMBER, "the process with this pid, as the container numbers it"),
)


def execute(config: Config, flags: Parsed) -> int:
    if not 1 <= len(flags.args) <= 2:
        raise UsageError("a container id is required, and at most a signal after it")
    number = signal_number(flags.args[1] if len(flags.args) == 2 else "TERM")
    found = container(config, flags.args[0])
    if "pid" in flags.given:
        if flags.on("all"):
            raise UsageError("give either --all or --pid")
        found.kill_process(flags.number("pid"), number)
    else:
        found.kill(number, all_processes=flags.on("all"))
    return 0


def signal_number(text: str) -> int:
    """Raises UsageError for what is not a signal."""
    if text.isdigit():
        # as engines give it, and without `import signal`, which takes a third of what this command takes
        if int(text) <= _LAST:
            return int(text)
    else:
        import signal

        name = text.upper()
        name = name if name.startswith("SIG") else f"SIG{name}"
        base, sign, offset = _split_offset(name)
        known = {"SIGIOT": 6, "SIGPOLL": 29, "SIGRTMIN": int(signal.SIGRTMIN), "SIGRTMAX": int(signal.SIGRTMAX)}
        found = known.get(base) or getattr(signal, base, None)
        if base.isidentifier() and isinstance(found, int) and not base.startswith("SIG_"):
            number = int(found) + sign * offset
            if not offset or (base.startswith("SIGRT") and signal.SIGRTMIN <= number <= signal.SIGRTMAX):
                return number
    raise UsageError(f"unknown signal {text!r}: use a name like TERM or a number up to 64", object=text)


def _split_offset(name: str) -> tuple[str, int, int]:
    for mark, sign in (("+", 1), ("-", -1)):
        base, found, offset = name.partition(mark)
        if found and offset.isdigit():
            return base, sign, int(offset)
    return name, 1, 0
