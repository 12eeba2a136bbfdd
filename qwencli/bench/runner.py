"""Runs a campaign: one fresh process a cell, in shuffled order, every row on disk at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from qwencli.bench import spec as wire
from qwencli.bench.campaign import Campaign
from qwencli.bench.matrix import BenchCell
from qwencli.bench.process import Ending, WorkerProcess
from qwencli.bench.tables import cell_label, cell_summary
from qwencli.bench.telemetry import Telemetry
from qwencli.engine.child_process import python_command

Say = Callable[[str], None]


def worker_command() -> list[str]:
    return python_command("qwencli.bench.worker")


@dataclass(frozen=True)
class RunnerOptions:
    """How cells are run, as against what they do.

    Args:
        command: the worker process.
        sampler: the GPU sampler process; None = no telemetry.
        timeout_s: wall time of one cell, loading included.
    """

    command: Sequence[str]
    sampler: Sequence[str] | None
    timeout_s: float


def run_campaign(campaign: Campaign, options: RunnerOptions, say: Say) -> None:
    """Run all cells that are not over yet; `say` gets a line of progress for each.

    A cell that fails is a row and never stops the others. KeyboardInterrupt ends the worker and
    leaves every finished run on disk.

    Raises:
        OutputError: rows cannot be written any more.
    """
    for cell in campaign.plan.cells:
        if cell.skip_reason and campaign.next_run(cell):
            campaign.add_end(cell, "skipped", cell.skip_reason, None)
    order = [cell for cell in campaign.plan.order() if not cell.skip_reason]
    with Telemetry(options.sampler) as telemetry:
        for number, cell in enumerate(order, start=1):
            first_run = campaign.next_run(cell)
            label = f"[{number}/{len(order)}] {cell_label(cell)}"
            if first_run is None:
                say(f"{label}: already there")
                continue
            say(label)
            ending, speeds = _run_cell(campaign, cell, first_run, options, telemetry)
            say(f"    {cell_summary(ending.status, ending.reason, speeds)}")
    if telemetry.unavailable:
        say(f"no GPU telemetry: {telemetry.unavailable}")


def _run_cell(
    campaign: Campaign,
    cell: BenchCell,
    first_run: int,
    options: RunnerOptions,
    telemetry: Telemetry,
) -> tuple[Ending, list[float]]:
    spec = wire.dumps(campaign.plan.worker_spec(cell, first_run))
    lost = 0  # the run being made now: the warm-up comes first
    speeds: list[float] = []
    with WorkerProcess(options.command, spec, campaign.log_path(cell), options.timeout_s) as worker:
        for message in worker.messages():
            if message["type"] == "sampler":
                telemetry.switch(on=message["on"])
                continue
            if message["type"] == "probes":
                campaign.add_probes(cell, message["rows"], sampled=options.sampler is not None)
                continue
            before, within = telemetry.take(message["start_s"], message["end_s"])
            campaign.add_run(cell, message, before, within)
            run = message["row"]["run"]
            lost = run + 1 if run else first_run
            if run and message["row"]["decode_tok_per_s"]:
                speeds.append(message["row"]["decode_tok_per_s"])
        ending = worker.ending
        if ending.status != "ok":
            skipped = ending.status == "skipped"
            campaign.add_end(cell, ending.status, ending.reason, None if skipped else lost)
    return ending, speeds
