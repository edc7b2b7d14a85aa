"""Programs that make terminals of their own inside: a shell under script(1), a tmux server; and what is refused."""

import re
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support import bundles, procs
from support.bundles import HostRoot
from support.cli import Container, Torpor, new_id

pytestmark = [pytest.mark.requires("root"), pytest.mark.timeout(120)]

# A terminal made by Python, with a shell in it, that is driven by what is appended to a file and shows itself in another.
DRIVER = """
import os, pty, select, time
pid, master = pty.fork()
if pid == 0:
    os.execvp("script", ["script", "-q", "-c", "bash --norc --noprofile -i", "/dev/null"])
typed, shown = open("/wl/typed", "rb"), open("/wl/shown", "ab", buffering=0)
while True:
    if select.select([master], [], [], 0.02)[0]:
        shown.write(os.read(master, 65536))
    if data := typed.read():
        os.write(master, data)
"""


class Shell:
    """What is typed into the shell of DRIVER and what it shows."""

    def __init__(self, root: HostRoot) -> None:
        self.typed, self.shown = root.path / "wl" / "typed", root.path / "wl" / "shown"
        self.typed.touch()
        self.shown.touch()
        self.seen = 0

    def type(self, text: str) -> None:
        with self.typed.open("a") as f:
            f.write(text)

    def expect(self, what: str) -> None:
        def text() -> str:
            return self.shown.read_bytes()[self.seen :].decode(errors="replace")

        try:
            procs.wait_until(f"{what!r}", lambda: what in text(), 20)
        except AssertionError as e:
            raise AssertionError(f"{e}; it shows {text()!r}") from None
        self.seen += text().index(what) + len(what)


def host_container(torpor: Torpor, tmp: Path, root: HostRoot, args: list[str]) -> Container:
    bundle = bundles.write(tmp / new_id("b"), bundles.spec(args, rootfs=root.path, env=["TERM=xterm", "PS1=> "]))
    return Container(torpor, bundle, new_id())


@pytest.mark.requires("command:script", "command:bash", "command:python3.11")
def test_job_control_under_script_goes_on(torpor: Torpor, host_root: Callable[..., HostRoot], tmp: Path) -> None:
    """A job in the background, a job in the foreground, a variable: two terminals deep, again and again."""
    root = host_root()
    (root.path / "wl" / "driver.py").write_text(DRIVER)
    shell = Shell(root)
    c = host_container(torpor, tmp, root, ["python3.11", "/wl/driver.py"])
    c.run()
    shell.type("echo up-$((40+2))\n")
    shell.expect("up-42")
    shell.type("stty rows 33 cols 101; remembered=yes; sleep 1000 & echo started-$((40+3))\n")
    shell.expect("started-43")
    shell.type("sleep 2000\n")
    shell.expect("sleep 2000")
    for turn in range(2):
        if turn == 0:
            c.checkpoint(tmp / "image0", "--leave-running")
        else:
            c.checkpoint(tmp / "image1")
            c.delete()
            c = Container(torpor, c.bundle, new_id())
            c.restore_from(tmp / "image1")
        shell.type("\x03")
        shell.type("echo back-$remembered-$?; stty size; jobs\n")
        shell.expect("back-yes-130")
        shell.expect("33 101")
        shell.expect("Running")
        shell.type("fg\n")
        shell.expect("sleep 1000\r\n")
        time.sleep(0.3)  # bash says the name, then gives the terminal away
        shell.type("\x1a")
        shell.expect("Stopped")
        shell.type("bg; sleep 2000\n")
        shell.expect("sleep 2000\r\n")
    shell.type("\x03")
    shell.type("kill %1; wait; echo gone-$((40+4))\n")
    shell.expect("gone-44")


@pytest.mark.requires("command:tmux", "command:bash")
def test_a_tmux_server_goes_on(torpor: Torpor, host_root: Callable[..., HostRoot], tmp: Path) -> None:
    root = host_root()
    start = (
        "tmux -L t -f /dev/null new-session -d -s s -x 90 -y 20 'bash --norc --noprofile'; while :; do sleep 1000; done"
    )
    c = host_container(torpor, tmp, root, ["bash", "-c", start])
    c.run()

    def tmux(*words: str) -> str:
        return torpor("exec", c.id, "tmux", "-L", "t", *words, check=False).out

    def shows(what: str) -> None:
        procs.wait_until(f"{what!r} in tmux", lambda: what in tmux("capture-pane", "-p", "-t", "s"), 20)

    procs.wait_until("tmux to run", lambda: "s:" in tmux("ls"), 20)
    say_size = "echo $remembered-$(stty size | tr ' ' x)-"
    tmux("send-keys", "-t", "s", f"remembered=yes; {say_size}", "Enter")
    shows("yes-")
    before = re.search(r"^yes-(\d+x90)-", tmux("capture-pane", "-p", "-t", "s"), re.MULTILINE)
    assert before, tmux("capture-pane", "-p", "-t", "s")
    c.checkpoint(tmp / "image")
    c.delete()
    c = Container(torpor, c.bundle, new_id())
    c.restore_from(tmp / "image")
    shows(before[0])
    tmux("send-keys", "-t", "s", f"clear; echo back; {say_size}", "Enter")
    shows("back\n" + before[0])


WAITING = """
import os, pty, time
master, slave = pty.openpty()
os.write({end}, b"waiting\\n")
time.sleep(0.1)
print("READY", flush=True)
while True: time.sleep(1000)
"""


@pytest.mark.requires("command:python3.11")
@pytest.mark.parametrize(("end", "link"), [("master", "/dev/pts/"), ("slave", "/dev/pts/ptmx")])
def test_what_waits_in_a_terminal_is_refused(
    torpor: Torpor, host_root: Callable[..., HostRoot], tmp: Path, end: str, link: str
) -> None:
    """Nobody can look at it without taking it from the program: refused by name, and the program still has it."""
    c = host_container(torpor, tmp, host_root(), ["python3.11", "-c", WAITING.format(end=end)])
    c.run().wait_ready()
    for _ in range(2):
        torpor.fails("checkpoint", "--image-path", tmp / "image", c.id, says=link)
    assert c.status == "running"
    torpor("kill", c.id, str(int(signal.SIGKILL)))
