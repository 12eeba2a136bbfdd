"""What one worker process is told, and how it travels: one JSON line on its stdin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from qwencli.config import (
    Attention,
    Cache,
    DType,
    EngineConfig,
    EngineName,
    Kernels,
    LoadFormat,
    LoadMode,
    ModelSource,
    ModelSpec,
    Quantization,
)


@dataclass(frozen=True)
class WorkerSpec:
    """One cell's work for one process.

    Args:
        first_run: 1 for a new cell; later where a resumed campaign already has runs.
        reload_before: runs before which the model is loaded anew, whatever the load mode.
        runs: number of the last run; the warm-up is run 0 and comes first in any case.
    """

    config: EngineConfig
    load_mode: LoadMode
    first_run: int
    runs: int
    max_new_tokens: int
    prompt: str
    images: tuple[Path, ...]
    reload_before: tuple[int, ...] = ()


_ENUMS = {
    "engine": EngineName,
    "quantization": Quantization,
    "attention": Attention,
    "cache": Cache,
    "dtype": DType,
    "kernels": Kernels,
    "load_format": LoadFormat,
}


def dumps(spec: WorkerSpec) -> str:
    """One line of JSON."""
    return json.dumps(spec, default=_plain)


def loads(line: str) -> WorkerSpec:
    raw: dict[str, Any] = json.loads(line)
    config = raw.pop("config")
    model = config.pop("model")
    model["source"] = ModelSource(model["source"])
    model["path"] = None if model["path"] is None else Path(model["path"])
    modes: dict[str, Any] = {
        key: _ENUMS[key](value) if key in _ENUMS and value is not None else value
        for key, value in config.items()
    }
    return WorkerSpec(
        config=EngineConfig(model=ModelSpec(**model), **modes),
        load_mode=LoadMode(raw.pop("load_mode")),
        images=tuple(Path(image) for image in raw.pop("images")),
        reload_before=tuple(raw.pop("reload_before")),
        **raw,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):  # dict itself never gets here, read-only views do
        return dict(value)
    return {field.name: getattr(value, field.name) for field in fields(value)}
