"""`qwencli bench compare`: two campaigns cell by cell, or two matrices run in turns."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from qwencli.commands.options import Device, Format
from qwencli.config import DType, LoadFormat
from qwencli.errors import UsageError
from qwencli.output import Output


class FailOn(StrEnum):
    SLOWER = "slower"


def compare(
    context: typer.Context,
    a: Annotated[Path, typer.Argument(metavar="A", help="The campaign to compare with.")],
    b: Annotated[Path, typer.Argument(metavar="B", help="The campaign in question.")],
    run: Annotated[
        bool,
        typer.Option(
            "--run", help="A and B are matrices (names or TOML files): measure them in turns first."
        ),
    ] = False,
    processes: Annotated[
        int | None, typer.Option(min=5, max=100, help="With --run: of each cell. Default: 10.")
    ] = None,
    runs: Annotated[
        int | None, typer.Option(min=5, help="With --run: of each cell. Default: 5 a process.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="With --run. Default: campaigns/compare-<UTC time>."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="With --run: replaces the matrices'.")] = None,
    load_format: Format = LoadFormat.AUTO,
    device: Device = "auto",
    threshold: Annotated[
        float, typer.Option(metavar="PERCENT", help="Percent that still counts as SAME.")
    ] = 1.0,
    fail_on: Annotated[
        FailOn | None,
        typer.Option(help="Exit code 1 when a cell is slower or has lost its figure."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Compare unlike models, devices or work.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say of each cell whether B is the SAME, FASTER, SLOWER or AMBIGUOUS (too noisy to tell).

    With --run processes of A and B alternate, and neighbours are compared: on a busy machine too.
    """
    if run:
        from qwencli.bench.compare.compare_run import run_sides
        from qwencli.bench.plan.prepare import BenchRequest
        from qwencli.bench.plan.stopping import RepetitionOptions

        request = BenchRequest(
            matrix="",
            axes={"model": model},
            exclude=(),
            repetition=RepetitionOptions(runs=runs, processes=processes),
            max_new_tokens=None,
            prompt=None,
            images=(),
            seed=0,
            device=device,
            dtype=DType.AUTO,
            load_format=load_format,
            max_seq_len=None,
            quality_samples=0,
        )
        folder = out or Path("campaigns") / f"compare-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
        matrices = str(a), str(b)
        a, b = run_sides(request, matrices, folder, sys.argv[1:], context.ensure_object(Output))
    elif processes or runs or out or model:
        raise UsageError(
            "--processes, --runs, --out and --model go with --run", "add --run, or leave them out"
        )
    from qwencli.bench.compare.comparison import compare as compare_sides
    from qwencli.bench.compare.comparison_tables import comparison_document, comparison_table
    from qwencli.bench.compare.sides import read_side
    from qwencli.bench.storage.campaign_files import renamed_columns

    output = context.ensure_object(Output)
    if notice := renamed_columns(a, b):
        output.notice(notice)
    found = compare_sides(read_side(a), read_side(b), threshold=threshold / 100, force=force)
    if json:
        output.json_line(comparison_document(found))
    else:
        output.show(comparison_table(found))
    if fail_on is FailOn.SLOWER and found.got_slower:
        raise typer.Exit(1)
