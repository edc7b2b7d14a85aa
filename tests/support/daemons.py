"""What the fixtures for Docker, containerd and Podman share.

Every daemon lives in network and mount namespaces of its own: bridges, iptables rules and mounts that it makes are gone with it, and
the machine's own are never touched.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from support import bundles, leaks, procs

ISOLATED = ["unshare", "--net", "--mount", "--propagation", "private"]
# unshare has ended its own set-up when this runs
_ENTRY = 'ip link set lo up && exec "$@"'

FETCH = "import sys, urllib.request as u; print(u.urlopen(sys.argv[1], timeout=5).read().decode(), end='')"


class Failed(AssertionError):  # noqa: N818
    """A client's command that should have worked."""


class Daemon:
    """A process in namespaces of its own, and the directory it may write to."""

    def __init__(self, name: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=f"{leaks.RUN_MARK}-{name}-", dir="/var/tmp"))
        self.cgroup = f"/{leaks.RUN_MARK}-{name}"
        self.process: subprocess.Popen[bytes] | None = None
        # there before the first test looks, so that it is no leak of that one
        for hierarchy in hierarchies():
            with contextlib.suppress(OSError):
                (hierarchy / self.cgroup[1:]).mkdir()

    @property
    def pid(self) -> int:
        assert self.process is not None
        return self.process.pid

    def start(self, argv: Sequence[str], env: Mapping[str, str] | None = None) -> None:
        # containerd forgets the directories in which it unpacks checkpoints
        env = {**os.environ, "TMPDIR": str(self.directory), **(env or {})}
        env.pop("XDG_RUNTIME_DIR", None)
        with procs.claiming, open(self.directory / "daemon.log", "wb") as log:
            self.process = subprocess.Popen(
                [*ISOLATED, "sh", "-c", _ENTRY, "sh", *argv],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=env, start_new_session=True,
            )  # fmt: skip
            procs.claimed.add(self.process.pid)

    def wait_ready(self, argv: Sequence[str], timeout: float = 40) -> bool:
        """Ask until the daemon answers. False when it has ended instead."""
        assert self.process is not None
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                procs.claimed.discard(self.process.pid)
                return False
            if subprocess.run(argv, capture_output=True, check=False, env=self.env()).returncode == 0:
                return True
            time.sleep(0.1)
        raise AssertionError(f"{argv[0]} got no answer: {self.log()[-2000:]}")

    def env(self) -> dict[str, str]:
        return dict(os.environ)

    def log(self) -> str:
        return (self.directory / "daemon.log").read_text(errors="replace")

    def run(
        self, argv: Sequence[str], *, check: bool = True, timeout: float = 60, input: bytes | None = None,  # noqa: A002
    ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        """Run a client. Its output goes to files, as what it starts may keep it open."""
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            with procs.claiming:
                process = subprocess.Popen(
                    argv,
                    stdin=subprocess.DEVNULL if input is None else subprocess.PIPE,
                    stdout=out,
                    stderr=err,
                    env=self.env(),
                )
                procs.claimed.add(process.pid)
            try:
                process.communicate(input, timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise Failed(f"{' '.join(argv)} took longer than {timeout} s") from None
            finally:
                procs.claimed.discard(process.pid)
            out.seek(0)
            err.seek(0)
            done = subprocess.CompletedProcess(
                list(argv), process.returncode, out.read().decode(errors="replace"), err.read().decode(errors="replace")
            )
        if check and done.returncode != 0:
            raise Failed(f"{' '.join(argv)}: exit code {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def inside(self, *argv: str) -> list[str]:
        """A command line that runs in the namespaces of the daemon."""
        return ["nsenter", "-t", str(self.pid), "-n", "-m", *argv]

    def fetch(self, url: str) -> str:
        """GET a URL from where the daemon's bridges and published ports are."""
        return self.run(["nsenter", "-t", str(self.pid), "-n", sys.executable, "-ISc", FETCH, url]).stdout

    def stop(self) -> None:
        process = self.process
        if process is not None and process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        if process is not None:
            procs.claimed.discard(process.pid)
        # shims of containers that a failed test left: below us now, and named by their arguments
        for p in procs.descendants(os.getpid()):
            if str(self.directory) in p.command:
                procs.kill_exactly(p)
        time.sleep(0.1)
        procs.reap()
        for hierarchy in hierarchies():
            for directory, _, _ in os.walk(hierarchy / self.cgroup[1:], topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        shutil.rmtree(self.directory, ignore_errors=True)


def hierarchies() -> Iterator[Path]:
    root = Path("/sys/fs/cgroup")
    if (root / "cgroup.controllers").exists():
        yield root
        return
    for entry in root.iterdir():
        if (entry / "cgroup.procs").exists():
            yield entry


def root_file_system(at: Path) -> Path:
    """busybox and two programs: a counter, and a small web server that says how far the counter is."""
    root = bundles.busybox_root(at)
    (root / "bin" / "counter").write_text(COUNTER)
    (root / "bin" / "web").write_text(WEB)
    for name in ("counter", "web"):
        (root / "bin" / name).chmod(0o755)
    return root


COUNTER = """#!/bin/sh
trap 'exit 0' TERM
i=0
while :; do i=$((i+1)); echo $i; sleep 0.1; done
"""

# The answer is made when somebody has asked: nc runs it.
WEB = """#!/bin/sh
trap 'exit 0' TERM
if [ "$1" = answer ]; then
    # to its end: closing with something unread would throw the answer away
    cr=$(printf '\\r')
    while read -r line && [ "$line" != "$cr" ]; do :; done
    printf 'HTTP/1.0 200 OK\\r\\n\\r\\n'
    echo "$(hostname) $(cat /tmp/count) $(tr '\\0' ' ' < /run/torpor/environ 2>/dev/null)"
    exit
fi
i=0
(while :; do nc -l -p 80 -e /bin/web answer; done) &
while :; do i=$((i+1)); echo $i > /tmp/new; mv /tmp/new /tmp/count; sleep 0.1; done
"""
