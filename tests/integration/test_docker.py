"""Docker, with its own daemon, drives torpor as it drives runc; and starts new containers from images."""

import contextlib
import json
import os
import pty
import select
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support import procs
from support.docker import CLIENT, Docker
from support.leaks import RUN_MARK

pytestmark = [
    pytest.mark.requires(
        "root", "command:dockerd", "command:docker", "command:containerd", "command:runc", "command:busybox", "command:unshare"
    ),
    pytest.mark.timeout(180),
]  # fmt: skip

RUN = ("run", "--runtime=torpor")


@pytest.fixture(scope="session")
def daemon() -> Iterator[Docker]:
    started = Docker()
    yield started
    started.stop()


@pytest.fixture
def docker(daemon: Docker, leak_check: None) -> Iterator[Docker]:
    yield daemon
    daemon.clean_up()


def test_docker_lists_it(docker: Docker) -> None:
    assert "torpor" in json.loads(docker("info", "--format", "{{json .Runtimes}}"))


def test_run(docker: Docker) -> None:
    assert docker(*RUN, "--rm", "box", "echo", "hello") == "hello"
    assert docker(*RUN, "--rm", "-e", "A=b", "-w", "/tmp", "-u", "65534", "box", "sh", "-c", "echo $A $(pwd) $(id -u)") == "b /tmp 65534"  # fmt: skip


def test_exit_codes(docker: Docker) -> None:
    assert docker.run([CLIENT, *RUN, "--rm", "box", "sh", "-c", "exit 7"], check=False).returncode == 7
    assert docker.run([CLIENT, *RUN, "--rm", "box", "sh", "-c", "kill -9 $$"], check=False).returncode in (137, 0)
    assert docker.fails(*RUN, "--rm", "box", "nosuch", says='exec: "nosuch": executable file not found in $PATH') == 127
    assert docker.fails(*RUN, "--rm", "box", "/etc/passwd", says="permission denied") == 126


def test_input(docker: Docker) -> None:
    done = docker.run([CLIENT, *RUN, "--rm", "-i", "box", "wc", "-c"], input=b"x" * 100_000)
    assert done.stdout.split() == ["100000"]


def test_volumes(docker: Docker, tmp: Path) -> None:
    docker(*RUN, "--rm", "-v", f"{tmp}:/v", "box", "sh", "-c", "echo data > /v/file")
    assert (tmp / "file").read_text() == "data\n"
    name = f"{RUN_MARK}vol"
    docker("volume", "create", name)
    docker(*RUN, "--rm", "-v", f"{name}:/v", "box", "sh", "-c", "echo kept > /v/file")
    assert docker(*RUN, "--rm", "-v", f"{name}:/v:ro", "box", "cat", "/v/file") == "kept"
    docker("volume", "rm", name)


def test_looking_at_it(docker: Docker) -> None:
    docker(*RUN, "-d", "--name", "cc", "box", "counter")
    docker.wait_log("cc", 3)
    assert "counter" in docker("top", "cc")
    assert docker("exec", "cc", "echo", "inside") == "inside"
    assert docker.run([CLIENT, "exec", "cc", "sh", "-c", "exit 3"], check=False).returncode == 3
    assert (
        docker("exec", "-u", "65534", "-w", "/tmp", "-e", "A=b", "cc", "sh", "-c", "echo $A $(pwd) $(id -u)")
        == "b /tmp 65534"
    )
    stats = json.loads(docker("stats", "--no-stream", "--format", "{{json .}}", "cc"))
    assert stats["Name"] == "cc" and stats["PIDs"].isdigit() and not stats["MemUsage"].startswith("0B")
    assert docker.inspect("cc", "State.Status") == "running"


