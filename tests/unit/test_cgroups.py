"""What `update` writes on cgroup v2, into files as the kernel has them. (v1 is there in CI; test_conformance compares it with runc.)"""

from pathlib import Path
from typing import Any

import pytest
from torpor import cgroups, proc
from torpor.errors import KernelError, SpecError

FILES = {
    "memory.max": "max",
    "memory.low": "0",
    "memory.swap.max": "max",
    "cpu.max": "max 100000",
    "cpu.max.burst": "0",
    "cpu.weight": "100",
    "cpu.idle": "0",
    "cpuset.cpus": "",
    "cpuset.mems": "",
    "pids.max": "max",
    "io.weight": "default 100",
}


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(proc, "cgroup_directories", lambda pid: iter([str(tmp_path)]))
    return tmp_path


@pytest.mark.parametrize(
    ("resources", "written"),
    [
        ({}, {}),
        ({"memory": {"limit": 1 << 26}}, {"memory.max": "67108864"}),
        ({"memory": {"limit": 1 << 26, "swap": 3 << 26}}, {"memory.max": "67108864", "memory.swap.max": "134217728"}),
        ({"memory": {"limit": -1}}, {"memory.max": "max", "memory.swap.max": "max"}),
        ({"memory": {"swap": -1}}, {"memory.swap.max": "max"}),
        ({"memory": {"reservation": 4096}}, {"memory.low": "4096"}),
        ({"cpu": {"quota": 20000}}, {"cpu.max": "20000 100000"}),
        ({"cpu": {"period": 50000}}, {"cpu.max": "max 50000"}),
        ({"cpu": {"quota": 20000, "period": 50000}}, {"cpu.max": "20000 50000"}),
        ({"cpu": {"quota": -1}}, {"cpu.max": "max 100000"}),
        # the conversion of the OCI runtime specification (runc: ConvertCPUSharesToCgroupV2Value)
        ({"cpu": {"shares": 2}}, {"cpu.weight": "1"}),
        ({"cpu": {"shares": 1024}}, {"cpu.weight": "39"}),
        ({"cpu": {"shares": 262144}}, {"cpu.weight": "10000"}),
        ({"cpu": {"burst": 5000, "idle": 1}}, {"cpu.max.burst": "5000", "cpu.idle": "1"}),
        ({"cpu": {"cpus": "0-1", "mems": "0"}}, {"cpuset.cpus": "0-1", "cpuset.mems": "0"}),
        ({"pids": {"limit": 10}}, {"pids.max": "10"}),
        ({"pids": {"limit": -1}}, {"pids.max": "max"}),
        ({"blockIO": {"weight": 10}}, {"io.weight": "1"}),
        ({"blockIO": {"weight": 1000}}, {"io.weight": "10000"}),
        ({"unified": {"memory.low": "8192"}}, {"memory.low": "8192"}),
    ],
)  # fmt: skip
def test_update(cgroup: Path, resources: dict[str, Any], written: dict[str, str]) -> None:
    cgroups.update(1, resources)
    assert {name: (cgroup / name).read_text() for name in FILES} == FILES | written


def test_swap_is_what_is_left_of_both(cgroup: Path) -> None:
    (cgroup / "memory.max").write_text("1000\n")
    cgroups.update(1, {"memory": {"swap": 1500}})
    assert (cgroup / "memory.swap.max").read_text() == "500"


@pytest.mark.parametrize("memory", [{"swap": 4096}, {"swap": 4096, "limit": 8192}, {"swap": 4096, "limit": -1}])
def test_swap_below_memory_is_refused(cgroup: Path, memory: dict[str, int]) -> None:
    with pytest.raises(SpecError, match=r"memory\.swap 4096 counts memory too"):
        cgroups.update(1, {"memory": memory})
    assert (cgroup / "memory.swap.max").read_text() == "max" and (cgroup / "memory.max").read_text() == "max"


@pytest.mark.parametrize("resources", [{"unified": {"memory.high": "1"}}, {"unified": {"no.such": "1"}}])
def test_a_file_that_is_not_there_is_named(cgroup: Path, resources: dict[str, Any]) -> None:
    (name,) = resources["unified"]
    with pytest.raises(KernelError, match=name):
        cgroups.update(1, resources)


def test_a_unified_name_cannot_leave_the_cgroup(cgroup: Path) -> None:
    with pytest.raises(SpecError, match="invalid cgroup file"):
        cgroups.update(1, {"unified": {"../x": "1"}})
