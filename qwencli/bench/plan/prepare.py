"""From what the user asked for to a plan: reads the matrix, the models and this machine."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from qwencli.bench.plan.campaign_plan import Plan, Settings
from qwencli.bench.plan.environment import read_device_facts
from qwencli.bench.plan.matrix import AXES, DEFAULT_AXES, expand, override, without_modes
from qwencli.bench.plan.matrix_file import (
    EXAMPLE_IMAGE,
    ORIGIN,
    find_image,
    load_matrix,
    names,
    prompt_or_default,
)
from qwencli.bench.plan.stopping import RepetitionOptions, stop_rule
from qwencli.config import (
    DType,
    EngineName,
    LoadFormat,
    ModelSource,
    ModelSpec,
    SamplingOptions,
    SeqLen,
    check_sampling,
)
from qwencli.engine.machine.device import DeviceFacts
from qwencli.errors import ModelFileError, UsageError


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
    repetition: RepetitionOptions
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
    endpoints: tuple[str, ...] = ()


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
    engines = matrix.axes.get("engine", DEFAULT_AXES["engine"])
    if EngineName.REMOTE in engines and not request.endpoints:
        raise UsageError(
            "--engine remote needs a server", "give --endpoint http://127.0.0.1:8000/v1"
        )
    named = resolve_model
    if set(engines) == {EngineName.REMOTE}:
        from qwencli.engine.remote import remote_model

        if matrix.name in names():  # a file that names modes is told of each that it cannot have
            matrix = without_modes(matrix, request.axes)
        named = functools.partial(remote_model, request.endpoints)
    models = {name: named(name) for name in matrix.axes.get("model", ())}
    facts = read_device_facts(request.device)
    if set(engines) != {EngineName.REMOTE}:
        named = functools.partial(resolve_model, free_bytes=_usable_bytes(facts))
    default_model = None if "model" in matrix.axes else named(None)
    load_format, quality_samples, notice = request.load_format, request.quality_samples, None
    if default_model and (worth := _worth_measuring(default_model, facts, load_format)):
        notice = (
            f"no model is downloaded: measuring {worth.name}, recommended for this card, with "
            f"random weights of its true shape (not {default_model.name}, which is too small to "
            "tell anything of a GPU); --model names another"
        )
        default_model, load_format, quality_samples = worth, LoadFormat.DUMMY, 0
    if default_model:
        models[default_model.name] = default_model
    traits, unusable = _checked(models, load_format)
    cells = [
        replace(cell, skip_reason=cell.skip_reason or unusable.get(cell.model))
        for cell in expand(matrix, default_model.name if default_model else "", facts, traits)
    ]
    settings = Settings(
        stop=stop,
        max_new_tokens=request.max_new_tokens or matrix.max_new_tokens,
        prompt=prompt_or_default(request.prompt, matrix.prompt),
        images=images or matrix.images or (EXAMPLE_IMAGE,),
        seed=request.seed,
        device=facts.device,
        dtype=request.dtype,
        load_format=load_format,
        max_seq_len=request.max_seq_len,
        quality_samples=quality_samples,
        threads=request.threads,
        endpoints=request.endpoints,
    )
    as_origin = matrix.name == ORIGIN
    plan = Plan(tuple(cells), settings, models, notice=notice, as_origin=as_origin)
    return plan, facts


def _worth_measuring(
    default: ModelSpec, facts: DeviceFacts, load_format: LoadFormat
) -> ModelSpec | None:
    """The model to measure on a GPU instead of the bundled one that nobody named; None elsewhere.

    What speed a few million parameters have says nothing of a GPU.
    """
    usable = _usable_bytes(facts)
    bundled = default.source is ModelSource.BUNDLED
    if usable is None or not bundled or load_format is not LoadFormat.AUTO:
        return None
    from qwencli.models.resolve import names_a_model, recommended_model

    return None if names_a_model() else recommended_model(usable)


def _usable_bytes(facts: DeviceFacts) -> int | None:
    """What a model that nobody named may take of a GPU; None elsewhere."""
    total = facts.total_memory_bytes
    if facts.kind != "cuda" or total is None:
        return None
    from qwencli.models.resolve import usable_on_card

    return usable_on_card(total)


def _checked(
    models: Mapping[str, ModelSpec], load_format: LoadFormat
) -> tuple[dict[str, Mapping[str, bool]], dict[str, str]]:
    """What `capabilities` asks of models, and why others cannot be loaded, by name: found here
    once, not by every cell's process.

    Raises:
        ModelFileError: none can.
    """
    from qwencli.models.resolve import check_model

    traits: dict[str, Mapping[str, bool]] = {}
    found: dict[str, ModelFileError] = {}
    for name, spec in models.items():
        if spec.source is ModelSource.REMOTE:
            continue
        try:
            traits[name] = check_model(spec, load_format)
        except ModelFileError as error:
            found[name] = error
    if found and len(found) == len(models):
        raise next(iter(found.values()))
    return traits, {name: f"{error.message} ({error.hint})" for name, error in found.items()}
