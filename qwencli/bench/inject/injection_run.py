"""A fault-injection campaign: one cell whose runs are disturbed on purpose, by a known schedule.

The folder is an ordinary campaign's, with truth.csv, confusion.csv and confusion.md beside.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from qwencli.bench.causes import Cause
from qwencli.bench.inject.confusion import NONE, TRUTH, Confusion, build_confusion
from qwencli.bench.inject.faults import check_names, choose
from qwencli.bench.measure.telemetry import sampler_command
from qwencli.bench.plan.campaign_plan import Plan
from qwencli.bench.plan.environment import environment
from qwencli.bench.plan.prepare import BenchRequest, prepare
from qwencli.bench.plan.stopping import StopRule
from qwencli.bench.report.campaign_report import build_report
from qwencli.bench.run.campaign import Campaign
from qwencli.bench.run.campaign_progress import show_progress
from qwencli.bench.run.campaign_runner import RunnerOptions, run_campaign
from qwencli.engine.machine.child_process import python_command
from qwencli.engine.machine.device import DeviceFacts
from qwencli.errors import BenchError
from qwencli.output import Output, counted

# Undisturbed runs for each disturbed one: what is usual in the cell must be the undisturbed run,
# and blame of undisturbed runs in a few percent must be countable.
CONTROLS = 1.5
# One disturbed run takes a fraction of a second more than others; a load takes the longest.
TIMEOUT_S = 3600.0


@dataclass(frozen=True)
class Injection:
    """What `bench inject` was asked for, beyond the campaign itself."""

    names: tuple[str, ...]
    trials: int
    seed: int


def schedule(causes: Sequence[Cause], trials: int, seed: int) -> list[str]:
    """The cause of each run from run 1 on, `none` for undisturbed ones; shuffled."""
    disturbed = [cause.value for cause in causes for _ in range(trials)]
    runs = disturbed + [NONE] * round(CONTROLS * len(disturbed))
    random.Random(seed).shuffle(runs)
    return runs


def inject(
    request: BenchRequest,
    injection: Injection,
    folder: Path,
    arguments: Sequence[str],
    output: Output,
) -> Confusion:
    """Measure, attribute, and compare with what was done.

    Args:
        request: a campaign of which the first cell that can run here is taken.

    Raises:
        UsageError: a cause that is none, or that cannot be injected here.
        BenchError: no cell can run here, or the folder is not new.
    """
    check_names(injection.names)
    plan, facts = prepare(request)
    command = python_command("qwencli.bench.inject.injection_worker")
    return run_injection(plan, facts, injection, folder, arguments, output, command)


def run_injection(
    plan: Plan,
    facts: DeviceFacts,
    injection: Injection,
    folder: Path,
    arguments: Sequence[str],
    output: Output,
    command: Sequence[str],
) -> Confusion:
    """As `inject`, with the plan made; `command` is the worker without its arguments."""
    causes, blocked = choose(injection.names, facts.device)
    for cause, reason in blocked.items():
        output.notice(f"not injected: {cause}: {reason}")
    planned = schedule(causes, injection.trials, injection.seed)
    plan = _one_cell(plan, planned)
    options = RunnerOptions(
        command=[*command, str(folder / TRUTH), str(injection.seed), ",".join(planned)],
        sampler=_sampler(facts),
        timeout_s=TIMEOUT_S,
    )
    about = environment(facts, arguments, plan.settings.seed)
    with Campaign(folder, plan, about, resume=False) as campaign:
        if plan.notice:
            output.notice(plan.notice)
        output.notice(
            f"{counted(len(planned), 'run')}, {planned.count(NONE)} of them undisturbed, in "
            f"{folder}"
        )
        with show_progress(output) as moved:
            run_campaign(campaign, options, output.notice, moved)
    (row,) = build_report(folder)
    if row["status"] != "ok":
        output.warn(f"counted as far as it went: {row['status']}: {row['reason']}")
    return build_confusion(folder)


def _sampler(facts: DeviceFacts) -> list[str] | None:
    return sampler_command(facts.uuid) if facts.kind == "cuda" else None


def _one_cell(plan: Plan, planned: Sequence[str]) -> Plan:
    cell = next((cell for cell in plan.cells if not cell.skip_reason), None)
    if cell is None:
        raise BenchError(f"no cell can run here: {plan.cells[0].skip_reason}")
    reloads = tuple(run for run, name in enumerate(planned, 1) if name == Cause.RELOAD)
    stop = StopRule(len(planned), len(planned))
    settings = replace(plan.settings, stop=stop, reload_before=reloads)
    return replace(plan, cells=(cell,), settings=settings)
