"""All models that can be asked for, with what is known about each: the data of `qwencli models`.

Looks at folders and headers on this machine; never the network.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from math import inf
from pathlib import Path
from typing import Any

from qwencli.config import ModelSource, ModelSpec, Quantization
from qwencli.errors import ModelFileError
from qwencli.models.builtin import ENTRIES, builtin_spec
from qwencli.models.custom import CustomModels
from qwencli.models.folder import is_complete
from qwencli.models.hub import cached_repos
from qwencli.models.memory import (
    GPU_VALUE_BYTES,
    LISTED,
    estimate,
    packed_layers,
    packed_weight_bytes,
    weight_bytes,
)
from qwencli.models.quant_formats import packed_format
from qwencli.models.quantized_cache import cached_bytes
from qwencli.models.resolve import SearchPaths, bundled_spec, with_local_files
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import parameter_count
from qwencli.models.weight_files import find_weights, stored_tensors

# The columns of the list, smallest first.
SHOWN: dict[str, Quantization] = {
    "4bit": LISTED["4bit"],
    "8bit": LISTED["8bit"],
    "fp8": Quantization.FP8,
    "full": LISTED["full"],
}
_KINDS = {
    ModelSource.BUILTIN: "built-in",
    ModelSource.BUNDLED: "bundled",
    ModelSource.CUSTOM: "custom",
    ModelSource.LOCAL: "local",
    ModelSource.HUB: "downloaded",
}


@dataclass(frozen=True)
class ModelRow:
    """One model in the list.

    Args:
        path: the folder with its files; None when they are not on this machine.
        size_bytes: weights on disk, or to be downloaded (bfloat16); None when not known.
        num_parameters: from its shape; None when not known before a download.
        vram_gb: GB (1e9 bytes) by the modes of SHOWN, of host memory where a CPU would run it; a
            mode without a figure is missing.
        fits: the modes whose figure is within what is free on this machine.
        vram_stated: the modes whose figure the entry states, rather than we estimate.
        problem: why it cannot be used, when that is known already.
        kept_bytes: of its quantized weights in the user's cache.
    """

    name: str
    kind: str
    repo_id: str | None
    path: str | None
    downloaded: bool
    default: bool
    size_bytes: int | None = None
    num_parameters: int | None = None
    vram_gb: dict[str, float] = field(default_factory=dict)
    vram_stated: tuple[str, ...] = ()
    fits: tuple[str, ...] = ()
    problem: str | None = None
    kept_bytes: int = 0


def list_models(
    custom: CustomModels,
    search_paths: SearchPaths,
    free_bytes: int | None = None,
    value_bytes: int = GPU_VALUE_BYTES,
) -> list[ModelRow]:
    """Bundled, custom, local, built-in and otherwise downloaded models, each once, in this order.

    Local models are the complete model folders directly in the working folder.

    Args:
        free_bytes: what a model may take on this machine; None when not known, and nothing fits.
        value_bytes: of a value that is not quantized, on the device that would run the models.
    """
    return [_row(spec, free_bytes or 0, value_bytes) for spec in _specs(custom, search_paths)]


def _specs(custom: CustomModels, search_paths: SearchPaths) -> Iterator[ModelSpec]:
    if search_paths.bundled.is_dir():
        yield bundled_spec(search_paths)
    yield from custom.specs.values()
    for folder in sorted(search_paths.working_folder.glob("*/config.json")):
        if is_complete(folder.parent):
            yield ModelSpec(f"./{folder.parent.name}", ModelSource.LOCAL, path=folder.parent)
    builtins = [builtin_spec(entry) for entry in ENTRIES]
    yield from builtins
    listed = {spec.repo_id for spec in [*builtins, *custom.specs.values()]}
    for repo_id, path in cached_repos():
        if repo_id not in listed:
            yield ModelSpec(repo_id, ModelSource.HUB, repo_id=repo_id, path=path)


def _row(spec: ModelSpec, free_bytes: int, value_bytes: int) -> ModelRow:
    found: dict[str, Any] = {}
    problem = None
    try:
        spec = with_local_files(spec)
        found = _sizes(spec, value_bytes)
    except ModelFileError as error:
        problem = error.message
    # What an entry states is of a GPU's 16 bits; it says nothing of float32 in host memory.
    modes = LISTED if value_bytes == GPU_VALUE_BYTES else ()
    stated = {mode: spec.vram_requirement[mode] for mode in modes if mode in spec.vram_requirement}
    vram_gb = {**found.get("vram_gb", {}), **stated}
    return ModelRow(
        name=spec.name,
        kind=_KINDS[spec.source],
        repo_id=spec.repo_id,
        path=str(spec.path) if spec.path else None,
        downloaded=spec.path is not None and problem is None,
        default=spec.default,
        size_bytes=found.get("size_bytes"),
        num_parameters=found.get("num_parameters"),
        vram_gb=vram_gb,
        vram_stated=tuple(stated),
        fits=tuple(mode for mode in SHOWN if vram_gb.get(mode, inf) * 1e9 <= free_bytes),
        problem=problem,
        kept_bytes=cached_bytes(spec.path) if spec.path else 0,
    )


def _sizes(spec: ModelSpec, value_bytes: int) -> dict[str, Any]:
    if spec.hub_config is None:
        return {}
    shape = read_shape(spec.hub_config, _config_place(spec))
    weights = find_weights(spec.path, allow_pickle=True).size_bytes if spec.path else None
    found: dict[str, Any] = {
        "size_bytes": weight_bytes(shape) if weights is None else weights,
        "num_parameters": parameter_count(shape),
    }
    # A checkpoint that is quantized already has one size, which its files tell.
    if "quantization_config" in spec.hub_config:
        found["vram_gb"] = _packed_vram(spec, shape, value_bytes)
    elif not spec.quantized:
        found["vram_gb"] = {
            mode: round(estimate(shape, quantization, value_bytes=value_bytes).total / 1e9, 2)
            for mode, quantization in SHOWN.items()
        }
    return found


def _packed_vram(spec: ModelSpec, shape: ModelShape, value_bytes: int) -> dict[str, float]:
    """In the column of its bits; nothing where the files are not here or not read by us."""
    assert spec.hub_config is not None, "the caller looked"
    try:
        packed = packed_format(spec.hub_config)
        stored = stored_tensors(find_weights(spec.path).files) if spec.path else {}
    except ModelFileError:
        return {}
    layers = {} if packed is None else packed_layers(shape, packed, stored)
    if packed is None or not layers:
        return {}
    weights = packed_weight_bytes(shape, packed, stored, value_bytes)
    total = replace(estimate(shape, value_bytes=value_bytes), weights=weights).total
    least = min(layer.packing.bits or layer.bits for layer in layers.values())
    is_fp8 = any(kind.startswith("F8") for layer in layers.values() for kind in layer.packing.types)
    mode = "4bit" if least == 4 else "fp8" if is_fp8 else "8bit"
    return {mode: round(total / 1e9, 2)}


def _config_place(spec: ModelSpec) -> str:
    return str(Path(spec.path or spec.name) / "config.json")
