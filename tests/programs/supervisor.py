"""What supervisord does: a parent with twenty children of different kinds, their output read through pipes, restarted when they end."""

import os
import selectors
import signal
import subprocess
import sys
import time

import protocol

ANSWER = (
    "import os, signal, sys\n"
    "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})\n"
    "print('up', flush=True)\n"
    "n = 0\n"
    "while True:\n"
    "    signal.sigwait({signal.SIGUSR2})\n"
    "    n += 1\n"
    "    print(f'{sys.argv[1]} {n}', flush=True)\n"
)
protocol.block()
poll = selectors.DefaultSelector()


class Child:
    def __init__(self, number: int) -> None:
        self.number, self.count = number, 0
        # half of them in sessions of their own, as daemons
        self.process = subprocess.Popen([sys.executable, "-c", ANSWER, str(number)], stdout=subprocess.PIPE, text=True,
                                        preexec_fn=protocol.unblocked, start_new_session=bool(number % 2))  # fmt: skip
        poll.register(self.process.stdout, selectors.EVENT_READ, self)
        self.expect("up")

    def expect(self, text: str) -> None:
        line = self.process.stdout.readline().strip()
        assert line == text, f"child {self.number}: {line!r} instead of {text!r}"

    def end(self) -> None:
        poll.unregister(self.process.stdout)
        self.process.kill()
        assert self.process.wait() == -signal.SIGKILL
        self.process.stdout.close()


children = [Child(n) for n in range(20)]
rounds = 0


def verify() -> int:
    global rounds
    rounds += 1
    for c in children:
        assert c.process.poll() is None, f"child {c.number} has ended"
        c.process.send_signal(signal.SIGUSR2)
        c.count += 1
    waiting, deadline = set(range(20)), time.monotonic() + 20
    while waiting:
        assert time.monotonic() < deadline, f"no answer from {waiting}"
        for key, _ in poll.select(1):
            c = key.data
            c.expect(f"{c.number} {c.count}")
            waiting.discard(c.number)
    assert all(os.getsid(c.process.pid) == (c.process.pid if c.number % 2 else os.getsid(0)) for c in children)
    victim = children[rounds % 20]
    victim.end()
    children[rounds % 20] = Child(victim.number)
    return rounds


protocol.serve(verify)
