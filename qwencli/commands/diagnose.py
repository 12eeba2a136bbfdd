"""`qwencli diagnose`: what is wrong with this machine, the evidence, and the fix."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from qwencli.config import LoadFormat
from qwencli.errors import UsageError
from qwencli.output import Output

app = typer.Typer(invoke_without_command=True, no_args_is_help=False)


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


@app.callback()
def diagnose(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do no work on the GPU.")] = False,
    deep: Annotated[
        bool, typer.Option("--deep", help="Also run the real engine for a short time.")
    ] = False,
    only: Annotated[
        str | None, typer.Option(metavar="LIST", help="Run these checks or groups alone.")
    ] = None,
    skip: Annotated[
        str | None, typer.Option(metavar="LIST", help="Leave these checks or groups out.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="What the advice is for.")
    ] = None,
    load_format: Annotated[
        LoadFormat | None,
        typer.Option(
            metavar="NAME",
            help="Of --deep: auto or dummy. Default: dummy unless the model is downloaded.",
        ),
    ] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Write a page without names and paths, for an issue."),
    ] = None,
    apply: Annotated[
        bool, typer.Option("--apply", help="Write the recommended settings to your config.toml.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Let --apply write unasked.")] = False,
) -> None:
    """Check this machine: each finding with its evidence and the fix.

    The exit code is 1 when a check fails.
    """
    if context.invoked_subcommand:
        return
    if quick and deep:
        raise UsageError("--quick and --deep exclude each other", "give one of them")
    from qwencli.commands.diagnosis import apply_advice, chosen_model, engine_work, write_report
    from qwencli.diagnostics import live
    from qwencli.diagnostics.advice import advise
    from qwencli.diagnostics.check_table import run_check, select
    from qwencli.diagnostics.finding import Level, Status
    from qwencli.diagnostics.record import record
    from qwencli.diagnostics.report import document, text, verdict

    output = context.ensure_object(Output)
    level = Level.QUICK if quick else Level.DEEP if deep else Level.DEFAULT
    checks = select(level, _names(only), _names(skip))
    spec = chosen_model(model)
    with (
        output.status("looking at this machine"),
        live.LiveMachine(spec, engine_work(spec, load_format)) as machine,
    ):
        results = [(check, run_check(check, machine)) for check in checks]
        advice = advise(machine)
        recorded = record(machine) if json or report else {}
    if report is not None:
        write_report(report, results, advice, recorded)
        output.notice(f"wrote {report}; look at it before you paste it")
    if json:
        output.json_line(document(results, advice, recorded))
    else:
        output.show(text(results, advice))
    if apply:
        apply_advice(advice, output, default=model is not None, ask=not yes)
    if verdict(results) is Status.FAIL:
        raise typer.Exit(1)


@app.command()
def explain(
    context: typer.Context,
    campaign: Annotated[Path, typer.Argument(metavar="CAMPAIGN", help="A campaign's folder.")],
    json: Annotated[bool, typer.Option("--json", help="One JSON object a finding.")] = False,
) -> None:
    """Say in words what a bench campaign shows, each sentence with its figure."""
    from dataclasses import asdict

    from qwencli.bench.report.explain import explain_campaign, explained_text
    from qwencli.bench.storage.campaign_files import renamed_columns

    output, findings = context.ensure_object(Output), explain_campaign(campaign)
    if notice := renamed_columns(campaign):
        output.notice(notice)
    if not json:
        output.show(explained_text(findings))
        return
    for finding in findings:
        output.json_line(asdict(finding))
