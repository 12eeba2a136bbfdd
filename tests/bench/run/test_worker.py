from __future__ import annotations

import gc
import time
from pathlib import Path
from types import MappingProxyType

import pytest

from qwencli.bench.measure import host_probe as token_probe
from qwencli.bench.measure.cpu_calibration import CpuCalibration
from qwencli.bench.measure.host_probe import HostProbe
from qwencli.bench.plan.campaign_plan import WorkerSpec, dump_spec, load_spec, takes_images
from qwencli.bench.plan.stopping import Progress, StopRule
from qwencli.bench.run import worker
from qwencli.bench.storage import columns
from qwencli.config import (
    Cache,
    DType,
    EngineConfig,
    LoadMode,
    ModelSource,
    ModelSpec,
    Quantization,
)
from qwencli.messages import TextPart
from tests.bench.fake_engine import FakeEngine


def make_spec(model="steady", **changes):
    fields = {
        "config": EngineConfig(ModelSpec(model, ModelSource.LOCAL)),
        "load_mode": LoadMode.KEEP,
        "turn": StopRule(2, 2).turn(1),
        "progress": Progress(),
        "max_new_tokens": 4,
        "prompt": "Say something.",
        "images": (),
    }
    return WorkerSpec(**{**fields, **changes})


def run(work):
    """Messages of a cell run in this process, and the engine that was made for it."""
    engines, messages = [], []

    def make(config):
        engines.append(FakeEngine(config))
        return engines[-1]

    worker.run_cell(work, messages.append, make, lambda *_: iter(()))
    return messages, engines[0]


def test_spec_survives_the_way_to_the_worker():
    model = ModelSpec(
        "m", ModelSource.BUILTIN, "Qwen/m", Path("folder"), MappingProxyType({"a": {"b": [1]}}),
        MappingProxyType({"4bit": 3.5}),
    )  # fmt: skip
    config = EngineConfig(
        model, quantization=Quantization.INT4, cache=Cache.STATIC, dtype=DType.FLOAT16
    )
    sent = make_spec(config=config, images=(Path("a b.png"),), prompt="two\nlines é")
    assert "\n" not in dump_spec(sent)
    assert load_spec(dump_spec(sent)) == sent


def test_runs_are_numbered_and_only_columns_are_sent():
    messages, engine = run(make_spec())
    assert [m["row"]["run"] for m in messages[:-1]] == [0, 1, 2]
    assert messages[-1] == {"type": "end", "status": "ok", "reason": None}
    assert (engine.loads, engine.closes) == (1, 1)
    for message in messages[:-1]:
        assert set(message["row"]) <= set(columns.RUNS)
        assert all(set(token) <= set(columns.TOKENS) for token in message["tokens"])
        assert message["start_s"] < message["tokens"][0]["t_s"] <= message["end_s"]


def test_a_resumed_cell_starts_with_a_warm_up_and_the_missing_run():
    messages, _ = run(
        make_spec(turn=StopRule(4, 4).turn(1), progress=Progress((9.0, 9.5), 1.0, (2,)))
    )
    assert [m["row"]["run"] for m in messages[:-1]] == [0, 3, 4]


def test_reload_closes_and_loads_between_runs():
    messages, engine = run(make_spec(load_mode=LoadMode.RELOAD))
    assert (engine.loads, engine.closes) == (3, 3)
    assert [m["row"]["load_s"] for m in messages[:-1]] == [0.25, 0.25, 0.25]


def test_the_engine_is_closed_after_an_error():
    messages, engine = run(make_spec("oom"))
    assert messages[-1]["status"] == "oom"
    assert engine.closes == 1


def test_the_request_is_greedy_and_of_fixed_length():
    request = worker.build_request(make_spec())
    assert request.ignore_eos
    assert request.sampling.do_sample is False
    assert request.sampling.max_new_tokens == 4
    assert request.messages[0].parts == (TextPart("Say something."),)


def test_unexpected_errors_are_not_hidden():
    with pytest.raises(ZeroDivisionError):
        run(make_spec("broken"))


@pytest.mark.parametrize(
    ("hub_config", "wanted"),
    [(None, True), ({"model_type": "qwen3_vl"}, True), ({"model_type": "qwen3"}, False)],
)
def test_text_models_get_no_image(hub_config, wanted):
    assert takes_images(ModelSpec("m", ModelSource.LOCAL, hub_config=hub_config)) is wanted


def test_the_hosts_pace_is_measured_when_a_run_has_ended(monkeypatch):
    within = []

    def measure():
        within.append(any("HostProbe" in repr(callback) for callback in gc.callbacks))
        return CpuCalibration(4.0, 200.0)

    monkeypatch.setattr(token_probe, "calibrate_cpu", measure)
    messages, _ = run(make_spec())
    assert [m["row"]["pointer_chase_us"] for m in messages[:-1]] == [200.0] * 3
    assert within and not any(within)


def test_host_probe_sees_cpu_time_and_collections():
    with HostProbe() as busy:
        end = time.thread_time() + 0.2
        while time.thread_time() < end:
            pass
        gc.collect()
    with HostProbe() as idle:
        time.sleep(0.5)
    assert busy.row()["gc_pause_ms"] > 0.0
    assert busy.row()["main_thread_cpu_percent"] > 4 * idle.row()["main_thread_cpu_percent"]
    assert set(busy.row()) <= set(columns.RUNS)
    assert not [callback for callback in gc.callbacks if "HostProbe" in repr(callback)]


def test_no_run_may_use_what_an_earlier_one_left():
    assert worker.build_request(make_spec()).bypass_caches
