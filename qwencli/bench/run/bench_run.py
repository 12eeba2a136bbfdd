"""A campaign from plan to printed table: what `qwencli bench` does once its options are read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qwencli.bench.measure.telemetry import sampler_command
from qwencli.bench.plan.campaign_plan import Plan
from qwencli.bench.plan.environment import environment, read_machine_speed
from qwencli.bench.plan.predict import (
    MachineSpeed,
    duration,
    planned_table,
    predict,
    predicted_seconds,
)
from qwencli.bench.report.campaign_report import build_report
from qwencli.bench.report.cell_statistics import CellRow
from qwencli.bench.report.tables import terminal_table
from qwencli.bench.run.campaign import Campaign
from qwencli.bench.run.campaign_progress import show_progress
from qwencli.bench.run.campaign_runner import RunnerOptions, run_campaign, worker_command
from qwencli.bench.run.cooldown import NO_PAUSE, Cooldown
from qwencli.config import LoadFormat
from qwencli.engine.machine.child_process import python_command
from qwencli.engine.machine.device import DeviceFacts
from qwencli.output import Output, counted

INTERRUPTED = 130  # what a shell reports for a program ended by Ctrl-C


@dataclass(frozen=True)
class RunSettings:
    """How the cells are run, as against what they do (see `RunnerOptions`).

    Args:
        limits: measure limits and what probes cost after the runs of each cell.
        slowdown_percent: make every token so much slower on purpose; None = not.
    """

    resume: bool
    timeout_s: float
    cooldown: Cooldown = NO_PAUSE
    continue_on_error: bool = True
    limits: bool = True
    slowdown_percent: float | None = None


def show_cells(plan: Plan, output: Output, *, limits: bool = True) -> None:
    """Print the cells in the order they would run with what each will cost, and the skipped ones.

    Args:
        limits: as in `RunSettings`.

    Raises:
        BenchError: torch does not load.
    """
    if plan.notice:
        output.notice(plan.notice)
    with output.status("measuring this machine"):
        speed = read_machine_speed(plan.settings.device)
    runs = [cell for cell in plan.cells if not cell.skip_reason]
    found = {cell.cell_id: predict(plan, cell, speed, limits=limits) for cell in runs}
    output.show(planned_table(plan.order(), found))


def run_bench(
    plan: Plan,
    facts: DeviceFacts,
    folder: Path,
    arguments: Sequence[str],
    output: Output,
    settings: RunSettings,
    command: Sequence[str] = (),
) -> int:
    """Run the campaign, write its tables, print them; returns the exit code.

    0 = every cell that can run here ran, its figures hold, and what was to be measured after its
    runs was; 1 = some did not; 130 = Ctrl-C, with the tables of what was finished.

    Args:
        command: the worker process; empty = the real one.
    """
    options = RunnerOptions(
        command=command or worker_command_for(settings.slowdown_percent),
        sampler=sampler_command(facts.uuid) if facts.kind == "cuda" else None,
        timeout_s=settings.timeout_s,
        cooldown=settings.cooldown,
        continue_on_error=settings.continue_on_error,
        limits=settings.limits,
    )
    _fetch_models(plan, output)
    interrupted = False
    about = environment(facts, arguments, plan.settings.seed)
    with Campaign(folder, plan, about, resume=settings.resume) as campaign:
        if plan.notice:
            output.notice(plan.notice)
        output.notice(f"campaign in {folder}")
        predicted_s = say_how_long([plan], HOW_LESS, output, limits=settings.limits)
        if campaign.repaired:
            output.warn(f"cut off {campaign.repaired} rows of a run that was not finished")
        try:
            with show_progress(output) as moved:
                run_campaign(campaign, options, output.notice, moved, predicted_s)
        except KeyboardInterrupt:
            interrupted = True
        rows = build_report(folder)
    output.show(terminal_table(rows))
    if interrupted:
        output.warn(f"interrupted; go on with --resume --out {folder}")
        return INTERRUPTED
    if cut_off := campaign.cut_off(limits=settings.limits):
        lack = "lacks" if len(cut_off) == 1 else "lack"
        output.warn(
            f"{counted(len(cut_off), 'cell')} {lack} what is measured after the runs; go on with "
            f"--resume --out {folder}"
        )
    return 0 if _holds(rows) and not cut_off else 1


def _fetch_models(plan: Plan, output: Output) -> None:
    """Download what is not on this machine yet: here once, not in the first process of each cell.

    Raises:
        ModelError: a model is not to be had, or no engine could load it.
    """
    from qwencli.models.hub import find_cached
    from qwencli.models.resolve import check_model, locate

    if plan.settings.load_format is LoadFormat.DUMMY:
        return
    for name in dict.fromkeys(cell.model for cell in plan.cells if not cell.skip_reason):
        spec = plan.models[name]
        if spec.path is None and spec.repo_id and find_cached(spec.repo_id) is None:
            output.notice(f"downloading {name}")
            locate(spec)
            check_model(spec, plan.settings.load_format)


# Predicted time from which it is said before the campaign starts.
LONG_S = 300.0
# Slower than any machine in use: what ends in time on it needs no prediction, which itself takes
# seconds to measure.
SLOW_MACHINE = MachineSpeed(read_bandwidth=4e9, launch_rate=5e4, start_s=4.0)


HOW_LESS = (
    "less with --matrix quick, fewer values of an axis (--quantization none), --exclude, --runs or "
    "--max-new-tokens; --dry-run shows each cell. Ctrl-C keeps what is done, --resume goes on"
)


def say_how_long(
    plans: Sequence[Plan], how_less: str, output: Output, *, limits: bool
) -> Mapping[str, float] | None:
    """Say what campaigns of more than LONG_S together will take, and how to make it less.

    Args:
        limits: as in `RunSettings`.

    Returns:
        Predicted seconds by cell_id, where they were worth predicting.
    """

    def predicted(speed: MachineSpeed) -> list[dict[str, float]]:
        return [predicted_seconds(plan, speed, limits=limits) for plan in plans]

    def together(found: Sequence[Mapping[str, float]]) -> float:
        return sum(sum(cells.values()) for cells in found)

    if together(predicted(SLOW_MACHINE)) < LONG_S:
        return None
    with output.status("measuring this machine"):
        found = predicted(read_machine_speed(plans[0].settings.device))
    if (seconds := together(found)) > LONG_S:
        cells = counted(sum(map(len, found)), "cell")
        output.notice(f"about {duration(seconds)} for {cells}; {how_less}")
    return {cell: seconds for cells_s in found for cell, seconds in cells_s.items()}


def worker_command_for(slowdown_percent: float | None) -> list[str]:
    """The command of a worker process, one that slows tokens down on purpose if asked to."""
    if slowdown_percent is None:
        return worker_command()
    return python_command("qwencli.bench.inject.slowdown_worker", str(slowdown_percent))


def _holds(rows: Sequence[CellRow]) -> bool:
    """Whether something ran, nothing broke, and no verdict is FAIL."""
    ran = [row for row in rows if row["status"] != "skipped"]
    return bool(ran) and all(
        row["status"] == "ok" and not (row["verdict"] or "").startswith("FAIL") for row in ran
    )
