"""Never harm: whatever is killed, and whenever, the program runs on as if nothing had been, and nothing is left behind.

Twenty rounds at random moments in CI, 200 in `make soak`; and a failpoint in every stage, which does the same where it is known.
"""

import os
import random
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
from support import leaks, procs
from support.cli import Container, Torpor, new_id
from support.workloads import Stage

pytestmark = [pytest.mark.requires("root", "command:python3.11")]

ROUNDS = int(os.environ.get("TORPOR_SOAK_ROUNDS", "20"))
SEED = int(os.environ.get("TORPOR_SOAK_SEED", str(random.randrange(10**6))))
LONG = pytest.mark.timeout(120 + 15 * ROUNDS)


# ---- what must be true after each round -----------------------------------------------------------------------------------------------


def tracer_of(command: subprocess.Popen[bytes]) -> procs.Process | None:
    return next((p for p in procs.descendants(command.pid) if p.comm == "torpor-tracer"), None)


def no_tracer_left() -> None:
    """Who lost its command undoes everything and ends by itself."""

    def gone() -> bool:
        return not [p for p in procs.descendants(os.getpid()) if p.comm == "torpor-tracer" and p.state != "Z"]

    procs.wait_until("the tracer to end", gone, 30)


def untouched(c: Container) -> None:
    """Not frozen, not stopped, not traced: what a program could not see but an operator would."""
    assert c.status == "running"
    for pid in c.host_pids():
        for tid in os.listdir(f"/proc/{pid}/task") if os.path.exists(f"/proc/{pid}/task") else []:
            try:
                status = Path(f"/proc/{pid}/task/{tid}/status").read_text()
            except OSError:
                continue  # one of the short-lived ones
            fields = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
            assert fields["TracerPid"].strip() == "0", f"{pid}/{tid} is traced by {fields['TracerPid']}"
            assert fields["State"][0] not in "tT", f"{pid}/{tid} is stopped: {fields['State']}"


def whole_or_not_there(image: Path) -> bool:
    """Never half: the image verifies, or there is not even a temporary file."""
    names = [p.name for p in image.iterdir()] if image.exists() else []
    if not names:
        return False
    assert names == ["checkpoint.img"], names
    from torpor import _core

    _core.verify(str(image))
    return True


class Killer:
    """Kills the command in even rounds, its tracer in odd ones."""

    def __init__(self) -> None:
        self.random = random.Random(SEED)
        print(f"TORPOR_SOAK_SEED={SEED}")
        self.hits = {"command": 0, "tracer": 0, "late": 0}

    def strike(self, command: subprocess.Popen[bytes], number: int, duration: float) -> str:
        """After a random part of what the command usually takes. Returns what was killed."""
        delay = self.random.uniform(0, duration)
        start = time.monotonic()
        if number % 2 == 0:
            time.sleep(delay)
            what = "command"
            if command.poll() is None:
                command.kill()
            else:
                what = "late"
        else:
            what = "late"
            tracer = None
            while tracer is None and command.poll() is None:
                tracer = tracer_of(command)
            time.sleep(max(0.0, delay - (time.monotonic() - start)))
            if tracer is not None and procs.alive(tracer.pid) and command.poll() is None:
                procs.kill_exactly(tracer)
                what = "tracer"
        self.hits[what] += 1
        return what


def finish(command: subprocess.Popen[bytes]) -> int:
    try:
        return command.wait(60)
    finally:
        procs.claimed.discard(command.pid)


# ---- random moments -------------------------------------------------------------------------------------------------------------------


