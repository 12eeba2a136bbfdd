"""What one worker process is told, and how it travels: one JSON line on its stdin."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from qwencli.bench.plan.stopping import Progress, TurnRule
from qwencli.config import (
    Attention,
    Cache,
    DType,
    EngineConfig,
    EngineName,
    Kernels,
    KVDType,
    LoadFormat,
    LoadMode,
    ModelSource,
    ModelSpec,
    Quantization,
    Speculate,
)


@dataclass(frozen=True)
class WorkerSpec:
    """One cell's work for one process.

    Args:
        turn: when this process has made enough runs.
        progress: what earlier processes of the cell have made; runs are numbered on from there,
            and the warm-up is run 0 and comes first in any case.
        reload_before: runs before which the model is loaded anew, whatever the load mode.
        roofline: whether to measure, after the runs, what the machine can do at best, and what
            the probes cost.
        quality_samples: how many answers to check after the runs; 0 = none.
        reference: file with the reference of this model, None = there is none to diverge from.
        purpose: "reference" makes that file's rows instead of any run; "beside" measures what comes
            after the runs, which the cell has all of.
    """

    config: EngineConfig
    load_mode: LoadMode
    turn: TurnRule
    progress: Progress
    max_new_tokens: int
    prompt: str
    images: tuple[Path, ...]
    reload_before: tuple[int, ...] = ()
    roofline: bool = True
    quality_samples: int = 0
    reference: Path | None = None
    purpose: Literal["runs", "beside", "reference"] = "runs"


_ENUMS = {
    "engine": EngineName,
    "quantization": Quantization,
    "attention": Attention,
    "cache": Cache,
    "dtype": DType,
    "kernels": Kernels,
    "kv_dtype": KVDType,
    "speculate": Speculate,
    "load_format": LoadFormat,
}


def dumps(spec: WorkerSpec) -> str:
    """One line of JSON."""
    return json.dumps(spec, default=_plain)


def loads(line: str) -> WorkerSpec:
    raw: dict[str, Any] = json.loads(line)
    config, progress = raw.pop("config"), raw.pop("progress")
    reference = raw.pop("reference")
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
        turn=TurnRule(**raw.pop("turn")),
        progress=Progress(
            tuple(progress["speeds"]), progress["spent_s"], tuple(progress["process_runs"])
        ),
        reference=None if reference is None else Path(reference),
        **raw,
    )


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, Mapping):  # dict itself never gets here, read-only views do
        return dict(value)
    return {field.name: getattr(value, field.name) for field in fields(value)}
