"""Single faults, one at a time, on the healthy machine."""

from __future__ import annotations

import pytest

from qwencli.diagnostics import report
from qwencli.diagnostics.advice import Advice
from qwencli.diagnostics.check_table import CHECKS, run_check, select
from qwencli.diagnostics.finding import Check, Finding, Level, Status
from qwencli.diagnostics.known_bad import cudnn_text, meets, numbers
from qwencli.diagnostics.machine import Unreadable
from qwencli.errors import UsageError
from qwencli.output import Output
from tests.diagnostics.replay import machine, recorded

BY_ID = {check.id: check for check in CHECKS}
GPU = recorded("healthy-5090")["driver"]["gpus"][0]


def gpu(**change):
    return {"driver": {"gpus": [{**GPU, **change}]}}


def probe(name, **change):
    return {"probes": {name: change}}


def load(name, **change):
    return {"probes": {name: {"load": change}}}


def ended(name, outcome, kind="", error=""):
    return probe(name, outcome=outcome, kind=kind, error=error, value=None)


def chosen(family, us=20.0):
    runs = [
        {"phase": "decode", "backend": "chosen", "us": us, "family": family},
        {"phase": "decode", "backend": "flash", "us": None, "error": "no mask, please"},
    ]
    return probe("attention", value={"runs": runs})


def linear(**int8):
    runs = recorded("healthy-5090")["probes"]["bitsandbytes"]["value"]["runs"]
    return probe("bitsandbytes", value={"runs": [*runs[:2], {**runs[2], **int8}]})


