"""Every probe of `diagnose` on a real GPU: it answers, and its figures can be true."""

from __future__ import annotations

import json

import pytest

from qwencli.config import EngineConfig, LoadFormat
from qwencli.diagnostics.check_table import run_check, select
from qwencli.diagnostics.finding import Level, Status
from qwencli.diagnostics.live import LiveMachine
from qwencli.diagnostics.record import RecordedMachine, record
from qwencli.engine.instruments.probes.answers import EngineWork
from qwencli.models.resolve import resolve_model

MODEL = resolve_model("qwen3-vl-4b")


@pytest.fixture(scope="module")
def machine():
    def engine(box):
        config = EngineConfig(
            MODEL, device=box.device, load_format=LoadFormat.DUMMY, offline=True, max_seq_len=2048
        )
        return EngineWork(config, 32, 2)

    with LiveMachine(MODEL, engine) as box:
        yield box


def value(machine, name):
    answer = machine.probe(name)
    assert answer.outcome == "ok", answer
    return answer.value


def test_bandwidth_is_below_the_vendors(machine):
    found, vendor = value(machine, "bandwidth"), machine.gpu.vendor_bytes_per_s
    assert 0.3 * vendor < found.read_bytes_per_s < 1.02 * vendor
    load = machine.under_load("bandwidth")
    assert load.samples > 5
    assert load.sm_clock_mhz >= machine.gpu.now.sm_clock_mhz


def test_a_graph_launches_faster_than_the_host(machine):
    rate = value(machine, "launch-rate")
    assert 0.3 < rate.graph_us < rate.eager_us < rate.round_trip_us


def test_the_link(machine):
    assert value(machine, "host-link").to_device_bytes_per_s > 1e9
    assert machine.under_load("host-link").pcie_width


def test_attention_kernels_have_names(machine):
    runs = value(machine, "attention").runs
    chosen = {run.phase: run for run in runs if run.backend == "chosen"}
    assert set(chosen) == {"prefill", "decode", "vision"}
    assert all(run.kernels and run.family for run in chosen.values()), chosen


def test_the_patch_embedding(machine):
    found = value(machine, "patch-embedding")
    assert 0 < found.linear_ms <= found.conv3d_ms
    assert found.kernels


def test_bitsandbytes(machine):
    runs = {run.scheme: run for run in value(machine, "bitsandbytes").runs}
    assert all(run.error is None for run in runs.values()), runs
    assert runs["none"].relative_error < 0.01
    assert runs["bnb-int8"].relative_error < runs["bnb-nf4"].relative_error < 0.2


def test_triton(machine):
    assert value(machine, "triton").compile_and_run_s > 0


def test_the_engine(machine):
    run = value(machine, "engine")
    assert run.cache == "static-graph"
    assert min(run.tok_per_s) > 20
    assert run.kernels_per_token > 36
    # Kernels that wait for each other on the device overlap.
    assert 0 < run.gpu_busy_ms < 2 * run.itl_p50_ms
    assert run.kernels in ("triton", "torch")


def test_a_whole_look_can_be_recorded_and_replayed(machine):
    checks = select(Level.DEEP, skip=["hub"])
    results = {check.id: run_check(check, machine) for check in checks}
    unreadable = [f.what for f in results.values() if f.what.startswith("cannot be checked")]
    assert not unreadable
    assert results["device-works"].status is Status.PASS
    again = RecordedMachine(json.loads(json.dumps(record(machine))))
    assert {check.id: run_check(check, again) for check in checks} == results
