"""Captions a second of a folder, pictures opened and prepared beside the engine (decision 0019).

    python benchmarks/captions_per_second.py [QUANTIZATION] > captions.json

4B shapes with random weights, JPEG files of 512x512, 64 new tokens each. One line a repeat.
"""

from __future__ import annotations

import functools
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qwencli.config import EngineConfig, EngineName, LoadFormat, Quantization, SamplingOptions
from qwencli.engine.client import generate_many
from qwencli.engine.factory import create_engine
from qwencli.engine.frontend.images import open_image
from qwencli.engine.protocol import Engine
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model

FILES, PICTURES, REPEATS = 100, 1000, 3
SAMPLING = SamplingOptions(do_sample=False, max_new_tokens=64)


def request(path: Path) -> GenerationRequest:
    message = user_message("Describe this image in detail.", (open_image(path),))
    return GenerationRequest((message,), SAMPLING, ignore_eos=True)


def write_pictures(folder: Path) -> list[Path]:
    random = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(FILES)]
    for path in paths:
        pixels = np.kron(random.integers(0, 255, (32, 32, 3)), np.ones((16, 16, 1)))
        Image.fromarray(pixels.astype("uint8")).save(path, quality=90)
    return paths


def config_of(quantization: Quantization, model: str = "qwen3-vl-4b") -> EngineConfig:
    return EngineConfig(
        model=resolve_model(model, offline=True),
        engine=EngineName.NATIVE,
        load_format=LoadFormat.DUMMY,
        quantization=quantization,
    )


def seconds_of(engine: Engine, paths: Sequence[Path], count: int) -> float:
    """Caption `count` pictures."""
    started = time.perf_counter()
    sources = (functools.partial(request, paths[n % len(paths)]) for n in range(count))
    for result in generate_many(engine, sources):
        if isinstance(result, Exception):
            raise result
    return time.perf_counter() - started


def main() -> None:
    quantization = Quantization(sys.argv[1]) if len(sys.argv) > 1 else Quantization.NONE
    config = config_of(quantization)
    with tempfile.TemporaryDirectory() as folder, create_engine(config) as engine:
        paths = write_pictures(Path(folder))
        for count in (16, 300, *[PICTURES] * REPEATS):
            seconds = seconds_of(engine, paths, count)
            line = {"captions": count, "seconds": seconds, "captions_per_s": count / seconds}
            print(json.dumps({"quantization": quantization.value, **line}), flush=True)


if __name__ == "__main__":
    main()
