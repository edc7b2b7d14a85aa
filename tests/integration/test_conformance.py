"""The same commands given to runc and to torpor do the same: output, exit code, state.

Where the two differ on purpose (exit code 128 instead of 1 for the runtime's own errors, as runsc; other words in messages) the cases
compare what clients look at.
"""

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from support import procs
from support.cli import TORPOR, new_id

pytestmark = [pytest.mark.requires("root", "command:runc", "command:busybox")]


@dataclass(frozen=True)
class Said:
    code: int
    out: str
    err: str


class Runtime:
    """runc or torpor, by the command line that is common to both."""

    def __init__(self, program: str, directory: Path) -> None:
        self.program = program
        self.directory = directory
        directory.mkdir()
        self.ids: list[str] = []
        self.count = 0

    def new_id(self) -> str:
        self.ids.append(new_id("conf"))
        return self.ids[-1]

    def __call__(self, *args: str | Path, input: str | None = None) -> Said:  # noqa: A002
        self.count += 1
        out_path, err_path = self.directory / f"{self.count}.out", self.directory / f"{self.count}.err"
        with open(out_path, "wb") as out, open(err_path, "wb") as err, procs.claiming:
            process = subprocess.Popen(
                [self.program, "--root", str(self.directory / "root"), *map(str, args)],
                stdin=subprocess.DEVNULL if input is None else subprocess.PIPE, stdout=out, stderr=err,
            )  # fmt: skip
            procs.claimed.add(process.pid)
        try:
            process.communicate(None if input is None else input.encode(), timeout=60)
        finally:
            procs.claimed.discard(process.pid)
        return Said(process.returncode, out_path.read_text(errors="replace"), err_path.read_text(errors="replace"))

    def status(self, name: str) -> str:
        said = self("state", name)
        return json.loads(said.out)["status"] if said.code == 0 else "none"

    def clean_up(self) -> None:
        for name in self.ids:
            self("delete", "--force", name)
        procs.reap()


@pytest.fixture
def both(tmp: Path, leak_check: None) -> Iterator[list[Runtime]]:
    runtimes = [Runtime(shutil.which("runc") or "", tmp / "runc"), Runtime(str(TORPOR), tmp / "torpor")]
    yield runtimes
    for runtime in runtimes:
        runtime.clean_up()


# (command, what of config.json differs from the default)
Edit = Callable[[dict[str, Any]], None]


def process(**fields: Any) -> Edit:
    return lambda config: config["process"].update(fields)


def linux(**fields: Any) -> Edit:
    return lambda config: config["linux"].update(fields)


def top(**fields: Any) -> Edit:
    return lambda config: config.update(fields)


def resources(**fields: Any) -> Edit:
    return lambda config: config["linux"].setdefault("resources", {}).update(fields)


NO_MKDIR = {
    "defaultAction": "SCMP_ACT_ALLOW",
    "architectures": ["SCMP_ARCH_X86_64"],
    "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"}],
}

