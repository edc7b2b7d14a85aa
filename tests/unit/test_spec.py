"""config.json: what is refused, and in which words."""

import contextlib
import copy
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torpor import bundle, plan, spec
from torpor.config import Config
from torpor.errors import SpecError, TorporError


def bundle_with(tmp_path: Path, config: object) -> str:
    (tmp_path / "rootfs").mkdir(exist_ok=True)
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return str(tmp_path)


def without(path: str) -> dict[str, Any]:
    made = copy.deepcopy(spec.default())
    *parents, last = path.split(".")
    inner: Any = made
    for name in parents:
        inner = inner[name]
    del inner[last]
    return made


def changed(path: str, value: object) -> dict[str, Any]:
    made = copy.deepcopy(spec.default())
    *parents, last = path.split(".")
    inner: Any = made
    for name in parents:
        inner = inner[name]
    inner[last] = value
    return made


def test_the_default_is_good(tmp_path: Path) -> None:
    loaded = bundle.load(bundle_with(tmp_path, spec.default()))
    assert loaded["root"]["path"] == str(tmp_path / "rootfs")


def test_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="does not exist") as e:
        bundle.load(str(tmp_path / "none"))
    assert e.value.code == "bad-bundle"
    with pytest.raises(SpecError, match=r"no config\.json in bundle .*: make one with") as e:
        bundle.load(str(tmp_path))
    assert e.value.code == "bad-bundle"


@pytest.mark.parametrize(
    "more",
    [
        {"options": ["bind", "idmap"]},
        {"options": ["bind"], "uidMappings": [{"containerID": 0, "hostID": 1, "size": 1}]},
    ],
)
def test_a_mount_with_ids_of_its_own_is_named(more: dict[str, Any]) -> None:
    mount = {"destination": "/data", "type": "bind", "source": "/srv", **more}
    with pytest.raises(SpecError, match="ids of the mount at /data, which is not supported"):
        spec.check(changed("mounts", [mount]), "config.json")


def test_a_network_device_that_is_not_there_is_named() -> None:
    made = spec.default()
    made["linux"]["netDevices"] = {"lo": {}, "nosuch0": {"name": "eth0"}}
    with pytest.raises(SpecError, match="network device 'nosuch0'"):
        spec.check(made, "config.json")


@pytest.mark.parametrize("text", ["", "{", "not json", '{"a": }'])
def test_not_json(tmp_path: Path, text: str) -> None:
    with pytest.raises(SpecError, match="is not JSON") as e:
        bundle.load(bundle_with(tmp_path, text))
    assert e.value.code == "bad-spec"


@pytest.mark.parametrize("path", ["ociVersion", "process", "process.args", "process.cwd", "root", "root.path"])
def test_what_must_be_there(tmp_path: Path, path: str) -> None:
    with pytest.raises(SpecError, match=f"lacks {path}$") as e:
        bundle.load(bundle_with(tmp_path, without(path)))
    assert e.value.code == "bad-spec"


@pytest.mark.parametrize(
    ("path", "value", "says"),
    [
        ("process.args", [], "empty process.args"),
        ("process.args", [""], "empty first word"),
        ("process.args", "sh", "process.args that is not a list"),
        ("process.args", [1], "other than strings"),
        ("process.args", ["a\0b"], "NUL byte"),
        ("process.cwd", "tmp", "must be an absolute path"),
        ("process.env", ["PATH"], "not NAME=VALUE"),
        ("process.env", ["=x"], "not NAME=VALUE"),
        ("process.terminal", "yes", "not true or false"),
        ("process.user", {"uid": "root"}, "process.user.uid that is not a number"),
        ("process.user", {"uid": True}, "not a number"),
        ("process", [], "not an object"),
        ("root", "rootfs", "not an object"),
        ("root.path", "", "empty root.path"),
        ("ociVersion", "2.0.0", "knows 1.x"),
        ("hostname", 1, "not a string"),
        ("annotations", {"a": 1}, "annotation 'a'"),
        ("mounts", [{}], "lacks mounts.destination"),
        ("mounts", ["/proc"], "not an object"),
        ("linux.namespaces", [{}], "lacks linux.namespaces.type"),
        ("linux", [1], "not an object"),
        ("process.rlimits", [{}], "lacks process.rlimits.type"),
        ("process.capabilities", {"bounding": "all"}, "not a list"),
    ],
)
def test_what_is_refused(tmp_path: Path, path: str, value: object, says: str) -> None:
    with pytest.raises(SpecError, match=says) as e:
        bundle.load(bundle_with(tmp_path, changed(path, value)))
    assert e.value.code == "bad-spec"
    assert str(tmp_path / "config.json") in str(e.value) and "\n" not in str(e.value)


