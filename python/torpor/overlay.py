"""The host's files as a container's root: read-only below, a layer of the container's own above.

The overlay is mounted in the host's mount namespace, inside the state directory, for as long as the container exists.
The lower layer is the file system that is mounted on `/` and nothing that is mounted below it: the kernel does not
follow mounts inside a layer. So /proc, /dev and /tmp-on-tmpfs are empty directories there, which is what a container
wants; a separate /home needs --volume.
"""

from __future__ import annotations

import os

from .errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .state import Home


def mount(home: Home, lower: str = "/") -> str:
    """Mount the overlay of a container and return the path of its root.

    Raises:
        KernelError: `kernel` or `permission`.
    """
    from . import mounts

    top = home.file("overlay")
    try:
        os.makedirs(top, mode=0o700)
        try:
            return _mount_in(top, lower)
        except OSError as first:
            # An overlay cannot carry an upper layer for another overlay; then the upper layer lives in memory.
            if first.errno != 22:
                raise
            mounts.mount("tmpfs", top, "tmpfs", mounts.MS_NOSUID | mounts.MS_NODEV, "mode=700")
            return _mount_in(top, lower)
    except OSError as e:
        unmount(home)
        code = "permission" if e.errno in (1, 13) else "kernel"
        raise KernelError(
            f"cannot put an overlay over {lower}: {e.strerror}; use --bundle with a root file system of its own",
            code=code,
            object=lower,
        ) from None


def _mount_in(top: str, lower: str) -> str:
    from .mounts import MS_PRIVATE
    from .mounts import mount as mount_call

    upper, work, merged = (os.path.join(top, name) for name in ("upper", "work", "merged"))
    for path in (upper, work, merged):
        os.makedirs(path, mode=0o755, exist_ok=True)
    # The root of the overlay shows the upper directory's own mode and owner, and those should be the host root's.
    shown = os.stat(lower)
    os.chmod(upper, shown.st_mode & 0o7777)
    options = ",".join(
        f"{key}={_escape(path)}" for key, path in (("lowerdir", lower), ("upperdir", upper), ("workdir", work))
    )
    mount_call("overlay", merged, "overlay", 0, options)
    # What the launcher mounts in the container must not show up on the host, nor the other way round.
    mount_call("", merged, "", MS_PRIVATE)
    return merged


def unmount(home: Home) -> None:
    """Take the overlay off again. Safe to call when there is none.

    Raises:
        OSError: the kernel would not let it go.
    """
    top = home.file("overlay")
    if not os.path.isdir(top):
        return
    from . import mounts

    mounts.unmount(os.path.join(top, "merged"))
    mounts.unmount(top)


def _escape(path: str) -> str:
    """overlayfs splits its options at `,` and lowerdir at `:`; a backslash keeps them."""
    return "".join("\\" + c if c in "\\,:" else c for c in path)
