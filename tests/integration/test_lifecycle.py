"""The life of a container without checkpoints: run, create, start, state, list, kill, delete, exec, ps, wait, spec, do, features."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import procs
from support.cli import Container, Torpor, new_id

pytestmark = pytest.mark.requires("root")


# ---- run ------------------------------------------------------------------------------------------------------------------------------


def test_attached_run_has_the_programs_output_and_exit_code(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    bundle = busybox(["sh", "-c", "echo out; echo err >&2; exit 42"])
    result = torpor("run", "--bundle", bundle, new_id(), check=False)
    assert (result.code, result.out, result.err) == (42, "out\n", "err\n")
    assert torpor.ids() == []


@pytest.mark.parametrize(
    ("number", "name"), [(signal.SIGKILL, "KILL"), (signal.SIGTERM, "TERM"), (signal.SIGSEGV, "SEGV")]
)
def test_attached_run_of_a_killed_program_gives_128_plus_the_signal(torpor: Torpor, busybox: Callable[..., Path], number: int, name: str) -> None:  # fmt: skip
    # init of a pid namespace does not die of its own signals: a child does, and init passes it on
    bundle = busybox(["sh", "-c", f"sh -c 'kill -{name} $$'; exit $?"])
    assert torpor("run", "--bundle", bundle, new_id(), check=False).code == 128 + number


def test_attached_run_of_a_killed_init(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    bundle, name = busybox(["sleep", "1000"]), new_id()
    command = torpor.popen("run", "--bundle", bundle, name, stdin=subprocess.DEVNULL)
    procs.wait_until("the container", lambda: torpor("state", name, check=False).code == 0)
    torpor.wait_status(name, "running")
    torpor("kill", name, "KILL")
    assert command.wait(20) == 137
    procs.claimed.discard(command.pid)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR2])
def test_attached_run_passes_signals_on(torpor: Torpor, busybox: Callable[..., Path], tmp: Path, number: int) -> None:
    bundle, name = (
        busybox(
            ["sh", "-c", f"trap 'exit 9' {signal.Signals(number).name[3:]}; echo up; while :; do sleep 0.05; done"]
        ),
        new_id(),
    )
    with open(tmp / "out", "wb") as out:
        command = torpor.popen("run", "--bundle", bundle, name, stdin=subprocess.DEVNULL, stdout=out)
    procs.wait_until("the program", lambda: (tmp / "out").read_bytes() == b"up\n")
    command.send_signal(number)
    assert command.wait(20) == 9
    procs.claimed.discard(command.pid)
    assert torpor.ids() == []


def test_stdin_reaches_the_program(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    result = torpor("run", "--bundle", busybox(["tr", "a-z", "A-Z"]), new_id(), input="hello\n")
    assert result.out == "HELLO\n"


def test_detached_run_returns_and_the_container_stays(torpor: Torpor, waiter: Callable[..., Container]) -> None:
    c = waiter()
    state = torpor.state(c.id)
    assert (
        state["status"] == "running"
        and state["id"] == c.id
        and state["bundle"] == str(c.bundle)
        and state["ociVersion"].startswith("1.")
    )
    c.verify()
    torpor("kill", c.id, "KILL")
    torpor.wait_status(c.id, "stopped")
    torpor("delete", c.id)
    assert torpor.ids() == []


def test_pid_file_holds_a_host_process_whose_exit_status_is_the_containers(
    torpor: Torpor, busybox: Callable[..., Path], tmp: Path, no_reaper: None
) -> None:
    """What containerd relies on: the pid is reparented to the subreaper that called torpor, and waiting for it gives the exit code."""
    bundle, name = busybox(["sh", "-c", "trap 'exit 7' TERM; while :; do sleep 0.05; done"]), new_id()
    torpor("run", "--detach", "--bundle", bundle, "--pid-file", tmp / "pid", name)
    pid = int((tmp / "pid").read_text())
    found = procs.process(pid)
    assert found is not None and found.ppid == os.getpid()
    assert torpor.state(name)["pid"] == pid
    time.sleep(0.2)
    os.kill(pid, signal.SIGTERM)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    assert torpor.state(name)["status"] == "stopped"
    torpor("delete", name)


def test_a_zombie_is_a_stopped_container(
    torpor: Torpor, busybox: Callable[..., Path], tmp: Path, no_reaper: None
) -> None:
    name = new_id()
    torpor("run", "--detach", "--bundle", busybox(["true"]), "--pid-file", tmp / "pid", name)
    pid = int((tmp / "pid").read_text())
    procs.wait_until("the zombie", lambda: (p := procs.process(pid)) is not None and p.state == "Z")
    assert torpor.state(name)["status"] == "stopped"
    torpor("delete", name)


def test_a_program_that_does_not_exist(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    bundle, name = busybox(["/no/such/program"]), new_id()
    torpor.fails("run", "--bundle", bundle, name, says="/no/such/program")
    torpor.fails("run", "--detach", "--bundle", bundle, name, says="/no/such/program")
    assert torpor.ids() == []


# ---- create and start -----------------------------------------------------------------------------------------------------------------


def test_create_start_kill_delete(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    c = Container(torpor, busybox(["sh", "-c", "echo started; exec sleep 1000"]), new_id()).create()
    assert c.status == "created"
    time.sleep(0.2)
    assert c.text() == ""
    torpor("start", c.id)
    assert c.next_line() == "started"
    assert c.status == "running"
    torpor.fails("start", c.id, says="running")
    torpor.fails("delete", c.id, says="--force")
    assert c.status == "running"
    torpor("kill", c.id, "9")
    torpor.wait_status(c.id, "stopped")
    torpor.fails("kill", c.id, "TERM", says="container not running")
    torpor("delete", c.id)
    torpor.fails("state", c.id, says="does not exist")


def test_what_clients_call_most_needs_little_of_python(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    """No timing: what the commands import while they work is looked at. Each of these costs milliseconds with every command."""
    bundle, name = busybox(["sleep", "1000"]), new_id()
    image = tmp / "image"
    life = (
        ("create", "--bundle", bundle, name), ("start", name), ("state", name), ("list", "--format=json"), ("ps", "--format=json", name),
        ("exec", "--detach", name, "true"), ("pause", name), ("resume", name), ("checkpoint", "--image-path", image, name), ("delete", name),
        ("create", "--bundle", bundle, name), ("restore", "--detach", "--image-path", image, name), ("kill", name, "9"), ("delete", "--force", name),
    )  # fmt: skip
    for command in life:
        said = torpor(*command, stdin=subprocess.DEVNULL, env={"PYTHONPROFILEIMPORTTIME": "1"}).err
        imported = {line.rpartition("|")[2].strip() for line in said.splitlines() if line.startswith("import time:")}
        assert "torpor.cli.main" in imported, said
        assert not imported & {"json", "re", "enum", "importlib", "warnings", "socket", "ctypes", "threading"}, command


def test_a_created_container_can_be_deleted(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    c = Container(torpor, busybox(["true"]), new_id()).create()
    torpor("delete", c.id)
    assert torpor.ids() == []


def test_an_id_is_used_once(torpor: Torpor, waiter: Callable[..., Container]) -> None:
    c = waiter()
    torpor.fails("run", "--detach", "--bundle", c.bundle, c.id, says="already exists")
    torpor.fails("create", "--bundle", c.bundle, c.id, says="already exists")
    c.verify()


def test_hooks_run_in_order_with_the_state_on_stdin(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    kinds = ["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"]
    log = tmp / "hooks.log"

    def hook(kind: str) -> dict[str, object]:
        # the hooks that run inside see the container's files: there the log is a mount
        path = "/hooks.log" if kind in ("startContainer",) else str(log)
        shell = "/bin/sh"
        return {"path": shell, "args": ["sh", "-c", f"echo {kind} $(cat) >> {path}"], "env": ["PATH=/usr/bin:/bin"]}

    log.touch()
    bundle = busybox(
        ["true"],
        hooks={k: [hook(k)] for k in kinds},
        mounts=[{"destination": "/hooks.log", "type": "bind", "source": str(log), "options": ["bind", "rw"]}],
    )
    name = new_id()
    torpor("run", "--bundle", bundle, name)
    lines = log.read_text().splitlines()
    assert [line.split()[0] for line in lines] == kinds
    for line in lines:
        state = json.loads(line.split(" ", 1)[1])
        assert state["id"] == name and state["bundle"] == str(bundle), line
    assert json.loads(lines[1].split(" ", 1)[1])["pid"] > 0


def test_a_failing_hook_leaves_nothing(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    bundle = busybox(["true"], hooks={"createRuntime": [{"path": "/bin/false"}]})
    torpor.fails("create", "--bundle", bundle, new_id())
    assert torpor.ids() == []


# ---- looking --------------------------------------------------------------------------------------------------------------------------


def test_state_and_list(torpor: Torpor, waiter: Callable[..., Container]) -> None:
    a, b = waiter("a", annotations={"org.example.key": "value"}), waiter("b")
    assert sorted(torpor.ids()) == sorted([a.id, b.id])
    listed = {c["id"]: c for c in json.loads(torpor("list", "--format", "json").out)}
    assert listed[a.id]["status"] == "running" and listed[b.id]["pid"] == b.pid
    table = torpor("list").out
    assert table.splitlines()[0].split()[:3] == ["ID", "PID", "STATUS"] and a.id in table
    assert torpor.state(a.id)["annotations"] == {"org.example.key": "value"}


def test_a_unique_beginning_of_an_id_is_enough(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    base = new_id("prefix")
    one = Container(torpor, busybox(["sleep", "1000"]), f"{base}-one").run()
    two = Container(torpor, busybox(["sleep", "1000"]), f"{base}-two").run()
    assert torpor.state(f"{base}-o")["id"] == one.id
    torpor.fails("state", f"{base}-", says="ambiguous")
    two.delete()
    assert torpor.state(f"{base}-")["id"] == one.id


def test_ps(torpor: Torpor, waiter: Callable[..., Container]) -> None:
    c = waiter()
    pids = json.loads(torpor("ps", "--format", "json", c.id).out)
    assert pids == c.host_pids() and c.pid in pids and len(pids) == 2
    table = torpor("ps", c.id).out
    assert "PID" in table.splitlines()[0] and str(c.pid) in table


def test_wait_prints_the_exit_status(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    c = (
        Container(
            torpor, busybox(["sh", "-c", "trap 'exit 5' TERM; echo READY; while :; do sleep 0.05; done"]), new_id()
        )
        .run()
        .wait_ready()
    )
    with open(tmp / "wait", "wb") as out:
        waiting = torpor.popen("wait", c.id, stdout=out)
    time.sleep(0.2)
    assert waiting.poll() is None
    torpor("kill", c.id)
    assert waiting.wait(20) == 0
    procs.claimed.discard(waiting.pid)
    assert json.loads((tmp / "wait").read_text()) == {"id": c.id, "exitStatus": 5}


def test_features(torpor: Torpor) -> None:
    features = json.loads(torpor("features").out)
    assert features["ociVersionMin"] and "pid" in features["linux"]["namespaces"]
    assert features["annotations"]["org.opencontainers.runc.checkpoint.enabled"] == "true"


def test_version_and_help(torpor: Torpor) -> None:
    lines = torpor("--version").out.splitlines()
    assert lines[0].startswith("torpor version ") and any(line.startswith("spec: 1.") for line in lines)
    for verb in ("", "run", "create", "checkpoint", "restore", "exec", "do"):
        words = [verb, "--help"] if verb else ["help"]
        result = torpor(*words)
        assert len(result.out + result.err) > 50, f"{verb} has no help"


# ---- acting ---------------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["TERM", "SIGTERM", "15"])
def test_kill_takes_names_and_numbers(torpor: Torpor, waiter: Callable[..., Container], name: str) -> None:
    c = waiter()
    torpor("kill", c.id, name)
    torpor.wait_status(c.id, "stopped")


def test_kill_with_nonsense(torpor: Torpor, waiter: Callable[..., Container]) -> None:
    c = waiter()
    torpor.fails("kill", c.id, "NOSUCHSIGNAL", says="NOSUCHSIGNAL")
    torpor.fails("kill", c.id, "4711", says="4711")
    c.verify()


def test_kill_all_reaches_every_process(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    c = Container(torpor, busybox(["sh", "-c", "setsid sleep 1000 & sleep 1000 & echo READY; exec sleep 1000"], namespaces=("mount", "uts", "ipc", "network")), new_id()).run().wait_ready()  # fmt: skip
    # without a pid namespace the others would live on
    pids = json.loads(torpor("ps", "--format", "json", c.id).out)
    assert len(pids) == 3
    torpor("kill", "--all", c.id, "KILL")
    procs.wait_until("all to be dead", lambda: not any(procs.alive(p) for p in pids))


def test_force_delete_of_a_running_container_and_of_an_unknown_one(
    torpor: Torpor, waiter: Callable[..., Container]
) -> None:
    c = waiter()
    pids = c.host_pids()
    torpor("delete", "--force", c.id)
    procs.reap()
    assert not any(procs.alive(p) for p in pids)
    torpor("delete", "--force", c.id)


def test_exec(torpor: Torpor, waiter: Callable[..., Container]) -> None:
    c = waiter()
    result = torpor("exec", c.id, "sh", "-c", "echo in; hostname; pwd; exit 6", check=False)
    assert (result.code, result.out.split()) == (6, ["in", "torpor-test", "/"])
    result = torpor(
        "exec",
        "--cwd",
        "/tmp",
        "--env",
        "X=1 2",
        "--user",
        "65534:65534",
        c.id,
        "sh",
        "-c",
        'pwd; echo "$X"; id -u; id -g',
    )
    assert result.out.splitlines() == ["/tmp", "1 2", "65534", "65534"]
    result = torpor("exec", c.id, "cat", input="through\n")
    assert result.out == "through\n"
    torpor.fails("exec", c.id, "/no/such/thing", says="/no/such/thing")
    c.verify()


def test_exec_detached(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    torpor("exec", "--detach", "--pid-file", tmp / "pid", c.id, "sleep", "1000")
    pid = int((tmp / "pid").read_text())
    assert pid in json.loads(torpor("ps", "--format", "json", c.id).out)
    found = procs.process(pid)
    assert found is not None and found.comm == "sleep"


def test_pause_and_resume(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    c = (
        Container(
            torpor,
            busybox(["sh", "-c", "echo READY; i=0; while :; do i=$((i+1)); echo $i > /count; sleep 0.01; done"]),
            new_id(),
        )
        .run()
        .wait_ready()
    )
    count = c.bundle / "rootfs" / "count"
    torpor("pause", c.id)
    assert c.status == "paused"
    time.sleep(0.1)
    before = count.read_text()
    time.sleep(0.3)
    assert count.read_text() == before
    torpor.fails("pause", c.id, says="paused")
    torpor.fails("exec", c.id, "true", says="paused")
    torpor("resume", c.id)
    assert c.status == "running"
    procs.wait_until("the counter to go on", lambda: count.read_text() not in ("", before))
    torpor.fails("resume", c.id, says="not paused")


def test_force_delete_of_a_paused_container(torpor: Torpor, waiter: Callable[..., Container]) -> None:
    c = waiter()
    torpor("pause", c.id)
    c.delete()
    assert torpor.ids() == []


# ---- spec and do ----------------------------------------------------------------------------------------------------------------------


def test_spec_makes_a_bundle_that_runs(torpor: Torpor, tmp: Path, busybox: Callable[..., Path]) -> None:
    bundle = tmp / "fresh"
    bundle.mkdir()
    (bundle / "rootfs").symlink_to(busybox(["true"]) / "rootfs")
    torpor("spec", "--bundle", bundle, "--", "echo", "from the new bundle")
    config = json.loads((bundle / "config.json").read_text())
    assert config["process"]["args"] == ["echo", "from the new bundle"]
    torpor.fails("spec", "--bundle", bundle, says="config.json")
    config["process"]["terminal"] = False
    (bundle / "config.json").write_text(json.dumps(config))
    assert torpor("run", "--bundle", bundle, new_id()).out == "from the new bundle\n"


def test_do_runs_on_the_hosts_files_and_throws_away_what_is_written(torpor: Torpor) -> None:
    marker = Path("/var/tmp") / f"{new_id('marker')}"
    result = torpor("do", "--", "sh", "-c", f"id -u; touch {marker} && ls {marker}; exit 4", check=False)
    assert (result.code, result.out.split()) == (4, ["0", str(marker)])
    assert not marker.exists()
    assert torpor.ids() == []
    assert torpor("do", "echo", "without dashes").out == "without dashes\n"
    assert torpor("do", "--cwd", "/etc", "pwd").out == "/etc\n"


def test_do_mounts_volumes(torpor: Torpor, tmp: Path) -> None:
    (tmp / "volume").mkdir()
    torpor("do", "--volume", f"{tmp}/volume:/mnt", "sh", "-c", "echo kept > /mnt/file")
    assert (tmp / "volume" / "file").read_text() == "kept\n"


def test_run_without_a_bundle(torpor: Torpor) -> None:
    name = new_id()
    torpor("run", "--detach", name, "sleep", "1000")
    assert torpor.state(name)["status"] == "running"
    assert "sleep" in torpor("exec", name, "cat", "/proc/1/cmdline").out


# ---- flags ----------------------------------------------------------------------------------------------------------------------------


def test_go_style_flags(torpor: Torpor, waiter: Callable[..., Container]) -> None:
    c = waiter()
    root = str(torpor.root)
    for top in (
        ["-root", root],
        [f"-root={root}"],
        ["--root", root],
        [f"--root={root}"],
        ["--root", root, "--root", root],
    ):
        result = torpor("list", "-quiet", top=top)
        assert c.id in result.out.split(), top
    assert c.id in torpor("list", "-q").out
    assert torpor("list", "--quiet=true").out.split() == [c.id]
    assert len(torpor("list", "--quiet=false").out.split()) > 1
    torpor("--debug=false", "list")
    torpor("list", top=["--debug", "--debug-log", str(torpor.directory / "debug.log")])
    assert (torpor.directory / "debug.log").stat().st_size > 0


def test_runcs_short_flags(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    name = new_id()
    torpor("run", "-d", "-b", busybox(["sleep", "1000"]), name)
    assert torpor("list", "-q").out.split() == [name]
    torpor("delete", "-f", name)


def test_log_formats(torpor: Torpor) -> None:
    for words in (["--log-format", "json"], ["--log-format=json"], ["--log-format", "text"]):
        torpor.fails("state", "nobody-here", top=words, says="does not exist")


def test_a_nearly_empty_environment_is_enough(torpor: Torpor, waiter: Callable[..., Container]) -> None:
    """Podman calls pause, resume, kill and delete without PATH and HOME."""
    c = waiter()
    for words in (["pause", c.id], ["resume", c.id], ["kill", c.id, "KILL"], ["delete", "--force", c.id]):
        done = subprocess.run(torpor.argv(*words), env={}, capture_output=True, text=True, check=False)
        assert done.returncode == 0, (words, done.stderr)


def test_commands_that_race_for_one_id(torpor: Torpor, busybox: Callable[..., Path]) -> None:
    """Eight commands at a time race for the same id: one wins, the others are told."""
    bundle, name = busybox(["sleep", "1000"]), new_id()
    running = [torpor.popen("run", "--detach", "--bundle", bundle, name, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) for _ in range(8)]  # fmt: skip
    codes = sorted(p.wait(60) for p in running)
    for p in running:
        procs.claimed.discard(p.pid)
    assert codes == [0] + [128] * 7
    assert torpor.ids() == [name]
