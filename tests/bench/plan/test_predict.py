from __future__ import annotations

import dataclasses

import pytest

from qwencli.bench.measure import probe_overhead
from qwencli.bench.plan.campaign_plan import Plan, Settings
from qwencli.bench.plan.environment import read_machine_speed
from qwencli.bench.plan.matrix import Matrix, expand
from qwencli.bench.plan.predict import LIMITS_S, MachineSpeed, predict, predicted_seconds
from qwencli.bench.plan.stopping import StopRule
from qwencli.config import ModelSource, ModelSpec
from qwencli.models.builtin import bundled_folder, hub_config

H200 = MachineSpeed(read_bandwidth=4.3e12, launch_rate=2.0e5, start_s=5.0)


@pytest.fixture
def predicted(gpu):
    """The prediction for the one cell of these axes, 5 runs of 100 tokens on a GPU."""

    def of(stop=None, model="qwen3-vl-4b", **axes):
        matrix = Matrix("m", {axis: (value,) for axis, value in axes.items()})
        (cell,) = expand(matrix, model, gpu)
        settings = Settings(stop or StopRule(5, 5), 100, "Hi", (), 0, gpu.device)
        config = hub_config(model) if model.startswith("qwen") else None
        plan = Plan(
            (cell,), settings, {model: ModelSpec(model, ModelSource.BUILTIN, model, None, config)}
        )
        return predict(plan, cell, H200)

    return of


@pytest.mark.parametrize(
    ("axes", "measured"),
    [
        # Medians of results/2026-11-23-h200-transformers.
        ({"engine": "transformers"}, 25.8),
        ({"engine": "transformers", "cache": "static-compile"}, 148.8),
        ({"engine": "transformers", "quantization": "8bit"}, 9.0),
        ({"engine": "transformers", "quantization": "4bit"}, 24.7),
    ],
)
def test_predictions_are_within_a_factor_of_two_of_what_was_measured(predicted, axes, measured):
    assert measured / 2 < predicted(**axes).tok_per_s < measured * 2


# Of results/2026-11-25-cpu-engines-before and 2026-11-23-cpu-engines-2: launches, and the bandwidth
# of what a token of the bundled model reads, which a cache holds; memory itself is slower.
EPYC = MachineSpeed(12e9, 1 / 1.60e-6, 3.0, ((1 << 22, 90e9), (1 << 25, 87e9), (1 << 28, 12e9)))
OLDER = MachineSpeed(9e9, 1 / 2.23e-6, 5.0, ((1 << 22, 60e9), (1 << 25, 52e9), (1 << 28, 9e9)))


@pytest.mark.parametrize(
    ("speed", "axes", "measured"),
    [
        (EPYC, {"engine": "native", "cache": "static"}, 3737),
        (EPYC, {"engine": "native", "cache": "dynamic"}, 2326),
        (EPYC, {"engine": "transformers", "cache": "dynamic"}, 869),
        (OLDER, {"engine": "native", "cache": "static"}, 1903),
        (OLDER, {"engine": "native", "cache": "dynamic"}, 1256),
        (OLDER, {"engine": "transformers", "cache": "static"}, 446),
    ],
)
def test_a_model_that_a_cache_holds_is_predicted_within_a_factor_of_two(cpu, speed, axes, measured):
    (cell,) = expand(Matrix("m", {axis: (value,) for axis, value in axes.items()}), "scenes", cpu)
    settings = Settings(StopRule(5, 5), 128, "Hi", (), 0, "cpu")
    model = ModelSpec("scenes", ModelSource.BUNDLED, None, bundled_folder(), None)
    found = predict(Plan((cell,), settings, {"scenes": model}), cell, speed)
    assert measured / 2 < found.tok_per_s < measured * 2


def test_the_bandwidth_is_that_of_what_a_token_reads():
    assert EPYC.bandwidth(1 << 20) == EPYC.bandwidth(1 << 22) == 90e9
    assert EPYC.bandwidth((1 << 22) + 1) == 87e9
    assert EPYC.bandwidth(1 << 30) == 12e9
    assert H200.bandwidth(1 << 20) == 4.3e12


def test_time_is_starts_loads_and_runs(predicted):
    once = predicted(engine="native", cache="static-graph")
    run_s = 100 / once.tok_per_s
    load_s = 8.88
    checks_s = LIMITS_S + probe_overhead.RUNS * run_s
    assert once.seconds == pytest.approx(5.0 * 1.3 + load_s + 6 * run_s + checks_s, rel=0.01)
    twice = predicted(StopRule(5, 5, processes=2), engine="native", cache="static-graph")
    assert twice.seconds == pytest.approx(2 * (6.5 + load_s) + 7 * run_s + checks_s, rel=0.01)
    again = predicted(engine="native", cache="static-graph", load_mode="reload")
    assert again.seconds == pytest.approx(6.5 + 6 * load_s + 6 * run_s + checks_s, rel=0.01)


def test_what_is_not_measured_after_the_runs_takes_no_time(cpu):
    (cell,) = expand(Matrix("m", {"engine": ("native",), "cache": ("static",)}), "scenes", cpu)
    settings = Settings(StopRule(5, 5), 128, "Hi", (), 0, "cpu")
    model = ModelSpec("scenes", ModelSource.BUNDLED, None, bundled_folder(), None)
    plan = Plan((cell,), settings, {"scenes": model})
    whole, short = (sum(predicted_seconds(plan, EPYC, limits=limits).values()) for limits in (1, 0))
    run_s = 128 / predict(plan, cell, EPYC).tok_per_s
    assert whole - short == pytest.approx(LIMITS_S + probe_overhead.RUNS * run_s)


def test_memory_falls_with_quantization(predicted):
    whole = predicted(engine="transformers").memory_bytes
    assert 9e9 < whole < 11e9
    assert predicted(engine="transformers", quantization="4bit").memory_bytes < whole / 2


def test_what_is_not_known_is_not_predicted(predicted):
    nothing = (None, None, None)
    assert dataclasses.astuple(predicted(model="mine")) == nothing


def test_the_machine_is_measured_in_a_process_of_its_own():
    speed = read_machine_speed("cpu")
    assert speed.read_bandwidth > 1e8
    assert speed.launch_rate > 1e3
    assert speed.start_s > 0.0