@LONG
@pytest.mark.parametrize("name", ["cpython", "spaces"])
def test_kill_at_random_moments_of_checkpoint(stage: Callable[[str], Stage], torpor: Torpor, tmp: Path, name: str) -> None:  # fmt: skip
    c = stage(name).start()
    c.verify()
    start = procs.process(c.pid)
    before = time.monotonic()
    c.checkpoint(tmp / "first", "--leave-running")
    duration = (time.monotonic() - before) * 1.1
    shutil.rmtree(tmp / "first")
    quiet = leaks.snapshot()
    killer = Killer()
    for number in range(ROUNDS):
        image = tmp / f"image{number}"
        errors = tmp / "errors"
        with open(errors, "wb") as err:
            command = torpor.popen("checkpoint", "--image-path", image, "--leave-running", c.id, stdin=subprocess.DEVNULL, stdout=err, stderr=err)  # fmt: skip
        what = killer.strike(command, number, duration)
        code = finish(command)
        no_tracer_left()
        if what == "tracer" and code != 0:
            assert code == 128 and errors.read_text().count("\n") == 1, (code, errors.read_text())
        untouched(c)
        assert start is not None and (now := procs.process(c.pid)) is not None and now.start == start.start
        c.verify()
        assert whole_or_not_there(image) or code != 0
        assert leaks.new_since(quiet, ignore=c.host_pids) == [], f"round {number} ({what})"
        shutil.rmtree(image, ignore_errors=True)
    assert killer.hits["command"] and killer.hits["tracer"], killer.hits
    # and it can still do what it could
    c.checkpoint(tmp / "last", "--leave-running")
    c.verify()


def test_a_killed_tracer_leaves_calls_caught(stage: Callable[[str], Stage], torpor: Torpor, tmp: Path) -> None:
    """A program that catches its own system calls must not catch ours, and must catch its own from then on."""
    c = stage("dispatch").start()
    before = time.monotonic()
    c.checkpoint(tmp / "first", "--leave-running")
    duration = (time.monotonic() - before) * 1.1
    killer = Killer()
    for number in range(40):
        with open(tmp / "errors", "wb") as err:
            command = torpor.popen("checkpoint", "--image-path", tmp / f"image{number}", "--leave-running", c.id, stdin=subprocess.DEVNULL, stdout=err, stderr=err)  # fmt: skip
        killer.strike(command, 2 * number + 1, duration)
        finish(command)
        no_tracer_left()
        untouched(c)
        try:
            c.verify()
        except AssertionError as e:
            # A thread that was told to stop and had no processor yet to do so sees that (docs/safety.md).
            if "FAIL sigwaitinfo: Interrupted system call" not in str(e) or "; " in str(e):
                raise
    assert killer.hits["tracer"], killer.hits


@LONG
def test_kill_at_random_moments_of_restore(stage: Callable[[str], Stage], torpor: Torpor, tmp: Path) -> None:
    play = stage("cpython")
    c = play.start()
    c.checkpoint(tmp / "image", "--leave-running")
    copy = play.copy_root()
    image = (tmp / "image" / "checkpoint.img").stat()
    once = play.successor(c, copy)
    before = time.monotonic()
    once.restore_from(tmp / "image")
    duration = (time.monotonic() - before) * 1.1
    once.verify()
    once.delete()
    quiet = leaks.snapshot()
    killer = Killer()
    whole = 0
    for number in range(ROUNDS):
        again = play.successor(c, copy)
        again.stderr = tmp / f"errors{number}"
        with open(again.output, "ab") as out, open(again.stderr, "wb") as err:
            command = torpor.popen(
                "restore", "--detach", "--image-path", tmp / "image", "--bundle", copy, again.id,
                stdin=subprocess.DEVNULL, stdout=out, stderr=err,
            )  # fmt: skip
        what = killer.strike(command, number, duration)
        code = finish(command)
        no_tracer_left()
        if what == "tracer" and code != 0:
            assert code == 128 and again.stderr.read_text().count("\n") == 1, (code, again.stderr.read_text())
        state = torpor("state", again.id, check=False)
        if state.code == 0:
            # it was through: then it runs, whole
            untouched(again)
            again.verify()
            whole += 1
            again.delete()
        else:
            assert code != 0 and "does not exist" in state.err, (code, str(state))
        assert torpor.ids() == [c.id]
        assert leaks.new_since(quiet, ignore=c.host_pids) == [], f"round {number} ({what}, exit code {code})"
    untouched(c)
    c.verify()
    after = (tmp / "image" / "checkpoint.img").stat()
    assert (after.st_size, after.st_mtime_ns) == (image.st_size, image.st_mtime_ns)
    assert killer.hits["command"] and killer.hits["tracer"], killer.hits
    again = play.successor(c, copy)
    again.restore_from(tmp / "image")
    again.verify()


