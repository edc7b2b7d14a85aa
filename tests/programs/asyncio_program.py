"""asyncio with everything in it: subprocesses with pipes, signal handlers, timers, TCP and unix streams, a thread pool."""

import asyncio
import signal
import sys

ECHO = "import sys\nfor line in sys.stdin: print(line.strip()[::-1], flush=True)"


async def main() -> None:
    loop = asyncio.get_running_loop()
    asked, ended = asyncio.Event(), asyncio.Event()
    loop.add_signal_handler(signal.SIGUSR1, asked.set)
    loop.add_signal_handler(signal.SIGTERM, ended.set)
    hangups = 0

    def hung_up() -> None:
        nonlocal hangups
        hangups += 1

    loop.add_signal_handler(signal.SIGHUP, hung_up)
    children = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-c", ECHO, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
        )
        for _ in range(5)
    ]

    async def upper(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while line := await reader.readline():
            writer.write(line.upper())
            await writer.drain()

    await asyncio.start_server(upper, "127.0.0.1", 8888)
    await asyncio.start_unix_server(upper, "/wl/async.sock")
    streams = [await asyncio.open_connection("127.0.0.1", 8888), await asyncio.open_unix_connection("/wl/async.sock")]
    beats, queue = [0], asyncio.Queue[int](maxsize=3)

    async def beat() -> None:
        while True:
            await asyncio.sleep(0.01)
            beats[0] += 1

    async def produce() -> None:
        n = 0
        while True:
            await queue.put(n)
            n += 1

    tasks = [asyncio.create_task(beat()), asyncio.create_task(produce())]
    expected = 0

    async def verify() -> int:
        nonlocal expected
        before, signals = beats[0], hangups
        for number, child in enumerate(children):
            assert child.stdin and child.stdout
            child.stdin.write(b"child %d\n" % number)
            line = await asyncio.wait_for(child.stdout.readline(), 20)
            assert line == (b"child %d" % number)[::-1] + b"\n", line
        for reader, writer in streams:
            writer.write(b"hello\n")
            assert await asyncio.wait_for(reader.readline(), 20) == b"HELLO\n"
        for _ in range(5):
            got = await asyncio.wait_for(queue.get(), 20)
            assert got == expected, (got, expected)
            expected += 1
        signal.raise_signal(signal.SIGHUP)
        assert await loop.run_in_executor(None, sum, range(1000)) == 499500
        # one child comes and goes: the child watcher still works
        short = await asyncio.create_subprocess_exec("sh", "-c", "exit 7")
        assert await asyncio.wait_for(short.wait(), 20) == 7
        while beats[0] == before or hangups == signals:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        assert not any(t.done() for t in tasks) and all(c.returncode is None for c in children)
        return beats[0]

    print("READY", flush=True)
    while True:
        waits = [asyncio.create_task(e.wait()) for e in (asked, ended)]
        await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
        for w in waits:
            w.cancel()
        if ended.is_set():
            return
        asked.clear()
        try:
            result = f"OK {await verify()}"
        except Exception as e:
            result = f"FAIL {type(e).__name__} {e}"
        print(result, flush=True)


asyncio.run(main())