PYTHON = {"pid": 7, "name": "python", "used_bytes": 9_000_000_000, "compute": True}
OFF = {"flash": False, "mem_efficient": False, "cudnn": False}
FLASH = {"version": "2.8.4", "flash_us": 30.0, "sdpa_us": 28.0, "max_difference": 0.004}
CASES = [
    ("driver", {"driver": {"problem": "Driver/library version mismatch"}}, "fail", "mismatch"),
    ("torch-loads", ended("torch", "crashed", "SIGILL"), "fail", "crashed (SIGILL)"),
    ("torch-loads", ended("torch", "failed", "OSError", "libcudart.so.13"), "fail", "libcudart"),
    ("torch-loads", ended("torch", "timeout", error="no answer after 120 s"), "fail", "timeout"),
    ("device-works", ended("small-work", "crashed", "SIGSEGV"), "fail", "SIGSEGV"),
    ("python", {"system": {"python": [3, 10, 1]}}, "fail", "Linux"),
    ("packages", {"packages": {"bitsandbytes": None}}, "fail", "bitsandbytes"),
    ("packages", {"requirements": None}, "skip", ""),
    ("bitsandbytes", {"packages": {"bitsandbytes": None}}, "skip", ""),
    ("triton", {"packages": {"triton": None, "triton-windows": "3.6"}}, "pass", ""),
    ("sdpa-backends", probe("torch", value={"sdpa_backends": OFF}), "warn", "math on"),
    ("attention-kernels", chosen("math"), "warn", "decode, flash: no mask, please"),
    ("attention-kernels", chosen("cudnn"), "pass", "decode: cudnn"),
    ("attention-kernels", chosen(None), "skip", ""),
    ("attention-kernels", chosen(None, us=None), "fail", ""),
    ("bitsandbytes-runs", linear(us=None, error="no kernel image"), "fail", "8-bit: no kernel"),
    ("bitsandbytes-runs", linear(relative_error=0.9), "fail", "error 0.900"),
    ("bitsandbytes-runs", linear(relative_error=float("nan")), "fail", "error nan"),
    ("patch-embedding", {"model": "qwen3-4b"}, "skip", ""),
    ("triton-runs", ended("triton", "failed", "RuntimeError", "no C compiler"), "fail", "no C"),
    ("launch-rate", probe("launch-rate", value={"eager_us": 30.0}), "warn", "30.0 us"),
    ("bandwidth", probe("bandwidth", value={"read_bytes_per_s": 9e11}), "warn", "50% of the 1792"),
    ("pcie", load("host-link", pcie_gen=3), "warn", "PCIe 3 x16"),
    ("pcie", probe("host-link", value={"to_device_bytes_per_s": 4e9}), "warn", "carries 63"),
    ("pcie", {"probes": {"host-link": {"load": None}}}, "pass", "55.0"),
    ("power-limit", gpu(power_limit_w=400.0), "warn", "400 W; default 575 W"),
    ("power-limit", gpu(power_limit_w=None), "skip", ""),
    ("clocks", load("bandwidth", pstate=8), "warn", "under load P8"),
    ("clocks", load("bandwidth", sm_clock_mhz=990), "warn", "990 of 3090"),
    ("clocks", load("bandwidth", mem_clock_mhz=405), "warn", "405 of 14001"),
    ("throttling", load("bandwidth", throttle_reasons=["sw_power_cap"]), "pass", "sw_power_cap"),
    ("throttling", load("bandwidth", throttle_reasons=["hw_power_brake"]), "warn", "hw_power"),
    ("temperature", gpu(now={**GPU["now"], "temperature_c": 88}), "warn", "88 C idle"),
    ("ecc", gpu(ecc=True, uncorrected_errors=2), "fail", "2 uncorrected"),
    ("ecc", gpu(ecc=None), "skip", ""),
    ("gpu-memory", gpu(free_memory_bytes=20_000_000_000), "warn", "20.0 of 34.2"),
    ("gpu-processes", gpu(processes=[PYTHON]), "warn", "python 9.0 GB"),
    ("bar1", gpu(bar1_bytes=268435456), "warn", "BAR1 0.3 GB"),
    ("ram", {"memory": {"available_bytes": 1_000_000_000}}, "warn", "1.0 of 66.0"),
    ("wsl", {"system": {"wsl": 1, "release": "4.4.0-19041-Microsoft"}}, "fail", "4.4.0"),
    ("cpu", {"cpu": {"cores": 1}}, "warn", "1 usable"),
    ("cpu-clock", {"cpu": {"driver": "acpi-cpufreq"}}, "warn", "powersave"),
    ("cpu-clock", {"cpu": {"policy": "Power saver", "driver": None}}, "warn", "Power saver"),
    ("cpu-load", {"cpu": {"busy_cores": 30.0}}, "warn", "load 30.0"),
    ("variables", {"variables": {"CUDA_LAUNCH_BLOCKING": "1"}}, "warn", "CUDA_LAUNCH_BLOCKING=1"),
    ("variables", {"variables": {"CUDA_VISIBLE_DEVICES": "0"}}, "pass", "CUDA_VISIBLE"),
    ("disk", {"cache": {"free_bytes": 1_000_000_000}}, "warn", "1.0 GB"),
    ("disk-speed", {"disk_speed": {"read_bytes_per_s": 9e7}}, "warn", "90 MB/s"),
    ("hub", {"hub": {"asked": False}}, "skip", ""),
    ("hub", {"hub": {"problem": "timed out"}}, "skip", ""),
    ("downloads", {"downloads": [{"repo_id": "Qwen/X", "missing_files": 2, "running": False}]},
     "warn", "Qwen/X (2 files begun)"),
    ("downloads", {"downloads": [{"repo_id": "Qwen/X", "missing_files": 2, "running": True}]},
     "pass", "Qwen/X"),
    ("engines", {"engines": [{"pid": 9, "what": "worker", "orphaned": True}]}, "warn", "pid 9"),
    ("engines", {"engines": [{"pid": 9, "what": "worker", "orphaned": False}]}, "pass", "pid 9"),
    ("engines", {"engines": None}, "skip", ""),
    ("engines", {"engines": []}, "pass", "none found"),
    ("engine-run", probe("engine", value={"gpu_busy_ms": 2.0}), "warn", "2.00 ms of a token"),
    ("engine-run", probe("engine", value={"tok_per_s": [50.0, 51.0]}), "warn", "50.5 tok/s"),
    ("flash-attn-runs", {"packages": {"flash-attn": "2.8.4"},
     "probes": {"flash-attn": {"outcome": "ok", "seconds": 1, "value": FLASH}}}, "pass", "30 us"),
    ("flash-attn-runs", {"packages": {"flash-attn": "2.8.4"},
     "probes": {"flash-attn": {"outcome": "ok", "seconds": 1,
                               "value": {**FLASH, "max_difference": 3.0}}}}, "fail", "3.000"),
    ("flash-attn-runs", {"packages": {"flash-attn": "2.8.4"},
     "probes": {"flash-attn": {"outcome": "failed", "seconds": 1, "kind": "ImportError",
                               "error": "undefined symbol"}}}, "fail", "undefined symbol"),
    ("flash-attn-runs", {"packages": {"flash-attn": "2.8.4"}, "hub_config": {"dtype": "float32"},
     "probes": {"flash-attn": {"outcome": "ok", "seconds": 1, "value": FLASH}}}, "warn", "30 us"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("check", "change", "status", "evidence"),
    CASES,
    ids=[f"{c[0]}-{i}" for i, c in enumerate(CASES)],
)
def test_one_fault(check, change, status, evidence):
    finding = run_check(BY_ID[check], machine("healthy-5090", **change))
    assert finding.status.value == status, finding
    assert evidence in finding.evidence
    if status in ("warn", "fail"):
        assert finding.fix


@pytest.mark.parametrize(
    ("kind", "said", "what", "fix"),
    [
        ("ImportError", "x.so: undefined symbol: _ZN3c10", "another torch", "FORCE_BUILD=TRUE"),
        ("AcceleratorError", "CUDA error: no kernel image is available for execution on the device",
         "not built for this GPU", "FLASH_ATTN_CUDA_ARCHS=120"),
        ("RuntimeError", "FlashAttention forward only supports head dimension at most 128",
         "heads above 128", "--upgrade flash-attn"),
        ("RuntimeError", "FlashAttention only support fp16 and bf16 data type", "float16 alone",
         "--dtype bfloat16"),
        ("RuntimeError", "something else", "cannot run on this GPU", "FORCE_BUILD=TRUE"),
        ("OSError", "something else", "does not load", "FORCE_BUILD=TRUE"),
    ],
)  # fmt: skip
def test_flash_attn_says_what_is_wrong_with_it(kind, said, what, fix):
    answer = {"outcome": "failed", "seconds": 1, "kind": kind, "error": said}
    change = {"packages": {"flash-attn": "2.8.4"}, "probes": {"flash-attn": answer}}
    finding = run_check(BY_ID["flash-attn-runs"], machine("healthy-5090", **change))
    assert what in finding.what and said in finding.evidence
    assert fix in finding.fix and "--attention sdpa" in finding.fix


def test_every_check_says_why_it_is_made_and_is_tried_with_a_fault():
    assert not [check.id for check in CHECKS if not check.why.endswith(".")]
    on_machines = {"driver-model", "hags", "memory-spill", "arch-list", "cuda-device", "known-bad",
                   "torch-build", "flash-attn"}  # fmt: skip
    assert {check.id for check in CHECKS} - {case[0] for case in CASES} <= on_machines


def test_a_gpu_that_torch_cannot_see():
    hidden = machine(
        "healthy-5090",
        variables={"CUDA_VISIBLE_DEVICES": ""},
        probes={"torch": {"value": {"devices": []}}},
    )
    found = run_check(BY_ID["cuda-device"], hidden)
    assert (found.status, found.fix) == (Status.FAIL, "unset CUDA_VISIBLE_DEVICES")


def test_a_workstation_card_may_leave_wddm():
    card = {**GPU, "name": "NVIDIA RTX PRO 6000 Blackwell", "driver_model": "WDDM"}
    box = machine("5090-windows-wddm", driver={"gpus": [card]})
    assert run_check(BY_ID["driver-model"], box).status is Status.WARN


def test_where_torch_does_not_load_everything_else_is_said_all_the_same():
    box = machine("healthy-5090", **ended("torch", "failed", "OSError", "libcudart.so.13"))
    found = {check.id: run_check(check, box) for check in CHECKS}
    assert found["arch-list"].what == "cannot be checked: torch does not load"
    assert found["driver"].status is Status.PASS
    assert found["ram"].status is Status.PASS
    assert found["pcie"].status is Status.SKIP


@pytest.mark.parametrize("error", [KeyError("gone\nand a second line"), Unreadable("it is gone")])
def test_a_check_that_raises_is_a_skip_with_the_reason(error):
    def broken(machine):
        raise error

    finding = run_check(Check("x", "x", Level.QUICK, broken), machine("healthy-5090"))
    assert finding.status is Status.SKIP
    assert "gone" in finding.what
    assert "\n" not in finding.what


def test_a_section_that_cannot_be_read_is_a_skip():
    box = machine("healthy-5090", memory={"unreadable": "OSError: no /proc"})
    assert run_check(BY_ID["ram"], box).what == "cannot be checked: OSError: no /proc"


def test_ids_are_unique_and_no_group_is_called_like_a_check():
    ids = [check.id for check in CHECKS]
    assert len(set(ids)) == len(ids)
    assert not {check.group for check in CHECKS} & set(ids)


def test_selection():
    assert [check.id for check in select(Level.QUICK, only=["host"])][:2] == ["wsl", "hags"]
    mixed = select(Level.QUICK, only=["storage", "python"], skip=["disk", "engines"])
    assert [check.id for check in mixed] == ["python", "downloads"]
    assert [check.id for check in select(Level.QUICK, only=["engine-run"])] == ["engine-run"]


@pytest.mark.parametrize(
    "names", [{"only": ["gpus"]}, {"skip": ["x"]}, {"only": ["cpu"], "skip": ["host"]}]
)
def test_wrong_selections_are_usage_errors(names):
    with pytest.raises(UsageError) as caught:
        select(Level.QUICK, **names)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("2.9.1+cu128", (2, 9, 1)),
        ("581.15", (581, 15)),
        ("2.8.3.post1", (2, 8, 3, 1)),
        ("main", ()),
    ],
)
def test_numbers(text, parsed):
    assert numbers(text) == parsed


