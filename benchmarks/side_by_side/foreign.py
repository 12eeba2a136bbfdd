"""Runs of another engine as a campaign of one cell, which `bench compare` and `bench report` read.

The files are those of `qwencli bench`; what the other engine does not tell is empty. Its
attention and cache are "auto": nobody here chose them.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from qwencli.bench.plan.environment import environment, read_device_facts
from qwencli.bench.plan.matrix_file import EXAMPLE_IMAGE, find_image, prompt_or_default
from qwencli.bench.report.campaign_report import build_report
from qwencli.bench.report.tables import terminal_table
from qwencli.bench.run.campaign import ENVIRONMENT, GPU, PLAN, RUNS, TOKENS, write_json
from qwencli.bench.statistics.slow_tokens import run_latency
from qwencli.bench.storage import columns
from qwencli.bench.storage.row_file import RowFile
from qwencli.errors import BenchError, OutputError, QwenCliError
from qwencli.output import Output


@dataclass(frozen=True)
class Work:
    """What every run does; `model` is what the cell is called, to be found by a comparison."""

    engine: str
    model: str
    quantization: str
    prompt: str
    images: tuple[Path, ...]
    runs: int
    max_new_tokens: int
    device: str
    load_format: str = "auto"


@dataclass(frozen=True)
class Run:
    """One answer. Times in seconds; `token_s` on a clock that begins with the request.

    Either `token_s` or `decode_s` says how fast tokens came; None = not told.
    """

    num_new_tokens: int
    num_prompt_tokens: int | None = None
    token_s: tuple[float, ...] = ()
    ttft_s: float | None = None
    decode_s: float | None = None
    text: str = ""


def options(about: str, *, image: bool) -> ArgumentParser:
    """The options that all scripts share."""
    parser = ArgumentParser(description=about)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for the campaign")
    parser.add_argument("--name", required=True, help="the model's name in the campaign")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--device", default="auto", help="where the other engine runs")
    if image:
        parser.add_argument("--prompt")
        parser.add_argument("--image", action="append", help="default: the shipped example")
    return parser


def work_of(engine: str, said: Namespace, **more: Any) -> Work:
    images: tuple[Path, ...] = ()
    if hasattr(said, "image"):
        images = tuple(find_image(name, Path.cwd()) for name in said.image or [str(EXAMPLE_IMAGE)])
    return Work(
        engine=engine,
        model=said.name,
        quantization=said.quantization,
        prompt=prompt_or_default(getattr(said, "prompt", None)),
        images=images,
        runs=said.runs,
        max_new_tokens=said.max_new_tokens,
        device=said.device,
        **more,
    )


class ForeignCampaign:
    """A context manager; leaving it writes the tables.

    Raises:
        BenchError: the folder is not empty. OutputError: it cannot be written.
    """

    def __init__(self, folder: Path, work: Work) -> None:
        self.folder, self.work = folder, work
        axes = {
            "model": work.model,
            "engine": work.engine,
            "quantization": work.quantization,
            "attention": "auto",
            "cache": "auto",
            "load_mode": "keep",
        }
        digest = hashlib.sha256(repr(axes).encode()).hexdigest()[:6]
        self.cell_id = f"{work.engine}-{work.quantization}-{digest}"
        self._number = itertools.count()
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OutputError(f"{folder} cannot be written: {error.strerror}") from error
        if any(folder.iterdir()):
            raise BenchError(f"{folder} is not empty", "give a new --out")
        facts = read_device_facts(work.device)
        write_json(folder / ENVIRONMENT, environment(facts, sys.argv[1:], 0))
        document = {
            "format": 1,
            "seed": 0,
            "runs": work.runs,
            "max_new_tokens": work.max_new_tokens,
            "prompt": work.prompt,
            "images": [
                {"name": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
                for path in work.images
            ],
            "device": facts.device,
            "dtype": "auto",
            "load_format": work.load_format,
            "cells": [{"cell_id": self.cell_id, **axes, "skip_reason": None}],
        }
        write_json(folder / PLAN, document)

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            self._runs = stack.enter_context(RowFile(self.folder / RUNS, columns.RUNS))
            self._tokens = stack.enter_context(RowFile(self.folder / TOKENS, columns.TOKENS))
            stack.enter_context(RowFile(self.folder / GPU, columns.GPU))
            self._files = stack.pop_all()
        return self

    def add(self, run: Run) -> None:
        """The first is the warm-up, which counts in no statistic."""
        number = next(self._number)
        key = {"cell_id": self.cell_id, "run": number}
        gaps = [(b - a) * 1e3 for a, b in itertools.pairwise(run.token_s)]
        ttft_s = run.token_s[0] if run.token_s else run.ttft_s
        decode_s = run.token_s[-1] - run.token_s[0] if run.token_s else run.decode_s
        # Deltas of a stream may hold several tokens: the count is the engine's own.
        speed = (run.num_new_tokens - 1) / decode_s if decode_s else None
        self._tokens.append(
            {**key, "token_index": i, "t_s": at, "itl_ms": gap}
            for i, (at, gap) in enumerate(zip(run.token_s, (None, *gaps), strict=False))
        )
        row = {
            **key,
            "status": "ok" if number else "warmup",
            "num_prompt_tokens": run.num_prompt_tokens,
            "num_new_tokens": run.num_new_tokens,
            "ttft_s": ttft_s,
            "decode_s": decode_s,
            "e2e_s": ttft_s + decode_s if ttft_s is not None and decode_s is not None else None,
            "decode_tok_per_s": speed,
            **run_latency(gaps),
            "ran_quantization": self.work.quantization,
            "ran_attention": "auto",
            "ran_cache": "auto",
            "text_sha256": hashlib.sha256(run.text.encode()).hexdigest(),
            "process": 1,
        }
        self._runs.append([row])

    def __exit__(self, *exc: object) -> None:
        self._files.close()


def measure(folder: Path, work: Work, runs: Callable[[], Iterable[Run]]) -> None:
    """Write a campaign of what `runs` gives (a warm-up first) and print its table.

    An engine that is not there, or refuses, leaves no folder.
    """
    coming = iter(runs())
    warm_up = next(coming)
    with ForeignCampaign(folder, work) as campaign:
        campaign.add(warm_up)
        for run in coming:
            campaign.add(run)
    Output().show(terminal_table(build_report(folder)))


def main(script: Callable[[Sequence[str]], None]) -> int:
    """Run a script; an expected error is one line."""
    try:
        script(sys.argv[1:])
    except QwenCliError as error:
        print(
            f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr
        )
        return error.exit_code
    return 0
