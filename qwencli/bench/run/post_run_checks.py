"""What a worker measures after its runs: the machine's limits, and whether answers are right."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

from qwencli.bench.measure.quality import (
    caption_rows,
    divergence_rows,
    has_captions,
    reference_rows,
)
from qwencli.bench.plan.campaign_plan import WorkerSpec
from qwencli.config import EngineName, ModelSpec
from qwencli.engine.protocol import Engine, drain
from qwencli.messages import GenerationRequest
from qwencli.results import GenerationResult

if TYPE_CHECKING:
    from qwencli.engine.base_engine import BaseEngine

Row = dict[str, Any]
Message = dict[str, Any]
# Given the engine, the spec, the request of the runs and the row of the last one.
PostRunChecks = Callable[
    [Engine, WorkerSpec, GenerationRequest, Mapping[str, Any]], Iterator[Message]
]

# Answers of these lengths are counted; what they differ by are decode steps. Few, because the
# profiler keeps thousands of events a token.
COUNTED_TOKENS = (2, 10)
_VALUE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}


def post_run_checks(
    engine: Engine, spec: WorkerSpec, request: GenerationRequest, last: Mapping[str, Any]
) -> Iterator[Message]:
    """Messages of type "rows": the name of a file of the campaign, and what to add to it.

    Raises:
        Exception: only where the reference is made; what a cell's runs gave stands in any case.
    """
    if spec.purpose == "reference":
        rows = list(reference_rows(_local(engine), spec.config.model.name))
        yield {"type": "rows", "file": "reference", "rows": rows}
        return
    if spec.config.engine is EngineName.REMOTE:
        return  # what computes is elsewhere, and no logits come from there
    if spec.roofline:
        yield _rows("roofline", lambda: [roofline_row(engine, spec, request, last)])
    if spec.quality_samples and has_captions(engine):
        yield _rows("quality", lambda: list(caption_rows(engine, spec.quality_samples)))
    if spec.reference is not None:
        file, name = spec.reference, spec.config.model.name
        yield _rows("quality", lambda: list(divergence_rows(_local(engine), file, name)))


def _local(engine: Engine) -> BaseEngine:
    """Logits are to be had from engines that hold the model in this process."""
    from qwencli.engine.base_engine import BaseEngine

    assert isinstance(engine, BaseEngine), "rules.py lets no other engine run"
    return engine


def _rows(file: str, measure: Callable[[], list[Row]]) -> Message:
    try:
        rows = measure()
    except Exception as error:  # noqa: BLE001  the cell's runs are measured and stand
        rows = [{"reason": f"{type(error).__name__}: {error}"[:300]}]
    return {"type": "rows", "file": file, "rows": rows}


def roofline_row(
    engine: Engine, spec: WorkerSpec, request: GenerationRequest, last: Mapping[str, Any]
) -> Row:
    """One row of roofline.csv."""
    from qwencli.engine.instruments.device_events import device_work
    from qwencli.engine.instruments.timing import launch_times, read_bandwidth
    from qwencli.models.memory import decode_bytes
    from qwencli.models.shape_reader import read_shape

    ran = engine.effective
    context = last["num_prompt_tokens"] + last["num_new_tokens"] / 2
    shape = read_shape(_hub_config(spec.config.model))
    quantization, value_bytes = str(ran.quantization), _VALUE_BYTES[str(ran.dtype)]
    read = decode_bytes(shape, quantization, value_bytes, context, ran.kv_dtype)
    times = launch_times(ran.device)
    few, more = (
        device_work(ran.device, partial(_answer, engine, request, tokens))
        for tokens in COUNTED_TOKENS
    )
    steps = COUNTED_TOKENS[1] - COUNTED_TOKENS[0]
    row: Row = {
        "read_bandwidth_bytes_per_s": read_bandwidth(ran.device, int(read or 1 << 28)),
        "launch_rate_per_s": 1 / min(times.eager),
        "graph_launch_rate_per_s": 1 / min(times.graph) if times.graph else None,
        "bytes_per_token": read,
        "context_tokens": context,
    }
    if few is not None and more is not None:
        row |= {
            "launches_per_token": (more.launches - few.launches) / steps,
            "kernels_per_token": (more.kernels - few.kernels) / steps,
            "gpu_busy_ms_per_token": (more.busy_ms - few.busy_ms) / steps,
        }
    return row


def _answer(engine: Engine, request: GenerationRequest, tokens: int) -> GenerationResult:
    sampling = replace(request.sampling, max_new_tokens=tokens)
    return drain(engine.stream(replace(request, sampling=sampling)))


def _hub_config(model: ModelSpec) -> Mapping[str, Any]:
    if model.hub_config is not None:
        return model.hub_config
    from qwencli.models.folder import read_config
    from qwencli.models.resolve import locate

    return read_config(locate(model, offline=True))
