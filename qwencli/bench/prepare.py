"""From what the user asked for to a plan: reads the matrix, the models and this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qwencli.bench.launch import read_device_facts
from qwencli.bench.matrix import AXES, expand, override
from qwencli.bench.matrix_file import load_matrix
from qwencli.bench.plan import Plan, Settings
from qwencli.bench.repetition import Wanted, stop_rule
from qwencli.bench.work import EXAMPLE_IMAGE, find_image, prompt_or_default
from qwencli.config import DType, LoadFormat, ModelSpec, SamplingOptions, SeqLen, check_sampling
from qwencli.engine.device import DeviceFacts
from qwencli.errors import ModelFileError


@dataclass(frozen=True)
class BenchRequest:
    """A campaign as asked for.

    Args:
        axes: axis -> comma list that replaces the matrix's own; None = not said.
        exclude: each a comma list of AXIS=VALUE, beyond the matrix's own exclusions.
        repetition, max_new_tokens, prompt: None = what the matrix says.
        images: names or files; empty = what the matrix says, or EXAMPLE_IMAGE.
    """

    matrix: str
    axes: Mapping[str, str | None]
    exclude: tuple[str, ...]
    repetition: Wanted
    max_new_tokens: int | None
    prompt: str | None
    images: tuple[str, ...]
    seed: int
    device: str
    dtype: DType
    load_format: LoadFormat
    max_seq_len: SeqLen | None
    quality_samples: int
    threads: int | None = None


def prepare(request: BenchRequest) -> tuple[Plan, DeviceFacts]:
    """Resolve everything that can be wrong before any model is loaded.

    Raises:
        UsageError, BenchError: the matrix, an axis or an option is wrong.
        InputError: an image is not there.
        ModelError: a model of the matrix is unknown, or none can be loaded by any engine.
        DeviceError: the device is not there.
    """
    from qwencli.models.resolve import resolve_model

    assert request.axes.keys() <= AXES.keys()
    check_sampling(SamplingOptions(max_new_tokens=request.max_new_tokens))
    images = tuple(find_image(image, Path.cwd()) for image in request.images)
    matrix = override(load_matrix(request.matrix), request.axes, request.exclude)
    stop = stop_rule(request.repetition.over(matrix.repetition))
    default_model = None if "model" in matrix.axes else resolve_model(None)
    models = {name: resolve_model(name) for name in matrix.axes.get("model", ())}
    if default_model:
        models[default_model.name] = default_model
    unusable = _unusable(models, request.load_format)
    facts = read_device_facts(request.device)
    cells = [
        replace(cell, skip_reason=cell.skip_reason or unusable.get(cell.model))
        for cell in expand(matrix, default_model.name if default_model else "", facts)
    ]
    settings = Settings(
        stop=stop,
        max_new_tokens=request.max_new_tokens or matrix.max_new_tokens,
        prompt=prompt_or_default(request.prompt, matrix.prompt),
        images=images or matrix.images or (EXAMPLE_IMAGE,),
        seed=request.seed,
        device=facts.device,
        dtype=request.dtype,
        load_format=request.load_format,
        max_seq_len=request.max_seq_len,
        quality_samples=request.quality_samples,
        threads=request.threads,
    )
    return Plan(cells=tuple(cells), settings=settings, models=models), facts


def _unusable(models: Mapping[str, ModelSpec], load_format: LoadFormat) -> dict[str, str]:
    """Why models cannot be loaded, by name: found here once, not by every cell's process.

    Raises:
        ModelFileError: none can.
    """
    from qwencli.models.locate import check_model

    found: dict[str, ModelFileError] = {}
    for name, spec in models.items():
        try:
            check_model(spec, load_format)
        except ModelFileError as error:
            found[name] = error
    if found and len(found) == len(models):
        raise next(iter(found.values()))
    return {name: f"{error.message} ({error.hint})" for name, error in found.items()}
