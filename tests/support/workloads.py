"""The programs of tests/workloads/: how each is built, on which root file system it runs, and how it is asked whether all is well."""

import hashlib
import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support import bundles, procs
from support.bundles import DOCKER_CAPS, HostRoot
from support.cli import Container, Torpor, new_id

SOURCES = bundles.REPO / "tests" / "workloads"
BUILT = bundles.CACHE / "bin"
# what the programs need beside Docker's set: a network namespace of their own has to be brought up
CAPS = [*DOCKER_CAPS, "CAP_NET_ADMIN", "CAP_SYS_ADMIN", "CAP_SYS_NICE"]


def compiled(name: str) -> Path:
    """Compile tests/workloads/NAME.c, statically so that it runs on any root, once for each version of the source."""
    source, header = SOURCES / f"{name}.c", SOURCES / "workload.h"
    command = ["gcc", "-O2", "-g", "-static", "-pthread", "-Wall", "-Wextra", "-Werror"]
    version = hashlib.sha256(source.read_bytes() + header.read_bytes() + " ".join(command).encode()).hexdigest()[:12]
    target = BUILT / f"{name}-{version}"
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        made = target.with_suffix(f".{os.getpid()}")
        subprocess.run([*command, "-o", str(made), str(source), "-lm"], check=True)
        made.replace(target)
    return target


class Redis(Container):
    """redis-server, asked over its socket instead of by a signal."""

    socket_path = "wl/redis.sock"
    keys = 100_000

    def ask(self, *words: str | int) -> Any:
        """One command on a connection of its own."""
        path = self.bundle / "rootfs" / self.socket_path
        with socket.socket(socket.AF_UNIX) as s:
            s.settimeout(60)
            s.connect(str(path))
            s.sendall(
                b"*%d\r\n" % len(words)
                + b"".join(b"$%d\r\n%s\r\n" % (len(w), w) for w in (str(x).encode() for x in words))
            )
            return self._answer(s.makefile("rb"))

    def _answer(self, stream: Any) -> Any:
        line = stream.readline().rstrip()
        kind, rest = line[:1], line[1:]
        if kind == b"-":
            raise AssertionError(f"redis: {rest.decode()}")
        if kind == b":":
            return int(rest)
        if kind == b"$":
            return stream.read(int(rest) + 2)[:-2] if int(rest) >= 0 else None
        if kind == b"*":
            return [self._answer(stream) for _ in range(int(rest))]
        return rest.decode()

    def _settled(self) -> None:
        """Let the server see that our connection is closed: a connected socket is not this workload's subject."""
        time.sleep(0.1)

    def wait_ready(self, timeout: float = 60) -> "Redis":
        def up() -> bool:
            try:
                return bool(self.ask("PING") == "PONG")
            except (OSError, AssertionError):
                return False

        procs.wait_until("redis to answer", up, timeout)
        self.ask("DEBUG", "POPULATE", self.keys, "key", 200)
        self.ask("SET", "counter", 0)
        self.ask("RPUSH", "list", *range(1000))
        self.ask("HSET", "hash", *[x for i in range(500) for x in (f"f{i}", i)])
        self.expected = self.digest()
        self.count = 0
        self._settled()
        return self

    def digest(self) -> tuple[Any, Any]:
        self.ask("SET", "counter", 0)
        return self.ask("DBSIZE"), self.ask("DEBUG", "DIGEST")

    def take_over(self, other: "Container") -> None:
        assert isinstance(other, Redis)
        self.expected, self.count = other.expected, other.count

    def verify(self, timeout: float = 60) -> str:
        # the counter shows that it is the state of that moment, then it is set back
        assert int(self.ask("GET", "counter")) == 0
        assert self.digest() == self.expected, "redis holds other keys"
        assert self.ask("GET", f"key:{self.keys // 2}") is not None
        inside = self.torpor("exec", self.id, "redis-cli", "-h", "127.0.0.1", "DBSIZE", check=False)
        assert inside.code == 0 and str(self.expected[0]) in inside.out, f"a client over TCP: {inside}"
        self._settled()
        return "OK"

    def bgsave(self) -> None:
        """Save in the background, to the end."""
        before = self.ask("LASTSAVE")
        time.sleep(1.1)  # LASTSAVE counts seconds
        self.ask("BGSAVE")
        procs.wait_until("BGSAVE to end", lambda: self.ask("LASTSAVE") > before and not self.saving(), 60)
        assert "rdb_last_bgsave_status:ok" in self.ask("INFO", "persistence").decode()
        self._settled()

    def saving(self) -> bool:
        return "rdb_bgsave_in_progress:1" in self.ask("INFO", "persistence").decode()


@dataclass(frozen=True)
class Workload:
    name: str
    args: tuple[str, ...]
    root: str  # busybox or host
    container: type[Container] = Container
    real: bool = False  # one of the real programs of issue 3
    needs: tuple[str, ...] = ()
    mounts: tuple[dict[str, Any], ...] = ()
    cpu: tuple[tuple[str, int], ...] = ()  # linux.resources.cpu
    restless: bool = False  # its processes, threads or mappings change all the time: never the same ones twice


def _tmpfs(point: str, *options: str) -> dict[str, Any]:
    """As `docker run --tmpfs POINT:OPTIONS` has it."""
    options = ("nosuid", "nodev", *options)
    return {"destination": point, "type": "tmpfs", "source": "tmpfs", "options": list(options)}


def _c(name: str, *args: str) -> Workload:
    return Workload(name, (f"/bin/{name}", *args), "busybox")


