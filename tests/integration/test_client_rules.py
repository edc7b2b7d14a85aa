"""The twenty rules of what clients call and expect: one test for each, in the order of client-surface.md §0."""

import ctypes
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support import procs
from support.cli import TORPOR, Container, Torpor, new_id

pytestmark = pytest.mark.requires("root", "command:busybox")


def test_01_global_flags_come_first_in_both_spellings(torpor: Torpor, tmp: Path) -> None:
    log = tmp / "log.json"
    for words in (
        ["--root", str(tmp / "r"), "--log", str(log), "--log-format", "json", "list"],
        [f"--root={tmp}/r", f"--log={log}", "--log-format=json", "--debug=false", "--systemd-cgroup=false", "list"],
        ["-root", str(tmp / "r"), "--rootless=auto", "list"],
        ["--rootless", "false", "--cgroup-manager", "cgroupfs", "list"],
        ["--systemd-cgroup", "list"],
        ["--version"],
    ):
        done = subprocess.run([TORPOR, *words], capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stderr)


def test_02_one_dash_is_enough(
    torpor: Torpor, busybox: Callable[..., Path], tmp: Path, waiter: Callable[..., Container]
) -> None:
    c = waiter()
    torpor("checkpoint", "-image-path", tmp / "i", c.id)
    torpor("delete", c.id)
    again = Container(torpor, c.bundle, new_id())
    again.restore_from(tmp / "i", "-no-subreaper")
    again.verify()


