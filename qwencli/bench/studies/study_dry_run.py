"""What a study will roughly cost, before anything is loaded: for `--dry-run`.

    process = start + loads x load + runs x (prompt + tokens x token) + what conditions add

Bandwidth, launch rate and start are measured here and now; the token is that of `bench.predict`,
the others are tables, so this is to plan by.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from qwencli.bench.plan.dry_run import duration
from qwencli.bench.plan.predict import MachineSpeed, predict
from qwencli.bench.studies.conditions import CONDITIONS
from qwencli.bench.studies.schedule import Process
from qwencli.bench.studies.study_plan import PreparedStudy
from qwencli.config import Cache, LoadFormat

if TYPE_CHECKING:
    from rich.console import RenderableType

# Seconds beside what `predict` counts: compiling once, and reading a prompt in each run.
COMPILE_S, PROMPT_S = 50.0, 0.1
# How much faster than from a disk random weights are there: what the loads of
# results/2026-11-23-h200-transformers leave after importing transformers.
RANDOM_FACTOR = 2.5


def predicted_s(study: PreparedStudy, process: Process, speed: MachineSpeed) -> float | None:
    """Seconds of one process; None where `predict` knows no speed."""
    plan = study.plan(process)
    found = predict(plan, process.cell, speed)
    if found.seconds is None or found.tok_per_s is None:
        return None
    runs = len(process.runs)
    answers_s = (runs + 1) * plan.settings.max_new_tokens / found.tok_per_s
    load_s = max(0.0, found.seconds - answers_s - speed.start_s)
    if plan.settings.load_format is LoadFormat.DUMMY:
        load_s /= RANDOM_FACTOR
    extra_s = sum(CONDITIONS[name].extra_s for name in process.runs) + PROMPT_S * runs
    compiling = COMPILE_S if process.cell.cache is Cache.STATIC_COMPILE else 0.0
    return found.seconds + (process.loads - 1) * load_s + extra_s + compiling


def planned_study(study: PreparedStudy, seconds: Mapping[str, float | None]) -> RenderableType:
    """The processes in their order, and the claims that cannot run here."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    processes = study.processes
    table = Table(title=f"{len(processes)} processes", box=SIMPLE_HEAD, title_justify="left")
    table.add_column("#", justify="right")
    for name in ("process", "claims"):
        table.add_column(name, overflow="fold")
    for name in ("runs", "loads", "time"):
        table.add_column(name, justify="right", no_wrap=True)
    for number, process in enumerate(processes, start=1):
        took = seconds[process.name]
        table.add_row(
            str(number),
            process.name,
            " ".join(process.claims),
            str(len(process.runs)),
            str(process.loads),
            duration(took),
        )
    total = duration(sum(took for took in seconds.values() if took is not None))
    lines = [f"all together about {total}; without what conditions themselves slow down"]
    lines += [f"{claim} cannot run here: {why}" for claim, why in study.layout.blocked.items()]
    return Group(table, *(Text(line, style="dim") for line in lines))
