"""A real Python program: 256 MiB of heap, 8 threads, an HTTP server, open files at offsets, subprocesses. Every byte is checked.

Speaks the workload protocol: READY, then `OK n` or `FAIL what differs` for each SIGUSR1; SIGTERM ends it.
"""

import fcntl
import hashlib
import http.server
import os
import queue
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import urllib.request

MIB = int(sys.argv[1]) if len(sys.argv) > 1 else 256
PORT = 8000
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1, signal.SIGTERM})
differences: list[str] = []


def check(condition: object, what: str) -> None:
    if not condition:
        differences.append(what)


def loopback_up() -> None:
    """A fresh network namespace has its loopback interface down."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
        request = struct.pack("16sh14x", b"lo", 0)
        flags = struct.unpack("16sh14x", fcntl.ioctl(s, 0x8913, request))[1]
        if not flags & 1:
            fcntl.ioctl(s, 0x8914, struct.pack("16sh14x", b"lo", flags | 1))


# ---- heap -----------------------------------------------------------------------------------------------------------------------------


def block(number: int) -> bytes:
    return hashlib.shake_128(b"block %d" % number).digest(1 << 20)


blocks = [bytearray(block(i)) for i in range(MIB)]
small = {i: f"value {i * 7919 % 10007}" for i in range(100_000)}
nested: list[object] = []
for depth in range(200):
    nested = [nested, depth, float(depth) / 3]
generator = (i * i for i in range(10**9))
next(generator)
randomness = random.Random(42)
random_state = randomness.getstate()


def check_heap() -> None:
    for i, b in enumerate(blocks):
        if b != block(i):
            check(False, f"block {i} of the heap")
    check(len(blocks) == MIB, "number of blocks")
    for i, text in small.items():
        if text != f"value {i * 7919 % 10007}":
            check(False, f"small[{i}] is {text!r}")
            break
    node: object = nested
    for depth in reversed(range(200)):
        assert isinstance(node, list)
        check(node[1] == depth and node[2] == float(depth) / 3, f"nested list at depth {depth}")
        node = node[0]
    check(randomness.getstate() == random_state, "state of the random numbers")


# ---- threads --------------------------------------------------------------------------------------------------------------------------

questions: "queue.Queue[int]" = queue.Queue()
answers: "queue.Queue[tuple[int, int, object]]" = queue.Queue()
ticks = [0] * 8
lock = threading.Lock()
shared_total = 0
late_sleeps: list[str] = []
events = [threading.Event() for _ in range(8)]
local = threading.local()


def answerer(index: int) -> None:
    """Waits in a queue, that is in a futex; answers with what only this thread knows."""
    local.secret = index * 1000
    while True:
        question = questions.get()
        answers.put((question, threading.get_native_id(), local.secret + question))


def ticker(index: int) -> None:
    """Sleeps and counts under a lock."""
    global shared_total
    while True:
        before = time.monotonic()
        time.sleep(0.01)
        if time.monotonic() - before < 0.01:
            late_sleeps.append(f"a sleep of 10 ms took {time.monotonic() - before}")
        with lock:
            shared_total += 1
            ticks[index] += 1


def cruncher(index: int) -> None:
    """Never waits."""
    expected = hashlib.sha256(b"x" * 100_000).hexdigest()
    while True:
        if hashlib.sha256(b"x" * 100_000).hexdigest() != expected:
            late_sleeps.append("a wrong hash")
        ticks[index] += 1
        time.sleep(0)


def waiter(index: int) -> None:
    while True:
        events[index].wait()
        events[index].clear()
        ticks[index] += 1


threads = [threading.Thread(target=f, args=(i,), daemon=True, name=f"{f.__name__}-{i}") for i, f in enumerate([answerer, answerer, answerer, ticker, ticker, cruncher, waiter, waiter])]  # fmt: skip
for t in threads:
    t.start()
native_ids = {t.native_id for t in threads}


def check_threads() -> None:
    check({t.native_id for t in threads} == native_ids and all(t.is_alive() for t in threads), "threads")
    check({int(n) for n in os.listdir("/proc/self/task")} >= native_ids, "tids of the threads")
    for question in range(20):
        questions.put(question)
    seen = sorted(answers.get(timeout=20) for _ in range(20))
    check([q for q, _, _ in seen] == list(range(20)), "the queue")
    check(
        all(value in {q, q + 1000, q + 2000} and tid in native_ids for q, tid, value in seen),
        f"thread-local values {seen}",
    )
    before = list(ticks)
    for e in (events[6], events[7]):
        e.set()
    deadline = time.monotonic() + 20
    moving = (3, 4, 5, 6, 7)
    while time.monotonic() < deadline and not all(ticks[i] > before[i] for i in moving):
        time.sleep(0.01)
    check(all(ticks[i] > before[i] for i in moving), f"threads stand still: {before} {ticks}")
    with lock:
        check(shared_total == ticks[3] + ticks[4], "what two threads count under a lock")
    check(not late_sleeps, "; ".join(late_sleeps[:3]))


# ---- HTTP -----------------------------------------------------------------------------------------------------------------------------


class Handler(http.server.BaseHTTPRequestHandler):
    count = 0

    def do_GET(self) -> None:
        Handler.count += 1
        body = f"{self.path} {Handler.count}".encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        pass


loopback_up()
server = http.server.ThreadingHTTPServer(("127.0.0.1", PORT), Handler)
threading.Thread(target=server.serve_forever, daemon=True, name="http").start()


def check_http(number: int) -> None:
    loopback_up()
    before = Handler.count
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{PORT}/ask{number}", timeout=20) as answer:
            text = answer.read().decode()
        check(text == f"/ask{number} {before + 1}", f"HTTP answer {text!r}")
    except OSError as e:
        check(False, f"HTTP: {e}")


# ---- files ----------------------------------------------------------------------------------------------------------------------------

os.makedirs("/wl", exist_ok=True)
lines = [f"line {i} of the book\n" for i in range(50_000)]
with open("/wl/book.txt", "w") as f:
    f.writelines(lines)
book = open("/wl/book.txt")
for expected_line in lines[:12_345]:
    assert book.readline() == expected_line
binary = open("/wl/binary", "w+b", buffering=0)
binary.write(bytes(range(256)) * 64)
binary.seek(777)
diary = open("/wl/diary", "a+")
diary.write("unflushed so far ")
next_line = 12_345


def check_files(number: int) -> None:
    global next_line
    for _ in range(100):
        check(book.readline() == lines[next_line % len(lines)], f"line {next_line} of the book")
        next_line += 1
    check(binary.tell() == 777, f"offset {binary.tell()}")
    check(binary.read(2) == bytes([777 % 256, 778 % 256]), "content of the binary file")
    binary.seek(777)
    diary.write(f"{number} ")
    diary.flush()
    diary.seek(0)
    # somebody restored from the same image before may have written into it as well
    text = diary.read()
    check(text.startswith("unflushed so far ") and text.endswith(f" {number} "), f"the diary: {text!r}")


# ---- subprocesses ---------------------------------------------------------------------------------------------------------------------

echo = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0)
sleeper = subprocess.Popen(["/bin/sleep", "1000000"])
ENDING = "import sys; sys.stdin.readline(); sys.exit(23)"
ending = subprocess.Popen([sys.executable, "-S", "-c", ENDING], stdin=subprocess.PIPE)


def check_subprocesses() -> None:
    global ending
    assert echo.stdin and echo.stdout and ending.stdin
    echo.stdin.write(b"are you there?")
    got = b""
    while len(got) < 14 and (more := echo.stdout.read(100)):
        got += more
    check(got == b"are you there?", f"cat gives {got!r}")
    check(sleeper.poll() is None, f"sleep has ended: {sleeper.returncode}")
    ending.stdin.write(b"\n")
    ending.stdin.close()
    check(ending.wait(timeout=20) == 23, f"a subprocess ended with {ending.returncode}")
    ending = subprocess.Popen([sys.executable, "-S", "-c", ENDING], stdin=subprocess.PIPE)


pid, cwd, environment, arguments = os.getpid(), os.getcwd(), dict(os.environ), list(sys.argv)


def check_self() -> None:
    check(
        os.getpid() == pid and os.getcwd() == cwd and dict(os.environ) == environment and sys.argv == arguments,
        "pid, cwd, environment",
    )


print("READY", flush=True)
number = 0
last_monotonic = time.monotonic()
while True:
    try:
        info = signal.sigwaitinfo({signal.SIGUSR1, signal.SIGTERM})
    except InterruptedError:  # CPython repeats the call by itself; this would be news
        differences.append("sigwaitinfo was interrupted")
        continue
    if info.si_signo == signal.SIGTERM:
        os._exit(0)
    number += 1
    check(time.monotonic() >= last_monotonic, "the monotonic clock ran back")
    last_monotonic = time.monotonic()
    for part in (
        check_self,
        check_heap,
        check_threads,
        lambda: check_http(number),
        lambda: check_files(number),
        check_subprocesses,
    ):
        try:
            part()
        except Exception as e:
            check(False, f"{e.__class__.__name__}: {e}")
    print("FAIL " + "; ".join(differences) if differences else f"OK {number}", flush=True)
    differences.clear()
