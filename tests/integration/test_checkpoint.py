"""What checkpoint and restore promise beside carrying state: files, states, stdio, flags, pauses, terminals, refusals."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import bundles, procs
from support.cli import Container, Torpor, new_id
from support.workloads import Stage

from .conftest import COUNTER, WAITER

pytestmark = [pytest.mark.requires("root")]


def test_image_path_is_made_with_its_parents(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    image = tmp / "a" / "b" / "c"
    c.checkpoint(image)
    assert [p.name for p in image.iterdir()] == ["checkpoint.img"]
    assert c.status == "stopped"
    torpor("delete", c.id)


def test_image_path_may_be_there_already_and_is_relative_to_where_one_is(
    torpor: Torpor, waiter: Callable[..., Container], tmp: Path
) -> None:
    c = waiter()
    (tmp / "here").mkdir()
    torpor("checkpoint", "--image-path=here", "--leave-running", c.id, cwd=tmp)
    assert (tmp / "here" / "checkpoint.img").exists()
    c.verify()


def test_a_stopped_container_keeps_its_id_until_it_is_deleted(
    torpor: Torpor, waiter: Callable[..., Container], tmp: Path
) -> None:
    c = waiter()
    c.checkpoint(tmp / "image")
    torpor.fails("run", "--detach", "--bundle", c.bundle, c.id, says="already exists")
    torpor("delete", c.id)
    c.restore_from(tmp / "image")  # under the very same id
    c.verify()


def test_attached_restore_has_the_programs_output_and_exit_code(
    torpor: Torpor, busybox: Callable[..., Path], tmp: Path
) -> None:
    bundle = busybox(
        ["sh", "-c", "echo before; while [ ! -e /go ]; do sleep 0.05; done; echo after; echo late >&2; exit 33"]
    )
    c = Container(torpor, bundle, new_id()).run()
    assert c.next_line() == "before"
    c.checkpoint(tmp / "image")
    c.delete()
    (bundle / "rootfs" / "go").touch()
    result = torpor("restore", "--image-path", tmp / "image", "--bundle", bundle, new_id(), check=False)
    assert (result.code, result.out, result.err) == (33, "after\n", "late\n")
    assert torpor.ids() == []


def test_attached_restore_of_a_program_that_is_killed(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    c = Container(torpor, busybox(["sh", "-c", WAITER]), new_id()).run().wait_ready()
    c.checkpoint(tmp / "image")
    c.delete()
    name = new_id()
    with open(tmp / "out", "wb") as out:
        command = torpor.popen(
            "restore", "--image-path", tmp / "image", "--bundle", c.bundle, name, stdin=subprocess.DEVNULL, stdout=out
        )
    torpor_running(torpor, name)
    torpor("kill", name, "USR1")
    procs.wait_until("the answer", lambda: (tmp / "out").read_bytes() == b"OK 1\n")
    torpor("kill", name, "KILL")
    assert command.wait(20) == 137
    procs.claimed.discard(command.pid)


def torpor_running(torpor: Torpor, name: str) -> None:
    def running() -> bool:
        result = torpor("state", name, check=False)
        return result.code == 0 and json.loads(result.out)["status"] == "running"

    procs.wait_until(f"{name} to run", running)


def test_attached_run_sees_its_container_end_by_checkpoint(
    torpor: Torpor, busybox: Callable[..., Path], tmp: Path
) -> None:
    name = new_id()
    with open(tmp / "out", "wb") as out:
        command = torpor.popen(
            "run", "--bundle", busybox(["sh", "-c", WAITER]), name, stdin=subprocess.DEVNULL, stdout=out
        )
    procs.wait_until("READY", lambda: b"READY" in (tmp / "out").read_bytes())
    torpor("checkpoint", "--image-path", tmp / "image", name)
    assert command.wait(20) in (0, 137)
    procs.claimed.discard(command.pid)
    assert (tmp / "image" / "checkpoint.img").exists()


def test_pipes_of_the_caller_are_connected_to_those_of_the_restore(
    torpor: Torpor, busybox: Callable[..., Path], tmp: Path
) -> None:
    """A filter that reads its standard input: the restore command's input is what it reads on."""
    bundle = busybox(["sh", "-c", 'echo READY; while read -r line; do echo "got $line"; done; echo end'])
    c = Container(torpor, bundle, new_id())
    r, w = os.pipe()
    with open(c.output, "ab") as out:
        started = torpor.popen(
            "run", "--detach", "--bundle", bundle, c.id, stdin=r, stdout=out, stderr=subprocess.DEVNULL
        )
        assert started.wait(60) == 0
    procs.claimed.discard(started.pid)
    os.close(r)
    c.stderr = c.output
    c.wait_ready()
    os.write(w, b"one\n")
    assert c.next_line() == "got one"
    c.checkpoint(tmp / "image")
    os.close(w)
    c.delete()
    result = torpor("restore", "--image-path", tmp / "image", "--bundle", bundle, new_id(), input="two\nthree\n")
    assert result.out == "got two\ngot three\nend\n"


