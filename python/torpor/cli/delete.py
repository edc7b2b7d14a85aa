from __future__ import annotations

import os

from torpor.errors import StateError, UsageError
from torpor.flags import BOOL, Flag

TYPE_CHECKING = False
if TYPE_CHECKING:
    from torpor.config import Config
    from torpor.flags import Parsed

USAGE = "[flags] ID..."
FLAGS = (Flag("force", BOOL, "also when it runs; content when there is no such container", short="f"),)


def execute(config: Config, flags: Parsed) -> int:
    if not flags.args:
        raise UsageError("a container id is required")
    for container_id in flags.args:
        if flags.on("force") and _is_surely_absent(config.root, container_id):
            continue
        _delete(config, container_id, flags.on("force"))
    return 0


def _is_surely_absent(root: str, container_id: str) -> bool:
    """containerd's shim ends every container with a second `delete --force`: answered without loading the rest."""
    if not (container_id.isascii() and container_id.isalnum()):
        return False
    try:
        return not any(name.startswith(container_id) for name in os.listdir(root))
    except FileNotFoundError:
        return True


def _delete(config: Config, container_id: str, force: bool) -> None:
    from torpor import ruins
    from torpor.container import Container
    from torpor.state import Home, find_id

    try:
        found = Container.load(container_id, root=config.root)
        config.check_against(found.refresh().flags, found.id)
        found.delete(force=force)
    except StateError as e:
        if force and e.code == "not-found":
            return
        if force and e.object == "damaged":
            ruins.clear_damaged(Home(config.root, find_id(config.root, container_id)))
            return
        raise
