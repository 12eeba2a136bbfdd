"""Captions a second of a folder, pictures opened and prepared beside the engine (decision 0019).

    python benchmarks/captions_per_second.py [QUANTIZATION] [--pictures 1000] [--repeats 3]
                                             [--schema FILE [--tokenizer FOLDER]] > captions.json

4B shapes with random weights, JPEG files of 512x512, 64 new tokens each. One line a repeat. A
hundred files stand for as many as are asked for: caches are passed by, as if all were different.

With `--schema` each repeat runs twice in turns, free and held to the schema, and a last line has
the ratio of the medians (decision 0023). Answers go on freely behind their end, so that both have
64 tokens: give a schema that random text does not end, such as an object with one string. Random
weights have the bundled model's small vocabulary; `--tokenizer` names a folder with the one that
masks are to be made for.
"""

from __future__ import annotations

import argparse
import functools
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from qwencli.config import EngineConfig, EngineName, LoadFormat, Quantization, SamplingOptions
from qwencli.engine.base_engine import BaseEngine
from qwencli.engine.client import generate_many
from qwencli.engine.constrained import Grammars, read_schema
from qwencli.engine.factory import create_engine
from qwencli.engine.frontend.images import open_image
from qwencli.engine.frontend.tokenizer import Tokenizer
from qwencli.engine.protocol import Engine
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model

FILES, PICTURES, REPEATS = 100, 1000, 3
SAMPLING = SamplingOptions(do_sample=False, max_new_tokens=64)


def request(path: Path, schema: str | None = None) -> GenerationRequest:
    message = user_message("Describe this image in detail.", (open_image(path),))
    return GenerationRequest(
        (message,), SAMPLING, ignore_eos=True, schema=schema, bypass_caches=True
    )


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


def seconds_of(
    engine: Engine, paths: Sequence[Path], count: int, schema: str | None = None
) -> float:
    """Caption `count` pictures."""
    started = time.perf_counter()
    sources = (functools.partial(request, paths[n % len(paths)], schema) for n in range(count))
    for result in generate_many(engine, sources):
        if isinstance(result, Exception):
            raise result
    return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("quantization", nargs="?", default="none")
    parser.add_argument("--pictures", type=int, default=PICTURES)
    parser.add_argument("--repeats", type=int, default=REPEATS)
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--schema", type=Path)
    parser.add_argument("--tokenizer", type=Path)
    given = parser.parse_args()
    ways: dict[str, str | None] = {"free": None}
    if given.schema:
        ways["schema"] = read_schema(given.schema.read_text(encoding="utf-8"), str(given.schema))
    rates: dict[str, list[float]] = {way: [] for way in ways}
    config = config_of(Quantization(given.quantization), given.model)
    with tempfile.TemporaryDirectory() as folder, create_engine(config) as engine:
        if given.tokenizer:
            assert isinstance(engine, BaseEngine), "it runs in this process"
            tokenizer, files = Tokenizer.from_folder(given.tokenizer), engine.files
            stop = [tokenizer.token_id("<|im_end|>")]
            engine._grammars = Grammars(tokenizer, files.vocab_size, stop)
        paths = write_pictures(Path(folder))
        warm_up = [min(count, given.pictures) for count in (16, 300)]
        for count in (*warm_up, *[given.pictures] * given.repeats):
            for way, schema in ways.items():
                seconds = seconds_of(engine, paths, count, schema)
                line = {"captions": count, "seconds": seconds, "captions_per_s": count / seconds}
                about = {"quantization": given.quantization, "way": way}
                print(json.dumps({**about, **line}), flush=True)
                rates[way].append(count / seconds)
    if given.schema:
        free, held = (statistics.median(rates[way][2:]) for way in ("free", "schema"))
        print(json.dumps({"percent_of_free_rate": 100 * held / free}))


if __name__ == "__main__":
    main()