RUNS: dict[str, tuple[list[str], Edit | None]] = {
    "true": (["true"], None),
    "exit code": (["sh", "-c", "exit 42"], None),
    "killed": (["sh", "-c", "kill -KILL $$; sleep 5"], None),
    "output": (["sh", "-c", "echo out; echo err >&2"], None),
    "no such program": (["/bin/nosuch"], None),
    "not in path": (["nosuch"], None),
    "not executable": (["/etc/passwd"], None),
    "environment": (["env"], process(env=["A=1", "B=two words", "PATH=/bin"])),
    "directory": (["pwd"], process(cwd="/tmp")),
    "new directory": (["pwd"], process(cwd="/brand/new")),
    "user": (["id"], process(user={"uid": 1000, "gid": 1001, "additionalGids": [5, 6]})),
    "umask": (["sh", "-c", "umask"], process(user={"uid": 0, "gid": 0, "umask": 63})),
    "hostname": (["hostname"], top(hostname="other")),
    "capabilities": (["grep", "^Cap", "/proc/self/status"], None),
    "no capabilities": (["grep", "^Cap", "/proc/self/status"], process(capabilities={})),
    "capabilities of a user": (["grep", "^Cap", "/proc/self/status"], process(user={"uid": 1000, "gid": 1000})),
    "no new privileges": (["grep", "NoNewPrivs", "/proc/self/status"], process(noNewPrivileges=True)),
    "limits": (["sh", "-c", "ulimit -n; ulimit -Hn"], process(rlimits=[{"type": "RLIMIT_NOFILE", "hard": 512, "soft": 256}])),
    "oom score": (["cat", "/proc/self/oom_score_adj"], process(oomScoreAdj=100)),
    "seccomp": (["mkdir", "/tmp/x"], linux(seccomp=NO_MKDIR)),
    "seccomp status": (["grep", "^Seccomp:", "/proc/self/status"], linux(seccomp=NO_MKDIR)),
    "read-only root": (["touch", "/file"], top(root={"path": "rootfs", "readonly": True})),
    "masked path": (["sh", "-c", "cat /etc/group; ls /root"], linux(maskedPaths=["/etc/group", "/root"])),
    "read-only path": (["touch", "/etc/x"], linux(readonlyPaths=["/etc"])),
    "sysctl": (["cat", "/proc/sys/net/ipv4/ip_forward"], linux(sysctl={"net.ipv4.ip_forward": "1"})),
    "devices": (["sh", "-c", "stat -c '%t %T %a %n' /dev/null /dev/zero /dev/full /dev/random /dev/urandom /dev/tty"], None),
    "extra device": (
        ["stat", "-c", "%t %T %a %u %g", "/dev/extra"],
        linux(devices=[{"path": "/dev/extra", "type": "c", "major": 1, "minor": 3, "fileMode": 438, "uid": 1, "gid": 2}]),
    ),
    "links in /dev": (["sh", "-c", "readlink /dev/fd /dev/stdin /dev/stdout /dev/stderr; ls /dev"], None),
    "mounts": (["sh", "-c", "cut -d' ' -f2,3 /proc/mounts | grep -v cgroup | sort"], None),
    "user namespace": (
        ["sh", "-c", "id; cat /proc/self/uid_map | tr -s ' '"],
        lambda config: config["linux"].update(
            namespaces=[*config["linux"]["namespaces"], {"type": "user"}],
            uidMappings=[{"containerID": 0, "hostID": 100000, "size": 65536}],
            gidMappings=[{"containerID": 0, "hostID": 100000, "size": 65536}],
        ),
    ),
    "pids limit": (["cat", "/proc/self/cgroup"], None),
    "loopback": (["ip", "-o", "link", "show", "lo"], None),
    "domain": (["cat", "/proc/sys/kernel/domainname"], None),
    "namespaces": (["sh", "-c", "echo $$; set -- /proc/[0-9]*; echo $#"], None),
    "standard streams": (["sh", "-c", "ls -l /proc/self/fd | wc -l"], None),
}  # fmt: skip
# a cgroup has the container's id in its name
RUNS.pop("pids limit")


def without_names(text: str, runtime: Runtime) -> str:
    for name in runtime.ids:
        text = text.replace(name, "ID")
    return text.replace(str(runtime.directory), "DIR")


@pytest.mark.parametrize("case", RUNS)
def test_run(both: list[Runtime], busybox: Callable[..., Path], case: str) -> None:
    command, edit = RUNS[case]
    found = []
    for runtime in both:
        bundle = busybox(command, edit=edit, hostname="same")
        if case == "user namespace":
            subprocess.run(["chown", "-R", "100000:100000", str(bundle / "rootfs")], check=True)
            for directory in (bundle, bundle.parent):
                directory.chmod(0o755)
        said = runtime("run", "--bundle", bundle, runtime.new_id())
        found.append((said.code, without_names(said.out, runtime), said.err))
    (code, out, err), (torpor_code, torpor_out, torpor_err) = found
    assert torpor_out == out, found
    if err.startswith("time="):
        # runc's own error, not the program's
        assert torpor_code != 0 and torpor_err, found
        for words in ("executable file not found in $PATH", "no such file or directory", "permission denied"):
            assert (words in err) == (words in torpor_err), found
    else:
        assert (torpor_code, torpor_err) == (code, err), found


