"""What a second Python thread in the process costs, by engine.

    python benchmarks/contention.py --model qwen3-vl-4b --load-format dummy --out contention.json

Answers equal requests in turns, with and without a thread that spins in Python, and writes for
each engine, as soon as it has been measured: every run's decode tok/s and seconds in all, and the
slowdown of the medians of both. The transformers engine makes a 64th of the tokens: its operators
let go of the interpreter's lock one by one, and each may wait 5 ms to get it back. Three runs of 8
tokens beside such a thread did not end within a minute on an H100.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from qwencli.bench.plan.matrix_file import EXAMPLE_IMAGE
from qwencli.config import Cache, EngineConfig, EngineName, LoadFormat, SamplingOptions
from qwencli.engine.factory import create_engine
from qwencli.engine.frontend.images import open_image
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model
from qwencli.results import GenerationResult

# Engine, cache, and the share of the tokens that it makes.
MODES = [
    (EngineName.NATIVE, None, 1),
    (EngineName.TRANSFORMERS, Cache.DYNAMIC, 64),
]
FEWEST_TOKENS = 4


def spin(stop: threading.Event) -> None:
    count = 0
    while not stop.is_set():
        count += 1


def measure(config: EngineConfig, runs: int, tokens: int) -> dict[str, object]:
    sampling = SamplingOptions(do_sample=False, max_new_tokens=tokens)
    request = GenerationRequest(
        (user_message("Describe a lighthouse at dusk. " * 40, (open_image(EXAMPLE_IMAGE),)),),
        sampling,
        ignore_eos=True,
        bypass_caches=True,
    )
    alone: list[GenerationResult] = []
    beside: list[GenerationResult] = []
    with create_engine(config) as engine:
        engine.generate(request)
        for _ in range(runs):
            alone.append(engine.generate(request))
            stop = threading.Event()
            thread = threading.Thread(target=spin, args=(stop,))
            thread.start()
            try:
                beside.append(engine.generate(request))
            finally:
                stop.set()
                thread.join()
        ran = engine.effective
    return {
        "engine": ran.engine,
        "cache": ran.cache,
        "device": ran.device,
        "alone_tok_per_s": [decode_speed(result) for result in alone],
        "beside_tok_per_s": [decode_speed(result) for result in beside],
        "slowdown_percent": lost_percent(map(decode_speed, alone), map(decode_speed, beside)),
        "alone_e2e_s": [result.timings.e2e_s for result in alone],
        "beside_e2e_s": [result.timings.e2e_s for result in beside],
        "whole_slowdown_percent": lost_percent(map(whole_speed, alone), map(whole_speed, beside)),
    }


def decode_speed(result: GenerationResult) -> float:
    return result.timings.decode_tok_per_s or 0.0


def whole_speed(result: GenerationResult) -> float:
    return 1 / result.timings.e2e_s


def lost_percent(alone: Iterable[float], beside: Iterable[float]) -> float:
    return 100 * (1 - statistics.median(beside) / statistics.median(alone))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--load-format", type=LoadFormat, default=LoadFormat.AUTO)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--engine", type=EngineName, help="this one alone")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    base = EngineConfig(resolve_model(options.model), load_format=options.load_format)
    results = []
    for engine, cache, share in MODES:
        if options.engine not in (None, engine):
            continue
        tokens = max(options.tokens // share, FEWEST_TOKENS)
        results.append(measure(replace(base, engine=engine, cache=cache), options.runs, tokens))
        lost = [f"{results[-1][of]:.1f}%" for of in ("slowdown_percent", "whole_slowdown_percent")]
        print(results[-1]["engine"], *lost)
        found = {"python": sys.version.split()[0], "results": results}
        options.out.write_text(json.dumps(found, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