WORKLOADS = {
    w.name: w
    for w in (
        _c("threads"), _c("signals"), _c("timers"), _c("blocked"), _c("identity", "first argument", "second"), _c("credentials"),
        _c("rlimits"), _c("memory"), _c("memfd"), _c("deleted"), _c("files"), _c("pipes"), _c("events"), _c("unixsock"), _c("inflight"), _c("inetsock"), _c("tcp"),
        _c("sessions"), _c("robust"), _c("rseq"), _c("sysv"), _c("mapped", "a-long-argument-that-makes-room"), _c("paging"), _c("late"), _c("tracked"),
        Workload("advice", ("/bin/advice",), "busybox", restless=True),
        Workload("flags", ("/bin/flags",), "busybox", restless=True),
        _c("clocks"), _c("waits"),
        _c("alone"), _c("churn"), _c("datagrams"),
        _c("timerfds"), _c("posixtimers"), _c("pidfds"), _c("watches"), _c("locks"), _c("owners"),
        # Where real-time groups are on, a group has no real-time processes unless it is given time for them.
        Workload("scheduling", ("/bin/scheduling",), "busybox", cpu=(("realtimeRuntime", 10000), ("realtimePeriod", 1000000))),
        Workload("tmpfs", ("/bin/tmpfs",), "busybox",
                 mounts=(_tmpfs("/run", "noexec", "mode=755", "size=65536k"), _tmpfs("/tmp", "exec", "mode=1777"))),
        _c("orphans"), _c("terminals"), _c("forked"), _c("sharing"), _c("spaces"), _c("mappings"), _c("crowd"), _c("handlers"), _c("vdso"), _c("dispatch"),
        Workload("vfork", ("/bin/vfork",), "busybox", restless=True),
        Workload("bomb", ("/bin/bomb",), "busybox", restless=True),
        Workload("counter", ("sh", "/bin/counter.sh"), "busybox", real=True, restless=True),
        Workload("pipeline", ("sh", "/bin/pipeline.sh"), "busybox", real=True, restless=True),
        Workload("busy", ("/bin/busy",), "busybox", real=True),
        Workload("cpython", ("/usr/bin/python3.11", "/wl/cpython.py", "256"), "host", real=True, needs=("command:python3.11",)),
        Workload("redis",
                 ("/usr/bin/redis-server", "--port", "6379", "--bind", "127.0.0.1", "--save", "", "--dir", "/wl",
                  "--unixsocket", "/wl/redis.sock", "--enable-debug-command", "yes", "--loglevel", "warning"),
                 "host", Redis, real=True, needs=("command:redis-server",)),
    )
}  # fmt: skip


class Stage:
    """Where a workload plays: makes its bundle, starts it, and makes further containers on the same or on a copied root."""

    def __init__(self, torpor: Torpor, directory: Path, host_root: Callable[..., HostRoot], workload: Workload) -> None:
        self.torpor = torpor
        self.directory = directory
        self.host_root = host_root
        self.workload = workload
        self.count = 0
        self.roots: dict[Path, HostRoot] = {}
        self.bundle = self._new_bundle()

    def _spec(self, rootfs: Path | str) -> dict[str, Any]:
        config = bundles.spec(
            self.workload.args,
            rootfs=rootfs,
            caps=CAPS,
            env=["WORKLOAD=yes", "PYTHONHASHSEED=7"],
            mounts=self.workload.mounts,
        )
        # the limits of a session may be too low for high file descriptors
        config["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 4096, "hard": 4096}]
        if self.workload.cpu:
            config["linux"]["resources"] = {"cpu": dict(self.workload.cpu)}
        return config

    def _new_bundle(self) -> Path:
        self.count += 1
        bundle = self.directory / f"{self.workload.name}{self.count}"
        bundle.mkdir(parents=True)
        if self.workload.root == "busybox":
            root = bundles.busybox_root(bundle / "rootfs")
            if self.workload.args[0].startswith("/bin/"):
                shutil.copy2(compiled(self.workload.name), root / "bin" / self.workload.name)
            else:
                shutil.copy2(SOURCES / f"{self.workload.name}.sh", root / "bin")
        else:
            host = self.host_root()
            (bundle / "rootfs").symlink_to(host.path)
            self.roots[bundle] = host
            script = SOURCES / f"{self.workload.name}.py"
            if script.exists():
                shutil.copy2(script, host.path / "wl")
        return bundles.write(bundle, self._spec((bundle / "rootfs").resolve()))

    def container(self, bundle: Path | None = None) -> Container:
        return self.workload.container(self.torpor, bundle or self.bundle, new_id(self.workload.name))

    def start(self) -> Container:
        return self.container().run().wait_ready()

    def successor(self, of: Container, bundle: Path | None = None) -> Container:
        """A container to restore `of` into."""
        c = self.container(bundle)
        if isinstance(c, Redis):
            c.take_over(of)
        return c

    def copy_root(self) -> Path:
        """A second bundle whose files are what the first one's are at this moment: torpor saves processes, not file systems."""
        self.count += 1
        bundle = self.directory / f"{self.workload.name}{self.count}"
        bundle.mkdir()
        if self.workload.root == "busybox":
            subprocess.run(["cp", "-a", str(self.bundle / "rootfs"), str(bundle / "rootfs")], check=True)
        else:
            host = self.host_root(self.roots[self.bundle].directory / "upper")
            (bundle / "rootfs").symlink_to(host.path)
            self.roots[bundle] = host
        return bundles.write(bundle, self._spec((bundle / "rootfs").resolve()))
