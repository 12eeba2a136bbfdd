"""`qwencli bench study`: settle claims about speed by controlled experiments."""

from __future__ import annotations

import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated

import typer

from qwencli.config import DType, LoadFormat
from qwencli.errors import UsageError
from qwencli.output import Output

LIST = "LIST"


def study(
    context: typer.Context,
    claim: Annotated[
        list[str] | None, typer.Argument(metavar="[CLAIM]...", help="LIST, ALL, or C05, say.")
    ] = None,
    claims: Annotated[
        str | None, typer.Option(metavar="LIST", help="The same as a comma list.")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A name or a folder.")] = None,
    load_format: Annotated[LoadFormat, typer.Option(help="dummy: random weights.")] = (
        LoadFormat.AUTO
    ),
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N or mps.")] = "auto",
    dtype: Annotated[DType, typer.Option(help="Of weights that are not quantized.")] = DType.AUTO,
    runs: Annotated[
        int | None, typer.Option(min=3, help="Of each condition in each process. Default: 5.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=8, help="Tokens of each run. Default: 48.")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="3 runs of 16 tokens.")] = False,
    max_time: Annotated[
        float | None, typer.Option(metavar="SECONDS", min=1.0, help="No process begins after it.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Default: campaigns/study-<UTC time>.")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with the one in --out.")] = False,
    part: Annotated[
        str, typer.Option(metavar="I/N", help="Deal the processes out to N GPUs; make part I.")
    ] = "1/1",
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the processes, run nothing.")
    ] = False,
    share: Annotated[
        bool, typer.Option("--share", help="Afterwards write one redacted archive to send.")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the order of processes and runs.")] = 0,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", min=1.0, help="Of one process, loading included.")
    ] = 1800.0,
) -> None:
    """Settle claims about speed, each by a controlled experiment with its rule fixed beforehand.

    One factor varies at a time, in turns within one process where that is possible. Verdicts:
    supported, refuted, not reproduced here, cannot run here. Writes verdicts.csv and report.md.
    """
    from qwencli.bench.studies import study_plan as plan
    from qwencli.bench.studies import study_run as session
    from qwencli.bench.studies.claim_file import choose
    from qwencli.bench.studies.study_report import claims_table

    output = context.ensure_object(Output)
    named = [*(claim or ()), *([claims] if claims else ())]
    if [name.upper() for name in named] == [LIST]:
        output.show(claims_table())
        return
    if resume and out is None:
        raise UsageError("--resume needs --out DIR", "name the study's folder")
    studies = choose(named)
    from qwencli.bench.plan.environment import read_device_facts

    number, parts = _read_part(part)
    request = plan.StudyRequest(
        model=model,
        load_format=load_format,
        device=device,
        dtype=dtype,
        runs=runs or (plan.QUICK_RUNS if quick else plan.DEFAULT_RUNS),
        max_new_tokens=max_new_tokens or (plan.QUICK_TOKENS if quick else plan.DEFAULT_TOKENS),
        seed=seed,
        max_time_s=max_time,
        timeout_s=timeout,
        part=number,
        parts=parts,
    )
    with output.status("reading the claims and this machine"):
        prepared = plan.prepare_study(studies, request, read_device_facts(device))
    if dry_run:
        session.show_plan(prepared, output)
        return
    folder = out or Path("campaigns") / f"study-{datetime.now(UTC):%Y%m%dT%H%M%SZ}"
    code = session.run_and_report(prepared, folder, sys.argv[1:], output, resume=resume)
    if share:
        from qwencli.bench.studies.study_report import share as pack
        from qwencli.diagnostics.redact import redact, this_owner

        owner = this_owner()
        output.notice(f"to send: {pack(folder, lambda text: redact(text, owner))}")
    raise typer.Exit(code)


def _read_part(text: str) -> tuple[int, int]:
    number, _, parts = text.partition("/")
    if not (number.isdecimal() and parts.isdecimal() and 1 <= int(number) <= int(parts)):
        raise UsageError(f"--part {text}: not a part of a whole", "give 1/2 and 2/2, say")
    return int(number), int(parts)
