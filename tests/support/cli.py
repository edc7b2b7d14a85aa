"""The command under test, and one container as a test sees it."""

import contextlib
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from support import leaks, procs

TORPOR = Path(sys.executable).with_name("torpor")
ENGINE_ERROR = 128
_numbers = itertools.count(1)


def new_id(name: str = "c") -> str:
    return f"{leaks.RUN_MARK}-{name}-{next(_numbers)}"


@dataclass(frozen=True)
class Result:
    args: tuple[str, ...]
    code: int
    out: str
    err: str

    def __str__(self) -> str:
        return f"torpor {' '.join(self.args)}\n  exit code {self.code}\n  stdout: {self.out!r}\n  stderr: {self.err!r}"


class Torpor:
    """Runs the installed `torpor` with a state root of its own."""

    def __init__(self, directory: Path, *top: str) -> None:
        self.directory = directory
        self.root = directory / "state"
        self.log = directory / "torpor.log"
        self.top = top

    def argv(self, *args: str | Path, top: Sequence[str] | None = None) -> list[str]:
        flags = self.top if top is None else top
        return [str(TORPOR), "--root", str(self.root), "--log", str(self.log), *flags, *map(str, args)]

    def __call__(
        self,
        *args: str | Path,
        check: bool = True,
        timeout: float = 60,
        stdin: int | IO[Any] | None = subprocess.DEVNULL,
        env: Mapping[str, str] | None = None,
        top: Sequence[str] | None = None,
        cwd: Path | None = None,
        input: str | None = None,  # noqa: A002
    ) -> Result:
        """Run a command to its end. Output goes to files: a detached container keeps the stdout it was given, and a pipe would never end."""
        number = next(_numbers)
        self.directory.mkdir(parents=True, exist_ok=True)
        out_path, err_path = self.directory / f"cmd{number}.out", self.directory / f"cmd{number}.err"
        with open(out_path, "wb") as out, open(err_path, "wb") as err:
            process = self.popen(*args, stdin=subprocess.PIPE if input is not None else stdin, stdout=out, stderr=err, env=env, top=top, cwd=cwd)  # fmt: skip
            try:
                process.communicate(input.encode() if input is not None else None, timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"torpor {' '.join(map(str, args))} took longer than {timeout} s") from None
            finally:
                procs.claimed.discard(process.pid)
        code = process.returncode
        result = Result(
            tuple(map(str, args)), code, out_path.read_text(errors="replace"), err_path.read_text(errors="replace")
        )
        assert "Traceback (most recent call last)" not in result.err, f"a Python traceback reached the user: {result}"
        if check:
            assert code == 0, str(result)
        return result

    def popen(self, *args: str | Path, top: Sequence[str] | None = None, env: Mapping[str, str] | None = None, **more: Any) -> subprocess.Popen[bytes]:  # fmt: skip
        full_env = {**os.environ, **(env or {})}
        self.directory.mkdir(parents=True, exist_ok=True)
        with procs.claiming:
            process = subprocess.Popen(self.argv(*args, top=top), env=full_env, **more)
            procs.claimed.add(process.pid)
        return process

    def fails(self, *args: str | Path, code: int | None = ENGINE_ERROR, says: str | Sequence[str] = (), **more: Any) -> Result:  # fmt: skip
        """Run a command that must be refused: non-zero exit, exactly one line on stderr, one JSON object in the log, no traceback."""
        size = self.log.stat().st_size if self.log.exists() else 0
        result = self(*args, check=False, **more)
        assert result.code != 0, f"should have failed: {result}"
        if code is not None:
            assert result.code == code, f"wrong exit code, expected {code}: {result}"
        assert result.err.endswith("\n") and result.err.count("\n") == 1, f"not exactly one line of error: {result}"
        for word in [says] if isinstance(says, str) else says:
            assert word in result.err, f"the message should say {word!r}: {result}"
        if self.log.exists():
            logged = self.log.read_bytes()[size:].decode()
            if logged:
                entry = json.loads(logged)
                assert entry["level"] == "error" and entry["time"] and entry["msg"], logged
                assert entry["msg"].strip() in result.err or result.err.strip() in entry["msg"], (logged, result.err)
        return result

    def state(self, container_id: str) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(self("state", container_id).out)
        return state

    def ids(self) -> list[str]:
        return self("list", "--quiet").out.split()

    def wait_status(self, container_id: str, status: str, timeout: float = 20) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            procs.reap()
            state = self.state(container_id)
            return state if state["status"] == status else None

        found = procs.wait_until(f"{container_id} to be {status}", look, timeout)
        assert found is not None
        return found

    def clean_up(self) -> None:
        """Delete every container that the test left, by the command itself, which must work whatever the test did."""
        if not self.root.exists():
            return
        results = [
            self("delete", "--force", name, check=False, timeout=30)
            for name in sorted(os.listdir(self.root))
            if (self.root / name).is_dir()
        ]
        procs.reap()
        failed = [str(r) for r in results if r.code != 0]
        assert not failed, "\n".join(failed)


