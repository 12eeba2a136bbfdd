"""`qwencli ps` and `qwencli stop`: the engine that stays loaded between commands."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from qwencli.output import Output, counted


def ps(
    context: typer.Context,
    json: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show the model that is kept loaded, and for how long."""
    from qwencli.server.resident import status

    output = context.ensure_object(Output)
    there = status()
    if json:
        output.json_line({} if there is None else asdict(there))
        return
    if there is None:
        output.notice("no model is kept loaded")
        return
    size = "-" if there.memory_bytes is None else f"{there.memory_bytes / 1e9:.1f} GB"
    ends = f"ends in {_time(there.until_s)} without requests"
    doing = f"answers {counted(there.running, 'request')}" if there.running else ends
    name = there.model or "no model"
    output.answer(f"{name}  {there.device or '-'}  {size}  {doing}  (process {there.pid})")


def stop(context: typer.Context) -> None:
    """End the engine that is kept loaded; its memory is free at once."""
    from qwencli.server.resident import stop as end

    output = context.ensure_object(Output)
    ended = end()
    if ended is None:
        output.notice("no model is kept loaded")
    else:
        output.notice(f"stopped (process {ended.pid}, {ended.model or 'no model'})")


def _time(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
