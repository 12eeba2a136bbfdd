"""The longest gap between two tokens of a running row when a long prompt arrives.

    python benchmarks/longest_gap.py [--model qwen3-vl-4b] [--device auto] [--rows 32]
                                     [--quantization none] [--tokens 8000] [--repeats 5]

Shapes with random weights where the model is not here (the bundled one is: `--model scenes`). So
many rows decode; then one long prompt arrives, in turns a text, a picture as large as the model
takes, and a dozen pictures of a megapixel at once. A gap is the time between two tokens of one row
as the host reads them. A line of JSON for each kind: gaps of all rows before the prompt arrives,
from then to its first token, and after it.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from typing import Any

import numpy as np
from PIL import Image

from qwencli.config import EngineConfig, EngineName, LoadFormat, Quantization, SamplingOptions
from qwencli.engine import factory
from qwencli.engine.protocol import Engine
from qwencli.errors import QwenCliError
from qwencli.messages import GenerationRequest, ImagePart, user_message
from qwencli.models.resolve import resolve_model


def ask(text: str, pictures: tuple[ImagePart, ...], new_tokens: int) -> GenerationRequest:
    sampling = SamplingOptions(do_sample=False, max_new_tokens=new_tokens)
    message = user_message(text, pictures)
    return GenerationRequest((message,), sampling, bypass_caches=True, ignore_eos=True)


def noise(width: int, height: int, seed: int) -> ImagePart:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return ImagePart(Image.fromarray(pixels), f"{width}x{height}")


def longest(engine: Engine, rows: int, arriving: list[GenerationRequest]) -> dict[str, Any]:
    """Gaps in ms: before, while and after `arriving` are run to their first tokens."""
    room = min(2000, engine.max_seq_len - 256)
    running = [engine.add(ask(f"Row {n}.", (), room)) for n in range(rows)]
    last: dict[int, float] = {}
    gaps: dict[str, list[float]] = {"before": [], "while": [], "after": []}
    waiting: set[int] = set()
    phase, prompt_tokens, arrived_s, first_s = "warming", 0, 0.0, 0.0

    def step() -> None:
        nonlocal prompt_tokens
        for output in engine.step():
            if output.error is not None:
                raise output.error
            if output.request in waiting:
                waiting.discard(output.request)
            if output.request not in running or output.chunk is None or not output.chunk.token_ids:
                continue
            now = time.perf_counter()
            if phase in gaps and output.request in last:
                gaps[phase].append((now - last[output.request]) * 1e3)
            last[output.request] = now

    while len(last) < rows:
        step()
    for _ in range(8):
        step()
    phase = "before"
    for _ in range(32):
        step()
    phase, arrived_s = "while", time.perf_counter()
    added = [engine.add(request) for request in arriving]
    waiting.update(added)
    while waiting:
        step()
    first_s = time.perf_counter() - arrived_s
    phase = "after"
    for _ in range(16):
        step()
    for number in (*running, *added):
        engine.abort(number)
    while engine.has_unfinished:
        engine.step()
    return {
        "gap_ms_before": max(gaps["before"]),
        "gap_ms_while": max(gaps["while"], default=0.0),
        "gap_ms_after": max(gaps["after"], default=0.0),
        "gap_ms_while_median": statistics.median(gaps["while"] or [0.0]),
        "first_token_s": first_s,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", default="none", type=Quantization)
    parser.add_argument("--rows", default=32, type=int)
    parser.add_argument("--tokens", default=8000, type=int, help="of the long text")
    parser.add_argument("--picture", default="3840x2160", help="width x height")
    parser.add_argument("--pictures", default=12, type=int, help="of a megapixel, at once")
    parser.add_argument("--repeats", default=5, type=int)
    parser.add_argument("--max-seq-len", default=16384, type=int)
    said = parser.parse_args()
    spec = resolve_model(said.model)
    config = EngineConfig(
        spec,
        engine=EngineName.NATIVE,
        device=said.device,
        quantization=said.quantization,
        max_seq_len=said.max_seq_len,
        load_format=LoadFormat.AUTO if spec.path is not None else LoadFormat.DUMMY,
    )
    with factory.create_engine(config) as engine:
        engine.load()
        kinds = {
            "text": [ask("word " * said.tokens, (), 4)],
            "picture": [ask("Look.", (noise(*map(int, said.picture.split("x")), 0),), 4)],
            "pictures": [ask("Look.", (noise(1024, 1024, n),), 4) for n in range(said.pictures)],
        }
        for repeat in range(-1, said.repeats):
            for kind, arriving in kinds.items():
                facts = {"kind": kind, "rows": said.rows, "repeat": repeat}
                try:
                    found = longest(engine, min(said.rows, engine.max_rows - 1), arriving)
                except QwenCliError as error:
                    found = {"error": error.message}
                if repeat >= 0:  # the first round makes the graphs
                    print(
                        json.dumps({**facts, "device": engine.effective.device, **found}),
                        flush=True,
                    )


if __name__ == "__main__":
    main()