@pytest.mark.parametrize(
    ("version", "condition", "holds"),
    [
        ("2.9.1", ">=2.9,<2.10", True),
        ("2.10.0", ">=2.9,<2.10", False),
        ("2.9.0+cu128", "==2.9.0", True),
        ("2.9.1", "==2.9.0", False),
        ("2.8.3", "<2.8.3.post1", True),
        ("2.8.3.post1", "<2.8.3.post1", False),
        ("12.0", ">=12.0,<13.0", True),
    ],
)
def test_conditions(version, condition, holds):
    assert meets(version, condition) is holds


def test_a_condition_without_a_sign_is_an_error():
    with pytest.raises(ValueError, match="not a condition"):
        meets("2.9", "2.9")


def test_cudnn_versions():
    assert cudnn_text(91501) == "9.15.1"


def finding(status, number):
    check = Check(f"check-{number}", "group", Level.QUICK, lambda machine: None)
    return check, Finding(status, f"reason {number}")


@pytest.mark.parametrize("skips", [2, 12])
def test_many_skipped_checks_are_one_line(skips, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    results = [finding(Status.PASS, 0), *(finding(Status.SKIP, n) for n in range(1, skips + 1))]
    Output().show(report.text(results, Advice("m", ())))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("SKIP")]
    assert len(lines) == (1 if skips > 3 else skips)
    assert all(f"check-{n}" in "".join(lines) for n in range(1, skips + 1))
    assert ("reason 1" in lines[0]) is (skips <= 3)


def test_without_a_gpu_nothing_serves_kernels():
    found = run_check(BY_ID["triton"], machine("no-gpu", packages={"triton": "3.6"}))
    assert found.status is Status.SKIP
    assert "of no use without a CUDA device" in found.what


def test_harmless_variables_are_called_so():
    found = run_check(BY_ID["variables"], machine("healthy-5090", variables={"TORCH_LOGS": "x"}))
    assert (found.status, found.evidence) == (Status.PASS, "set, and harmless: TORCH_LOGS=x")
