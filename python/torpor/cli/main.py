"""`torpor [flags] VERB [flags] ARGS`: find the verb, run it, turn failures into one line and an exit code."""

from __future__ import annotations

import os
import sys

from torpor import log
from torpor.cli import Interrupted
from torpor.config import FLAGS, Config, from_flags
from torpor.errors import TorporError, UsageError
from torpor.flags import HelpRequested, describe, parse

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from types import ModuleType
    from typing import NoReturn

# runsc's exit code for its own errors; a program's own may be anything below
ERROR = 128

VERBS = {
    "checkpoint": "write a container to an image and stop it, or let it go on",
    "create": "build a container and have it wait for start or restore",
    "delete": "remove a container and everything that belongs to it",
    "do": "run a command in a throw-away container on the host's files",
    "events": "print what a container uses, again and again",
    "exec": "run another program in a container",
    "features": "say what this runtime can do, as OCI features JSON",
    "help": "show help for a verb",
    "inspect": "show what is in an image",
    "install": "make torpor a runtime of Docker, containerd or Podman",
    "kill": "send a signal to a container",
    "list": "list containers",
    "pause": "freeze a container where it is",
    "ps": "list the processes of a container",
    "restore": "wake up an image in a container",
    "resume": "let a paused container go on",
    "run": "create and start a container",
    "spec": "write a config.json to start from",
    "squash": "fold a chain of images into one",
    "start": "start the program of a created container",
    "state": "show the state of a container",
    "uninstall": "take back what install did",
    "update": "change the limits of a container",
    "wait": "wait for a container to end",
}


def main(argv: Sequence[str] | None = None) -> int:
    """The `torpor` command. Returns its exit code."""
    _open_standard_streams()
    debugging = False
    try:
        words = list(sys.argv[1:] if argv is None else argv)
        try:
            parsed = parse(FLAGS, words)
        except HelpRequested:
            return _print(usage())
        if parsed.on("version"):
            return _print(version())
        # Before anything else can fail: the caller reads failures from --log.
        verb, *rest = parsed.args or [""]
        log.setup(
            Config(log=parsed.text("log"), debug=parsed.on("debug"), debug_log=parsed.text("debug-log")), verb or "none"
        )
        debugging = parsed.on("debug")
        config = from_flags(parsed)
        log.debug(f"torpor {' '.join(words)}")
        if not verb:
            raise UsageError("no verb given: see `torpor help`")
        return _run(config, verb, rest)
    except TorporError as e:
        if debugging:
            _debug_traceback()
        _fail(str(e), argv)
    except KeyboardInterrupt:
        return 128 + 2
    except Interrupted as e:
        return 128 + e.number
    except BrokenPipeError:
        # The reader of our output is gone; nobody is left to tell. Keep Python from trying again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    except Exception as e:
        if debugging:
            _debug_traceback()
        _fail(_unexpected(e), argv)
    return ERROR


def command() -> NoReturn:
    """The `torpor` program: `main`, but what the kernel clears up is left to the kernel, which is quicker."""
    code = main()
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            pass  # its reader is gone
    os._exit(code)


def _run(config: Config, verb: str, words: list[str]) -> int:
    module = load(verb)
    try:
        flags = parse(module.FLAGS, words)
    except HelpRequested:
        return _print(usage_of(verb, module))
    except UsageError as e:
        raise UsageError(f"{e} (see `torpor help {verb}`)", code=e.code, object=e.object) from None
    try:
        code = module.execute(config, flags)
        sys.stdout.flush()
    except UsageError as e:
        if e.code == "usage" and "see `" not in str(e):
            raise UsageError(f"{e} (see `torpor help {verb}`)", code=e.code, object=e.object) from None
        raise
    return int(code)


def load(verb: str) -> ModuleType:
    """Import one verb.

    Raises:
        UsageError: there is no such verb.
    """
    if verb not in VERBS:
        raise UsageError(f"unknown verb {verb!r}: see `torpor help`", object=verb)
    # importlib.import_module would bring the package importlib, and warnings with it
    name = f"{__package__}.{verb}"
    __import__(name)
    return sys.modules[name]


def usage() -> str:
    verbs = "\n".join(f"  {name:<12} {what}" for name, what in VERBS.items())
    return f"""usage: torpor [flags] VERB [flags] ARGS

{verbs}

Flags before the verb:
{describe(FLAGS)}

`torpor help VERB` tells more. Flags may begin with one dash or two, and come before the arguments."""


def usage_of(verb: str, module: ModuleType) -> str:
    text = f"usage: torpor {verb} {module.USAGE}".rstrip() + f"\n\n{VERBS[verb]}"
    if module.__doc__:
        text += f"\n\n{module.__doc__.strip()}"
    if module.FLAGS:
        text += f"\n\nFlags:\n{describe(module.FLAGS)}"
    return text


def version() -> str:
    from torpor import __version__
    from torpor.spec import OCI_VERSION

    return f"torpor version {__version__}\nspec: {OCI_VERSION}"


def _print(text: str) -> int:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()
    return 0


def _fail(message: str, argv: Sequence[str] | None) -> None:
    if not log.is_set_up():
        # The flags themselves are wrong. Somebody may still be waiting for the answer in --log.
        log.setup(Config(log=_log_file(sys.argv[1:] if argv is None else argv)), "none")
    log.error(message)


def _log_file(words: Sequence[str]) -> str:
    for i, word in enumerate(words):
        name, has_value, value = word.lstrip("-").partition("=")
        if word.startswith("-") and name == "log":
            return value if has_value else words[i + 1] if i + 1 < len(words) else ""
    return ""


def _unexpected(e: Exception) -> str:
    if isinstance(e, OSError) and e.strerror:
        where = f"{e.filename}: " if e.filename else ""
        return f"{where}{e.strerror}"
    return f"internal error: {type(e).__name__}: {e} (run again with --debug to see where)"


def _debug_traceback() -> None:
    import traceback

    for line in traceback.format_exc().splitlines():
        log.debug(line)


def _open_standard_streams() -> None:
    """Give 0, 1 and 2 to something: a file opened later must not become the container's standard output by accident."""
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
            os.set_inheritable(fd, True)
    if sys.stdout is None:
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
    if sys.stderr is None:
        sys.stderr = open(2, "w", closefd=False)  # noqa: SIM115
