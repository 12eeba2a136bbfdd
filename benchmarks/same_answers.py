"""How often a request's answer depends on what runs beside it, and what it costs that it does not.

    python benchmarks/same_answers.py [--model M] [--quantization none 8bit 4bit fp8]
        [--kernels auto torch] [--requests 24] [--out same_answers.json]

Each mode runs with and without `--batch-invariant`. Its requests, of mixed pictures, words and
lengths, some with a common beginning, are answered one after the other through `stream` and through
`add` and `step` (nothing kept from one to the next), and then together in random mixes: shuffled,
with joins and leaves, and prompts cut at few tokens. Counted are answers that differ from those of
`add` and `step` alone, and the token at which each does first. Then `--captions` equal requests and
one long answer are timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from qwencli.config import (
    EngineConfig,
    EngineName,
    Kernels,
    LoadFormat,
    Quantization,
    SamplingOptions,
)
from qwencli.engine.client import generate_many
from qwencli.engine.native.engine import NativeEngine
from qwencli.errors import QwenCliError
from qwencli.messages import GenerationRequest, ImagePart, user_message
from qwencli.models.resolve import resolve_model

WORDS = "Describe this image in detail, and say what is unusual about it. "
# Prompts are cut at so many tokens in some mixes.
CUTS = (None, 100)

Answers = list[tuple[int, ...]]


@dataclass(frozen=True)
class Same:
    """How answers compare with others: first_at has the first token that differs, by answer."""

    answers: int
    differ: int
    tokens: int
    first_at: list[int]


def picture(side: int, seed: int) -> ImagePart:
    pixels = np.random.default_rng(seed).integers(0, 255, (8, 8, 3)).astype("uint8")
    return ImagePart(Image.fromarray(pixels).resize((side, side)), f"{seed}.png")


def requests_of(count: int, most: int, drawn: bool) -> list[GenerationRequest]:
    chance = random.Random(0)
    found = []
    for number in range(count):
        images = [picture(64 * chance.randint(1, 4), seed) for seed in range(number % 3)]
        text = WORDS * chance.randint(1, 6) + ("" if number % 2 else str(number))
        sampling = SamplingOptions(do_sample=False, max_new_tokens=chance.randint(2, most))
        if drawn and number % 2:
            sampling = replace(sampling, do_sample=True, temperature=1.0, seed=number)
        message = user_message(text, tuple(images))
        found.append(GenerationRequest((message,), sampling, ignore_eos=True))
    return found


def known(result: Any) -> tuple[int, ...]:
    if isinstance(result, QwenCliError):
        raise result
    ids: tuple[int, ...] = tuple(result.token_ids)
    return ids


def compare(found: Answers, expected: Answers) -> Same:
    pairs = list(zip(found, expected, strict=True))
    first = [
        next(n for n, (a, b) in enumerate(itertools.zip_longest(one, other)) if a != b)
        for one, other in pairs
        if one != other
    ]
    return Same(len(pairs), len(first), sum(map(len, expected)), first)


def cut_at(engine: NativeEngine, tokens: int | None) -> None:
    scheduler = engine._requests()._scheduler  # type: ignore[attr-defined]
    if tokens is not None:
        scheduler.limits = replace(scheduler.limits, max_prefill_tokens=tokens)


def mixed(engine: NativeEngine, requests: Sequence[GenerationRequest], mixes: int) -> list[Answers]:
    found = []
    for number in range(mixes):
        order = list(range(len(requests)))
        random.Random(number).shuffle(order)
        cut_at(engine, CUTS[number % len(CUTS)])
        results = generate_many(engine, [requests[n] for n in order])
        by_request = dict(zip(order, map(known, results), strict=True))
        found.append([by_request[n] for n in range(len(requests))])
    return found


def costs(engine: NativeEngine, captions: int, side: int, most: int) -> dict[str, float]:
    sampling = SamplingOptions(do_sample=False, max_new_tokens=most)

    def request(seed: int) -> GenerationRequest:
        message = user_message(WORDS, (picture(side, seed),))
        return GenerationRequest((message,), sampling, ignore_eos=True)

    lone = engine.generate(request(1000))
    lone = engine.generate(request(1001))
    rates = []
    for first in (2000, 3000):  # the first makes the graphs
        started = time.perf_counter()
        for result in generate_many(engine, [request(first + n) for n in range(captions)]):
            known(result)
        rates.append(captions / (time.perf_counter() - started))
    return {
        "captions_per_s": rates[-1],
        "one_row_tok_per_s": (most - 1) / lone.timings.decode_s,
    }


def measure(config: EngineConfig, options: argparse.Namespace) -> dict[str, Any]:
    requests = requests_of(options.requests, options.most_tokens, options.drawn)
    with NativeEngine(config) as engine:
        lone: Answers = []
        alone: Answers = []
        for request in requests:
            engine._forget()
            lone.append(known(engine.generate(request)))
        for request in requests:
            engine._recover()  # a queue of its own, and the memory of the last one given back
            alone += [known(result) for result in generate_many(engine, [request])]
        engine._recover()
        mixes = mixed(engine, requests, options.mixes)
        found = [compare(answers, alone) for answers in mixes]
        said = {
            "lone_stream": asdict(compare(lone, alone)),
            "mixes": [asdict(each) for each in found],
            "differ_percent": 100 * sum(s.differ for s in found) / sum(s.answers for s in found),
            "effective": asdict(engine.effective),
        }
        if options.captions:
            engine._recover()
            said |= costs(engine, options.captions, options.side, options.most_tokens)
    return said


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--dummy", action="store_true", help="random weights of true shapes")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", nargs="+", default=["none"])
    parser.add_argument("--kernels", nargs="+", default=["auto"])
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--mixes", type=int, default=2)
    parser.add_argument("--most-tokens", type=int, default=24)
    parser.add_argument("--drawn", action="store_true", help="every other request is sampled")
    parser.add_argument("--captions", type=int, default=16, help="timed; 0 = none")
    parser.add_argument("--side", type=int, default=256, help="of the pictures that are timed")
    parser.add_argument("--only", choices=("usual", "invariant"))
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    rows = []
    modes = itertools.product(options.quantization, options.kernels, (False, True))
    for quantization, kernels, invariant in modes:
        if options.only == ("usual" if invariant else "invariant"):
            continue
        config = EngineConfig(
            model=resolve_model(options.model, offline=True),
            engine=EngineName.NATIVE,
            device=options.device,
            quantization=Quantization(quantization),
            kernels=Kernels(kernels),
            load_format=LoadFormat.DUMMY if options.dummy else LoadFormat.AUTO,
            batch_invariant=invariant,
        )
        row = {"quantization": quantization, "kernels": kernels, "batch_invariant": invariant}
        try:
            row |= measure(config, options)
        except QwenCliError as error:
            row |= {"error": error.message}
        rows.append(row)
        print(json.dumps(row), flush=True)
        if options.out is not None:
            options.out.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
