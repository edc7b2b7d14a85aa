"""mount(2) and umount2(2). Python has no call for them, and `mount` the program is not on every machine."""

from __future__ import annotations

import ctypes
import os

MS_RDONLY, MS_NOSUID, MS_NODEV = 0x1, 0x2, 0x4
MS_PRIVATE, MS_BIND, MS_REC = 1 << 18, 1 << 12, 1 << 14
MNT_DETACH, UMOUNT_NOFOLLOW = 0x2, 0x8

_libc = ctypes.CDLL(None, use_errno=True)


def mount(source: str, target: str, kind: str, flags: int = 0, data: str = "") -> None:
    """Raises OSError with the path mounted on."""
    done = _libc.mount(_bytes(source), _bytes(target), _bytes(kind), ctypes.c_ulong(flags), _bytes(data))
    if done != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), target)


def unmount(target: str) -> None:
    """Take off every mount at `target`. Done when there is none. Detaches what is still in use: its users keep it till
    they end.
    """
    for _ in range(16):
        if _libc.umount2(_bytes(target), UMOUNT_NOFOLLOW) == 0:
            continue
        number = ctypes.get_errno()
        if number in (22, 2):  # EINVAL: not a mount point; ENOENT
            return
        if number == 16 and _libc.umount2(_bytes(target), UMOUNT_NOFOLLOW | MNT_DETACH) == 0:  # EBUSY
            continue
        raise OSError(number, os.strerror(number), target)


def _bytes(text: str) -> bytes:
    return os.fsencode(text)
