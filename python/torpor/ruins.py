"""Take a container down completely, and clear away what a killed torpor left half built.

Every step may have been done already, by the launcher, the tracer or an earlier try, so every step is content with
finding nothing. The directory goes last: as long as it is there, somebody can try again.
"""

from __future__ import annotations

import os
import sys

from . import launcher, log, overlay, proc
from .errors import StateError, TorporError
from .state import LIVING, TRANSIENT, Home, State

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

_SIGKILL = 9


def is_ruin(home: Home, state: State | None) -> bool:
    """Whether this is the leftover of a torpor that died while it made or restored a container."""
    if state is None:
        return os.path.isdir(home.path) and not home.is_busy()
    if state.status not in TRANSIENT:
        return False
    owner = state.owner_process
    return owner is None or not proc.is_alive(*owner)


def clear_if_ruin(home: Home) -> bool:
    """Clear the directory if it is a ruin. The lock is waited for: what a tracer started may be at the same work."""
    if not is_ruin(home, home.read()):
        return False
    try:
        with home:
            state = home.read()
            if state is None or is_ruin(home, state):
                log.debug(f"clearing what a dead torpor left of container {home.id}")
                clear(home, state)
                return True
    except StateError:
        pass  # somebody else cleared it while we waited
    return not os.path.isdir(home.path)


def clear_damaged(home: Home) -> None:
    """Remove a container whose state.json cannot be read. The launcher has its own record of what to kill."""
    with home:
        clear(home, None)


def clear(home: Home, state: State | None) -> None:
    """Kill the container, run its poststop hooks, remove its cgroups, mounts and directory. The lock must be held.

    Raises:
        TorporError: the launcher could not do its part.
        OSError: something could not be unmounted or removed.
    """
    if state is not None:
        kill(state)
    if os.path.isdir(home.file("oci")):
        launcher.run("delete", "--root", home.file("oci"), "--id", home.id)
    overlay.unmount(home)
    remove_tree(home.path)


def orphan_command(home: Home, state: State) -> dict[str, Any]:
    """What the tracer runs when it has undone a restore because the torpor it works for was killed."""
    package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    if sys.executable:
        code = (
            "import sys; sys.path.insert(0, sys.argv[1]); from torpor import ruins; ruins.clear_orphan(*sys.argv[2:])"
        )
        argv = [sys.executable, "-I", "-S", "-c", code, package, home.path, str(state.pid)]
        return {"argv0_path": sys.executable, "argv": argv, "remove": []}
    # Python inside another program. What stays of the directory, the next torpor finds and clears.
    argv = ["torpor-launcher", "delete", "--root", home.file("oci"), "--id", home.id]
    return {"argv0_path": launcher.path(), "argv": argv, "remove": []}


def clear_orphan(path: str, pid: str) -> None:
    """Clear the container whose init had this pid.

    Its status may be `running` already: torpor may have been killed after it wrote that and before it told the tracer
    to go on.
    """
    home = Home(*os.path.split(path))
    with home:
        state = home.read()
        if state is not None and state.pid == int(pid):
            clear(home, state)


def end_tracers(state: State) -> None:
    """End the tracers that hold a container: a stuck one must not make it undeletable."""
    for pid in proc.cgroup_processes(state.pid):
        tracer = proc.tracer(pid)
        if tracer and tracer != os.getppid() and proc.comm(tracer) == "torpor-tracer":
            log.debug(f"ending tracer {tracer} of container {state.id}")
            try:
                os.kill(tracer, _SIGKILL)
            except ProcessLookupError:
                pass


def kill(state: State) -> None:
    """SIGKILL for the init of a container; the kernel takes the rest of its pid namespace along."""
    if state.pid == 0 or not proc.is_alive(state.pid, state.start_time):
        return
    end_tracers(state)
    try:
        os.kill(state.pid, _SIGKILL)
    except ProcessLookupError:
        return
    if state.status in LIVING:
        _thaw(state.pid)


def _thaw(pid: int) -> None:
    # The v1 freezer keeps even a killed process from dying.
    from . import freezer

    if freezer.is_frozen(pid):
        try:
            freezer.set_frozen(pid, False)
        except TorporError as e:
            log.debug(f"thaw {pid}: {e}")


def remove_tree(path: str) -> None:
    """rm -r that never leaves the file system it starts on, so a mount that is still there is not emptied."""
    try:
        device = os.lstat(path).st_dev
    except FileNotFoundError:
        return
    for directory, names, files, fd in os.fwalk(path, topdown=False, follow_symlinks=False):
        if os.fstat(fd).st_dev != device:
            raise OSError(16, "something is still mounted there", directory)
        for name in files:
            _forget(os.unlink, name, fd)
        for name in names:
            # a link to a directory is listed among the directories
            try:
                os.rmdir(name, dir_fd=fd)
            except NotADirectoryError:
                _forget(os.unlink, name, fd)
            except FileNotFoundError:
                pass
    try:
        os.rmdir(path)
    except FileNotFoundError:
        pass


def _forget(remove: object, name: str, fd: int) -> None:
    try:
        remove(name, dir_fd=fd)  # type: ignore[operator]
    except FileNotFoundError:
        pass