def test_life(both: list[Runtime], busybox: Callable[..., Path]) -> None:
    found = []
    for runtime in both:
        name, story = runtime.new_id(), []
        bundle = busybox(["sh", "-c", "trap 'exit 3' TERM; while :; do sleep 0.1; done"])

        def note(*args: str | Path, runtime: Runtime = runtime, name: str = name, story: list[Any] = story) -> None:
            said = runtime(*args)
            story.append((args[0], said.code != 0, runtime.status(name)))

        note("state", name)
        note("create", "--bundle", bundle, name)
        note("create", "--bundle", bundle, name)
        note("exec", name, "true")
        note("resume", name)
        note("start", name)
        note("start", name)
        note("exec", name, "false")
        note("pause", name)
        note("exec", name, "true")
        note("start", name)
        note("resume", name)
        note("resume", name)
        note("delete", name)
        note("kill", name, "0")
        note("kill", name, "NOSUCH")
        # Whether it has ended already when one looks is a matter of luck.
        story.append(("kill", runtime("kill", name, "TERM").code != 0))
        procs.wait_until("the end", lambda runtime=runtime, name=name: runtime.status(name) == "stopped")  # type: ignore[misc]
        note("kill", name, "TERM")
        note("exec", name, "true")
        note("pause", name)
        note("delete", name)
        note("delete", name)
        note("delete", "--force", name)
        found.append(story)
    assert found[1] == found[0]


EXECS: dict[str, tuple[list[str], list[str]]] = {
    "plain": ([], ["echo", "x"]),
    "exit code": ([], ["sh", "-c", "exit 9"]),
    "killed": ([], ["sh", "-c", "kill -TERM $$; sleep 5"]),
    "environment": (["--env", "A=1", "--env", "B=2"], ["env"]),
    "directory": (["--cwd", "/tmp"], ["pwd"]),
    "user": (["--user", "1000:1001"], ["id"]),
    "groups": (["-u", "1000", "-g", "5", "-g", "6"], ["id", "-G"]),
    "capability": (["--cap", "CAP_SYS_ADMIN"], ["grep", "^Cap[BEP]", "/proc/self/status"]),
    "no new privileges": (["--no-new-privs"], ["grep", "NoNewPrivs", "/proc/self/status"]),
    "not there": ([], ["nosuch"]),
    "namespaces": ([], ["sh", "-c", "hostname; set -- /proc/[0-9]*; echo $#"]),
}


def test_exec(both: list[Runtime], busybox: Callable[..., Path], tmp: Path) -> None:
    found: list[dict[str, Any]] = []
    process_json = tmp / "process.json"
    process_json.write_text(json.dumps({
        "args": ["sh", "-c", "id; env; pwd"], "cwd": "/tmp", "env": ["X=y", "PATH=/bin", "HOME=/h"], "user": {"uid": 7, "gid": 8},
    }))  # fmt: skip
    for runtime in both:
        name = runtime.new_id()
        runtime("run", "--detach", "--bundle", busybox(["sleep", "1000"]), name)
        said = {case: runtime("exec", *flags, name, *command) for case, (flags, command) in EXECS.items()}
        said["process"] = runtime("exec", "--process", process_json, name)
        pid_file = runtime.directory / "pid"
        said["detached"] = runtime("exec", "--detach", "--pid-file", pid_file, name, "sleep", "5")
        assert procs.process(int(pid_file.read_text())) is not None
        # a message of the runtime's own has other words; its exit code is 255 with runc
        found.append({case: (s.out, s.code if s.code < 128 or s.code == 143 else "error") for case, s in said.items()})
        os.kill(int(pid_file.read_text()), 9)
    assert found[1] == found[0]


