"""What keeping quantized weights on disk saves a load.

    python benchmarks/quantized_load.py OUT.csv [--model qwen3-vl-2b] [--layers 8] [--device cpu]

The weights of the bundled model, and of a checkpoint of random values in the widths of `--model`
with `--layers` layers and no vision tower, are loaded in each mode: quantized by torch, as this
device does it (on a GPU by our kernel), the same and written before it counts as over, and read
back. Files are in the system's page cache (the first load warms
it). A row a load; the fastest of `--repeats` is what to compare.
"""

from __future__ import annotations

import argparse
import csv
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from qwencli.config import Kernels, Quantization
from qwencli.engine.loading import weights
from qwencli.engine.native.supported import quantizer_for
from qwencli.models.builtin import bundled_folder
from qwencli.models.folder import read_config
from qwencli.models.resolve import resolve_model
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import specs

FIELDS = ("model", "quantization", "device", "way", "load_s", "checkpoint_bytes", "kept_bytes")
MODES = [mode for mode in Quantization if mode is not Quantization.NONE]


def random_checkpoint(folder: Path, model: str, layers: int) -> ModelShape:
    """A text checkpoint of bfloat16 values in the model's widths."""
    config = resolve_model(model).hub_config
    assert config is not None, "built-in models carry their shape"
    whole = read_shape(config)
    shape = replace(whole, vision=None, text=replace(whole.text, num_layers=layers))
    tensors = {}
    for spec in specs(shape):
        for part in spec.parts:
            generator = torch.Generator().manual_seed(zlib.crc32(part.name.encode()))
            values = torch.randn(part.shape, generator=generator) * weights.DUMMY_STD
            tensors[{"text": "model.", "root": ""}[part.section] + part.name] = values.bfloat16()
    save_file(tensors, folder / "model.safetensors")
    return shape


def loads(
    name: str, folder: Path, shape: ModelShape, device: torch.device, repeats: int
) -> Iterator[dict[str, object]]:
    size = (folder / "model.safetensors").stat().st_size
    dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
    kernels = Kernels.TORCH if device.type == "cpu" else Kernels.TRITON
    weights.load(folder, shape, dtype, device)  # warms the page cache
    for mode in MODES:
        with tempfile.TemporaryDirectory() as place:
            kept = Path(place) / "kept.safetensors"
            for way in ("by torch", "quantized", "quantized and written", "read back"):
                for _ in range(repeats):
                    if way == "quantized and written":
                        kept.unlink(missing_ok=True)
                    started = time.perf_counter()
                    loaded = weights.load(
                        folder,
                        shape,
                        dtype,
                        device,
                        mode,
                        cache_file=kept if way in ("quantized and written", "read back") else None,
                        quantizer=quantizer_for(Kernels.TORCH if way == "by torch" else kernels),
                    )
                    if device.type == "cuda":
                        torch.cuda.synchronize(device)
                    if loaded.keeping is not None:
                        loaded.keeping.begin()
                        loaded.keeping.write()
                        assert loaded.keeping.warning is None, loaded.keeping.warning
                    seconds = time.perf_counter() - started
                    del loaded
                    yield {
                        "model": name,
                        "quantization": mode.value,
                        "device": device.type,
                        "way": way,
                        "load_s": f"{seconds:.4f}",
                        "checkpoint_bytes": size,
                        "kept_bytes": kept.stat().st_size if kept.exists() else "",
                    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="qwen3-vl-2b")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    device = torch.device(options.device)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary, torch.inference_mode():
        folder = Path(temporary)
        shape = random_checkpoint(folder, options.model, options.layers)
        bundled = read_shape(read_config(bundled_folder()))
        with options.out.open("w", encoding="utf-8", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            for name, place, sizes in (
                ("scenes", bundled_folder(), bundled),
                (f"{options.model}, {options.layers} layers, text, random", folder, shape),
            ):
                for row in loads(name, place, sizes, device, options.repeats):
                    writer.writerow(row)
                    file.flush()


if __name__ == "__main__":
    main()
