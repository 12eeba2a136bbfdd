from __future__ import annotations

from dataclasses import replace

import pytest

from qwencli.diagnostics.finding import Check, Level, Status
from qwencli.diagnostics.gpu_checks import arch_list
from qwencli.diagnostics.host_checks import cpu, disk, packages, python, ram
from qwencli.diagnostics.machine import LiveMachine
from qwencli.diagnostics.recommend import recommend
from qwencli.diagnostics.table import CHECKS, run_check, select
from qwencli.diagnostics.versions import KNOWN_BAD, numbers
from qwencli.engine.host import HostMemory
from qwencli.errors import UsageError
from tests.diagnostics.machines import EXPECTED, MACHINES, RecordedMachine, device, torch


def findings(machine):
    return {check.id: run_check(check, machine) for check in CHECKS}


@pytest.mark.parametrize("name", MACHINES)
def test_recorded_machines_get_exactly_their_findings(name):
    found = findings(MACHINES[name])
    wrong = {
        key: finding.status.value
        for key, finding in found.items()
        if finding.status in (Status.WARN, Status.FAIL)
    }
    assert wrong == EXPECTED[name]
    for key in wrong:
        assert found[key].fix, f"{key} does not say what to do"
        assert found[key].evidence
    assert not [f.what for f in found.values() if "cannot be checked" in f.what]


def test_a_cpu_box_is_told_so_plainly():
    found = findings(MACHINES["no-gpu-cpu-torch"])
    assert found["cuda-device"].what.startswith("no CUDA device found")
    assert found["torch-build"].what == "torch 2.13.0+cpu is a CPU-only build"
    assert "install a CUDA build of torch" in found["torch-build"].fix


def test_the_origins_box_learns_of_its_conv3d_and_its_bitsandbytes():
    found = findings(MACHINES["the-origin"])["known-bad"]
    assert "conv3d" in found.what
    assert "#174051" in found.evidence
    assert "bitsandbytes>=0.50" in found.fix


def test_the_wrong_wheel_shows_the_error_of_the_device():
    found = findings(MACHINES["5070ti-wheel-without-sm_120"])
    assert found["arch-list"].evidence == "device: sm_120; wheel: sm_80 sm_86 sm_90"
    assert found["device-works"].evidence.endswith("for execution on the device")


@pytest.mark.parametrize(
    ("capability", "archs", "runs"),
    [
        ((8, 9), ("sm_80", "sm_86"), True),  # code runs on a later minor version
        ((8, 0), ("sm_86",), False),  # but not on an earlier one
        ((12, 0), ("sm_90",), False),
        ((12, 0), ("sm_90", "compute_90"), True),  # PTX is compiled for what is newer
        ((7, 5), ("compute_80",), False),
        ((9, 0), ("sm_90a",), True),
        ((12, 0), ("sm_90a",), False),
        ((10, 3), ("sm_100",), True),
    ],
)
def test_which_code_runs_on_which_device(capability, archs, runs):
    machine = RecordedMachine(torch=torch(archs=archs, devices=(device(capability=capability),)))
    assert arch_list(machine).status is (Status.PASS if runs else Status.FAIL)


def test_a_machine_where_torch_does_not_load():
    class Broken(RecordedMachine):
        def __getattribute__(self, name):
            if name == "torch":
                raise ImportError("libcudart.so.13: cannot open shared object file")
            return super().__getattribute__(name)

    machine = Broken()
    found = findings(machine)
    assert found["torch-loads"].status is Status.FAIL
    assert "libcudart" in found["torch-loads"].evidence
    assert found["arch-list"].status is Status.SKIP
    assert "cannot be checked: ImportError" in found["arch-list"].what
    assert found["ram"].status is Status.PASS
    assert recommend(machine) == {"why": "torch does not load, so nothing can run"}


@pytest.mark.parametrize(
    ("check", "change", "status"),
    [
        (python, {"python": (3, 10, 1)}, Status.FAIL),
        (cpu, {"cores": 1}, Status.WARN),
        (ram, {"memory": HostMemory(8_000_000_000, 1_000_000_000)}, Status.WARN),
        (ram, {"memory": HostMemory(8_000_000_000, None)}, Status.PASS),
        (disk, {"cache_free_bytes": 1_000_000_000}, Status.WARN),
        (packages, {"packages": {"torch": "2.11.0"}}, Status.FAIL),
        (packages, {"requirements": {}}, Status.SKIP),
    ],
)
def test_host_checks(check, change, status):
    assert check(replace(RecordedMachine(), **change)).status is status


def test_a_check_that_raises_is_a_skip_with_the_reason():
    def broken(machine):
        raise KeyError("gone\nand a second line")

    finding = run_check(Check("x", "x", Level.QUICK, broken), RecordedMachine())
    assert finding.status is Status.SKIP
    assert finding.what.startswith("cannot be checked: KeyError")


def test_ids_are_unique_and_no_group_is_called_like_a_check():
    ids = [check.id for check in CHECKS]
    assert len(set(ids)) == len(ids)
    assert not {check.group for check in CHECKS} & set(ids)


def test_selection():
    assert [check.id for check in select(Level.QUICK, only=["host"])] == [
        "cpu",
        "ram",
        "disk",
        "variables",
    ]
    mixed = select(Level.QUICK, only=["host", "python"], skip=["cpu", "ram"])
    assert [check.id for check in mixed] == ["python", "disk", "variables"]
    assert [check.id for check in select(Level.QUICK, only=["device-works"])] == ["device-works"]
    assert "device-works" not in [check.id for check in select(Level.QUICK)]
    assert "device-works" in [check.id for check in select(Level.DEFAULT)]


@pytest.mark.parametrize(
    "names", [{"only": ["gpus"]}, {"skip": ["x"]}, {"only": ["cpu"], "skip": ["host"]}]
)
def test_wrong_selections_are_usage_errors(names):
    with pytest.raises(UsageError) as caught:
        select(Level.QUICK, **names)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "quantization", "why"),
    [("healthy-5090", "none", "fits 32 GB"), ("no-gpu-cpu-torch", "none", "no CUDA device")],
)
def test_recommendation(name, quantization, why):
    advice = recommend(MACHINES[name])
    assert advice["quantization"] == quantization
    assert why in advice["why"]


def test_a_small_gpu_is_advised_to_quantize():
    small = RecordedMachine(torch=torch(devices=(device("RTX 3060", (8, 6), 8e9, 8e9),)))
    assert recommend(small)["quantization"] == "4bit"


@pytest.mark.parametrize(
    ("text", "parsed"), [("2.9.1+cu128", (2, 9, 1)), ("581.15", (581, 15)), ("main", ())]
)
def test_numbers(text, parsed):
    assert numbers(text) == parsed


def test_known_bad_entries_are_dated_and_sourced():
    for entry in KNOWN_BAD:
        assert entry.noted
        assert entry.source


def test_this_machine_can_be_read():
    machine = LiveMachine()
    assert machine.cores >= 1
    assert machine.memory.total_bytes > 1e8
    assert machine.cache_free_bytes >= 0
    assert machine.version("pytest")
    assert machine.version("no-such-package") is None
    assert run_check(CHECKS[0], machine).status in (Status.PASS, Status.WARN, Status.FAIL)
