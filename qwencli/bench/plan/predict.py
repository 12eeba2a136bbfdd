"""What a campaign will roughly cost, before anything is loaded: for `--dry-run`.

    token  = bytes a token / read bandwidth + layers x LAUNCHES / launch rate
    run    = new tokens x token
    cell   = processes x (start + load) + (runs + one warm-up a process) x run + checks
    load   = weight bytes / LOAD_BYTES_PER_S        (again before each run with reload)

Bandwidth, launch rate and start are measured here and now. LAUNCHES is a table, so a prediction is
to plan by (within a factor of two), not to quote. Prompts, pictures and compiling are not in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwencli.bench.measure import probe_overhead, quality
from qwencli.bench.plan.campaign_plan import Plan
from qwencli.bench.plan.matrix import BenchCell, cell_label
from qwencli.config import Cache, DType, EngineName, KVDType, LoadMode, ModelSpec, Quantization
from qwencli.errors import ModelFileError
from qwencli.models.memory import (
    CPU_VALUE_BYTES,
    DEFAULT_IMAGE_TOKENS,
    GPU_VALUE_BYTES,
    decode_bytes,
    estimate,
)
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape
from qwencli.output import counted

if TYPE_CHECKING:
    from rich.console import RenderableType


# Launches that a decoder layer costs the host (or, in a graph, the device), Python around them
# included: what the token times of results/2026-11-23-cpu-engines, 2026-11-23-h200-transformers
# and 2026-11-23-h200-native-first-look leave after the reading of the weights.
LAUNCHES: Mapping[EngineName, Mapping[Cache, int]] = {
    EngineName.NATIVE: {
        Cache.DYNAMIC: 90,
        Cache.STATIC: 90,
        Cache.STATIC_COMPILE: 20,
        Cache.STATIC_GRAPH: 8,
    },
    EngineName.TRANSFORMERS: {
        Cache.DYNAMIC: 230,
        Cache.STATIC: 230,
        Cache.STATIC_COMPILE: 30,
    },
}
# The native engine on a CPU, unquantized: its static steps are numpy's calls where torch's are
# counted (16 to 37 and 47 to 78 in seven campaigns under results/ from 2026-11-23 on).
HOST_LAUNCHES = {Cache.STATIC: 24, Cache.DYNAMIC: 60}
# bitsandbytes' layers launch that much more (8.9 tok/s of 8bit beside 28 unquantized on the H200).
_LAUNCH_FACTOR = {Quantization.INT8: 3.0, Quantization.INT4: 1.2}
# A local solid-state disk, or the page cache.
LOAD_BYTES_PER_S = 1e9
# Importing transformers takes a process about this many times what importing torch does.
START_FACTOR = {EngineName.NATIVE: 1.3, EngineName.TRANSFORMERS: 2.5}
# After the runs of a cell: measuring the machine's limits takes so long, whatever the model.
LIMITS_S = 4.0
# A prompt with its template, beside its pictures.
PROMPT_TOKENS = 64
# What engines call the scheme of each mode; modes without an entry have no prediction.
_SCHEMES = {
    (EngineName.TRANSFORMERS, Quantization.NONE): "none",
    (EngineName.TRANSFORMERS, Quantization.INT8): "bnb-int8",
    (EngineName.TRANSFORMERS, Quantization.INT4): "bnb-nf4",
    (EngineName.NATIVE, Quantization.NONE): "none",
    (EngineName.NATIVE, Quantization.INT8): "int8",
    (EngineName.NATIVE, Quantization.FP8): "fp8-e4m3",
    (EngineName.NATIVE, Quantization.INT4): "int4-g128",
}
FORMULA = (
    "predicted: tokens x (bytes a token / read bandwidth + layers x launches / launch rate) + "
    "start + load + checks after the runs; without prompts, pictures and compiling"
)


@dataclass(frozen=True)
class MachineSpeed:
    """This machine, as `python -m qwencli.engine.instruments.machine_speed` measured it.

    Args:
        read_bandwidth: of a buffer beyond any cache; by_size: of smaller ones, ascending.
        start_s: how long that process took to load torch.
    """

    read_bandwidth: float
    launch_rate: float
    start_s: float
    by_size: Sequence[tuple[int, float]] = ()

    def bandwidth(self, read_bytes: float) -> float:
        """Bytes a second of reading so much over and over: that of the smallest buffer measured
        that is no smaller, as what fits into caches is read faster."""
        fitting = (rate for size, rate in self.by_size if size >= read_bytes)
        return next(fitting, self.read_bandwidth)


@dataclass(frozen=True)
class Prediction:
    """What one cell will take; None where the model's shape or the scheme's storage is unknown."""

    tok_per_s: float | None
    seconds: float | None
    memory_bytes: int | None


def predict(plan: Plan, cell: BenchCell, speed: MachineSpeed, *, limits: bool = True) -> Prediction:
    """By the formula above; memory is the model's, by `models.memory`, for one request.

    Args:
        limits: whether the machine's limits, and what the probes cost, are measured after its runs.
    """
    shape = _shape(plan.models[cell.model])
    launches = _launches(plan, cell)
    scheme = _SCHEMES.get((cell.engine, cell.quantization))
    if shape is None or launches is None or scheme is None:
        return Prediction(None, None, None)
    settings = plan.settings
    wide = settings.device == "cpu" and settings.dtype in (DType.AUTO, DType.FLOAT32)
    image_tokens = DEFAULT_IMAGE_TOKENS * len(settings.images) if shape.vision else 0
    context = PROMPT_TOKENS + image_tokens + settings.max_new_tokens
    value_bytes = CPU_VALUE_BYTES if wide else GPU_VALUE_BYTES
    read = decode_bytes(shape, scheme, value_bytes, context)
    assert read is not None, "every scheme of the table is known"
    launched = shape.text.num_layers * launches * _LAUNCH_FACTOR.get(cell.quantization, 1.0)
    token_s = read / speed.bandwidth(read) + launched / speed.launch_rate
    memory = estimate(
        shape,
        cell.quantization,
        engine=cell.engine,
        context_tokens=context,
        image_tokens=image_tokens,
        value_bytes=value_bytes,
    )
    stop = settings.stop
    runs = stop.min_runs + stop.processes
    loads = runs if cell.load_mode is LoadMode.RELOAD else stop.processes
    start_s = stop.processes * speed.start_s * START_FACTOR[cell.engine]
    load_s = loads * memory.weights / LOAD_BYTES_PER_S
    return Prediction(
        tok_per_s=1 / token_s,
        seconds=start_s
        + load_s
        + runs * settings.max_new_tokens * token_s
        + (_limits_s(plan, token_s) if limits else 0.0)
        + _quality_s(plan, cell, token_s),
        memory_bytes=memory.total,
    )


def _limits_s(plan: Plan, token_s: float) -> float:
    """The A/B of the probes, and the machine's limits."""
    probed_s = probe_overhead.RUNS * plan.settings.max_new_tokens * token_s
    return min(probe_overhead.BUDGET_S, probed_s) + LIMITS_S


