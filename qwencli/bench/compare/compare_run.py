"""Measures two matrices in turns, to be compared: what `bench compare --run A.toml B.toml` does.

A machine that is busy, or drifts, is another one a minute later. Processes of A and B alternate, so
that each pair of neighbours met the same, and only what differs within pairs is judged.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from qwencli.bench.compare.sides import IN_TURNS
from qwencli.bench.measure.telemetry import sampler_command
from qwencli.bench.plan.environment import environment
from qwencli.bench.plan.prepare import BenchRequest, prepare
from qwencli.bench.plan.stopping import RepetitionOptions
from qwencli.bench.report.campaign_report import build_report
from qwencli.bench.run.bench_run import say_how_long, worker_command_for
from qwencli.bench.run.campaign import Campaign
from qwencli.bench.run.campaign_progress import show_progress
from qwencli.bench.run.campaign_runner import RunnerOptions, run_in_turns
from qwencli.errors import BenchError
from qwencli.output import Output, counted

# By ranks, eight pairs are the fewest that can show a change; two more let one of them be wrong.
PROCESSES, RUNS_EACH = 10, 5
TIMEOUT_S = 1800.0
HOW_LESS = "less with fewer cells in the matrices, --processes (8 or more show a change) or --runs"


def run_sides(
    request: BenchRequest,
    matrices: tuple[str, str],
    folder: Path,
    arguments: Sequence[str],
    output: Output,
    command: Sequence[str] = (),
) -> tuple[Path, Path]:
    """Measure both matrices in turns into FOLDER/a and FOLDER/b, and write their reports.

    Args:
        request: what both have in common; its matrix is not looked at.
        command: the worker process; empty = the real one.

    Raises:
        UsageError, BenchError, InputError, ModelError, DeviceError: as `prepare`; or the matrices
            have not equally many cells that can run here.
    """
    processes = request.repetition.processes or PROCESSES
    runs = request.repetition.runs or RUNS_EACH * processes
    request = replace(request, repetition=RepetitionOptions(runs=runs, processes=processes))
    (plan_a, facts), (plan_b, _) = (prepare(replace(request, matrix=matrix)) for matrix in matrices)
    able = [[cell for cell in plan.cells if not cell.skip_reason] for plan in (plan_a, plan_b)]
    if not able[0] or len(able[0]) != len(able[1]):
        raise BenchError(
            f"{counted(len(able[0]), 'cell')} of {matrices[0]} can run here and {len(able[1])} of "
            f"{matrices[1]}: they cannot take turns",
            "give two matrices with as many cells, in the same order",
        )
    options = RunnerOptions(
        command=command or worker_command_for(None),
        sampler=sampler_command(facts.uuid) if facts.kind == "cuda" else None,
        timeout_s=TIMEOUT_S,
        limits=False,
    )
    about = environment(facts, arguments, request.seed)
    about[IN_TURNS] = f"{time.time_ns():x}"
    sides = folder / "a", folder / "b"
    with ExitStack() as stack:
        campaigns = [
            stack.enter_context(
                Campaign(side, replace(plan, cells=tuple(cells)), about, resume=False)
            )
            for side, plan, cells in zip(sides, (plan_a, plan_b), able, strict=True)
        ]
        output.notice(f"campaigns in {sides[0]} and {sides[1]}")
        plans = [campaign.plan for campaign in campaigns]
        predicted_s = say_how_long(plans, HOW_LESS, output, limits=options.limits)
        with show_progress(output) as moved:
            run_in_turns(campaigns, options, output.notice, moved=moved, predicted_s=predicted_s)
    for side in sides:
        build_report(side)
    return sides
