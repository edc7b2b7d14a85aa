"""What torpor reads and writes without the json module is what the json module would have read and written."""

import json
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torpor import quick_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=20,
)


def test_the_quick_way_is_used_on_this_interpreter() -> None:
    assert quick_json._works


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_a_value_is_written_as_json_does(value: object) -> None:
    assert quick_json.dumps(value) == json.dumps(value)
    assert quick_json.loads(json.dumps(value, indent=2)) == value


@settings(max_examples=100, deadline=None)
@given(st.text(alphabet='{}[]",: \n\\u0123456789eE+-.truefalsn\x00\x1fé') | st.text())
def test_text_is_read_as_json_does(text: str) -> None:
    try:
        expected = json.loads(text)
    except ValueError:
        with pytest.raises(ValueError):
            quick_json.loads(text)
    else:
        assert repr(quick_json.loads(text)) == repr(expected)


def test_lone_surrogates_of_file_names_survive() -> None:
    name = b"\xff\xfe".decode("utf-8", "surrogateescape")
    assert quick_json.loads(quick_json.dumps([name])) == [name]


@settings(max_examples=50, deadline=None)
@given(VALUES)
def test_pretty_is_what_json_writes_with_indent(value: object) -> None:
    assert quick_json.pretty(value) == json.dumps(value, indent=2)


def test_what_has_no_json_form_is_refused() -> None:
    with pytest.raises(TypeError):
        quick_json.dumps({"a": object()})


def test_without_the_private_functions_the_standard_module_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quick_json, "_works", False)
    assert quick_json.loads(quick_json.dumps({"a": [1, "b"]})) == {"a": [1, "b"]}


@pytest.mark.parametrize("text", ["", "{", '{"a": ', '{"a": [1, 2', '"half', "[1,]", "nul", '{"a" 1}', "1 2"])
def test_what_is_wrong_is_a_value_error_before_json_was_imported(text: str) -> None:
    code = (
        "import sys; from torpor import quick_json; assert 'json' not in sys.modules\n"
        f"try: quick_json.loads({text!r})\n"
        "except ValueError as e: print('ValueError')"
    )
    done = subprocess.run([sys.executable, "-ISc", _with_path(code)], capture_output=True, text=True, check=True)
    assert done.stdout == "ValueError\n"


def test_the_verbs_that_clients_call_most_import_no_json_module() -> None:
    code = (
        "import sys; from torpor.cli.main import load\n"
        "for verb in ('create', 'start', 'delete', 'kill', 'pause', 'resume', 'checkpoint', 'restore'): load(verb)\n"
        "print(sorted({'json', 're', 'socket', 'ctypes', 'enum', 'threading'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-ISc", _with_path(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def _with_path(code: str) -> str:
    import torpor

    package = torpor.__path__[0].rsplit("/", 1)[0]
    return f"import sys; sys.path.insert(0, {package!r})\n{code}"