def test_queries(both: list[Runtime], busybox: Callable[..., Path]) -> None:
    found = []
    for runtime in both:
        name = runtime.new_id()
        bundle = busybox(["sh", "-c", "sleep 1000 & sleep 1000 & wait"], annotations={"a": "b"})
        runtime("run", "--detach", "--bundle", bundle, name)
        state = json.loads(runtime("state", name).out)
        assert state["bundle"] == str(bundle) and state["id"] == name and state["rootfs"] == str(bundle / "rootfs")
        listed = json.loads(runtime("list", "--format", "json").out)
        pids = json.loads(runtime("ps", "--format", "json", name).out)
        table = runtime("ps", name).out.splitlines()
        events = json.loads(runtime("events", "--stats", name).out)
        found.append({
            "state": (sorted(state), state["status"], state["annotations"]),
            "list": [(sorted(set(entry) & set(state)), entry["status"]) for entry in listed],
            "quiet": runtime("list", "-q").out == f"{name}\n",
            "head": runtime("list").out.splitlines()[0].split(),
            "ps": (len(pids), state["pid"] in pids, len(table), table[0].split()[:2]),
            "events": (events["type"], events["id"] == name, sorted(set(events["data"]) - {"network_interfaces", "cpuset", "hugetlb", "intel_rdt", "blkio"})),
            "cpu": sorted(events["data"]["cpu"]["usage"]), "memory": sorted(set(events["data"]["memory"]) - {"cache"}),
            "pids": events["data"]["pids"]["current"],
        })  # fmt: skip
    assert found[1] == found[0]


def test_ps_of_an_ended_container(both: list[Runtime], busybox: Callable[..., Path]) -> None:
    found = []
    for runtime in both:
        name = runtime.new_id()
        runtime("run", "--detach", "--bundle", busybox(["true"]), name)
        procs.wait_until("the end", lambda runtime=runtime, name=name: runtime.status(name) == "stopped")  # type: ignore[misc]
        table, pids = runtime("ps", name), runtime("ps", "--format", "json", name)
        # runc says null for a list without anything in it
        found.append(
            (table.code, table.out.split()[:2], len(table.out.splitlines()), pids.code, json.loads(pids.out) or [])
        )
    assert found[1] == found[0]


def test_update(both: list[Runtime], busybox: Callable[..., Path]) -> None:
    from torpor.cgroups import Cgroup

    names = ("memory.limit_in_bytes", "memory.memsw.limit_in_bytes", "memory.soft_limit_in_bytes", "cpu.shares", "cpu.cfs_quota_us",
             "cpu.cfs_period_us", "pids.max", "memory.max", "memory.low", "cpu.max", "cpu.weight", "cpuset.cpus")  # fmt: skip
    found = []
    for runtime in both:
        name = runtime.new_id()
        bundle = busybox(["sleep", "1000"], edit=linux(cgroupsPath=f"/{name}"))
        runtime("run", "--detach", "--bundle", bundle, name)
        cgroup, story = Cgroup(json.loads(runtime("state", name).out)["pid"]), []
        for args, text in (
            (["--memory", "64m", "--memory-swap", "128m", "--memory-reservation", "32M", "--pids-limit", "50"], None),
            (["--memory", "256m", "--memory-swap", "512m", "--cpu-share", "512"], None),
            (["--cpu-quota", "20000", "--cpu-period", "50000", "--cpuset-cpus", "0"], None),
            (["--resources", "-"], '{"memory": {"limit": 33554432}, "cpu": {"quota": -1}, "pids": {"limit": -1}}'),
            (["--memory", "-1"], None),
            (["--memory", "nonsense"], None),
        ):
            said = runtime("update", *args, name, input=text)
            story.append((args, said.code != 0, [cgroup.read(n) for n in names]))
        found.append(story)
    for torpor, runc in zip(found[1], found[0], strict=True):
        assert torpor == runc


def test_messages_that_clients_look_for(both: list[Runtime], busybox: Callable[..., Path]) -> None:
    for runtime in both:
        assert "does not exist" in runtime("state", "nobody").err
        assert "does not exist" in runtime("delete", "nobody").err
        assert runtime("delete", "--force", "nobody").code == 0
        name = runtime.new_id()
        runtime("run", "--detach", "--bundle", busybox(["true"]), name)
        procs.wait_until("the end", lambda runtime=runtime, name=name: runtime.status(name) == "stopped")  # type: ignore[misc]
        assert "container not running" in runtime("kill", name, "TERM").err
        assert "already exists" in runtime("run", "--bundle", busybox(["true"]), name).err
