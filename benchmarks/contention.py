"""What a second Python thread in the process costs, by engine.

    python benchmarks/contention.py --model qwen3-vl-4b --load-format dummy > contention.json

Answers equal requests in turns, with and without a thread that spins in Python, and prints one
JSON object: every run's decode tok/s and the slowdown of the medians, for each engine.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import threading
from dataclasses import replace

from qwencli.config import Cache, EngineConfig, EngineName, LoadFormat, SamplingOptions
from qwencli.engine.factory import create_engine
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model

MODES = [
    (EngineName.NATIVE, None),
    (EngineName.TRANSFORMERS, Cache.DYNAMIC),
]


def spin(stop: threading.Event) -> None:
    count = 0
    while not stop.is_set():
        count += 1


def measure(config: EngineConfig, runs: int, tokens: int) -> dict[str, object]:
    sampling = SamplingOptions(do_sample=False, max_new_tokens=tokens)
    request = GenerationRequest(
        (user_message("Describe a lighthouse at dusk. " * 40),), sampling, ignore_eos=True
    )
    alone: list[float] = []
    beside: list[float] = []
    with create_engine(config) as engine:
        engine.generate(request)
        for _ in range(runs):
            alone.append(engine.generate(request).timings.decode_tok_per_s or 0.0)
            stop = threading.Event()
            thread = threading.Thread(target=spin, args=(stop,))
            thread.start()
            try:
                beside.append(engine.generate(request).timings.decode_tok_per_s or 0.0)
            finally:
                stop.set()
                thread.join()
        ran = engine.ran
    return {
        "engine": ran.engine,
        "cache": ran.cache,
        "device": ran.device,
        "alone_tok_per_s": alone,
        "beside_tok_per_s": beside,
        "slowdown_percent": 100 * (1 - statistics.median(beside) / statistics.median(alone)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--load-format", type=LoadFormat, default=LoadFormat.AUTO)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--engine", type=EngineName, help="this one alone")
    options = parser.parse_args()
    base = EngineConfig(resolve_model(options.model), load_format=options.load_format)
    results = []
    for engine, cache in MODES:
        if options.engine not in (None, engine):
            continue
        tokens = options.tokens if engine is EngineName.NATIVE else max(options.tokens // 4, 16)
        results.append(measure(replace(base, engine=engine, cache=cache), options.runs, tokens))
        print(results[-1]["engine"], f"{results[-1]['slowdown_percent']:.1f}%", file=sys.stderr)
    print(json.dumps({"python": sys.version.split()[0], "results": results}, indent=1))


if __name__ == "__main__":
    main()
