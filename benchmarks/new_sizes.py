"""Time to the first token of pictures whose size comes for the first, second and third time.

    python benchmarks/new_sizes.py OUT.json [--model qwen3-vl-4b] [--device cuda] [--sizes 12]

One engine, with random weights where the model is not here. Each size is asked about with other
pictures each time, so that nothing is kept from earlier requests but the sizes. Before that one
size comes three times, so that what a process does once is over. Written: every time in ms, and by
turn the median and the largest.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

TURNS = ("first", "second", "third")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--sizes", type=int, default=12)
    given = parser.parse_args()
    import numpy as np
    from PIL import Image

    from qwencli.config import EngineConfig, EngineName, LoadFormat, Quantization, SamplingOptions
    from qwencli.engine.factory import create_engine
    from qwencli.messages import GenerationRequest, ImagePart, user_message
    from qwencli.models.resolve import resolve_model

    spec = resolve_model(given.model)
    config = EngineConfig(
        spec,
        engine=EngineName.NATIVE,
        quantization=Quantization(given.quantization),
        device=given.device,
        load_format=LoadFormat.AUTO if spec.path is not None else LoadFormat.DUMMY,
        max_seq_len=4096,
    )
    drawn = np.random.default_rng(0)
    sizes = random.Random(1).sample(
        [(width, height) for width in range(256, 1025, 64) for height in range(256, 1025, 64)],
        given.sizes,
    )

    def first_token_ms(width: int, height: int) -> float:
        values = drawn.integers(0, 256, (height, width, 3), dtype=np.uint8)
        part = ImagePart(Image.fromarray(values), "picture")
        sampling = SamplingOptions(do_sample=False, max_new_tokens=2)
        request = GenerationRequest((user_message("Describe it.", (part,)),), sampling)
        begun, first = time.perf_counter(), 0.0
        for _ in engine.stream(request):
            first = first or time.perf_counter() - begun
        return 1e3 * first

    with create_engine(config) as engine:
        before = [first_token_ms(512, 512) for _ in TURNS]
        rows: list[dict[str, Any]] = [{"size": (512, 512), **dict(zip(TURNS, before, strict=True))}]
        for size in sizes:
            times = [first_token_ms(*size) for _ in TURNS]
            rows.append({"size": size, **dict(zip(TURNS, times, strict=True))})
        told = {
            turn: {
                "median_ms": statistics.median(row[turn] for row in rows[1:]),
                "largest_ms": max(row[turn] for row in rows[1:]),
            }
            for turn in TURNS
        }
        about = {"effective": str(engine.effective), "load_s": engine.load_s}
    given.out.write_text(json.dumps({**about, "turns": told, "rows": rows}, indent=2) + "\n")
    print(json.dumps(told, indent=2))


if __name__ == "__main__":
    main()
