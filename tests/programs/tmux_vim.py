"""An interactive bash in tmux with vim open in it, and a job that bash has stopped: the keyboard goes on where it was."""

import os
import subprocess
import time

import protocol

protocol.block()
os.environ.update(TERM="xterm", HOME="/wl", SHELL="/bin/bash", LANG="C.UTF-8")


def tmux(*words: str) -> str:
    command = ["tmux", "-S", "/wl/tmux.sock", "-f", "/dev/null", *words]
    return subprocess.run(command, preexec_fn=protocol.unblocked, check=True, capture_output=True, text=True).stdout


def type_in(*keys: str) -> None:
    tmux("send-keys", "-t", "main", *keys)


def wait_for(text: str) -> None:
    deadline = time.monotonic() + 30
    while text not in (screen := tmux("capture-pane", "-p", "-t", "main")):
        assert time.monotonic() < deadline, f"{text!r} is not on the screen: {screen!r}"
        time.sleep(0.05)


tmux("new-session", "-d", "-s", "main", "-x", "100", "-y", "30", "bash --norc --noprofile")
type_in("PS1='shell> '", "Enter")
type_in("x=kept; sleep 1000", "Enter")
time.sleep(0.3)
type_in("C-z")
wait_for("Stopped")
type_in("vim -u NONE -N /wl/text", "Enter")
wait_for("~")
type_in("i", "line 0", "Enter")
wait_for("line 0")
rounds = 0


def verify() -> int:
    """Type in insert mode; leave vim by ctrl-Z, ask bash what it knows, come back to where the cursor was."""
    global rounds
    rounds += 1
    type_in(f"line {rounds}", "Enter")
    wait_for(f"line {rounds}")
    type_in("Escape", "C-z")
    # what is typed before bash has the terminal back goes to nobody
    wait_for("Stopped")
    type_in(f"clear; echo $x-{rounds}; jobs", "Enter")
    wait_for(f"kept-{rounds}")
    wait_for("sleep 1000")
    type_in("clear; fg %2", "Enter")
    wait_for(f"line {rounds}")
    type_in(":w", "Enter")
    wait_for("written")
    type_in("o")
    with open("/wl/text") as f:
        text = f.read()
    lines = [line for line in text.splitlines() if line]
    assert lines == [f"line {n}" for n in range(rounds + 1)], lines
    type_in("Escape", "k", "a")
    return rounds


protocol.serve(verify)
