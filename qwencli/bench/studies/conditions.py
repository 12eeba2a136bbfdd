"""The conditions a run can be made under, as a table: what is done, and when the model is loaded.

`plain` is the engine as it is. Every other condition changes one thing around a run or a load and
undoes it before the next.
"""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from enum import Enum
from functools import partial
from typing import Any

from qwencli.bench.inject import contention
from qwencli.bench.inject.contention import COPYING
from qwencli.config import EngineName
from qwencli.engine.instruments import interventions
from qwencli.engine.machine.device import DeviceFacts
from qwencli.engine.protocol import Engine
from qwencli.messages import GenerationRequest

Need = Callable[[DeviceFacts], str | None]
BLACKWELL = (12, 0)
PLAIN = "plain"
IDLE_S = 5.0


def _cuda(facts: DeviceFacts) -> str | None:
    return None if facts.kind == "cuda" else "needs an NVIDIA GPU"


def _flash_attn(facts: DeviceFacts) -> str | None:
    return facts.flash_attn_blocker


def _affinity(facts: DeviceFacts) -> str | None:
    return None if sys.platform == "linux" else "this system ties no thread to a core"


def _sm_120(facts: DeviceFacts) -> str | None:
    if facts.capability == BLACKWELL:
        return None
    return "the claim is about an RTX 50-series GPU (sm_120)"


def _torch_2_9(facts: DeviceFacts) -> str | None:
    if facts.torch_version.startswith("2.9."):
        return None
    return f"the claim is about torch 2.9 with cuDNN before 9.15, and this is {facts.torch_version}"


def _vllm(facts: DeviceFacts) -> str | None:
    if importlib.util.find_spec("vllm") is None:
        return "vLLM is not installed; benchmarks/side_by_side/vllm_latency.py measures it"
    return "benchmarks/side_by_side/vllm_latency.py measures vLLM into a campaign to compare with"


NEEDS: Mapping[str, Need] = {
    "cuda": _cuda,
    "flash-attn": _flash_attn,
    "affinity": _affinity,
    "sm_120": _sm_120,
    "torch-2.9": _torch_2_9,
    "vllm": _vllm,
}


def blocker(names: Iterable[str], facts: DeviceFacts) -> str | None:
    """The first reason why one of the needs is not met here, or None."""
    return next((reason for name in names if (reason := NEEDS[name](facts))), None)


@dataclass
class ConditionContext:
    """What a condition may look at and add to.

    Args:
        request: what every run is asked.
        observed: name -> what the condition saw in this run; stored with it.
        seen: likewise, kept over all runs of the process.
    """

    engine: Engine
    request: GenerationRequest
    observed: dict[str, Any]
    seen: dict[str, Any]

    @property
    def device(self) -> str:
        return self.engine.effective.device


Around = Callable[[ConditionContext], AbstractContextManager[Any]]
Loading = Callable[[Engine], AbstractContextManager[None]]


class Load(Enum):
    """When the model is loaded for a condition: not for its sake, before each of its runs, or once
    for a stretch of them."""

    KEPT = "kept"
    EACH = "each"
    ONCE = "once"


@dataclass(frozen=True)
class Condition:
    """
    Args:
        around: held around the run.
        loading: held around releasing and loading the model, where `load` asks for that.
        needs: names of `NEEDS`.
        engines: those it can be applied to.
        extra_s: what a run takes longer for its sake, to plan by.
        alters: the load leaves another model, which other conditions must not find.
    """

    around: Around = lambda at: nullcontext()
    loading: Loading = lambda engine: nullcontext()
    load: Load = Load.KEPT
    needs: tuple[str, ...] = ()
    engines: tuple[EngineName, ...] = (EngineName.TRANSFORMERS,)
    extra_s: float = 0.0
    alters: bool = False

    def blocker(self, engine: EngineName) -> str | None:
        return None if engine in self.engines else f"it is not made for the {engine} engine"


_ANY = (EngineName.TRANSFORMERS, EngineName.NATIVE)


def _changed(**changes: Any) -> Around:
    return lambda at: interventions.changed(at.engine, **changes)


def _loaded(**changes: Any) -> Loading:
    return partial(interventions.changed, **changes)


@contextmanager
def _idle(at: ConditionContext) -> Iterator[None]:
    time.sleep(IDLE_S)
    yield


@contextmanager
def _emptied(at: ConditionContext) -> Iterator[None]:
    interventions.empty_cache(at.device)
    yield
    interventions.empty_cache(at.device)


@contextmanager
def _after_matmul(at: ConditionContext) -> Iterator[None]:
    interventions.warm_up_with_matmul(at.device)
    yield