def test_stdio_on_null_files_and_pipes(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    bundle = busybox(["sh", "-c", WAITER])
    name = new_id()
    (tmp / "image").mkdir()
    r, w = os.pipe()
    started = torpor.popen("run", "--detach", "--bundle", bundle, name, stdin=subprocess.DEVNULL, stdout=w, stderr=w)
    assert started.wait(60) == 0
    procs.claimed.discard(started.pid)
    os.close(w)
    assert os.read(r, 100) == b"READY\n"
    torpor("checkpoint", "--image-path", tmp / "image", "--leave-running", name)
    torpor("kill", name, "USR1")
    assert os.read(r, 100) == b"OK 1\n"
    os.close(r)
    with open(tmp / "file", "wb") as f:
        restored = torpor.popen("restore", "--detach", "--image-path", tmp / "image", "--bundle", bundle, new_id(), stdin=subprocess.DEVNULL, stdout=f, stderr=f)  # fmt: skip
        assert restored.wait(60) == 0
    procs.claimed.discard(restored.pid)
    [other] = [i for i in torpor.ids() if i != name]
    torpor("kill", other, "USR1")
    procs.wait_until("the answer", lambda: (tmp / "file").read_bytes() == b"OK 1\n")


def test_many_restores_at_the_same_time(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    """One image, six containers, the original still running."""
    c = waiter()
    c.verify()
    c.checkpoint(tmp / "image", "--leave-running")
    others = [Container(torpor, c.bundle, new_id("twin")) for _ in range(6)]
    commands = []
    for o in others:
        with open(o.output, "ab") as out:
            o.stderr = o.output
            commands.append(torpor.popen("restore", "--detach", "--image-path", tmp / "image", "--bundle", c.bundle, o.id, stdin=subprocess.DEVNULL, stdout=out, stderr=out))  # fmt: skip
    assert [p.wait(90) for p in commands] == [0] * 6, [o.text() for o in others]
    for p in commands:
        procs.claimed.discard(p.pid)
    for o in [*others, c]:
        assert o.verify() == "OK 2"


def test_create_then_restore_keeps_the_created_pid(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    c = waiter()
    c.checkpoint(tmp / "image")
    again = Container(torpor, c.bundle, new_id()).create()
    pid = again.pid
    torpor("restore", "--detach", "--image-path", tmp / "image", again.id)
    assert again.pid == pid and again.status == "running"
    again.verify()
    torpor.fails("start", again.id, says="running")
    torpor.fails("restore", "--detach", "--image-path", tmp / "image", again.id, says="running")
    again.verify()


def test_restored_pid_file_and_exit_status_belong_to_the_caller(
    torpor: Torpor, busybox: Callable[..., Path], tmp: Path, no_reaper: None
) -> None:
    bundle = busybox(["sh", "-c", "trap 'exit 7' TERM; echo READY; while :; do sleep 0.05; done"])
    c = Container(torpor, bundle, new_id()).run().wait_ready()
    c.checkpoint(tmp / "image")
    procs.reap()
    c.delete()
    name = new_id()
    torpor("restore", "--detach", "--image-path", tmp / "image", "--bundle", bundle, "--pid-file", tmp / "pid", name)
    pid = int((tmp / "pid").read_text())
    assert torpor.state(name)["pid"] == pid
    found = procs.process(pid)
    assert found is not None and found.ppid == os.getpid()
    torpor("kill", name, "TERM")
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 7


def test_exec_kill_ps_pause_work_in_a_restored_container(
    torpor: Torpor, waiter: Callable[..., Container], tmp: Path
) -> None:
    c = waiter()
    c.checkpoint(tmp / "image")
    c.delete()
    again = Container(torpor, c.bundle, new_id())
    again.restore_from(tmp / "image")
    assert torpor("exec", again.id, "cat", "/proc/1/comm").out == "sh\n"
    assert again.pid in json.loads(torpor("ps", "--format", "json", again.id).out)
    torpor("pause", again.id)
    assert again.status == "paused"
    torpor("resume", again.id)
    again.verify()
    torpor("kill", again.id, "TERM")
    torpor.wait_status(again.id, "stopped")
    torpor("delete", again.id)


def test_a_container_with_an_exec_in_it(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    """The second process has a parent outside. It is carried, or left out with a word, as runsc does; never in silence."""
    c = waiter()
    torpor("exec", "--detach", "--pid-file", tmp / "pid", c.id, "sleep", "100000")
    other = (tmp / "pid").read_text()
    before = len(c.host_pids())
    told = c.checkpoint(tmp / "image", "--leave-running").err
    assert len(c.host_pids()) == before
    c.verify()
    again = Container(torpor, c.bundle, new_id())
    told_again = again.restore_from(tmp / "image").err
    again.verify()
    if len(again.host_pids()) != before:
        assert other in told and "sleep" in told and "exec" in told, told
        assert "sleep" in told_again, told_again


NEGLIGENT = """
import ctypes, subprocess, sys, time
ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
subprocess.run(sys.argv[1:], check=True)
print("ready", flush=True)
time.sleep(1000)
"""


def test_a_parent_outside_that_never_waits(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    """The zombie of a process of `exec` is no reason to wait: nothing of the container is left but numbers."""
    c = waiter()
    argv = torpor.argv("exec", "--detach", c.id, "sleep", "100000")
    with procs.claiming:
        negligent = subprocess.Popen([sys.executable, "-c", NEGLIGENT, *argv], stdout=subprocess.PIPE)
        procs.claimed.add(negligent.pid)
    try:
        assert negligent.stdout is not None and negligent.stdout.readline() == b"ready\n"
        # The engine gives up on a task that does not end after ten seconds.
        c.checkpoint(tmp / "image", timeout=8)
        assert c.status == "stopped"
        left = [p for p in procs.descendants(negligent.pid) if p.state == "Z"]
        assert left, "somebody has waited for it: this test shows nothing"
    finally:
        negligent.kill()
        negligent.communicate()
        procs.claimed.discard(negligent.pid)
    procs.reap()
    torpor("delete", c.id)


def test_what_containerd_and_podman_really_pass(torpor: Torpor, waiter: Callable[..., Container], tmp: Path) -> None:
    """Flags of go-runc and Podman: single dashes, some given twice, some without a meaning here."""
    c = waiter()
    work = tmp / "work"
    torpor("checkpoint", "--image-path", tmp / "image", "--work-path", work, "--leave-running", "--leave-running",
           "--file-locks", "--tcp-established", "--ext-unix-sk", "--shell-job", "--empty-ns", "network",
           "--manage-cgroups-mode", "soft", c.id)  # fmt: skip
    assert "checkpoint.img" in [p.name for p in (tmp / "image").iterdir()]
    c.verify()
    again = Container(torpor, c.bundle, new_id())
    again.restore_from(
        tmp / "image", "-no-subreaper", "--work-path", str(work), "--file-locks", "--tcp-established", "--no-pivot",
        "--no-new-keyring", "--pid-file", str(tmp / "pid"),
    )  # fmt: skip
    assert int((tmp / "pid").read_text()) == again.pid
    again.verify()


def test_checkpoint_help_is_a_success(torpor: Torpor) -> None:
    """Podman's whole test whether a runtime can checkpoint."""
    for verb in ("checkpoint", "restore"):
        assert "--image-path" in torpor(verb, "--help").out


# ---- paused ---------------------------------------------------------------------------------------------------------------------------


def test_a_paused_container_can_be_checkpointed(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    c = Container(torpor, busybox(["sh", "-c", COUNTER]), new_id()).run().wait_ready()
    torpor("pause", c.id)
    c.checkpoint(tmp / "image")
    assert c.status == "stopped"
    c.delete()
    again = Container(torpor, c.bundle, new_id())
    again.restore_from(tmp / "image")
    assert again.status == "running"
    again.verify()


def test_with_leave_running_a_paused_container_stays_paused(
    torpor: Torpor, busybox: Callable[..., Path], tmp: Path
) -> None:
    c = Container(torpor, busybox(["sh", "-c", COUNTER]), new_id()).run().wait_ready()
    torpor("pause", c.id)
    for i in range(3):
        c.checkpoint(tmp / f"image{i}", "--leave-running")
        assert c.status == "paused"
    torpor("kill", c.id, "USR1")
    time.sleep(0.3)
    assert c.text() == "READY\n", "it ran while it was paused"
    torpor("resume", c.id)
    assert c.next_line().startswith("OK ")


# ---- flags that are remembered --------------------------------------------------------------------------------------------------------


def test_top_level_flags_of_run_are_remembered(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    """--network is the flag that changes what is built: given at run, it need not be repeated, and another one is refused."""
    bundle, name = busybox(["sh", "-c", WAITER]), new_id()
    torpor("run", "--detach", "--bundle", bundle, name, top=["--network", "none"])
    torpor("checkpoint", "--image-path", tmp / "one", "--leave-running", name)
    torpor("checkpoint", "--image-path", tmp / "two", "--leave-running", name, top=["--network", "none"])
    error = torpor.fails(
        "checkpoint",
        "--image-path",
        tmp / "three",
        "--leave-running",
        name,
        top=["--network", "host"],
        says="--network",
    )
    assert "none" in error.err
    assert not (tmp / "three").exists()
    assert torpor.state(name)["status"] == "running"


# ---- terminals ------------------------------------------------------------------------------------------------------------------------
# in test_terminal.py


# ---- what is refused ------------------------------------------------------------------------------------------------------------------


def refused(c: Container, image: Path, *words: str) -> str:
    """The checkpoint is refused by name, nothing is written, and the container does not notice."""
    result = c.checkpoint(image, check=False)
    assert result.code == 128 and result.err.count("\n") == 1, str(result)
    for word in words:
        assert word in result.err, str(result)
    assert not image.exists() or list(image.iterdir()) == []
    assert c.status == "running"
    return result.err


def _add_key(ring: int) -> str:
    """add_key(2) by its number, into a special ring."""
    return f"import ctypes; assert ctypes.CDLL(None).syscall(248, b'user', b'k', b'secret', 6, {ring}) > 0"


UNSUPPORTED = {
    "data in a TCP connection that nobody accepted": (
        "import socket; l = socket.create_server(('127.0.0.1', 0)); a = socket.create_connection(l.getsockname()); a.send(b'hello')",
        "connections with data wait to be accepted",
    ),
    "a deleted file with another name": (
        "import os; f = open('/wl/one', 'w+'); os.link('/wl/one', '/wl/two'); os.unlink('/wl/one'); f.write('x'); f.flush()",
        "/wl/one",
    ),
    "inotify": ("import ctypes; f = ctypes.CDLL(None).inotify_init1(0); assert f >= 0", "inotify"),
    "a timerfd": ("import ctypes; f = ctypes.CDLL(None).timerfd_create(1, 0); assert f >= 0", "timerfd"),
    "a signalfd": (
        "import ctypes; m = (ctypes.c_ulong * 16)(); f = ctypes.CDLL(None).signalfd(-1, m, 0); assert f >= 0",
        "signalfd",
    ),
    "inotify events that nobody has read": (
        (
            "import ctypes, os; c = ctypes.CDLL(None); f = c.inotify_init1(0); assert c.inotify_add_watch(f, b'/wl', 0x100) > 0;"
            "open('/wl/new', 'w').close()"
        ),
        "events wait to be read",
    ),
    "an inotify watch of a file without a name": (
        (
            "import ctypes, os; c = ctypes.CDLL(None); f = c.inotify_init1(0); o = open('/wl/new', 'w');"
            "assert c.inotify_add_watch(f, b'/wl/new', 2) > 0; os.unlink('/wl/new')"
        ),
        "inotify",
    ),
    "a pidfd of a process that is gone": (
        "import os; p = os.fork(); p or os._exit(0); f = os.pidfd_open(p); os.waitpid(p, 0)",
        "has ended",
    ),
    "a lease": ("import fcntl; f = open('/wl/lease', 'w+'); fcntl.fcntl(f, 1024, 1)", "a lease on it"),
    "a timer of one of several threads": (
        (
            "import ctypes, threading; threading.Thread(target=threading.Event().wait, daemon=True).start(); i = ctypes.c_int();"
            "assert ctypes.CDLL(None).syscall(222, 3, None, ctypes.byref(i)) == 0"
        ),
        "processor time of one of several threads",
    ),
    "data in a unix connection that nobody accepted": (
        "import socket; l = socket.socket(socket.AF_UNIX); l.bind('\\0x'); l.listen(); a = socket.socket(socket.AF_UNIX); a.connect('\\0x'); a.send(b'hello')",
        "it waits to be accepted and has sent data",
    ),
    "a unix connection that nobody accepted and whose caller is gone": (
        "import socket; l = socket.socket(socket.AF_UNIX); l.bind('\\0x'); l.listen(); a = socket.socket(socket.AF_UNIX); a.connect('\\0x'); a.close()",
        "whose caller has closed it",
    ),
    "credentials of a process that is gone": (
        (
            "import os, socket; a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM); b.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1);"
            "p = os.fork(); p or (a.send(b'x'), os._exit(0)); os.waitpid(p, 0)"
        ),
        "that process has ended",
    ),
    "an epoll instance that is only in flight": (
        (
            "import array, os, select, socket; a, b = socket.socketpair(socket.AF_UNIX); e = select.epoll(); e.register(a);"
            "a.sendmsg([b'x'], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array('i', [e.fileno()]))]); e.close()"
        ),
        "what waits in fd",
    ),
    "a netlink socket": ("import socket; s = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)", "netlink"),
    "a raw socket": ("import socket; s = socket.socket(socket.AF_INET, socket.SOCK_RAW, 1)", "raw IP"),
    "a packet socket": ("import socket; s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)", "packet"),
    "a UDP-Lite socket": ("import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM, 136)", "UDP-Lite"),
    "half a datagram": (
        "import socket; u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.connect(('127.0.0.1', 9)); u.send(b'half', 0x8000)",
        "UDP_CORK",
    ),
    "a datagram to a port that may be shared": (
        (
            "import socket; u = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); u.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1);"
            "u.bind(('127.0.0.1', 9)); u.sendto(b'x', u.getsockname())"
        ),
        "may share its port",
    ),
    "a key in the session's ring": (_add_key(-3), "session key ring"),
    "a key in the thread's ring": (_add_key(-1), "thread key ring"),
    "a Landlock domain": (
        (
            "import ctypes; c = ctypes.CDLL(None); a = ctypes.c_uint64(1); r = c.syscall(444, ctypes.byref(a), 8, 0); assert r > 0;"
            "assert c.prctl(38, 1, 0, 0, 0) == 0 and c.syscall(446, r, 0) == 0"
        ),
        "Landlock",
    ),
    "a seccomp filter that asks": (
        (
            "import ctypes; c = ctypes.CDLL(None); f = (ctypes.c_uint64 * 4)(0x20, 0x13d01000015, 0x7fc0000000000006, 0x7fff000000000006);"
            "p = (ctypes.c_uint64 * 2)(4, ctypes.addressof(f));"
            "assert c.prctl(38, 1, 0, 0, 0) == 0 and c.syscall(317, 1, 8, ctypes.byref(p)) > 0"
        ),
        "seccomp",
    ),
    "System V shared memory": (
        "import ctypes; c = ctypes.CDLL(None); i = c.shmget(77, 4096, 0o1600); c.shmat.restype = ctypes.c_void_p; assert c.shmat(i, None, 0) != 2**64 - 1",
        "System V",
    ),
}


NEVER_CARRIED = {
    "data in a unix connection that nobody accepted",
    "a unix connection that nobody accepted and whose caller is gone",
    "credentials of a process that is gone",
    "an epoll instance that is only in flight",
    "a key in the session's ring",
    "a key in the thread's ring",
    "a Landlock domain",
    "a seccomp filter that asks",
}


@pytest.mark.parametrize("what", UNSUPPORTED)
def test_what_is_not_carried_is_refused_by_name_or_carried_whole(
    what: str, torpor: Torpor, host_root: Callable[..., bundles.HostRoot], tmp: Path
) -> None:
    """Never silent: either the refusal names process and object, or it works."""
    code, word = UNSUPPORTED[what]
    root = host_root()
    program = f"""
import signal, fcntl, socket, struct, sys
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGUSR1])
s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", 1)); s.close()
{code}
print("READY", flush=True)
while True:
    signal.sigwait([signal.SIGUSR1]); print("OK", flush=True)
"""
    config = bundles.spec(
        ["/usr/bin/python3.11", "-c", program], rootfs=root.path, caps=[*bundles.DOCKER_CAPS, "CAP_NET_ADMIN"]
    )
    c = Container(torpor, bundles.write(tmp / "bundle", config), new_id()).run().wait_ready()
    result = c.checkpoint(tmp / "image", "--leave-running", check=False)
    if result.code == 0:
        assert what not in NEVER_CARRIED, f"{what}: the program cannot tell that it is lost"
        again = Container(torpor, c.bundle, new_id())
        again.restore_from(tmp / "image")
        again.verify()
    else:
        assert result.code == 128 and result.err.count("\n") == 1, str(result)
        assert word.lower() in result.err.lower(), str(result)
        assert not (tmp / "image").exists() or list((tmp / "image").iterdir()) == []
        assert c.status == "running"
    c.verify()


def test_a_file_of_the_host_that_is_open_inside_is_refused_by_name(
    torpor: Torpor, busybox: Callable[..., Path], tmp: Path
) -> None:
    """Descriptor 3 leads to a file that the container cannot name: what --preserve-fds gives away."""
    (tmp / "outside").write_text("secret")
    bundle, name = busybox(["sh", "-c", WAITER]), new_id()
    out = tmp / "out"
    shell = ["sh", "-c", 'exec "$@" 3< "$0"', str(tmp / "outside")]
    with open(out, "wb") as f:
        words = torpor.argv("run", "--detach", "--preserve-fds", "1", "--bundle", bundle, name)
        assert subprocess.run([*shell, *words], stdin=subprocess.DEVNULL, stdout=f, check=False).returncode == 0
    procs.wait_until("READY", lambda: out.read_bytes() == b"READY\n")
    result = torpor("checkpoint", "--image-path", tmp / "image", name, check=False)
    assert result.code == 128 and result.err.count("\n") == 1 and "outside" in result.err, str(result)
    assert torpor.state(name)["status"] == "running"
    torpor("kill", name, "USR1")
    procs.wait_until("the answer", lambda: out.read_bytes() == b"READY\nOK 1\n")


# ---- power ----------------------------------------------------------------------------------------------------------------------------


def test_an_image_never_gives_more_power_than_the_spec(torpor: Torpor, busybox: Callable[..., Path], tmp: Path) -> None:
    """A process that had capabilities is restored into a container that grants fewer: it is refused, or comes back without them."""
    c = (
        Container(torpor, busybox(["sh", "-c", WAITER], caps=[*bundles.DOCKER_CAPS, "CAP_SYS_ADMIN"]), new_id())
        .run()
        .wait_ready()
    )
    c.checkpoint(tmp / "image")
    c.delete()
    smaller = json.loads((c.bundle / "config.json").read_text())
    for kind in ("bounding", "effective", "permitted"):
        smaller["process"]["capabilities"][kind] = ["CAP_KILL"]
    other = tmp / "smaller"
    other.mkdir()
    (other / "rootfs").symlink_to(c.bundle / "rootfs")
    smaller["root"]["path"] = str(c.bundle / "rootfs")
    bundles.write(other, smaller)
    again = Container(torpor, other, new_id())
    result = again.restore_from(tmp / "image", check=False)
    if result.code != 0:
        assert result.err.count("\n") == 1 and "capabilit" in result.err.lower(), str(result)
        torpor.fails("state", again.id, says="does not exist")
        return
    status = Path(f"/proc/{again.pid}/status").read_text()
    for line in status.splitlines():
        if line.startswith(("CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb")):
            assert int(line.split()[1], 16) & ~(1 << 5) == 0, line


def test_a_seccomp_filter_of_the_spec_is_on_the_restored_process(
    torpor: Torpor, busybox: Callable[..., Path], tmp: Path
) -> None:
    """The spec's own filter may not get lost: mkdir is forbidden before and after."""
    filter_ = {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86_64"], "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 13}]}  # fmt: skip
    program = 'trap \'if mkdir /tmp/x 2>/dev/null; then echo "FAIL mkdir works"; else echo "OK"; fi\' USR1; echo READY; sleep 100000 & while :; do wait $!; done'
    c = (
        Container(torpor, busybox(["sh", "-c", program], seccomp=filter_, no_new_privileges=True), new_id())
        .run()
        .wait_ready()
    )
    c.verify()
    c.checkpoint(tmp / "image")
    c.delete()
    again = Container(torpor, c.bundle, new_id())
    again.restore_from(tmp / "image")
    again.verify()
    assert "Seccomp:\t2" in Path(f"/proc/{again.pid}/status").read_text()
    assert "NoNewPrivs:\t1" in Path(f"/proc/{again.pid}/status").read_text()


# ---- inspect --------------------------------------------------------------------------------------------------------------------------


def test_inspect_shows_what_is_in_an_image(stage: Callable[[str], Stage], torpor: Torpor, tmp: Path) -> None:
    c = stage("pipeline").start()
    c.checkpoint(tmp / "image", "--leave-running")
    text = torpor("inspect", tmp / "image").out
    assert "seq" in text and "awk" in text
    data = json.loads(torpor("inspect", "--json", tmp / "image").out)
    assert isinstance(data, dict) and data
    assert json.loads(torpor("inspect", "--json", tmp / "image" / "checkpoint.img").out) == data
    torpor.fails("inspect", tmp / "nothing", says="nothing")


def test_the_image_is_not_held_in_memory(stage: Callable[[str], Stage], torpor: Torpor, tmp: Path) -> None:
    """The command that writes and reads a 256 MiB image stays small."""
    play = stage("cpython")
    c = play.start()
    script = "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL); print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"

    def peak(*args: str | Path) -> int:
        done = subprocess.run(
            ["/usr/bin/python3.11", "-c", script, *torpor.argv(*args)], capture_output=True, text=True, check=True
        )
        return int(done.stdout) // 1024

    assert peak("checkpoint", "--image-path", tmp / "image", c.id) < 100
    assert (tmp / "image" / "checkpoint.img").stat().st_size > 200 << 20
    c.delete()