def test_life(docker: Docker) -> None:
    docker(*RUN, "-d", "--name", "cc", "box", "counter")
    docker.wait_log("cc")
    docker("pause", "cc")
    assert docker.inspect("cc", "State.Status") == "paused"
    before = docker("logs", "cc")
    time.sleep(0.3)
    assert docker("logs", "cc") == before
    docker("unpause", "cc")
    docker.wait_log("cc", len(before.split()))
    docker("restart", "-t", "5", "cc")
    assert docker.inspect("cc", "State.Status") == "running"
    docker("kill", "--signal", "KILL", "cc")
    procs.wait_until("the end", lambda: docker.inspect("cc", "State.Status") == "exited")
    assert docker.inspect("cc", "State.ExitCode") == 137
    docker("start", "cc")
    docker("stop", "-t", "5", "cc")
    assert docker.inspect("cc", "State.ExitCode") == 0


def test_update(docker: Docker) -> None:
    docker(*RUN, "-d", "--name", "cc", "box", "counter")
    docker(
        "update",
        "--memory",
        "64m",
        "--memory-swap",
        "128m",
        "--cpus",
        "0.5",
        "--cpu-shares",
        "512",
        "--pids-limit",
        "50",
        "cc",
    )
    pid = docker.inspect("cc", "State.Pid")
    from torpor.cgroups import Cgroup

    cgroup = Cgroup(pid)
    assert cgroup.number("memory.limit_in_bytes", "memory.max") == 64 << 20
    assert cgroup.number("pids.max") == 50
    if cgroup.find("cpu.max"):
        assert cgroup.read("cpu.max") == "50000 100000"
    else:
        assert cgroup.number("cpu.cfs_quota_us") == cgroup.number("cpu.cfs_period_us") // 2
        assert cgroup.number("cpu.shares") == 512
        assert cgroup.number("memory.memsw.limit_in_bytes") == 128 << 20


def test_health(docker: Docker) -> None:
    docker(*RUN, "-d", "--name", "cc", "--health-cmd", "true", "--health-interval", "1s", "box", "counter")
    procs.wait_until("health", lambda: docker.inspect("cc", "State.Health.Status") == "healthy")


class Pty:
    """A docker command with a terminal, as a person has one."""

    def __init__(self, docker: Docker, *args: str) -> None:
        self.master, slave = pty.openpty()
        with procs.claiming:
            self.process = subprocess.Popen(
                [CLIENT, *args], stdin=slave, stdout=slave, stderr=slave, env=docker.env(), start_new_session=True
            )
            procs.claimed.add(self.process.pid)
        os.close(slave)
        self.seen = b""

    def wait_for(self, text: bytes) -> None:
        deadline = time.monotonic() + 20
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.master], [], [], 0.2)[0]:
                with contextlib.suppress(OSError):
                    self.seen += os.read(self.master, 65536)

    def type(self, text: bytes) -> None:
        os.write(self.master, text)

    def wait(self) -> int:
        try:
            return self.process.wait(20)
        finally:
            procs.claimed.discard(self.process.pid)
            os.close(self.master)


def test_terminal(docker: Docker) -> None:
    p = Pty(docker, *RUN, "--rm", "-it", "box", "sh")
    p.wait_for(b"# ")
    p.type(b"tty; echo a$((1+1))b; exit 5\n")
    p.wait_for(b"a2b")
    assert b"/dev/pts/0" in p.seen or b"/dev/console" in p.seen
    assert p.wait() == 5


def test_exec_with_a_terminal(docker: Docker) -> None:
    docker(*RUN, "-d", "--name", "cc", "box", "counter")
    p = Pty(docker, "exec", "-it", "cc", "sh", "-c", "tty; exit 4")
    p.wait_for(b"/dev/pts/")
    assert p.wait() == 4


def test_published_port(docker: Docker) -> None:
    docker(*RUN, "-d", "--name", "cc", "-p", "8081:80", "box", "web")
    hostname, count, *_ = docker.wait_fetch("http://127.0.0.1:8081/")
    assert hostname == docker.inspect("cc", "Config.Hostname") and int(count) >= 0


# ---- checkpoints