def test_a_root_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SpecError, match="does not exist: put one there") as e:
        bundle.load(bundle_with(tmp_path, changed("root.path", "elsewhere")))
    assert e.value.code == "bad-bundle"


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
PATHS = [
    "ociVersion",
    "process",
    "process.args",
    "process.env",
    "process.user",
    "process.capabilities",
    "process.rlimits",
    "root",
    "root.path",
    "mounts",
    "linux",
    "linux.namespaces",
    "annotations",
    "hostname",
]


@given(st.sampled_from(PATHS), json_values)
def test_nothing_but_spec_errors(path: str, value: object) -> None:
    with contextlib.suppress(SpecError):
        spec.check(changed(path, value), "config.json")


@given(json_values)
def test_any_json_at_all(value: object) -> None:
    with pytest.raises(SpecError):
        spec.check(value, "config.json")


def namespaces(made: dict[str, Any]) -> dict[str, str | None]:
    return {n["type"]: n.get("path") for n in made["linux"]["namespaces"]}


def test_the_network_flag() -> None:
    with_path = spec.default(netns="/run/netns/x")
    spec.set_network(with_path, "sandbox", bundle_less=False)
    assert namespaces(with_path)["network"] == "/run/netns/x"
    spec.set_network(with_path, "host", bundle_less=False)
    assert namespaces(with_path)["network"] == "/run/netns/x"
    spec.set_network(with_path, "none", bundle_less=False)
    assert namespaces(with_path)["network"] is None


@pytest.mark.parametrize(("network", "own"), [("sandbox", True), ("none", True), ("host", False)])
def test_the_network_of_a_container_without_bundle(network: str, own: bool) -> None:
    made = plan.on_host_root(Config(network=network), ["true"], hostname="c", env={})
    assert ("network" in namespaces(made.spec)) is own


def test_a_container_without_bundle_does_not_see_the_state_of_others(tmp_path: Path) -> None:
    made = plan.on_host_root(Config(root=str(tmp_path)), ["true"], hostname="c", env={})
    assert str(tmp_path) in made.spec["linux"]["maskedPaths"]


def test_an_image_cannot_give_itself_power() -> None:
    greedy = spec.default(["sleep", "1"])
    greedy["process"]["capabilities"] = {"bounding": ["CAP_SYS_ADMIN"]}
    greedy["process"]["env"] = ["A=1=2"]
    greedy["hooks"] = {"prestart": [{"path": "/bin/evil"}]}
    greedy["linux"] = {"namespaces": []}
    greedy["root"]["path"] = "/etc"
    made = plan.from_image(Config(), "/image", {"spec": greedy}, hostname="c")
    assert made.spec["process"]["args"] == ["sleep", "1"]
    assert made.spec["process"]["env"] == ["A=1=2"]
    assert "CAP_SYS_ADMIN" not in made.spec["process"]["capabilities"]["bounding"]
    assert "hooks" not in made.spec
    assert {"pid", "mount", "network"} <= set(namespaces(made.spec))
    assert made.lower == "/"


def test_an_image_cannot_ask_for_the_hosts_directories() -> None:
    greedy = spec.default()
    greedy["mounts"].append({"destination": "/x", "type": "bind", "source": "/etc", "options": ["rbind"]})
    with pytest.raises(SpecError, match="volumes"):
        plan.from_image(Config(), "/image", {"spec": greedy}, hostname="c")


@given(json_values)
def test_any_record_in_an_image(value: object) -> None:
    with contextlib.suppress(TorporError):
        plan.from_image(Config(), "/image", {"spec": value, "container": {}}, hostname="c")


def test_volumes(tmp_path: Path) -> None:
    assert spec.volume(str(tmp_path))["destination"] == str(tmp_path)
    assert spec.volume(f"{tmp_path}:/x")["destination"] == "/x"
    for bad in ("", ":/x", f"{tmp_path}:x", "/does/not/exist"):
        with pytest.raises(SpecError):
            spec.volume(bad)


def test_the_process_of_an_exec() -> None:
    own = spec.default()
    own["process"]["env"] = ["A=1"]
    made = spec.process_for_exec(
        own, ["ls"], env=["B=2"], user="7:8", cwd="/tmp", capabilities=["net_admin"], terminal=True
    )
    assert made["args"] == ["ls"] and made["env"] == ["A=1", "B=2"] and made["cwd"] == "/tmp" and made["terminal"]
    assert made["user"] == {"uid": 7, "gid": 8}
    assert "CAP_NET_ADMIN" in made["capabilities"]["effective"]
    assert "CAP_NET_ADMIN" not in own["process"]["capabilities"]["effective"]
    for bad in ("root", "1:wheel", "-1"):
        with pytest.raises(SpecError, match="use UID"):
            spec.process_for_exec(own, ["ls"], user=bad)
