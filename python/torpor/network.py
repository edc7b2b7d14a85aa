"""Bring up the loopback of a new network namespace, as runc does: in an empty one 127.0.0.1 cannot even be bound."""

from __future__ import annotations

import _thread
import ctypes
import fcntl
import os
import socket
import struct

from .errors import KernelError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from .spec import Spec

_CLONE_NEWNET = 0x40000000
_SIOCGIFFLAGS, _SIOCSIFFLAGS, _IFF_UP = 0x8913, 0x8914, 1


def has_new_namespace(spec: Spec) -> bool:
    namespaces = (spec.get("linux") or {}).get("namespaces") or []
    return any(n["type"] == "network" and not n.get("path") for n in namespaces)


def bring_up_loopback(pid: int) -> None:
    """In the network namespace of `pid`.

    Raises:
        KernelError: `kernel`.
    """
    # A namespace is entered by a thread, not by a process: this one is made for it and ends with it.
    done = _thread.allocate_lock()
    done.acquire()
    failures: list[OSError] = []

    def work() -> None:
        try:
            _enter(pid)
            _set_up()
        except OSError as e:
            failures.append(e)
        finally:
            done.release()

    _thread.start_new_thread(work, ())
    done.acquire()
    if failures:
        raise KernelError(f"cannot bring up the container's loopback: {failures[0].strerror}", code="kernel", pid=pid)


def _enter(pid: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWNET) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number))
    finally:
        os.close(fd)


def _set_up() -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as s:
        request = struct.pack("16sh22x", b"lo", 0)
        (flags,) = struct.unpack_from("h", fcntl.ioctl(s, _SIOCGIFFLAGS, request), 16)
        fcntl.ioctl(s, _SIOCSIFFLAGS, struct.pack("16sh22x", b"lo", flags | _IFF_UP))