def test_checkpoint_and_start_again_and_again(docker: Docker) -> None:
    docker(*RUN, "-d", "--name", "cc", "-p", "8082:80", "box", "web")
    count = int(docker.wait_fetch("http://127.0.0.1:8082/")[1])
    for n in range(3):
        docker.checkpoint("cc", f"cp{n}")
        assert docker.inspect("cc", "State.Status") == "exited" and docker.inspect("cc", "State.ExitCode") == 0
        docker.wake(f"cp{n}", "cc")
        hostname, now, *_ = docker.wait_fetch("http://127.0.0.1:8082/")
        assert hostname == docker.inspect("cc", "Config.Hostname")
        assert int(now) >= count
        count = int(now)
        assert docker("exec", "cc", "echo", "inside") == "inside"
    assert docker("checkpoint", "ls", "cc").split()[2:] == ["cp0", "cp1", "cp2"]
    docker("checkpoint", "rm", "cc", "cp1")
    assert docker("checkpoint", "ls", "cc").split()[2:] == ["cp0", "cp2"]
    # an older one, a second time
    docker("stop", "-t", "5", "cc")
    docker.wake("cp0", "cc")
    assert int(docker.wait_fetch("http://127.0.0.1:8082/")[1]) < count + 100


def test_leave_running(docker: Docker) -> None:
    docker(*RUN, "-d", "--name", "cc", "box", "counter")
    docker.wait_log("cc", 3)
    pid = docker.inspect("cc", "State.Pid")
    for n in range(3):
        docker.checkpoint("--leave-running", "cc", f"cp{n}")
        assert docker.inspect("cc", "State.Status") == "running" and docker.inspect("cc", "State.Pid") == pid
    lines = docker.wait_log("cc", len(docker("logs", "cc").split()) + 3)
    assert lines == [str(n) for n in range(1, len(lines) + 1)], "no line is missing and none is there twice"


def test_what_docker_mounts_is_carried(docker: Docker) -> None:
    """/dev/shm with content, /etc/hosts and so on, a tmpfs, a volume."""
    script = """
exec 3< /etc/hosts 4< /etc/resolv.conf 5< /etc/hostname 6<> /dev/shm/kept 7<> /scratch/kept
echo in-memory >&6; echo scratch >&7
trap 'cat /dev/shm/kept /scratch/kept /vol/kept; hostname; cat <&5; exit 0' TERM
echo volume > /vol/kept
while :; do sleep 0.1; done
"""
    docker(*RUN, "-d", "--name", "cc", "--tmpfs", "/scratch", "-v", "/vol", "box", "sh", "-c", script)
    time.sleep(0.5)
    docker.checkpoint("cc", "cp")
    docker.wake("cp", "cc")
    docker("stop", "-t", "5", "cc")
    name = docker.inspect("cc", "Config.Hostname")
    assert docker("logs", "cc").split() == ["in-memory", "scratch", "volume", name, name]


def test_a_terminal_is_carried(docker: Docker) -> None:
    docker(
        *RUN, "-dt", "--name", "cc", "box", "sh", "-c", "i=0; while :; do i=$((i+1)); echo $i $(tty); sleep 0.1; done"
    )
    docker.wait_log("cc", 6)
    docker.checkpoint("cc", "cp")
    docker.wake("cp", "cc")
    lines = len(docker("logs", "cc").split("\n"))
    procs.wait_until("more lines", lambda: len(docker("logs", "cc").split("\n")) > lines + 3)
    last = docker("logs", "cc").split("\n")[-1].split()
    assert int(last[0]) >= lines and last[1].startswith("/dev/")


def test_exec_sessions_are_not_saved_and_that_is_said(docker: Docker) -> None:
    docker(*RUN, "-d", "--name", "cc", "box", "counter")
    docker.wait_log("cc", 2)
    docker("exec", "-d", "cc", "sleep", "1000")
    docker.checkpoint("--leave-running", "cc", "cp")
    assert "sleep 1000" in docker("top", "cc"), "it runs on with the container"
    (log,) = docker.directory.glob(f"exec/containerd/daemon/*/moby/{docker.inspect('cc', 'Id')}/log.json")
    said = [json.loads(line) for line in log.read_text().splitlines()]
    assert any("(sleep) was started by exec and is not saved" in entry["msg"] for entry in said), said
    docker("stop", "-t", "5", "cc")
    docker.wake("cp", "cc")
    assert "sleep 1000" not in docker("top", "cc")


