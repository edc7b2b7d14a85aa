"""Real programs from Debian's packages, at work while they are put to sleep and woken up: tests/programs/."""

import hashlib
import shutil
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import bundles, procs
from support.bundles import DOCKER_CAPS, HostRoot
from support.cli import Container, Torpor, new_id
from support.net import Net

pytestmark = [pytest.mark.requires("root"), pytest.mark.timeout(300)]

SOURCES = bundles.REPO / "tests" / "programs"
PYTHON = "/usr/bin/python3.11"


def program(name: str, *args: str, needs: str, rounds: int = 3) -> object:
    marks = pytest.mark.requires("command:python3.11", *(f"command:{c}" for c in needs.split()))
    return pytest.param(args, rounds, id=name, marks=marks)


PROGRAMS = [
    program("postgres", PYTHON, "/wl/postgres.py", needs="psql pgbench", rounds=10),
    program("redis", PYTHON, "/wl/redis_clients.py", needs="redis-server"),
    program("sqlite", PYTHON, "/wl/sqlite_wal.py", needs=""),
    program("asyncio", PYTHON, "/wl/asyncio_program.py", needs=""),
    program("supervisor", PYTHON, "/wl/supervisor.py", needs=""),
    program("tmux", PYTHON, "/wl/tmux_vim.py", needs="tmux vim"),
    program("node", "/usr/bin/node", "/wl/node.js", needs="node"),
    program("java", "/usr/bin/java", "-Xmx256m", "/wl/Program.java", needs="java javac"),
]


@pytest.mark.parametrize(("args", "rounds"), PROGRAMS)
def test_it_goes_on(
    args: tuple[str, ...], rounds: int, torpor: Torpor, tmp: Path, host_root: Callable[..., HostRoot]
) -> None:
    """Checkpoint and restore, again and again, on the same files; every other time the program goes on by itself first."""
    root = host_root()
    for source in SOURCES.iterdir():
        shutil.copy2(source, root.path / "wl")
    config = bundles.spec(args, rootfs=root.path, caps=DOCKER_CAPS, env=["PYTHONUNBUFFERED=1"])
    config["process"]["rlimits"] = [{"type": "RLIMIT_NOFILE", "soft": 4096, "hard": 4096}]
    (tmp / "bundle").mkdir()
    bundle = bundles.write(tmp / "bundle", config)
    c = Container(torpor, bundle, new_id("p")).run().wait_ready()
    c.verify()
    for n in range(rounds):
        if n % 2 == 0:
            c.checkpoint(tmp / f"beside{n}", "--leave-running")
            c.verify()
        # postgres and sqlite write all the time: only files of the very moment go with an image
        c.checkpoint(tmp / f"image{n}")
        c.delete()
        c = Container(torpor, bundle, new_id("p"))
        c.restore_from(tmp / f"image{n}")
        c.verify()
        for image in (tmp / f"beside{n}", tmp / f"image{n}"):
            shutil.rmtree(image, ignore_errors=True)
    c.verify()


NGINX = """
user www-data; daemon off; worker_processes 2; pid /wl/nginx.pid; error_log stderr;
events { worker_connections 64; }
http { access_log off; server { listen 10.99.7.2:7777; root /wl/www; } }
"""


@pytest.mark.requires("command:nginx", "command:ip")
def test_nginx_and_a_client_that_downloads_slowly(
    net: Net, torpor: Torpor, tmp: Path, host_root: Callable[..., HostRoot]
) -> None:
    """Workers, sendfile, a connection to the outside that is kept over three moves from one network namespace to another."""
    root = host_root()
    (root.path / "wl/nginx.conf").write_text(NGINX)
    (root.path / "wl/www").mkdir()
    served = root.path / "wl/www/file"
    served.write_bytes(b"".join(hashlib.shake_128(b"%d" % n).digest(1 << 20) for n in range(24)))
    digest = hashlib.sha256(served.read_bytes()).hexdigest()

    def container(which: int) -> Container:
        bundle = tmp / f"bundle{len(list(tmp.glob('bundle*')))}"
        config = bundles.spec(["/usr/sbin/nginx", "-c", "/wl/nginx.conf"], rootfs=root.path, caps=DOCKER_CAPS)
        net.join_by(config, which)
        return Container(torpor, bundles.write(bundle, config), new_id("nginx"))

    net.plug(0)
    c = container(0).run()
    procs.wait_until("nginx to listen", lambda: len(c.host_pids()) == 3 and net.listens(0))
    download = Download(net.connect())
    download.goes_on()
    for n in range(3):
        c.checkpoint(tmp / f"beside{n}", "--tcp-established", "--leave-running")
        download.goes_on()
        net.unplug()
        c.checkpoint(tmp / f"image{n}", "--tcp-established")
        c.delete()
        net.place((n + 1) % 2)
        c = container((n + 1) % 2)
        c.restore_from(tmp / f"image{n}")
        net.join()
        download.goes_on()
    assert download.end() == digest
    # and new clients are served, by the workers that were there
    assert len(c.host_pids()) == 3
    another = Download(net.connect(), wait=0)
    assert another.end() == digest


class Download:
    """Fetches /file, slowly."""

    def __init__(self, s: socket.socket, wait: float = 0.02) -> None:
        self.got, self.error, self._wait = 0, "", wait
        self._digest = hashlib.sha256()
        self._socket = s
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        self._socket.settimeout(60)
        try:
            self._socket.sendall(b"GET /file HTTP/1.0\r\nHost: x\r\n\r\n")
            stream = self._socket.makefile("rb", buffering=0)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += stream.read(1) or b"?"
            assert head.startswith(b"HTTP/1.1 200"), head
            while part := stream.read(32768):
                self._digest.update(part)
                self.got += len(part)
                time.sleep(self._wait)
        except (OSError, AssertionError) as e:
            self.error = f"{type(e).__name__}: {e}"

    def goes_on(self) -> None:
        before = self.got
        procs.wait_until("the client to get more", lambda: self.error or self.got > before + 200_000, 30)
        assert not self.error, self.error

    def end(self) -> str:
        """Read the rest at full speed; the digest of it all."""
        self._wait = 0
        self._thread.join(60)
        self._socket.close()
        assert not self.error, self.error
        return self._digest.hexdigest()