@contextmanager
def _after_answer(at: ConditionContext) -> Iterator[None]:
    interventions.warm_up_with_answer(at.engine, at.request)
    yield


@contextmanager
def _watched_sdpa(at: ConditionContext) -> Iterator[None]:
    with interventions.counted_sdpa_calls(at.engine) as calls:
        yield
    at.observed["sdpa_calls"] = " ".join(f"{name}:{n}" for name, n in sorted(calls.items()))
    at.observed["sdpa_math_percent"] = interventions.math_percent(calls)
    first = at.seen.setdefault("sdpa_backends", set(calls))
    at.observed["sdpa_changed_percent"] = 100.0 * (set(calls) != first)


@contextmanager
def _watched_sdpa_emptied(at: ConditionContext) -> Iterator[None]:
    interventions.empty_cache(at.device)
    with _watched_sdpa(at):
        yield


@contextmanager
def _timed_first_forward(at: ConditionContext) -> Iterator[None]:
    with interventions.timed_first_forward(at.engine) as times:
        yield
    if len(times) == 2:
        at.observed["first_forward_host_s"] = times[1] - times[0]


@contextmanager
def _slow_processor(at: ConditionContext) -> Iterator[None]:
    at.observed["processor_s"] = interventions.slow_processor_s(at.engine, at.request)
    yield


CONDITIONS: Mapping[str, Condition] = {
    PLAIN: Condition(engines=_ANY),
    # Around a run
    "no-kv-cache": Condition(_changed(generate={"use_cache": False, "cache_implementation": None})),
    "no-grad": Condition(_changed(no_grad=True)),
    "python-thread": Condition(lambda at: contention.python_thread(), engines=_ANY),
    "one-core": Condition(lambda at: contention.one_core(), needs=("affinity",), engines=_ANY),
    "shared-core": Condition(
        lambda at: contention.shared_core(), needs=("affinity",), engines=_ANY
    ),
    "memory-neighbours": Condition(
        lambda at: contention.neighbours(COPYING), needs=("cuda",), engines=_ANY, extra_s=0.5
    ),
    "idle": Condition(_idle, engines=_ANY, extra_s=IDLE_S),
    "empty-cache": Condition(_emptied, needs=("cuda",), engines=_ANY),
    "reserved-gap": Condition(
        lambda at: interventions.reserved_gap(at.device), needs=("cuda",), engines=_ANY
    ),
    "fragmented": Condition(
        lambda at: interventions.fragmented(at.device), needs=("cuda",), engines=_ANY
    ),
    "sdpa-math": Condition(lambda at: interventions.sdpa_backend("MATH")),
    "watched-sdpa": Condition(_watched_sdpa, extra_s=1.0),
    "watched-sdpa-emptied": Condition(_watched_sdpa_emptied, extra_s=1.0),
    "linear-patches": Condition(lambda at: interventions.linear_patch_embedding(at.engine)),
    "timed-first-forward": Condition(_timed_first_forward),
    "slow-processor": Condition(_slow_processor),
    # Around a load
    "reload": Condition(load=Load.EACH, engines=_ANY),
    "reload-through-cpu": Condition(
        loading=_loaded(release_through_host=True), load=Load.EACH, needs=("cuda",)
    ),
    "reload-matmul": Condition(_after_matmul, load=Load.EACH, engines=_ANY),
    "reload-answer": Condition(_after_answer, load=Load.EACH, engines=_ANY),
    "load-fp32-host": Condition(loading=_loaded(through_host=True), load=Load.EACH, alters=True),
    "device-map-auto": Condition(
        loading=_loaded(load={"device_map": "auto"}), load=Load.ONCE, alters=True
    ),
    "bnb-threshold": Condition(
        loading=_loaded(quantization={"llm_int8_threshold": 6.0}), load=Load.ONCE, alters=True
    ),
    "bnb-8bit-compute-dtype": Condition(
        loading=_loaded(quantization={"bnb_8bit_compute_dtype": "bfloat16"}),
        load=Load.ONCE,
        alters=True,
    ),
    "bnb-defaults": Condition(
        loading=_loaded(
            quantization={"bnb_4bit_quant_type": "fp4", "bnb_4bit_compute_dtype": "float32"}
        ),
        load=Load.ONCE,
        alters=True,
    ),
}


def why_not(name: str, engine: EngineName, facts: DeviceFacts) -> str | None:
    """Why a condition cannot be applied here, or None."""
    from qwencli.bench.studies.conditions import blocker

    condition = CONDITIONS[name]
    return condition.blocker(engine) or blocker(condition.needs, facts)
