"""Which cells a campaign has: axes, exclusions, and the cells that cannot run here.

A cell is one value of each axis. Knows neither torch nor the engines; what this machine can do
comes in as `DeviceFacts`.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from types import MappingProxyType

from qwencli.bench.plan.stopping import RepetitionOptions
from qwencli.capabilities import PREQUANTIZED, fastest_kernels, why_not
from qwencli.config import (
    Attention,
    Cache,
    EngineName,
    Kernels,
    KVDType,
    LoadMode,
    Quantization,
    Speculate,
)
from qwencli.engine.machine.device import DeviceFacts
from qwencli.errors import BenchError, UsageError

# Axis -> its values; None = free text (model names and folders).
AXES: Mapping[str, type[StrEnum] | None] = {
    "model": None,
    "engine": EngineName,
    "quantization": Quantization,
    "attention": Attention,
    "cache": Cache,
    "load_mode": LoadMode,
    "kernels": Kernels,
    "kv_dtype": KVDType,
    "speculate": Speculate,
}

# What an axis is when neither the matrix nor the command line names it. `model` has no entry:
# the caller says which model runs when none is named.
DEFAULT_AXES: Mapping[str, tuple[str, ...]] = {
    "engine": (EngineName.NATIVE,),
    "quantization": (Quantization.NONE,),
    "attention": (Attention.SDPA,),
    "cache": (Cache.DYNAMIC,),
    "load_mode": (LoadMode.KEEP,),
    "kernels": (Kernels.AUTO,),
    "kv_dtype": (KVDType.AUTO,),
    "speculate": (Speculate.OFF,),
}
# Axes that older plans lack, with what they ran.
NEWER_AXES: Mapping[str, str] = {
    "kernels": Kernels.AUTO,
    "kv_dtype": KVDType.AUTO,
    "speculate": Speculate.OFF,
}

# At 80 columns there is no room for the long name.
_SHORT = {"flash_attention_2": "flash2"}


@dataclass(frozen=True)
class BenchCell:
    """One combination of modes. `skip_reason` says why it cannot run here, None = it can."""

    model: str
    engine: EngineName
    quantization: Quantization
    attention: Attention
    cache: Cache
    load_mode: LoadMode
    kernels: Kernels = Kernels.AUTO
    kv_dtype: KVDType = KVDType.AUTO
    speculate: Speculate = Speculate.OFF
    skip_reason: str | None = None

    def axes(self) -> dict[str, str]:
        return {axis: str(getattr(self, axis)) for axis in AXES}

    @property
    def cell_id(self) -> str:
        """A readable name that is safe in a file name, ended by a hash of the exact axes."""
        # As before there was a choice, so that older campaigns compare with newer ones.
        axes = {axis: value for axis, value in self.axes().items() if NEWER_AXES.get(axis) != value}
        digest = hashlib.sha256(json.dumps(axes, sort_keys=True).encode()).hexdigest()[:6]
        model = re.sub(r"[^a-z0-9.]+", "-", self.model.lower()).strip("-.")[-40:].lstrip("-.")
        return "-".join([model or "model", *list(axes.values())[1:], digest])


def cell_label(cell: BenchCell) -> str:
    """Its axes, but for those that few campaigns vary where nobody did."""
    return shorten_modes(
        value for axis, value in cell.axes().items() if NEWER_AXES.get(axis) != value
    )


def shorten_modes(values: Iterable[str]) -> str:
    """Modes on one line, long names shortened."""
    return " ".join(_SHORT.get(value, value) for value in values)


@dataclass(frozen=True)
class Matrix:
    """A sweep as written down.

    Args:
        name: for messages: a built-in's name, or the file.
        axes: axis -> values in order; axes left out take DEFAULT_AXES.
        exclude: each entry drops the cells that match all of its axes.
        repetition, max_new_tokens, prompt, images: of each cell, where the command line does not
            say; a prompt of None and no images are the tool's own.
    """

    name: str
    axes: Mapping[str, tuple[str, ...]]
    exclude: tuple[Mapping[str, tuple[str, ...]], ...] = ()
    repetition: RepetitionOptions = field(default_factory=RepetitionOptions)
    max_new_tokens: int = 128
    prompt: str | None = None
    images: tuple[Path, ...] = ()


def check_values(axis: str, values: tuple[str, ...]) -> tuple[str, ...]:
    """Return the values without repeats.

    Raises:
        UsageError: a value the axis does not have, or no value at all.
    """
    flag = "--" + axis.replace("_", "-")
    kinds = AXES[axis]
    valid = None if kinds is None else [member.value for member in kinds]
    for value in values:
        if not value:
            raise UsageError(f"{flag} has an empty value", "separate values by single commas")
        if valid is not None and value not in valid:
            raise UsageError(
                f"{flag} has no value {value!r}", f"give one or more of {', '.join(valid)}"
            )
    if not values:
        raise UsageError(f"{flag} has no value", "name at least one")
    return tuple(dict.fromkeys(values))


def override(matrix: Matrix, said: Mapping[str, str | None], exclude: Sequence[str] = ()) -> Matrix:
    """Replace axes by the comma lists said on the command line (None = not said), and add its
    exclusions, each a comma list of AXIS=VALUE; an axis named twice has either value.

    Raises:
        UsageError: an unknown axis or value.
    """
    axes = dict(matrix.axes)
    for axis, text in said.items():
        if text is not None:
            axes[axis] = check_values(axis, tuple(part.strip() for part in text.split(",")))
    return replace(matrix, axes=axes, exclude=(*matrix.exclude, *map(_read_exclusion, exclude)))


def without_modes(matrix: Matrix, said: Mapping[str, str | None]) -> Matrix:
    """The matrix as servers run it: what a model is loaded with was chosen where they were started,
    so of those axes only what the command line says is left."""
    kept = {
        axis: values
        for axis, values in matrix.axes.items()
        if axis in ("model", "engine") or said.get(axis) is not None
    }
    return replace(matrix, axes=kept)


def _read_exclusion(text: str) -> Mapping[str, tuple[str, ...]]:
    found: dict[str, tuple[str, ...]] = {}
    for part in text.split(","):
        axis, equals, value = (piece.strip() for piece in part.partition("="))
        axis = axis.replace("-", "_")
        if not equals or axis not in AXES:
            raise UsageError(
                f"--exclude has {part.strip()!r}", f"write AXIS=VALUE; axes: {', '.join(AXES)}"
            )
        found[axis] = (*found.get(axis, ()), *check_values(axis, (value,)))
    return found


def expand(
    matrix: Matrix,
    default_model: str,
    facts: DeviceFacts,
    traits: Mapping[str, Mapping[str, bool]] = MappingProxyType({}),
) -> list[BenchCell]:
    """All cells in the order of the axes, those that cannot run carrying their reason, and so do
    those that differ in nothing from an earlier one: they are run once.

    Args:
        traits: of models, by name, see `resolve.check_model`.

    Raises:
        BenchError: the exclusions leave nothing.
    """
    axes = {"model": (default_model,), **DEFAULT_AXES, **matrix.axes}
    cells: list[BenchCell] = []
    seen: dict[tuple[str, ...], BenchCell] = {}
    for values in itertools.product(*(axes[axis] for axis in AXES)):
        chosen = dict(zip(AXES, values, strict=True))
        if any(_matches(chosen, rule) for rule in matrix.exclude):
            continue
        cell = BenchCell(
            model=chosen["model"],
            engine=EngineName(chosen["engine"]),
            quantization=Quantization(chosen["quantization"]),
            attention=Attention(chosen["attention"]),
            cache=Cache(chosen["cache"]),
            load_mode=LoadMode(chosen["load_mode"]),
            kernels=Kernels(chosen["kernels"]),
            kv_dtype=KVDType(chosen["kv_dtype"]),
            speculate=Speculate(chosen["speculate"]),
        )
        of_model = traits.get(cell.model, {})
        reason = skip_reason(cell, facts, of_model)
        if reason is None:
            first = seen.setdefault(work_of(cell, facts, of_model), cell)
            reason = None if first is cell else _same_as(first, cell)
        cells.append(replace(cell, skip_reason=reason))
    if not cells:
        raise BenchError(
            f"matrix {matrix.name} has no cell left",
            "its exclusions contradict its axes; drop one of them",
        )
    return cells


def _same_as(first: BenchCell, cell: BenchCell) -> str:
    others = cell.axes()
    differing = [f"{a} {v}" for a, v in first.axes().items() if others[a] != v]
    return f"the same work here as {', '.join(differing).replace('_', ' ')}, which is measured"


def _matches(chosen: Mapping[str, str], rule: Mapping[str, tuple[str, ...]]) -> bool:
    return all(chosen[axis] in values for axis, values in rule.items())


def work_of(
    cell: BenchCell, facts: DeviceFacts, traits: Mapping[str, bool] = MappingProxyType({})
) -> tuple[str, ...]:
    """The cell's axes with every choice that is left to the engine made as it makes it here: two
    cells with equal work differ in nothing but names (`engine.resolve`, `native.supported`)."""
    axes = cell.axes()
    if cell.kernels is Kernels.AUTO:
        quantized = cell.quantization is not Quantization.NONE or traits.get(PREQUANTIZED, False)
        chosen = fastest_kernels(cell.cache, quantized, facts.lacks)
        axes["kernels"] = chosen if cell.engine is EngineName.NATIVE else Kernels.TORCH
    may_choose = axes["kernels"] == Kernels.TRITON or (
        cell.engine is EngineName.NATIVE and facts.kind != "cuda" and cell.cache is Cache.STATIC
    )
    if cell.attention is Attention.AUTO and not may_choose:
        axes["attention"] = Attention.SDPA
    return tuple(axes.values())


def skip_reason(
    cell: BenchCell, facts: DeviceFacts, traits: Mapping[str, bool] = MappingProxyType({})
) -> str | None:
    """Why `cell` cannot run on this machine, or None. Only what is certain without loading a model:
    an engine that finds out more when it loads makes the cell a skipped row all the same."""
    refusal = why_not({**cell.axes(), **traits}, facts.lacks)
    return None if refusal is None else str(refusal)