def test_a_refusal_is_shown_and_harmless(docker: Docker) -> None:
    docker(*RUN, "-d", "--name", "cc", "box", "counter")
    docker.wait_log("cc", 2)
    docker.checkpoint("--leave-running", "cc", "cp")
    (docker.checkpoints_of("cc") / "cp" / "checkpoint.img").write_bytes(b"broken" * 1000)
    docker("stop", "-t", "5", "cc")
    docker.fails("start", "--checkpoint", "cp", "cc", says="checkpoint.img")
    assert docker.inspect("cc", "State.Status") == "exited"
    docker("start", "cc")
    assert docker.inspect("cc", "State.Status") == "running"


# ---- new containers from an image


@pytest.fixture
def warm(docker: Docker) -> Docker:
    """A directory of images with one in it: `one`."""
    docker(*RUN, "-d", "--name", "source", "box", "web")
    address = docker.inspect("source", "NetworkSettings.IPAddress")
    procs.wait_until("counting", lambda: int(docker.wait_fetch(f"http://{address}/")[1]) > 5)
    docker.checkpoint("--checkpoint-dir", str(docker.warm), "source", "one")
    docker("rm", "source")
    return docker


def test_ten_containers_from_one_image(warm: Docker) -> None:
    docker = warm
    names = [f"w{n}" for n in range(10)]
    with procs.claiming:
        clients = [
            subprocess.Popen(
                [CLIENT, *RUN, "-d", "--name", n, "--hostname", f"host-{n}", "-e", "TORPOR_RESTORE=one", "-e", f"MY={n}", "box", "web"],
                env=docker.env(), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            )
            for n in names
        ]  # fmt: skip
        procs.claimed.update(c.pid for c in clients)
    for client in clients:
        _, err = client.communicate(timeout=90)
        procs.claimed.discard(client.pid)
        assert client.returncode == 0, err
    addresses = {docker.inspect(n, "NetworkSettings.IPAddress") for n in names}
    assert len(addresses) == 10
    for n in names:
        hostname, count, *env = docker.wait_fetch(f"http://{docker.inspect(n, 'NetworkSettings.IPAddress')}/")
        assert hostname == f"host-{n}" and int(count) > 5
        assert f"MY={n}" in env, "the environment of the new container"


def test_started_a_second_time(warm: Docker) -> None:
    docker = warm
    docker(*RUN, "-d", "--name", "cc", "-e", "TORPOR_RESTORE=one", "box", "web")
    for _ in range(2):
        docker("restart", "-t", "5", "cc")
        assert int(docker.wait_fetch(f"http://{docker.inspect('cc', 'NetworkSettings.IPAddress')}/")[1]) > 5
    # and one that woke up can be put to sleep again
    docker.checkpoint("cc", "cp")
    docker.wake("cp", "cc")
    assert int(docker.wait_fetch(f"http://{docker.inspect('cc', 'NetworkSettings.IPAddress')}/")[1]) > 5


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["-e", "TORPOR_RESTORE=../one"], "cannot be a path"),
        (["-e", "TORPOR_RESTORE=.."], "cannot be a path"),
        (["-e", "TORPOR_RESTORE=two"], "there is no image 'two'"),
        (["-e", "TORPOR_RESTORE=link"], "there is no image 'link'"),
        (["-e", "TORPOR_RESTORE=one", "-u", "65534"], "user 0:0 in the image, 65534:65534 here"),
        (["-e", "TORPOR_RESTORE=one", "--cap-drop", "CHOWN"], "capabilities CAP_CHOWN in the image, not here"),
        (["-e", "TORPOR_RESTORE=one", "--read-only"], "a writable root in the image"),
        (["-e", "TORPOR_RESTORE=one", "--ipc", "host"], "namespaces of its own differ: ipc"),
    ],
)
def test_what_is_refused(warm: Docker, flags: list[str], says: str) -> None:
    (warm.warm / "link").symlink_to("one")
    try:
        warm.fails(*RUN, "--rm", *flags, "box", "web", says=says)
    finally:
        (warm.warm / "link").unlink()