class Container:
    """A detached container whose program speaks the workload protocol: READY, then `OK ...` or `FAIL ...` for each SIGUSR1."""

    def __init__(self, torpor: Torpor, bundle: Path, container_id: str) -> None:
        self.torpor = torpor
        self.bundle = bundle
        self.id = container_id
        self.output = torpor.directory / f"{container_id}.out"
        self.seen = 0

    # -- starting ---------------------------------------------------------------------------------

    def _with_output(self, *args: str | Path, timeout: float = 90, env: Mapping[str, str] | None = None, check: bool = True) -> Result:  # fmt: skip
        self.torpor.directory.mkdir(parents=True, exist_ok=True)
        err_path = self.torpor.directory / f"{self.id}.err{next(_numbers)}"
        with open(self.output, "ab") as out, open(err_path, "wb") as err:
            # the container writes both its outputs to one file; what the command itself says is copied there too
            process = self.torpor.popen(*args, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=env)
            try:
                process.wait(timeout=timeout)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError(f"torpor {' '.join(map(str, args))} took longer than {timeout} s") from None
            finally:
                procs.claimed.discard(process.pid)
        result = Result(tuple(map(str, args)), process.returncode, "", err_path.read_text(errors="replace"))
        self.stderr = err_path
        if check:
            assert process.returncode == 0, f"{result}\n  output: {self.text()!r}"
        return result

    def run(self, *flags: str, env: Mapping[str, str] | None = None) -> "Container":
        self._with_output("run", "--detach", "--bundle", self.bundle, *flags, self.id, env=env)
        return self

    def create(self, *flags: str) -> "Container":
        self._with_output("create", "--bundle", self.bundle, *flags, self.id)
        return self

    def restore_from(self, image: Path, *flags: str, check: bool = True, env: Mapping[str, str] | None = None, timeout: float = 90) -> Result:  # fmt: skip
        return self._with_output(
            "restore", "--detach", "--image-path", image, "--bundle", self.bundle, *flags, self.id,
            check=check, env=env, timeout=timeout,
        )  # fmt: skip

    # -- talking ----------------------------------------------------------------------------------

    def text(self) -> str:
        return self.output.read_text(errors="replace") if self.output.exists() else ""

    def next_line(self, timeout: float = 30) -> str:
        def look() -> str | None:
            new = self.text()[self.seen :]
            return new[: new.index("\n")] if "\n" in new else None

        try:
            line = procs.wait_until("a line", look, timeout)
        except AssertionError:
            raise AssertionError(
                f"{self.id} printed nothing for {timeout} s; output so far: {self.text()!r}; "
                f"stderr: {self.stderr.read_text(errors='replace')!r}; state: {self.torpor('state', self.id, check=False)}; {self.where()}"
            ) from None
        assert line is not None
        self.seen += len(line) + 1
        return line

    def where(self) -> str:
        """In which state and system call the processes are, for a failure message."""
        lines = []
        for pid in self.host_pids():
            for task in sorted(os.listdir(f"/proc/{pid}/task")) if os.path.exists(f"/proc/{pid}/task") else []:
                with contextlib.suppress(OSError):
                    base = Path(f"/proc/{pid}/task/{task}")
                    p = procs.process(int(task))
                    lines.append(f"{p} syscall {(base / 'syscall').read_text().strip()}")
        for p in procs.descendants(self.pid):
            if p.state == "Z":
                with contextlib.suppress(OSError):
                    lines.append(f"{p} exit code {Path(f'/proc/{p.pid}/stat').read_text().split()[-1]}")
        return "; ".join(lines)

    def wait_ready(self, timeout: float = 60) -> "Container":
        line = self.next_line(timeout)
        assert line == "READY", f"{self.id}: {line!r}"
        return self

    def verify(self, timeout: float = 60) -> str:
        self.torpor("kill", self.id, "USR1")
        line = self.next_line(timeout)
        assert line.split()[0] == "OK", f"{self.id} differs: {line}"
        return line

    # -- looking ----------------------------------------------------------------------------------

    @property
    def pid(self) -> int:
        return int(self.torpor.state(self.id)["pid"])

    @property
    def status(self) -> str:
        return str(self.torpor.state(self.id)["status"])

    def host_pids(self) -> list[int]:
        """Every process of the container, by the host's pids: init and what is below it or in its pid namespace."""
        result = self.torpor("state", self.id, check=False)
        if result.code != 0:
            return []
        init = json.loads(result.out).get("pid") or 0
        if not init or procs.process(init) is None:
            return []
        with contextlib.suppress(OSError):
            ns = os.readlink(f"/proc/{init}/ns/pid")
            found = []
            for p in procs.everyone():
                with contextlib.suppress(OSError):
                    if os.readlink(f"/proc/{p.pid}/ns/pid") == ns:
                        found.append(p.pid)
            return sorted(found)
        return []

    # -- ending -----------------------------------------------------------------------------------

    def checkpoint(self, image: Path, *flags: str, check: bool = True, env: Mapping[str, str] | None = None, timeout: float = 90) -> Result:  # fmt: skip
        return self.torpor("checkpoint", "--image-path", image, *flags, self.id, check=check, env=env, timeout=timeout)

    def delete(self) -> None:
        self.torpor("delete", "--force", self.id)
        procs.reap()


def one_line_error(result: Result) -> str:
    assert result.code != 0 and result.err.count("\n") == 1, str(result)
    return result.err.strip()


__all__ = ["ENGINE_ERROR", "TORPOR", "Container", "Result", "Torpor", "new_id", "one_line_error"]
