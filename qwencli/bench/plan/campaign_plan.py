"""What a campaign will do: its cells, their order, and the work of each."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwencli.bench.measure.divergence import wants_reference
from qwencli.bench.measure.quality import captions_fit
from qwencli.bench.plan import stopping
from qwencli.bench.plan.cells import BenchCell
from qwencli.bench.plan.stopping import Progress, StopRule
from qwencli.bench.plan.worker_spec import WorkerSpec
from qwencli.config import (
    Attention,
    Cache,
    DType,
    EngineConfig,
    EngineName,
    LoadFormat,
    LoadMode,
    ModelSpec,
    SeqLen,
)
from qwencli.errors import BenchError

FORMAT = 1


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


@dataclass(frozen=True)
class Plan:
    """Cells in the order of the matrix; `models` has the spec of every model they name. `notice`
    says what was chosen that nobody named."""

    cells: tuple[BenchCell, ...]
    settings: Settings
    models: Mapping[str, ModelSpec]
    notice: str | None = None

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
        return WorkerSpec(
            config=EngineConfig(
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
            ),
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
            "cells": [
                {"cell_id": cell.cell_id, **cell.axes(), "skip_reason": cell.skip_reason}
                for cell in self.cells
            ],
        }


def takes_images(model: ModelSpec) -> bool:
    """Whether the model has a vision tower; a model whose shapes are unknown is taken to."""
    return model.hub_config is None or "vision_config" in model.hub_config


def check_same(saved: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    """Raise BenchError, naming the first difference, unless both describe the same work."""
    hint = "repeat the options it was started with, or give a new --out"
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
