"""One tree of exceptions, and its codes."""

import pickle
import re
from pathlib import Path

import pytest
import torpor
from torpor import errors
from torpor.errors import TorporError, from_engine

CONTRACT = Path(__file__).parents[2] / "docs" / "internals.md"


def slugs() -> list[str]:
    text = CONTRACT.read_text()
    section = text[text.index("## 5. Error code slugs") :]
    found = re.search(r"`(usage [^`]*)`", section)
    assert found
    return found.group(1).split()


@pytest.mark.parametrize(
    ("code", "kind"),
    [("usage", "UsageError"), ("not-found", "StateError"), ("exists", "StateError"), ("bad-bundle", "SpecError"),
     ("image-corrupt", "ImageError"), ("unsupported", "UnsupportedError"), ("refused-power", "RefusedError"),
     ("no-space", "KernelError"), ("tracer-died", "InterruptedCheckpoint"), ("launcher", "LauncherError"),
     ("internal", "InternalError"), ("from-the-future", "TorporError")],
)  # fmt: skip
def test_the_class_for_a_code(code: str, kind: str) -> None:
    error = from_engine(code, "collect", 7, "a socket", "no such luck")
    assert type(error).__name__ == kind
    assert (error.code, error.stage, error.pid, error.object, str(error)) == (
        code,
        "collect",
        7,
        "a socket",
        "no such luck",
    )


def test_every_code_of_the_contract_has_a_class_of_its_own() -> None:
    assert len(slugs()) > 20
    for code in slugs():
        assert type(from_engine(code, None, None, None, "x")) is not TorporError, code


def test_errors_pickle() -> None:
    for code in slugs():
        error = from_engine(code, "freeze", 12, "thing", "message")
        again = pickle.loads(pickle.dumps(error))
        assert type(again) is type(error)
        assert vars(again) == vars(error) and str(again) == str(error)


def test_the_package_offers_every_class() -> None:
    classes = {n for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, TorporError)}
    assert classes <= set(torpor.__all__)
    for name in torpor.__all__:
        assert getattr(torpor, name)
    with pytest.raises(AttributeError, match="nonsense"):
        _ = torpor.nonsense


def test_the_version_is_that_of_the_workspace() -> None:
    cargo = (Path(__file__).parents[2] / "Cargo.toml").read_text()
    assert f'version = "{torpor.__version__}"' in cargo
