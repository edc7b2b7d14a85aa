"""--log is JSON objects and nothing else; standard error is one line."""

import json
import re
from pathlib import Path

import pytest
from torpor import log
from torpor.config import Config


@pytest.fixture(autouse=True)
def own_log(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_log", log.Log())


def objects(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_error_is_one_line_and_one_object(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    log.setup(Config(log=str(path)), "run")
    log.error('no "such"\nluck\x1b[0m')
    assert capsys.readouterr().err == 'no "such" luck?[0m\n'
    (entry,) = objects(path)
    assert set(entry) == {"level", "msg", "time"}
    assert entry["level"] == "error" and entry["msg"] == 'no "such" luck?[0m'
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z", entry["time"])


def test_the_file_is_appended_to(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text('{"level":"error","msg":"older"}\n')
    log.setup(Config(log=str(path), log_format="json"), "run")
    log.error("newer")
    assert [entry["msg"] for entry in objects(path)] == ["older", "newer"]


def test_without_debug_nothing_else_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "log"
    log.setup(Config(log=str(path)), "run")
    log.debug("details")
    assert not path.exists() and capsys.readouterr().err == ""


def test_debug_goes_to_its_own_file(tmp_path: Path) -> None:
    path, details = tmp_path / "log", tmp_path / "debug"
    log.setup(Config(log=str(path), debug=True, debug_log=f"{details}/"), "run")
    log.debug("details")
    assert not path.exists()
    (file,) = details.iterdir()
    assert file.name.startswith("torpor.log.") and file.name.endswith(".run.txt")
    assert "details" in file.read_text()


def test_debug_in_the_error_log_is_json_too(tmp_path: Path) -> None:
    path = tmp_path / "log"
    log.setup(Config(log=str(path), debug=True), "run")
    log.debug("details")
    assert [entry["level"] for entry in objects(path)] == ["debug"]


def test_a_log_that_cannot_be_written_does_not_hide_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    log.setup(Config(log="/nonexistent/directory/log"), "run")
    log.error("the real problem")
    assert capsys.readouterr().err.startswith("the real problem\n")


def test_the_library_writes_to_nobodys_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    log.error("quiet")
    log.warning("quiet")
    log.debug("quiet")
    assert capsys.readouterr().err == ""
