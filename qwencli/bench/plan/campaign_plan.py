"""What a campaign will do: its cells, their order, and what each worker process is told.

A `WorkerSpec` travels to its process as one line of JSON on its stdin.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal

from qwencli.bench.measure.quality import captions_fit, wants_reference
from qwencli.bench.plan import stopping
from qwencli.bench.plan.matrix import BenchCell
from qwencli.bench.plan.stopping import Progress, StopRule, TurnRule
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
    SeqLen,
    Speculate,
)
from qwencli.errors import BenchError
from qwencli.models.families import can_see

FORMAT = 1


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
        purpose: "reference" makes that file's rows instead of any run; "post_run_checks" measures
            what comes after the runs, which the cell has all of.
        profile: whether to trace what it does, and tell it at the end.
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
    purpose: Literal["runs", "post_run_checks", "reference"] = "runs"
    profile: bool = False


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


def dump_spec(spec: WorkerSpec) -> str:
    """One line of JSON."""
    return json.dumps(spec, default=_plain)


def load_spec(line: str) -> WorkerSpec:
    raw: dict[str, Any] = json.loads(line)
    config, progress = raw.pop("config"), raw.pop("progress")
    reference = raw.pop("reference")
    model = config.pop("model")
    model["source"] = ModelSource(model["source"])
    config["endpoints"] = tuple(config["endpoints"])
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


@dataclass(frozen=True)
class Settings:
    """Work that is equal in all cells; `reload_before` as in WorkerSpec."""

    stop: StopRule
    max_new_tokens: int
    prompt: str
    images: tuple[Path, ...]
    seed: int
    device: str
    dtype: DType = DType.AUTO
    load_format: LoadFormat = LoadFormat.AUTO
    max_seq_len: SeqLen | None = None
    reload_before: tuple[int, ...] = ()
    quality_samples: int = 0
    threads: int | None = None
    endpoints: tuple[str, ...] = ()


@dataclass(frozen=True)
class Plan:
    """Cells in the order of the matrix; `models` has the spec of every model they name. `notice`
    says what was chosen that nobody named. `as_origin`: reports have the columns of the origin's
    notes, too."""

    cells: tuple[BenchCell, ...]
    settings: Settings
    models: Mapping[str, ModelSpec]
    notice: str | None = None
    as_origin: bool = False

    def order(self, turn: int = 1) -> list[BenchCell]:
        """The cells as they will run: shuffled by the seed, so that no mode sits in one stretch
        of time and takes all of a slow drift (heat, clocks, other load) on itself. With several
        processes a cell, each turn gives every cell one, in an order of its own."""
        cells = list(self.cells)
        seed = self.settings.seed
        random.Random(seed if turn == 1 else f"{seed}/{turn}").shuffle(cells)
        return cells

    def worker_spec(self, cell: BenchCell, turn: int, progress: Progress) -> WorkerSpec:
        """What process `turn` of the cell is told, after what the cell has already."""
        settings = self.settings
        model = self.models[cell.model]
        if cell.engine is EngineName.REMOTE:
            # All else was said where the server was started.
            config = EngineConfig(
                model=replace(model, source=ModelSource.REMOTE),
                engine=cell.engine,
                endpoints=settings.endpoints,
            )
        else:
            config = EngineConfig(
                model=model,
                engine=cell.engine,
                quantization=cell.quantization,
                attention=cell.attention,
                cache=cell.cache,
                kernels=cell.kernels,
                kv_dtype=cell.kv_dtype,
                speculate=cell.speculate,
                device=settings.device,
                dtype=settings.dtype,
                load_format=settings.load_format,
                max_seq_len=settings.max_seq_len,
                threads=settings.threads,
            )
        return WorkerSpec(
            config=config,
            load_mode=cell.load_mode,
            turn=settings.stop.turn(turn),
            progress=progress,
            max_new_tokens=settings.max_new_tokens,
            prompt=settings.prompt,
            images=settings.images if takes_images(model) else (),
            quality_samples=settings.quality_samples,
            reload_before=settings.reload_before,
        )

    def reference_spec(self, name: str) -> WorkerSpec:
        """What the process is told that reads the unquantized reference of model `name`."""
        settings = self.settings
        return WorkerSpec(
            config=EngineConfig(
                model=self.models[name],
                engine=EngineName.TRANSFORMERS,
                attention=Attention.SDPA,
                cache=Cache.DYNAMIC,
                device=settings.device,
                dtype=settings.dtype,
            ),
            load_mode=LoadMode.KEEP,
            turn=settings.stop.turn(1),
            progress=Progress(),
            max_new_tokens=settings.max_new_tokens,
            prompt=settings.prompt,
            images=(),
            purpose="reference",
        )

    def wants_reference(self, name: str) -> bool:
        settings = self.settings
        return bool(settings.quality_samples) and wants_reference(
            self.models[name], settings.load_format
        )

    def wants_quality(self, name: str) -> bool:
        """Whether answers of model `name` are to be checked, and can be."""
        settings = self.settings
        captions = captions_fit(self.models[name], settings.load_format)
        return self.wants_reference(name) or (bool(settings.quality_samples) and captions)

    def document(self) -> dict[str, Any]:
        """What `plan.json` holds; two campaigns with equal documents do the same work."""
        settings = self.settings
        return {
            "format": FORMAT,
            "seed": settings.seed,
            "runs": settings.stop.max_runs,
            "stop": stopping.document(settings.stop),
            "max_new_tokens": settings.max_new_tokens,
            "prompt": settings.prompt,
            "images": [
                {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                for path in settings.images
            ],
            "device": settings.device,
            "dtype": str(settings.dtype),
            "load_format": str(settings.load_format),
            "max_seq_len": settings.max_seq_len,
            "quality_samples": settings.quality_samples,
            "threads": settings.threads,
            **({"as_origin": True} if self.as_origin else {}),
            **({"endpoints": list(settings.endpoints)} if settings.endpoints else {}),
            "cells": [
                {"cell_id": cell.cell_id, **cell.axes(), "skip_reason": cell.skip_reason}
                for cell in self.cells
            ],
        }


def takes_images(model: ModelSpec) -> bool:
    """Whether the model looks at pictures; one that is not known here is taken to."""
    return can_see((model.hub_config or {}).get("model_type")) is not False


def check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise BenchError, naming the first difference, unless both describe the same work."""
    hint = "leave out or repeat the options it was started with, or give a new --out"
    for key in wanted:
        if saved.get(key) == wanted[key]:
            continue
        if key == "cells":
            ids = [{cell["cell_id"] for cell in plan["cells"]} for plan in (saved, wanted)]
            what = (
                f"has other cells ({len(ids[0] - ids[1])} gone, {len(ids[1] - ids[0])} new)"
                if ids[0] != ids[1]
                else "has other cells that cannot run here"
            )
        else:
            what = f"has {key} {saved.get(key)!r}, not {wanted[key]!r}"
        raise BenchError(f"{folder} cannot be resumed: it {what}", hint)
