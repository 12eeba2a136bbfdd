"""Every recorded machine gets exactly the findings it should."""

from __future__ import annotations

import io
import json
import re

import pytest
from rich.console import Console

from qwencli.diagnostics import report
from qwencli.diagnostics.advice import advise
from qwencli.diagnostics.check_table import CHECKS, run_check, select
from qwencli.diagnostics.finding import Level, Status
from qwencli.diagnostics.record import RecordedMachine, record
from tests.diagnostics.replay import EXPECTED, MACHINES, machine


def findings(box):
    return {check.id: run_check(check, box) for check in CHECKS}


def test_every_machine_has_an_expectation():
    assert set(MACHINES) == set(EXPECTED)


@pytest.mark.parametrize("name", MACHINES)
def test_a_machine_gets_exactly_its_findings(name):
    found = findings(machine(name))
    wrong = {
        key: finding.status.value
        for key, finding in found.items()
        if finding.status in (Status.WARN, Status.FAIL)
    }
    assert wrong == EXPECTED[name]
    for key in wrong:
        assert found[key].fix, f"{key} does not say what to do"
        assert found[key].evidence, f"{key} has no evidence"
    broken = [f.what for f in found.values() if f.what.startswith("cannot be checked: ")]
    assert all("failed (" in what for what in broken), broken


@pytest.mark.parametrize("name", MACHINES)
def test_a_record_of_a_replay_is_the_same_machine(name):
    box = machine(name)
    before = findings(box)
    again = RecordedMachine(json.loads(json.dumps(record(box))))
    assert findings(again) == before


@pytest.mark.parametrize("form", ["text", "markdown"])
@pytest.mark.parametrize("name", MACHINES)
def test_no_command_is_advised_twice(name, form):
    box = machine(name)
    results = [(check, run_check(check, box)) for check in CHECKS]
    if form == "markdown":
        page = report.markdown(results, advise(box), {}, "1")
    else:
        console = Console(width=1000, file=io.StringIO())
        console.print(report.text(results, advise(box)))
        page = console.file.getvalue()
    commands = re.findall(r"(?:pip install|unset|kill|sudo) [^()\n]+", page)
    assert len(commands) == len(set(commands)), commands
    for check, finding in results:
        for line in finding.fix.splitlines():
            assert line in page.replace("\n", " "), check.id


def test_gpus_of_one_kind_are_named_once():
    evidence = findings(machine("h100-recorded"))["driver"].evidence
    assert evidence.startswith("2x NVIDIA H100 80GB HBM3; up to CUDA 13.0")
    mixed = machine("h100-recorded")._recorded["driver"]["gpus"]
    other = machine(
        "h100-recorded", driver={"gpus": [mixed[0], {**mixed[1], "name": "NVIDIA T400"}]}
    )
    assert findings(other)["driver"].evidence.startswith("NVIDIA H100 80GB HBM3, NVIDIA T400; ")


def test_the_wrong_wheel():
    found = findings(machine("5070ti-wheel-without-sm_120"))
    assert found["arch-list"].evidence.startswith("device: sm_120; wheel: sm_50")
    assert found["arch-list"].fix.endswith("/cu128"), "its driver cannot run CUDA 13"
    assert "no kernel image" in found["device-works"].evidence
    assert "Triton before 3.3" in found["known-bad"].evidence
    assert found["bandwidth"].status is Status.SKIP
    assert "no kernel image" in found["bandwidth"].what


def test_the_origins_box_learns_of_its_conv3d_and_its_bitsandbytes():
    found = findings(machine("origin"))
    lines = found["known-bad"].evidence.splitlines()
    assert lines[0].startswith("torch-2.9-conv3d (high, noted 2026-11-23): torch 2.9 with cuDNN")
    assert "https://github.com/pytorch/pytorch/issues/168167" in lines[0]
    assert "bitsandbytes>=0.50" in found["known-bad"].fix
    assert "vol2col" in found["patch-embedding"].evidence
    assert "7067x" in found["patch-embedding"].evidence
    assert found["bitsandbytes-runs"].what.endswith("4-bit and 8-bit save memory, not time")
    assert "bound by the host: the GPU waits 84% of the time" in found["engine-run"].what


def test_a_throttling_laptop():
    found = findings(machine("throttling-laptop"))
    assert found["throttling"].what == "the GPU throttles because of heat"
    assert "885 of 3090 MHz" in found["throttling"].evidence
    assert found["clocks"].status is Status.PASS, "throttling explains the clock already"
    assert found["power-limit"].evidence == "80 W; default 175 W"
    assert found["pcie"].status is Status.PASS, "8 lanes are all that a laptop has"


def test_pcie_with_half_its_lanes():
    finding = findings(machine("x8-pcie"))["pcie"]
    assert finding.what == "the PCIe link has 8 of 16 lanes"
    assert finding.evidence.startswith("PCIe 5 x8 under load; to the GPU 27.0")


def test_windows_and_wsl_name_what_linux_does_not_have():
    windows, wsl = findings(machine("5090-windows-wddm")), findings(machine("5090-wsl2"))
    assert windows["driver-model"].what.endswith("as it must on a GeForce card")
    assert windows["gpu-processes"].status is Status.PASS, "a desktop is not a rival"
    assert windows["hags"].confidence.value == "low"
    assert windows["memory-spill"].status is Status.PASS
    assert "microsoft/WSL #11050" in wsl["memory-spill"].fix
    assert wsl["wsl"].status is Status.PASS
    healthy = findings(machine("healthy-5090"))
    for check in ("wsl", "hags", "driver-model", "memory-spill"):
        assert healthy[check].status is Status.SKIP


def test_the_healthy_box_is_told_its_limits():
    found = findings(machine("healthy-5090"))
    assert "at most 200 tok/s" in found["bandwidth"].evidence
    assert "90% of the 1792 GB/s" in found["bandwidth"].evidence
    assert "3.4 us a launch" in found["launch-rate"].evidence
    assert found["attention-kernels"].evidence.startswith("prefill: flash (pytorch_flash")
    assert found["engine-run"].what.startswith("178.2 tok/s; bound by memory bandwidth")


def test_levels():
    quick = {check.id for check in select(Level.QUICK)}
    default = {check.id for check in select(Level.DEFAULT)}
    deep = {check.id for check in select(Level.DEEP)}
    assert quick < default < deep
    assert deep - default == {"engine-run"}
    # What a quick look needs, machines answer without their probes.
    box = machine("healthy-5090")
    asked = []
    box.probe = lambda name: asked.append(name) or RecordedMachine.probe(box, name)
    for check in select(Level.QUICK):
        run_check(check, box)
    assert set(asked) == {"torch"}
