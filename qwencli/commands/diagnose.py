"""`qwencli diagnose`: what is wrong with this machine, the evidence, and the fix."""

from __future__ import annotations

from typing import Annotated

import typer

from qwencli.output import Sink


def _names(text: str | None) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()] if text else []


def diagnose(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Do no work on the GPU.")] = False,
    only: Annotated[
        str | None, typer.Option(metavar="LIST", help="Run these checks or groups alone.")
    ] = None,
    skip: Annotated[
        str | None, typer.Option(metavar="LIST", help="Leave these checks or groups out.")
    ] = None,
) -> None:
    """Check this machine: each finding with its evidence and the fix.

    The exit code is 1 when a check fails.
    """
    from qwencli.diagnostics.finding import Level, Status
    from qwencli.diagnostics.machine import LiveMachine
    from qwencli.diagnostics.recommend import recommend
    from qwencli.diagnostics.report import document, text, verdict
    from qwencli.diagnostics.table import run_check, select

    sink = context.ensure_object(Sink)
    checks = select(Level.QUICK if quick else Level.DEFAULT, _names(only), _names(skip))
    machine = LiveMachine()
    with sink.status("looking at this machine"):
        results = [(check, run_check(check, machine)) for check in checks]
        recommended = recommend(machine)
    if json:
        sink.json_line(document(results, recommended))
    else:
        sink.show(text(results, recommended))
    if verdict(results) is Status.FAIL:
        raise typer.Exit(1)
