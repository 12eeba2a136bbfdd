"""`qwencli bench inject`: faults made on purpose, to see whether attribution names them."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from qwencli.commands.options import Device, Dtype, Format, Images
from qwencli.config import DType, LoadFormat
from qwencli.output import Output


def inject(
    context: typer.Context,
    causes: Annotated[
        list[str] | None, typer.Argument(metavar="[CAUSE]...", help="ALL, or some of them.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A name or a folder.")] = None,
    engine: Annotated[str, typer.Option(help="native or transformers.")] = "native",
    attention: Annotated[str, typer.Option(help="As in bench.")] = "sdpa",
    cache: Annotated[
        str, typer.Option(metavar="LIST", help="The first that can run here.")
    ] = "static-graph,static",
    trials: Annotated[int, typer.Option(min=1, help="Disturbed runs of each cause.")] = 20,
    max_new_tokens: Annotated[int, typer.Option(min=32, help="Tokens of each run.")] = 192,
    image: Images = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: campaigns/inject-<UTC time>.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the order and the places of the faults.")] = 0,
    load_format: Format = LoadFormat.AUTO,
    device: Device = "auto",
    dtype: Dtype = DType.AUTO,
) -> None:
    """Slow runs down on purpose and see whether attribution names the cause.

    Writes a campaign with truth.csv (what was done, when), confusion.csv and confusion.md.
    Exit code 1 where fewer than 90% of the disturbed runs are explained, or more than 2% of the
    undisturbed runs of a quiet machine blamed.
    """
    from qwencli.bench.inject.confusion import holds, summary
    from qwencli.bench.inject.injection_run import Injection
    from qwencli.bench.inject.injection_run import inject as run_injection
    from qwencli.bench.plan.prepare import BenchRequest
    from qwencli.bench.plan.stopping import RepetitionOptions

    request = BenchRequest(
        matrix="quick",
        axes={
            "model": model,
            "engine": engine,
            "quantization": "none",
            "attention": attention,
            "cache": cache,
            "load_mode": "keep",
        },
        exclude=(),
        repetition=RepetitionOptions(),
        max_new_tokens=max_new_tokens,
        prompt=None,
        images=tuple(image or ()),
        seed=seed,
        device=device,
        dtype=dtype,
        load_format=load_format,
        max_seq_len=None,
        quality_samples=0,
    )
    injection = Injection(names=tuple(causes or ("ALL",)), trials=trials, seed=seed)
    folder = out or Path("campaigns") / f"inject-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    output = context.ensure_object(Output)
    found = run_injection(request, injection, folder, sys.argv[1:], output)
    for line in summary(found):
        output.show(line)
    raise typer.Exit(0 if holds(found) else 1)
