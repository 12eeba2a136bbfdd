from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from qwencli.bench.measure.nvml_sampler import (
    CardLimits,
    OtherPrograms,
    read_sample,
    throttle_names,
)
from qwencli.bench.measure.telemetry import Telemetry, run_columns
from qwencli.bench.storage import columns
from qwencli.engine.machine.child_process import python_command

FAKE_SAMPLER = """
import json, time
while True:
    print(json.dumps({"t_s": time.perf_counter(), "gpu_index": 0, "sm_clock_mhz": 990}), flush=True)
    time.sleep(0.01)
"""


def sample(**values):
    names = ("sm_clock_mhz", "mem_clock_mhz", "power_w", "temperature_c", "throttle_reasons")
    return {**dict.fromkeys(names), **values}


def soon_after_a_sample(telemetry):
    """The time, when a sample of after the call has arrived."""
    called_s = time.perf_counter()
    with telemetry._arrived:
        arrives = lambda: telemetry._samples and telemetry._samples[-1]["t_s"] > called_s  # noqa: E731
        assert telemetry._arrived.wait_for(arrives, timeout=60)
    return time.perf_counter()


def test_samples_are_joined_by_the_clock_both_processes_share():
    with Telemetry([sys.executable, "-c", FAKE_SAMPLER]) as telemetry:
        start = soon_after_a_sample(telemetry)
        end = soon_after_a_sample(telemetry)
        before, within = telemetry.take(start, end)
        assert before is not None
        assert before["t_s"] < start
        assert 1 <= len(within) <= 1 + (end - start) / 0.01
        assert all(start <= one["t_s"] <= end for one in within)
        # A run that begins at once finds the sample that the one before it ended with.
        assert telemetry.take(end, end) == (within[-1], [])


def test_no_nvml_is_said_once_and_leaves_empty_columns():
    script = 'print(\'{"unavailable": "NVML: no library"}\')'
    with Telemetry([sys.executable, "-c", script]) as telemetry:
        assert telemetry.take(0.0, time.perf_counter()) == (None, [])
        assert telemetry.unavailable == "NVML: no library"
    assert set(run_columns(None, []).values()) == {None}


FAKE_NVML = """
class NVMLError(Exception): ...
NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0
def nvmlInit(): ...
def nvmlShutdown(): ...
def nvmlDeviceGetHandleByUUID(uuid): return uuid
def nvmlDeviceGetIndex(handle): return {"GPU-b": 1}[handle]
def nvmlDeviceGetClockInfo(handle, kind): return 1000 * kind
def nvmlDeviceGetMaxClockInfo(handle, kind): return 1980 * kind
def nvmlDeviceGetEnforcedPowerLimit(handle): return 420_000
def nvmlDeviceGetPowerManagementDefaultLimit(handle): return 700_000
def __getattr__(name):
    def refuse(*_): raise NVMLError("not supported")
    return refuse
"""


@pytest.fixture
def sampler(tmp_path):
    """The sampler process on a fake NVML."""
    (tmp_path / "pynvml.py").write_text(FAKE_NVML, encoding="utf-8")
    root = str(Path(__file__).parents[3])
    process = subprocess.Popen(
        [sys.executable, "-m", "qwencli.bench.measure.nvml_sampler", "0.02", "GPU-b"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), root])},
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, encoding="utf-8",
    )  # fmt: skip
    with process:
        yield process
        process.kill()


def test_the_sampler_process_reads_one_gpu_and_ends_with_its_parent(sampler):
    first, second = (json.loads(sampler.stdout.readline()) for _ in range(2))
    sampler.stdin.close()
    assert sampler.wait(timeout=20) == 3
    assert (first["gpu_index"], first["sm_clock_mhz"], first["mem_clock_mhz"]) == (1, 1000, 2000)
    assert first["power_w"] is None
    assert (first["max_sm_clock_mhz"], first["power_limit_percent"]) == (1980, 60.0)
    assert second["t_s"] - first["t_s"] >= 0.019


def test_the_sampler_can_be_silenced_for_a_while(sampler):
    times = [json.loads(sampler.stdout.readline())["t_s"]]
    for word, pause_s in (("-", 0.5), ("+", 0.0)):
        sampler.stdin.write(word)
        sampler.stdin.flush()
        time.sleep(pause_s)
    while times[-1] - times[0] < 0.5:
        times.append(json.loads(sampler.stdout.readline())["t_s"])
    assert max(b - a for a, b in itertools.pairwise(times)) > 0.25


