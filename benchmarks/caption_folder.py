"""`qwencli caption FOLDER` against the engine's own rate, from JPEG files to caption files on disk.

    python benchmarks/caption_folder.py [--pictures 1000] [--tokens 64] [--model qwen3-vl-4b]
                                        [--device auto] [--quantization none] [--repeats 3]
                                        [--devices all]

Shapes with random weights where the model is not here; JPEG files of 512x512, each its own. One
engine is loaded, and warmed up by a first round of each way. Then in turns: `generate_many` over
requests that open the same files, and the whole command on the same engine, its listing, manifest
and fsync included; guards are off, because random weights say nothing. A line of JSON for each, and
one with the ratio of the medians and how busy the GPU was. With `--devices`, the command once more
in a process of its own, with a worker on each; `pipeline_seconds` begin when the first is ready.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwencli.cli import run
from qwencli.config import EngineConfig, EngineName, LoadFormat, Quantization, SamplingOptions
from qwencli.dataset.progress import GpuUse
from qwencli.engine import factory
from qwencli.engine.client import generate_many
from qwencli.engine.frontend.images import open_image
from qwencli.engine.protocol import Engine
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model

PROMPT, WARM_UP = "Describe this image in detail.", 300
COMMAND_OPTIONS = ["--existing", "overwrite", "--guards", "none", "--retries", "0", "--greedy"]


def draw(folder: Path, count: int) -> list[Path]:
    random = np.random.default_rng(0)
    paths = [folder / f"{number}.jpg" for number in range(count)]
    for path in paths:
        pixels = np.kron(random.integers(0, 255, (32, 32, 3)), np.ones((16, 16, 1)))
        Image.fromarray(pixels.astype("uint8")).save(path, quality=90)
    return paths


def own_rate(engine: Engine, paths: list[Path], sampling: SamplingOptions) -> dict[str, Any]:
    def request(path: Path) -> GenerationRequest:
        return GenerationRequest((user_message(PROMPT, (open_image(path),)),), sampling)

    gpu, tokens = GpuUse(), 0
    with gpu.watched(engine.effective.device):
        started = time.perf_counter()
        for result in generate_many(engine, (functools.partial(request, path) for path in paths)):
            if isinstance(result, Exception):
                raise result
            tokens += result.num_new_tokens
        seconds = time.perf_counter() - started
    return line("generate_many", len(paths), tokens, seconds, gpu.mean)


def command_rate(folder: Path, count: int, arguments: list[str]) -> dict[str, Any]:
    """The whole command, from its listing to its last line; its engine is there already."""
    said = io.StringIO()
    started = time.perf_counter()
    with contextlib.redirect_stdout(said):
        code = run(
            [
                "caption",
                str(folder),
                "--keep-loaded",
                "0",
                "--json",
                "-p",
                PROMPT,
                *COMMAND_OPTIONS,
                *arguments,
                "-q",
            ]
        )
    seconds = time.perf_counter() - started
    end = json.loads(said.getvalue().splitlines()[-1])
    assert (code, end["captioned"]) == (0, count), end
    assert len(list(folder.glob("*.txt"))) == count
    found = line("caption FOLDER", count, end["num_new_tokens"], seconds, end["gpu_percent"])
    return {**found, "pipeline_seconds": end["seconds"]}


def workers_rate(folder: Path, count: int, arguments: list[str], devices: str) -> dict[str, Any]:
    """The whole command with a worker on each device: their loading included."""
    options = [*COMMAND_OPTIONS, *arguments, "--devices", devices, "--json", "-q", "-p", PROMPT]
    started = time.perf_counter()
    said = subprocess.run(
        [sys.executable, "-m", "qwencli", "caption", str(folder), "--keep-loaded", "0", *options],
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    ).stdout
    seconds = time.perf_counter() - started
    end = json.loads(said.splitlines()[-1])
    assert end["captioned"] == count, end
    way = f"caption FOLDER --devices {devices}"
    found = line(way, count, end["num_new_tokens"], end["seconds"], end["gpu_percent"])
    return {**found, "pipeline_seconds": end["seconds"], "with_loading_s": seconds}


def line(way: str, count: int, tokens: int, seconds: float, gpu: float | None) -> dict[str, Any]:
    rate = {"captions_per_s": count / seconds, "tok_per_s": tokens / seconds}
    return {"way": way, "captions": count, "seconds": seconds, **rate, "gpu_percent": gpu}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pictures", type=int, default=1000)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--devices", help="As of caption: workers that share the set.")
    given = parser.parse_args()
    spec = resolve_model(given.model, offline=True)
    load = LoadFormat.AUTO if spec.path is not None else LoadFormat.DUMMY
    config = EngineConfig(
        model=spec,
        engine=EngineName.NATIVE,
        load_format=load,
        device=given.device,
        quantization=Quantization(given.quantization),
    )
    sampling = SamplingOptions(do_sample=False, max_new_tokens=given.tokens)
    arguments = ["--model", given.model, "--load-format", load.value]
    arguments += ["--quantization", given.quantization, "--max-new-tokens", str(given.tokens)]
    rates: dict[str, list[dict[str, Any]]] = {}
    engine = factory.create_engine(config)
    with tempfile.TemporaryDirectory() as folder:
        engine.load()
        close, device = engine.close, engine.effective.device
        # The command makes and closes an engine; here it gets the one that is warm.
        engine.close = lambda: None  # type: ignore[method-assign]
        factory.create_engine = lambda config: engine
        paths = draw(Path(folder), given.pictures)
        own_rate(engine, paths[:WARM_UP], sampling)
        for _ in range(given.repeats):
            for measured in (
                own_rate(engine, paths, sampling),
                command_rate(Path(folder), given.pictures, [*arguments, "--device", given.device]),
            ):
                rates.setdefault(measured["way"], []).append(measured)
                print(json.dumps(measured), flush=True)
        close()
        if given.devices:
            measured = workers_rate(Path(folder), given.pictures, arguments, given.devices)
            print(json.dumps(measured), flush=True)
    own, command = (
        statistics.median(each["captions_per_s"] for each in rates[way])
        for way in ("generate_many", "caption FOLDER")
    )
    busy = [each["gpu_percent"] for each in rates["caption FOLDER"] if each["gpu_percent"]]
    summary = {"percent_of_own_rate": 100 * command / own, "own": own, "caption_folder": command}
    gpu = statistics.median(busy) if busy else None
    print(json.dumps({**summary, "gpu_percent": gpu, "device": device}))


if __name__ == "__main__":
    main()