def _quality_s(plan: Plan, cell: BenchCell, token_s: float) -> float:
    """Whether answers are right."""
    settings = plan.settings
    model = plan.models[cell.model]
    if not settings.quality_samples or not quality.captions_fit(model, settings.load_format):
        return 0.0
    answers = settings.quality_samples * quality.MAX_NEW_TOKENS / 2
    return min(quality.MOST_S, answers * token_s)


def predicted_seconds(plan: Plan, speed: MachineSpeed, *, limits: bool = True) -> dict[str, float]:
    """By cell_id, of the cells that can run here, all their processes together; one of an unknown
    shape takes no less than its start. `limits` as in `predict`."""
    return {
        cell.cell_id: predict(plan, cell, speed, limits=limits).seconds
        or plan.settings.stop.processes * speed.start_s * START_FACTOR.get(cell.engine, 1.0)
        for cell in plan.cells
        if not cell.skip_reason
    }


def _launches(plan: Plan, cell: BenchCell) -> int | None:
    if cell.engine is EngineName.NATIVE and plan.settings.device == "cpu":
        plain = cell.quantization is Quantization.NONE and cell.kv_dtype is KVDType.AUTO
        if plain and cell.cache in HOST_LAUNCHES:
            return HOST_LAUNCHES[cell.cache]
    return LAUNCHES.get(cell.engine, {}).get(cell.cache)


def _shape(model: ModelSpec) -> ModelShape | None:
    config: Mapping[str, Any] | None = model.hub_config
    if config is None and model.path is not None:
        from qwencli.models.folder import read_config

        config = read_config(model.path)
    try:
        return None if config is None else read_shape(config, model.name)
    except ModelFileError:  # the cell itself will say what is wrong with it
        return None


def planned_table(
    cells: Sequence[BenchCell], predictions: Mapping[str, Prediction]
) -> RenderableType:
    """The cells of a plan that can run, in the given order; the others counted by reason.

    Args:
        predictions: by cell_id, of the cells that can run here.
    """
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    runs = [cell for cell in cells if not cell.skip_reason]
    table = Table(
        title=f"{len(runs)} of {counted(len(cells), 'cell')}", box=SIMPLE_HEAD, title_justify="left"
    )
    table.add_column("#", justify="right")
    table.add_column("cell", overflow="fold")
    for name in ("tok/s", "time", "memory"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, cell in enumerate(runs, start=1):
        predicted = predictions[cell.cell_id]
        table.add_row(
            str(number),
            cell_label(cell),
            _speed(predicted.tok_per_s),
            duration(predicted.seconds),
            "-" if predicted.memory_bytes is None else f"{predicted.memory_bytes / 1e9:.1f} GB",
        )
    by_reason: dict[str, list[BenchCell]] = defaultdict(list)
    for cell in cells:
        if cell.skip_reason:
            by_reason[cell.skip_reason].append(cell)
    known = [p.seconds for p in predictions.values() if p.seconds is not None]
    lines = [f"all together about {duration(sum(known))}", FORMULA] if known else []
    lines += [
        f"skipped: {reason} - "
        + (cell_label(skipped[0]) if len(skipped) == 1 else counted(len(skipped), "cell"))
        for reason, skipped in by_reason.items()
    ]
    return Group(table, *(Text(line, style="dim") for line in lines))


def _speed(tok_per_s: float | None) -> str:
    """Three figures, of large numbers all before the point."""
    if tok_per_s is None:
        return "-"
    return format(tok_per_s, ".0f" if tok_per_s >= 100 else ".3g")


def duration(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02} min"
    return f"{minutes} min {rest:02} s" if minutes else f"{rest} s"
