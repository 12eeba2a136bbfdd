"""The axes of a campaign, and a cell: one value of each."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

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