def test_what_other_programs_compute_is_all_but_the_busiest():
    class NVMLError(Exception):
        def __init__(self, value):
            self.value = value

    answers = iter(
        [
            [SimpleNamespace(timeStamp=10, pid=1, smUtil=3)],
            [
                SimpleNamespace(timeStamp=20, pid=1, smUtil=60),
                SimpleNamespace(timeStamp=21, pid=2, smUtil=35),
            ],
            NVMLError(6),
            NVMLError(6),
            NVMLError(3),
        ]
    )

    def ask(handle, since):
        answer = next(answers)
        if isinstance(answer, NVMLError):
            raise answer
        return answer

    nvml = SimpleNamespace(NVMLError=NVMLError, nvmlDeviceGetProcessUtilization=ask)
    others = OtherPrograms(nvml)
    assert [others.percent(None, at) for at in (0.0, 1.0, 1.5, 9.0, 9.1)] == [0, 35, 35, 0, None]


def test_limits_of_a_card_are_read_once_a_second_and_none_where_it_is_silent():
    class NVMLError(Exception): ...

    def silent(*_):
        raise NVMLError

    asked = []
    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        nvmlDeviceGetMaxClockInfo=lambda handle, kind: asked.append(kind) or 1980,
        nvmlDeviceGetPowerManagementDefaultLimit=silent,
    )
    limits = CardLimits(nvml)
    for at in (5.0, 5.5, 5.9, 6.1):
        found = limits.read(None, at)
        assert found == {"max_sm_clock_mhz": 1980, "power_limit_percent": None}
    assert len(asked) == 2


def test_a_sampler_that_breaks_is_said():
    with Telemetry([sys.executable, "-c", "raise SystemExit(1)"]) as telemetry:
        assert telemetry.take(0.0, time.perf_counter()) == (None, [])
        assert telemetry.unavailable == "the sampler process ended by itself"


def test_no_gpu_starts_no_process():
    with Telemetry(None) as telemetry:
        assert telemetry.take(0.0, 1.0) == (None, [])


def test_run_columns():
    within = [
        sample(sm_clock_mhz=1000, power_w=100.0, temperature_c=60, throttle_reasons="none"),
        sample(
            sm_clock_mhz=3000, power_w=300.0, temperature_c=64, throttle_reasons="sw_power_cap|idle"
        ),
    ]
    row = run_columns(sample(sm_clock_mhz=390), within)
    assert row == {
        "sm_clock_mhz_before": 390,
        "sm_clock_mhz_mean": 2000,
        "sm_clock_mhz_min": 1000,
        "mem_clock_mhz_mean": None,
        "power_w_mean": 200.0,
        "temperature_c_max": 64,
        "throttle_reasons": "idle|sw_power_cap",
    }
    assert set(row) <= set(columns.RUNS)
    assert run_columns(None, within[:1])["throttle_reasons"] == "none"


@pytest.mark.parametrize(
    ("bits", "names"), [(0, "none"), (0x4, "sw_power_cap"), (0x48, "hw_slowdown|hw_thermal")]
)
def test_throttle_bits(bits, names):
    assert throttle_names(bits) == names


def test_a_sensor_the_device_does_not_have_is_none():
    class NVMLError(Exception):
        pass

    def refuse(*_):
        raise NVMLError

    names = [
        "ClockInfo",
        "PerformanceState",
        "PowerUsage",
        "Temperature",
        "UtilizationRates",
        "MemoryInfo",
        "CurrentClocksThrottleReasons",
        "CurrPcieLinkGeneration",
        "CurrPcieLinkWidth",
        "ComputeRunningProcesses",
        "MaxClockInfo",
        "EnforcedPowerLimit",
        "PowerManagementDefaultLimit",
    ]
    nvml = SimpleNamespace(
        NVMLError=NVMLError, NVML_CLOCK_SM=1, NVML_CLOCK_MEM=2, NVML_TEMPERATURE_GPU=0,
        **{f"nvmlDeviceGet{name}": refuse for name in names},
    )  # fmt: skip
    nvml.nvmlDeviceGetPowerUsage = lambda handle: 123_400
    reading = read_sample(nvml, None, 2, OtherPrograms(nvml), CardLimits(nvml))
    assert reading["power_w"] == pytest.approx(123.4)
    assert reading["gpu_index"] == 2
    assert {key for key, value in reading.items() if value is None} == set(reading) - {
        "t_s", "gpu_index", "power_w",
    }  # fmt: skip
    assert {"cell_id", "run", *reading} == set(columns.GPU)


def test_commands_use_this_interpreter():
    command = python_command("some.module", "x")
    assert command[0] == sys.executable
    assert command[-3:] == ["-m", "some.module", "x"]