def test_03_a_flag_given_twice(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    c.checkpoint(tmp / "i", "--leave-running", "--leave-running")
    c.verify()


def test_04_checkpoint_help(torpor: Torpor) -> None:
    assert "--image-path" in torpor("checkpoint", "--help").out


def test_05_a_flag_that_needs_an_argument(torpor: Torpor) -> None:
    torpor.fails("restore", "--lsm-mount-context", says="flag needs an argument")


def test_06_a_criu_to_ask(torpor: Torpor, tmp: Path) -> None:
    criu = tmp / "criu"
    torpor("install", "--podman", "--podman-file", tmp / "torpor.conf", "--criu", criu, env={"PATH": str(tmp)})
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs:
        process = subprocess.Popen([criu, "swrk", str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        ours.send(b"\x08\x0a")
        ours.settimeout(20)
        answer = ours.recv(4096)
    process.wait(20)
    # type VERSION, success, version { major, minor, sublevel }
    assert answer[:6] == b"\x08\x0a\x10\x01\x52\x06" and answer[7] * 10000 + answer[9] * 100 >= 31600


def test_07_and_08_the_image_directory(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    """inventory.img is there; the directory may exist or not; it is flat; one directory serves a client many times."""
    c = waiter()
    (tmp / "there").mkdir()
    for image in (tmp / "there", tmp / "not" / "there", tmp / "there"):
        c.checkpoint(image, "--work-path", str(tmp / "work"), "--leave-running")
        assert sorted(p.name for p in image.iterdir()) == ["checkpoint.img", "inventory.img"]
        assert all(p.is_file() for p in image.iterdir())
    c.delete()
    again = Container(torpor, c.bundle, new_id())
    again.restore_from(tmp / "there")
    again.verify()


def test_09_a_paused_container(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    torpor("pause", c.id)
    c.checkpoint(tmp / "one", "--leave-running")
    assert c.status == "paused"
    torpor("resume", c.id)
    c.verify()
    torpor("pause", c.id)
    c.checkpoint(tmp / "two")
    started = time.monotonic()
    torpor.fails("resume", c.id, says="container not running")
    assert time.monotonic() - started < 20
    torpor("delete", c.id)
    again = Container(torpor, c.bundle, new_id())
    again.restore_from(tmp / "two")
    again.verify()


CHECKPOINT_FLAGS = [
    "--file-locks", "--tcp-established", "--tcp-skip-in-flight", "--link-remap", "--ext-unix-sk", "--shell-job", "--empty-ns", "network",
    "--manage-cgroups-mode", "soft", "--auto-dedup",
]  # fmt: skip
RESTORE_FLAGS = [
    "--no-pivot", "--no-subreaper", "--no-new-keyring", "--file-locks", "--tcp-established", "--tcp-close", "--ext-unix-sk",
    "--shell-job", "--empty-ns", "network", "--manage-cgroups-mode", "ignore", "--auto-dedup", "--lsm-profile", "selinux:x",
    "--lsm-mount-context", "x",
]  # fmt: skip


def test_10_flags_that_are_honoured_or_ignored(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    c.checkpoint(tmp / "i", "--work-path", str(tmp / "work"), *CHECKPOINT_FLAGS)
    torpor("delete", c.id)
    again = Container(torpor, c.bundle, new_id())
    flags = [f for f in RESTORE_FLAGS if not os.path.isdir("/sys/fs/selinux") or "lsm" not in f]
    again.restore_from(tmp / "i", "--work-path", str(tmp / "other-work"), *flags)
    again.verify()


def test_10_a_pre_dump_into_the_same_directory_again(
    torpor: Torpor, waiter: Callable[..., Container], tmp: Path
) -> None:
    """As Podman's --pre-checkpoint and --with-previous call it: the directories are there already, with old images in them."""
    c = waiter()
    work = ("--work-path", str(tmp))
    for _ in range(2):
        c.checkpoint(tmp / "pre-checkpoint", *work, "--leave-running", "--pre-dump")
        c.verify()
    for _ in range(2):
        c.checkpoint(tmp / "checkpoint", *work, "--leave-running", "--parent-path", "../pre-checkpoint")
        c.verify()
    assert {p.name for p in (tmp / "checkpoint").iterdir()} == {"checkpoint.img", "inventory.img"}
    assert [p.name for p in tmp.iterdir() if ".torpor-" in p.name] == []
    torpor("delete", "--force", c.id)
    again = Container(torpor, c.bundle, new_id())
    # containerd says it again
    again.restore_from(tmp / "checkpoint", *work, "--parent-path", "../pre-checkpoint")
    again.verify()


def test_11_logs_in_the_work_path(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    c.checkpoint(tmp / "i", "--work-path", str(tmp / "work"))
    torpor("delete", c.id)
    assert "wrote" in (tmp / "work" / "dump.log").read_text()
    (tmp / "broken").mkdir()
    (tmp / "broken" / "checkpoint.img").write_bytes(b"x" * 9999)
    again = Container(torpor, c.bundle, new_id())
    done = again.restore_from(tmp / "broken", "--work-path", str(tmp / "work"), check=False)
    assert done.code == 128
    last = (tmp / "work" / "restore.log").read_text().splitlines()[-1]
    assert "Error" in last and done.err.strip() in last
    c = waiter()
    done = c.checkpoint(tmp / "j", "--work-path", str(tmp / "work"), check=False, env={"TORPOR_FAILPOINT": "collect"})
    assert done.code == 128 and "Error" in (tmp / "work" / "dump.log").read_text().splitlines()[-1]


def test_12_failures_are_one_line_and_one_object(torpor: Torpor, tmp: Path) -> None:
    torpor.fails("restore", "--image-path", tmp, "--bundle", tmp, "c", says="holds no checkpoint.img")
    entries = [json.loads(line) for line in torpor.log.read_text().splitlines()]
    assert len(entries) == 1 and entries[0]["level"] == "error"
    assert time.strptime(entries[0]["time"][:19], "%Y-%m-%dT%H:%M:%S")


def test_13_words_that_clients_look_for(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    for verb in ("state", "start", "kill", "delete", "pause", "resume", "ps"):
        torpor.fails(verb, "nobody", says="does not exist")
    name = new_id()
    torpor("run", "--detach", "--bundle", busybox(["true"]), name)
    torpor.wait_status(name, "stopped")
    torpor.fails("kill", name, says="container not running")


def test_14_restore_without_create(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    c.checkpoint(tmp / "i")
    torpor("delete", c.id)
    again = Container(torpor, c.bundle, new_id())
    again.restore_from(tmp / "i", "--pid-file", str(tmp / "pid"))
    assert again.status == "running" and (tmp / "pid").read_text() == str(again.pid)
    again.verify()


def test_15_the_pid_is_ours_and_outlives_the_command(
    torpor: Torpor, busybox: Callable[..., Path], tmp: Path, no_reaper: None
) -> None:
    """As a shim: a subreaper, whose commands die with the thread that started them."""

    def die_with_parent() -> None:
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)

    bundle = busybox(["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.1; done"])
    images = []
    for how in ("create", "restore"):
        name, pid_file = new_id(), tmp / f"pid-{how}"
        flags = ["--image-path", str(images[0]), "--detach"] if images else []
        subprocess.run(
            torpor.argv(how, "--bundle", bundle, "--pid-file", pid_file, *flags, name),
            check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, preexec_fn=die_with_parent, timeout=60,
        )  # fmt: skip
        pid = int(pid_file.read_text())
        if how == "create":
            subprocess.run(torpor.argv("start", name), check=True)
            time.sleep(0.5)
            images.append(tmp / "image")
            subprocess.run(torpor.argv("checkpoint", "--leave-running", "--image-path", images[0], name), check=True)
        p = procs.process(pid)
        assert p is not None and p.ppid == os.getpid()
        os.kill(pid, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 7, how
        subprocess.run(torpor.argv("delete", name), check=True)


def test_16_standard_streams_and_the_console(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    """test_terminal.py has more about terminals."""
    name = new_id()
    bundle = busybox(["sh", "-c", "tty; stty size; sleep 1000"], terminal=True)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp / "console"))
        listener.listen(1)
        torpor("create", "--bundle", bundle, "--console-socket", tmp / "console", name)
        connection, _ = listener.accept()
        with connection:
            _, (master,), _, _ = socket.recv_fds(connection, 4096, 1)
    torpor("start", name)
    try:
        assert b"/dev/pts/0" in procs.wait_until("output", lambda: os.read(master, 4096))
    finally:
        os.close(master)


HOOKS = ("prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop")


def test_17_hooks(torpor: Torpor, busybox: Callable[..., Path], tmp: Path, waiter: Callable[..., Container]) -> None:
    """Six kinds, each with the state on its standard input; prestart and createRuntime at a restore too, with the pid."""
    said = tmp / "said"
    said.mkdir()

    def hook(kind: str) -> dict[str, object]:
        inside = kind in ("startContainer",)
        target = f"/said/{kind}" if inside else f"{said}/{kind}"
        path = "/bin/sh" if inside else "/usr/bin/sh"
        return {"path": path, "args": ["sh", "-c", f"cat > {target}"], "env": ["PATH=/bin:/usr/bin"]}

    c = waiter(
        hooks={kind: [hook(kind)] for kind in HOOKS},
        mounts=[{"destination": "/said", "type": "bind", "source": str(said), "options": ["rbind", "rw"]}],
    )
    for kind in HOOKS[:-1]:
        state = json.loads((said / kind).read_text())
        assert state["id"] == c.id and state["bundle"] == str(c.bundle) and state["ociVersion"]
        (said / kind).unlink()
    c.checkpoint(tmp / "i")
    torpor("delete", c.id)
    assert json.loads((said / "poststop").read_text())["id"] == c.id
    again = Container(torpor, c.bundle, new_id())
    again.restore_from(tmp / "i")
    for kind in ("prestart", "createRuntime", "poststart"):
        state = json.loads((said / kind).read_text())
        assert state["id"] == again.id and state["pid"] == again.pid, kind
    assert not (said / "startContainer").exists(), "the program does not start, it goes on"
    again.verify()


def test_18_features_and_version(torpor: Torpor) -> None:
    features = json.loads(torpor("features").out)
    assert features["annotations"]["org.opencontainers.runc.checkpoint.enabled"] == "true"
    assert set(features["hooks"]) == set(HOOKS)
    assert torpor("--version").out.splitlines()[0].startswith("torpor version ")


def test_19_ps_kill_delete_update(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    name = new_id()
    torpor("run", "--detach", "--bundle", busybox(["sh", "-c", "sleep 1000 & sleep 1000 & wait"]), name)
    pids = json.loads(torpor("ps", "--format", "json", name).out)
    assert len(pids) == 3 and all(os.path.exists(f"/proc/{pid}") for pid in pids)
    assert len(torpor("ps", "--format", "table", name).out.splitlines()) == 4
    torpor("update", "--resources=-", name, input=json.dumps({"memory": {"limit": 1 << 25}, "pids": {"limit": 50}}))
    from torpor.cgroups import Cgroup

    cgroup = Cgroup(torpor.state(name)["pid"])
    assert cgroup.number("memory.limit_in_bytes", "memory.max") == 1 << 25 and cgroup.number("pids.max") == 50
    torpor(
        "update",
        "--memory",
        "64m",
        "--memory-swap",
        "-1",
        "--cpu-share",
        "512",
        "--cpu-quota",
        "20000",
        "--cpu-period",
        "100000",
        name,
    )
    assert cgroup.number("memory.limit_in_bytes", "memory.max") == 64 << 20
    torpor.fails("update", "--memory", "lots", name, says="invalid size")
    torpor.fails("update", "--resources", "/nope", name, says="cannot read")
    events = json.loads(torpor("events", "--stats", name).out)
    assert events["type"] == "stats" and events["data"]["pids"] == {"current": 3, "limit": 50}
    torpor("kill", name, "0")
    torpor("kill", name, "SIGCONT")
    torpor("kill", "--all", name, "9")
    torpor.wait_status(name, "stopped")
    torpor("delete", name)
    torpor("delete", "--force", name)


def test_19_exec_hands_on_descriptors(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    (tmp / "file").write_text("by descriptor 3\n")
    words = torpor.argv("exec", "--preserve-fds", "1", c.id, "sh", "-c", "cat <&3; ls /proc/self/fd | wc -l")
    with procs.claiming:
        done = subprocess.run(
            ["bash", "-c", f'exec 3< {tmp / "file"} 4< /dev/null; exec "$@"', "bash", *words],
            stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
        )  # fmt: skip
    # three streams, this one, and the directory that ls reads
    assert done.stdout.split("\n") == ["by descriptor 3", "5", ""], done


@pytest.mark.parametrize("interval", ["1s", "1", "200ms"])
def test_19_events(torpor: Torpor, busybox: Callable[..., Path], interval: str) -> None:
    name = new_id()
    torpor("run", "--detach", "--bundle", busybox(["sleep", "2"]), name)
    lines = torpor("events", f"--interval={interval}", name).out.splitlines()
    assert lines and all(json.loads(line)["type"] == "stats" for line in lines), "it ends with the container"


def test_20_an_almost_empty_environment(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    name = new_id()
    bundle = busybox(["sleep", "1000"])

    def call(*words: str | Path) -> None:
        argv = torpor.argv(*words)
        done = subprocess.run(
            argv, env={}, capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL, check=False
        )
        assert done.returncode == 0, done

    torpor("create", "--bundle", bundle, name)
    for words in (["start", name], ["pause", name], ["resume", name], ["checkpoint", "--leave-running", "--image-path", tmp / "i", name],
                  ["kill", name, "9"], ["delete", "--force", name]):  # fmt: skip
        call(*words)


def test_pidfd_socket(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    name = new_id()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp / "s"))
        listener.listen(1)
        torpor("run", "--detach", "--bundle", busybox(["sleep", "1000"]), "--pidfd-socket", tmp / "s", name)
        connection, _ = listener.accept()
        with connection:
            _, (fd,), _, _ = socket.recv_fds(connection, 16, 1)
    try:
        signal.pidfd_send_signal(fd, signal.SIGKILL)
    finally:
        os.close(fd)
    torpor.wait_status(name, "stopped")


def test_a_time_namespace(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    def edit(config: dict[str, Any]) -> None:
        config["linux"]["namespaces"].append({"type": "time"})
        config["linux"]["timeOffsets"] = {
            "monotonic": {"secs": 86400, "nanosecs": 1},
            "boottime": {"secs": 172800, "nanosecs": 0},
        }

    shown = torpor("run", "--bundle", busybox(["cat", "/proc/self/timens_offsets"], edit=edit), new_id()).out
    assert [line.split() for line in shown.splitlines()] == [["monotonic", "86400", "1"], ["boottime", "172800", "0"]]


def test_annotations_for_checkpoints(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter(annotations={
        "dev.torpor.checkpoint.capture": "sometimes",
        "dev.torpor.checkpoint.image-path": str(tmp / "other"),
        "dev.torpor.checkpoint.tcp": "established",
    })  # fmt: skip
    torpor.fails(
        "checkpoint", "--image-path", tmp / "i", c.id, says="annotation dev.torpor.checkpoint.capture=sometimes"
    )
    assert not (tmp / "i").exists() and c.status == "running"
    # what the command says goes before the annotation
    done = c.checkpoint(tmp / "i", "--capture=stop")
    assert "dev.torpor.checkpoint.image-path" in done.err and "has no effect" in done.err
    assert "dev.torpor.checkpoint.tcp" not in done.err
    assert (tmp / "i" / "checkpoint.img").exists() and not (tmp / "other").exists()


def test_an_annotation_chooses_the_compression(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter(annotations={"dev.torpor.checkpoint.compression": "zstd:1"})
    c.checkpoint(tmp / "i", "--leave-running")
    c.checkpoint(tmp / "j", "--leave-running", "--compression=lz4")
    for name, codec in (("i", "zstd"), ("j", "lz4")):
        assert json.loads(torpor("inspect", "--json", tmp / name).out)["compression"] == codec