# ---- failpoints -----------------------------------------------------------------------------------------------------------------------

CHECKPOINT_STAGES = ["freeze", "collect", "capture", "write", "finish"]
RESTORE_STAGES = ["read", "plan", "build", "fill", "resume"]
WAYS = ["error", "kill", "hang, then the command is killed", "hang, then the tracer is killed", "hang, then ctrl-C"]


def run_into(torpor: Torpor, failpoint: str, way: str, words: list[str | Path], stdout: Path, stderr: Path) -> int:
    """Run a command that meets a failpoint. Returns its exit code."""
    mode = way.split(",")[0]
    env: Mapping[str, str] = {"TORPOR_FAILPOINT": f"{failpoint}:{mode}"}
    with open(stdout, "ab") as out, open(stderr, "wb") as err:
        command = torpor.popen(*words, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    if mode == "hang":
        tracer = procs.wait_until("the tracer", lambda: tracer_of(command) or command.poll() is not None)
        assert isinstance(tracer, procs.Process), f"the command ended: {command.returncode} {stderr.read_text()}"
        procs.wait_until("the tracer to hang", lambda: _sleeps(tracer.pid))
        assert command.poll() is None, f"it did not hang: {command.returncode} {stderr.read_text()}"
        if "command" in way:
            command.kill()
        elif "tracer" in way:
            procs.kill_exactly(tracer)
        else:
            command.send_signal(signal.SIGINT)
    code = finish(command)
    no_tracer_left()
    return code


def _sleeps(pid: int) -> bool:
    """In a system call that waits, and the same one a little later."""
    first = Path(f"/proc/{pid}/syscall").read_text()
    time.sleep(0.15)
    return first == Path(f"/proc/{pid}/syscall").read_text() != "running\n"


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", CHECKPOINT_STAGES)
@pytest.mark.parametrize("leave_running", [True, False])
def test_checkpoint_that_fails(stage: Callable[[str], Stage], torpor: Torpor, tmp: Path, at: str, way: str, leave_running: bool) -> None:  # fmt: skip
    c = stage("pipes").start()
    quiet = leaks.snapshot()
    image, errors = tmp / "new" / "image", tmp / "errors"
    words = ["checkpoint", "--image-path", image, *(["--leave-running"] if leave_running else []), c.id]
    code = run_into(torpor, at, way, words, tmp / "out", errors)
    assert code != 0
    if code > 0 and "ctrl-C" not in way:
        assert code == 128 and errors.read_text().count("\n") == 1, (code, errors.read_text())
    untouched(c)
    c.verify()
    if whole_or_not_there(image):
        # only after the image was complete, and only when nobody was left to take it away again
        assert at == "finish" and way != "error", "the checkpoint failed and left an image"
    elif code > 0:
        assert not (tmp / "new").exists(), "directories that were made for the image are left"
    assert leaks.new_since(quiet) == []
    shutil.rmtree(tmp / "new", ignore_errors=True)
    # it can be done again at once
    c.checkpoint(tmp / "again", "--leave-running")
    c.verify()


@pytest.mark.requires("command:gcc", "command:busybox")
@pytest.mark.parametrize("way", ["error", "kill"])
@pytest.mark.parametrize("at", ["wait-entry", "wait-inside", "wait-left"])
def test_a_thread_that_was_let_into_its_wait(stage: Callable[[str], Stage], torpor: Torpor, tmp: Path, at: str, way: str) -> None:  # fmt: skip
    """To find out how long it waits: whatever ends us there, the wait goes on, without EINTR and not from the beginning."""
    c = stage("waits").start()
    words = ["checkpoint", "--image-path", tmp / "image", "--leave-running", c.id]
    assert run_into(torpor, at, way, words, tmp / "out", tmp / "errors") == 128
    untouched(c)
    c.verify()
    assert not whole_or_not_there(tmp / "image")
    c.checkpoint(tmp / "again", "--leave-running")
    c.verify()


SHORT_WAITS = """
trap 'echo "OK $n"' USR1
n=0
echo READY
while sleep 0.05; do n=$((n+1)); done
echo "FAIL a sleep ended with $?"
"""


@pytest.mark.requires("command:busybox")
def test_a_wait_that_ends_before_its_tracer_is_killed(busybox: Callable[..., Path], torpor: Torpor, tmp: Path) -> None:
    """Its thread stops at the end of its call, and nobody has looked at that yet: the kernel then sends it what it was stopped by."""
    c = Container(torpor, busybox(["sh", "-c", SHORT_WAITS]), new_id("w")).run().wait_ready()
    for _ in range(3):
        words = ["checkpoint", "--image-path", tmp / "image", "--leave-running", c.id]
        run_into(torpor, "wait-inside", "late", words, tmp / "out", tmp / "errors")
        untouched(c)
        c.verify()
        shutil.rmtree(tmp / "image", ignore_errors=True)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("at", RESTORE_STAGES)
def test_restore_that_fails(stage: Callable[[str], Stage], torpor: Torpor, tmp: Path, at: str, way: str) -> None:
    play = stage("pipes")
    c = play.start()
    c.checkpoint(tmp / "image")
    c.delete()
    quiet = leaks.snapshot()
    again = play.successor(c)
    errors = tmp / "errors"
    words = ["restore", "--detach", "--image-path", tmp / "image", "--bundle", again.bundle, again.id]
    code = run_into(torpor, at, way, words, again.output, errors)
    assert code != 0
    if code > 0 and "ctrl-C" not in way:
        assert code == 128 and errors.read_text().count("\n") == 1, (code, errors.read_text())
    torpor.fails("state", again.id, says="does not exist")
    assert torpor.ids() == []
    assert leaks.new_since(quiet) == []
    again.restore_from(tmp / "image")
    again.verify()


@pytest.mark.parametrize("way", ["error"])
@pytest.mark.parametrize("at", ["read", "plan"])
def test_restore_that_fails_before_anything_is_built_leaves_a_created_container(stage: Callable[[str], Stage], torpor: Torpor, tmp: Path, at: str, way: str) -> None:  # fmt: skip
    play = stage("pipes")
    c = play.start()
    c.checkpoint(tmp / "image")
    c.delete()
    again = play.successor(c).create()
    pid = again.pid
    words = ["restore", "--detach", "--image-path", tmp / "image", again.id]
    assert run_into(torpor, at, way, words, tmp / "out", tmp / "errors") == 128
    assert again.status == "created" and again.pid == pid
    torpor("restore", "--detach", "--image-path", tmp / "image", again.id)
    again.verify()


@pytest.mark.parametrize("at", CHECKPOINT_STAGES)
def test_a_paused_container_stays_paused_when_its_checkpoint_fails(
    stage: Callable[[str], Stage], torpor: Torpor, tmp: Path, at: str
) -> None:
    c = stage("pipes").start()
    torpor("pause", c.id)
    for way in ("error", "kill"):
        words = ["checkpoint", "--image-path", tmp / f"image-{way}", c.id]
        assert run_into(torpor, at, way, words, tmp / "out", tmp / "errors") == 128
        assert c.status == "paused"
    torpor("resume", c.id)
    c.verify()


def test_a_second_checkpoint_at_the_same_time(stage: Callable[[str], Stage], torpor: Torpor, tmp: Path) -> None:
    """Two commands for one container: one after the other, or the second is told; never both at once."""
    c = stage("pipes").start()
    commands = [
        torpor.popen("checkpoint", "--image-path", tmp / f"image{i}", "--leave-running", c.id, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for i in range(4)
    ]  # fmt: skip
    codes = [finish(p) for p in commands]
    assert 0 in codes and set(codes) <= {0, 128}
    for i, code in enumerate(codes):
        assert whole_or_not_there(tmp / f"image{i}") == (code == 0)
    untouched(c)
    c.verify()
