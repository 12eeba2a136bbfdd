"""From what the user asked for to a plan: reads the matrix, the models and this machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from qwencli.bench.launch import read_device_facts
from qwencli.bench.matrix import AXES, expand, override
from qwencli.bench.matrix_file import load_matrix
from qwencli.bench.plan import Plan, Settings
from qwencli.config import DType, LoadFormat, SamplingOptions, SeqLen, check_sampling
from qwencli.engine.device import DeviceFacts
from qwencli.errors import InputError, UsageError

# A red circle and a blue square: something to look at for every model there is.
EXAMPLE_IMAGE = Path(__file__).parent / "assets" / "scene.png"


@dataclass(frozen=True)
class BenchRequest:
    """A campaign as asked for.

    Args:
        axes: axis -> comma list that replaces the matrix's own; None = not said.
        runs, max_new_tokens: None = what the matrix says.
        images: empty = EXAMPLE_IMAGE.
    """

    matrix: str
    axes: Mapping[str, str | None]
    runs: int | None
    max_new_tokens: int | None
    prompt: str
    images: tuple[Path, ...]
    seed: int
    device: str
    dtype: DType
    load_format: LoadFormat
    max_seq_len: SeqLen | None


def prepare(request: BenchRequest) -> tuple[Plan, DeviceFacts]:
    """Resolve everything that can be wrong before any model is loaded.

    Raises:
        UsageError, BenchError: the matrix, an axis or an option is wrong.
        InputError: an image is not there.
        ModelError: a model of the matrix is unknown.
        DeviceError: the device is not there.
    """
    from qwencli.models.resolve import resolve_model

    assert request.axes.keys() <= AXES.keys()
    check_sampling(SamplingOptions(max_new_tokens=request.max_new_tokens))
    if not request.prompt.strip():
        raise UsageError("--prompt is empty", "say what the model is to do")
    for image in request.images:
        if not image.is_file():
            raise InputError(f"{image}: no such file", "check the path given to --image")
    matrix = override(load_matrix(request.matrix), request.axes)
    default_model = None if "model" in matrix.axes else resolve_model(None)
    models = {name: resolve_model(name) for name in matrix.axes.get("model", ())}
    if default_model:
        models[default_model.name] = default_model
    facts = read_device_facts(request.device)
    cells = expand(matrix, default_model.name if default_model else "", facts)
    settings = Settings(
        runs=request.runs or matrix.runs,
        max_new_tokens=request.max_new_tokens or matrix.max_new_tokens,
        prompt=request.prompt,
        images=tuple(image.resolve() for image in request.images) or (EXAMPLE_IMAGE,),
        seed=request.seed,
        device=facts.device,
        dtype=request.dtype,
        load_format=request.load_format,
        max_seq_len=request.max_seq_len,
    )
    return Plan(cells=tuple(cells), settings=settings, models=models), facts
