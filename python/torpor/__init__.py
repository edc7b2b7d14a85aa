"""torpor puts running containers to sleep in a file and wakes them up again.

>>> import torpor
>>> with torpor.run(["sleep", "60"], network="none") as container:   # doctest: +SKIP
...     saved = container.checkpoint("/tmp/nap")
>>> with torpor.restore("/tmp/nap") as again:                        # doctest: +SKIP
...     again.wait()
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from .api import Checkpoint as Checkpoint
    from .api import Container as Container
    from .api import PendingCheckpoint as PendingCheckpoint
    from .api import Process as Process
    from .api import inspect as inspect
    from .api import list_containers as list_containers
    from .api import restore as restore
    from .api import run as run
    from .api import squash as squash
    from .errors import ImageError as ImageError
    from .errors import InternalError as InternalError
    from .errors import InterruptedCheckpoint as InterruptedCheckpoint
    from .errors import KernelError as KernelError
    from .errors import LauncherError as LauncherError
    from .errors import RefusedError as RefusedError
    from .errors import SpecError as SpecError
    from .errors import StateError as StateError
    from .errors import TorporError as TorporError
    from .errors import UnsupportedError as UnsupportedError
    from .errors import UsageError as UsageError

__version__ = "0.1.0"

# The command line imports this package too and must not pay for what a verb does not use: names are looked up when
# asked for.
_HOME = {
    "Checkpoint": "api",
    "Container": "api",
    "PendingCheckpoint": "api",
    "Process": "api",
    "inspect": "api",
    "list_containers": "api",
    "restore": "api",
    "run": "api",
    "squash": "api",
    "ImageError": "errors",
    "InternalError": "errors",
    "InterruptedCheckpoint": "errors",
    "KernelError": "errors",
    "LauncherError": "errors",
    "RefusedError": "errors",
    "SpecError": "errors",
    "StateError": "errors",
    "TorporError": "errors",
    "UnsupportedError": "errors",
    "UsageError": "errors",
}

__all__ = [
    "Checkpoint",
    "Container",
    "ImageError",
    "InternalError",
    "InterruptedCheckpoint",
    "KernelError",
    "LauncherError",
    "PendingCheckpoint",
    "Process",
    "RefusedError",
    "SpecError",
    "StateError",
    "TorporError",
    "UnsupportedError",
    "UsageError",
    "__version__",
    "inspect",
    "list_containers",
    "restore",
    "run",
    "squash",
]


def __getattr__(name: str) -> Any:
    home = _HOME.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
