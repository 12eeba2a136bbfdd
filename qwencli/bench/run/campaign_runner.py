"""Runs a campaign: fresh processes for each cell, in shuffled order, every row on disk at once."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from typing import Any

from qwencli.bench.attribution import whole_cell
from qwencli.bench.measure.telemetry import Sample, Telemetry
from qwencli.bench.plan.campaign_plan import Plan, dump_spec
from qwencli.bench.plan.matrix import BenchCell, cell_label
from qwencli.bench.report.tables import cell_summary
from qwencli.bench.run.campaign import Campaign
from qwencli.bench.run.campaign_progress import CampaignProgress, Moved, not_shown, time_left
from qwencli.bench.run.cooldown import NO_PAUSE, Cooldown, cool_down
from qwencli.bench.run.worker_process import Ending, WorkerProcess
from qwencli.config import EngineName
from qwencli.engine.machine.child_process import python_command
from qwencli.output import counted
from qwencli.tracing import Event, active, span

Say = Callable[[str], None]

_GOES_ON = ("ok", "skipped")
# Ended from outside: what was being measured can be had another time.
_TRY_AGAIN = ("killed", "timeout")


def worker_command() -> list[str]:
    return python_command("qwencli.bench.run.worker")


@dataclass(frozen=True)
class RunnerOptions:
    """How cells are run, as against what they do.

    Args:
        command: the worker process.
        sampler: the GPU sampler process; None = no telemetry.
        timeout_s: wall time of one process, loading included.
        cooldown: before each process but the first.
        continue_on_error: a cell that fails is a row and the others run; off, the campaign ends
            after that row, and can be resumed.
        limits: measure limits, and what probes cost, after the runs.
    """

    command: Sequence[str]
    sampler: Sequence[str] | None
    timeout_s: float
    cooldown: Cooldown = NO_PAUSE
    continue_on_error: bool = True
    limits: bool = True


def run_campaign(
    campaign: Campaign,
    options: RunnerOptions,
    say: Say,
    moved: Moved = not_shown,
    predicted_s: Mapping[str, float] | None = None,
) -> None:
    """Run all cells that are not over yet; `say` gets a line for each process.

    KeyboardInterrupt ends the worker and leaves every finished run on disk.

    Args:
        moved: told how far the campaign is.
        predicted_s: by cell_id, of all processes of one cell; None = cells are taken to be equally
            long.

    Raises:
        OutputError: rows cannot be written any more.
    """
    _add_skipped(campaign)
    with Telemetry(options.sampler) as telemetry:
        started = _make_references(campaign, options, say)
        processes = _planned_processes(campaign.plan)
        wanted = [planned for planned in processes if planned.is_needed(campaign, options)]
        weights = [planned.weight(campaign, predicted_s) for planned in wanted]
        progress = CampaignProgress(weights, moved, in_seconds=predicted_s is not None)
        for planned in processes:
            if not planned.is_needed(campaign, options):
                say(f"{planned.label}: already there")
                if planned in wanted:  # until another cell had what is its fate too
                    progress.skip()
                continue
            if started:
                cool_down(options.cooldown, telemetry.temperature_c)
            started = True
            say(planned.label + time_left(progress.left_s))
            status = _run_planned(campaign, planned, options, telemetry, say, progress)
            if status not in _GOES_ON and not options.continue_on_error:
                say("    ended here: --no-continue-on-error; go on with --resume")
                break
    if telemetry.unavailable:
        say(f"no GPU telemetry: {telemetry.unavailable}")


def run_in_turns(
    campaigns: Sequence[Campaign],
    options: RunnerOptions,
    say: Say,
    go_on: Callable[[], bool] = lambda: True,
    moved: Moved = not_shown,
    predicted_s: Mapping[str, float] | None = None,
) -> None:
    """Run campaigns process by process in turns, so that all meet the same machine.

    Their plans are the same, or have matching cells in the same places and one seed.

    Who begins changes with every process, there and back (a b, b a, ...): a steady drift of the
    machine then takes as much from one as from the other.

    Args:
        go_on: asked before each round of processes; once False, no more begin.
        predicted_s: as in `run_campaign`.

    Raises:
        OutputError: as `run_campaign`.
    """
    for campaign in campaigns:
        _add_skipped(campaign)
    rounds = _rounds(campaigns)
    wanted = [(c, p) for turn in rounds for c, p in turn if p.is_needed(c, options)]
    weights = [planned.weight(campaign, predicted_s) for campaign, planned in wanted]
    progress = CampaignProgress(weights, moved, in_seconds=predicted_s is not None)
    with Telemetry(options.sampler) as telemetry:
        for turn in rounds:
            if not go_on():
                say(f"{turn[0][1].label}: no time left")
                break
            for campaign, planned in turn:
                if planned.is_needed(campaign, options):
                    say(f"{planned.label}, {campaign.folder.name}{time_left(progress.left_s)}")
                    _run_planned(campaign, planned, options, telemetry, say, progress)
                elif (campaign, planned) in wanted:  # until another cell had what is its fate too
                    progress.skip()


def _rounds(campaigns: Sequence[Campaign]) -> list[list[tuple[Campaign, _PlannedProcess]]]:
    """Who runs what one after the other: a process of each campaign, there and back."""
    found: list[list[tuple[Campaign, _PlannedProcess]]] = []
    for processes in zip_longest(*(_planned_processes(campaign.plan) for campaign in campaigns)):
        both = zip(campaigns, processes, strict=True)
        turn = [(campaign, planned) for campaign, planned in both if planned]
        found.append(turn[::-1] if len(found) % 2 else turn)
    return found


def _add_skipped(campaign: Campaign) -> None:
    for cell in campaign.plan.cells:
        if cell.skip_reason and campaign.next_turn(cell):
            campaign.add_end(cell, "skipped", cell.skip_reason, None)


def _run_planned(
    campaign: Campaign,
    planned: _PlannedProcess,
    options: RunnerOptions,
    telemetry: Telemetry,
    say: Say,
    progress: CampaignProgress,
) -> str:
    """Run one process and say how it ended; returns its status."""
    progress.begin(planned.number, _runs_of(campaign, planned))
    with span(planned.label):
        ending, made = _run_process(campaign, planned, options, telemetry, progress)
    progress.end()
    over = whole_cell.of_process(made.runs, made.host, made.gpu, campaign.machine)
    say(f"    {cell_summary(ending.status, ending.reason, made.speeds, over)}")
    if ending.of_model and (alike := _end_alike(campaign, planned.cell, ending)):
        cells = counted(alike, "other cell")
        cell = planned.cell
        say(f"    the same for {cells} of {cell.model} with the {cell.engine} engine")
    return ending.status


def _end_alike(campaign: Campaign, cell: BenchCell, ending: Ending) -> int:
    """End the cells without runs whose process would find the same; returns how many.

    What transformers says of a model may be due to how it was to be quantized.
    """
    alike = [
        other
        for other in campaign.plan.cells
        if (other.model, other.engine) == (cell.model, cell.engine)
        and (cell.engine is EngineName.NATIVE or other.quantization == cell.quantization)
        and campaign.next_turn(other) is not None
        and not campaign.progress(other).runs
    ]
    for other in alike:
        campaign.add_end(other, ending.status, ending.reason, None)
    return len(alike)


def _make_references(campaign: Campaign, options: RunnerOptions, say: Say) -> bool:
    """Read the unquantized reference of each model that wants one; returns whether any was.

    One that cannot be made costs its cells the figure, and nothing else.
    """
    plan = campaign.plan
    open_cells = [
        cell
        for cell in plan.cells
        if not cell.skip_reason
        and (campaign.next_turn(cell) or "quality" in campaign.missing_checks(cell, limits=False))
    ]
    names = dict.fromkeys(cell.model for cell in open_cells)
    wanted = [n for n in names if plan.wants_reference(n) and campaign.reference(n) is None]
    for name in wanted:
        say(f"reference of {name}, for the divergence of its cells")
        log = campaign.folder / "logs" / "reference.log"
        spec = dump_spec(plan.reference_spec(name))
        with WorkerProcess(options.command, spec, log, options.timeout_s) as worker:
            for message in worker.messages():
                campaign.add_reference(name, message["rows"])
            ending = worker.ending
        if ending.status != "ok":
            say(f"    none: {ending.status}: {ending.reason}")
        if ending.status not in _TRY_AGAIN:
            campaign.reference_tried(name)
    return bool(wanted)


@dataclass(frozen=True)
class _PlannedProcess:
    """One process in the campaign's order."""

    cell: BenchCell
    turn: int
    number: str
    name: str

    @property
    def label(self) -> str:
        return f"{self.number} {self.name}"

    def weight(self, campaign: Campaign, predicted_s: Mapping[str, float] | None) -> float:
        """Its part of what is predicted for its cell; 1 where nothing is."""
        if not predicted_s or self.cell.cell_id not in predicted_s:
            return 1.0
        return predicted_s[self.cell.cell_id] / campaign.plan.settings.stop.processes

    def is_needed(self, campaign: Campaign, options: RunnerOptions) -> bool:
        turn = campaign.next_turn(self.cell)
        if turn is None:  # all runs are there; what follows them may not be
            missing = campaign.missing_checks(self.cell, limits=options.limits)
            return self.turn == campaign.plan.settings.stop.processes and bool(missing)
        return turn <= self.turn


def _planned_processes(plan: Plan) -> list[_PlannedProcess]:
    turns = plan.settings.stop.processes
    order = [
        (cell, turn)
        for turn in range(1, turns + 1)
        for cell in plan.order(turn)
        if not cell.skip_reason
    ]
    of_turns = f", process {{}} of {turns}" if turns > 1 else ""
    return [
        _PlannedProcess(
            cell, turn, f"[{n}/{len(order)}]", f"{cell_label(cell)}{of_turns.format(turn)}"
        )
        for n, (cell, turn) in enumerate(order, start=1)
    ]


def _runs_of(campaign: Campaign, planned: _PlannedProcess) -> int:
    """How many runs this process has to make; of a cell that goes on until it is steady, at
    least."""
    rule = campaign.plan.settings.stop.turn(planned.turn)
    return max(0, rule.min_runs - campaign.progress(planned.cell).runs)


@dataclass
class _Made:
    """Rows of the runs that one process has made, without warm-ups."""

    runs: list[dict[str, Any]] = field(default_factory=list)
    host: list[dict[str, Any]] = field(default_factory=list)
    gpu: list[dict[str, Any]] = field(default_factory=list)

    def add(self, cell: BenchCell, message: Mapping[str, Any], within: Sequence[Sample]) -> None:
        key = {"cell_id": cell.cell_id, "run": message["row"]["run"]}
        if message["row"]["run"]:
            self.runs.append({**key, **message["row"]})
            self.host += [{**key, **row} for row in message["host"]]
            self.gpu += [{**key, **sample} for sample in within]

    @property
    def speeds(self) -> list[float]:
        return [speed for row in self.runs if (speed := row["decode_tok_per_s"])]


def _run_process(
    campaign: Campaign,
    planned: _PlannedProcess,
    options: RunnerOptions,
    telemetry: Telemetry,
    progress: CampaignProgress,
) -> tuple[Ending, _Made]:
    cell, turn = planned.cell, planned.turn
    work = campaign.plan.worker_spec(cell, turn, campaign.progress(cell))
    checked = campaign.has_checks(cell, "quality")
    work = replace(
        work,
        roofline=options.limits and not campaign.has_checks(cell, "roofline"),
        quality_samples=0 if checked else work.quality_samples,
        reference=None if checked else campaign.reference(cell.model),
        purpose="post_run_checks" if campaign.next_turn(cell) is None else "runs",
        profile=active() is not None,
    )
    spec = dump_spec(work)
    lost = 0  # the run being made now: the warm-up comes first
    made = _Made()
    log, timeout_s = campaign.log_path(cell), options.timeout_s
    with WorkerProcess(options.command, spec, log, timeout_s, progress.tick) as worker:
        for message in worker.messages():
            if message["type"] == "rows":
                campaign.add_checks(cell, message["file"], message["rows"])
                continue
            if message["type"] == "sampler":
                telemetry.switch(on=message["on"])
                continue
            if message["type"] == "trace":
                _add_trace(planned, message["events"])
                continue
            if message["type"] == "probes":
                campaign.add_probes(cell, message["rows"], sampled=options.sampler is not None)
                continue
            before, within = telemetry.take(message["start_s"], message["end_s"])
            campaign.add_run(cell, message, before, within)
            lost = campaign.progress(cell).runs + 1
            made.add(cell, message, within)
            progress.step(_next_step(campaign, planned, made.speeds))
        ending = worker.ending
        whole = campaign.turn_made(cell, turn)
        if whole:
            _note_missing(campaign, cell, options, ending)
        if ending.status != "ok" and whole:
            # What went wrong came after the runs: they are measured and stand.
            return Ending("ok", f"after its runs: {ending.status}: {ending.reason}"), made
        if ending.status != "ok":
            skipped = ending.status == "skipped"
            campaign.add_end(cell, ending.status, ending.reason, None if skipped else lost)
    return ending, made


def _add_trace(planned: _PlannedProcess, events: Sequence[Sequence[Any]]) -> None:
    """Have a worker's events in groups of its own."""
    trace = active()
    if trace is not None:
        told = (Event(*each) for each in events)
        trace.add(each._replace(group=f"{planned.label}: {each.group}") for each in told)


def _next_step(campaign: Campaign, planned: _PlannedProcess, speeds: Sequence[float]) -> str:
    """What a worker does after a run."""
    if campaign.turn_made(planned.cell, planned.turn):
        return "checks after the runs"
    of_all = campaign.plan.settings.stop
    most = f" of {of_all.max_runs}" if of_all.max_noise is None else ""
    speed = f", {speeds[-1]:.1f} tok/s" if speeds else ""
    return f"run {campaign.progress(planned.cell).runs + 1}{most}{speed}"


def _note_missing(
    campaign: Campaign, cell: BenchCell, options: RunnerOptions, ending: Ending
) -> None:
    """Store why what was to be measured after the runs is not there, so that it is not tried for
    ever; unless the worker was ended from outside, which another try may not be."""
    if ending.status in _TRY_AGAIN:
        return
    model = cell.model
    for name in campaign.missing_checks(cell, limits=options.limits):
        reason = ending.reason
        if name == "quality" and campaign.plan.wants_reference(model):
            if campaign.reference(model) is None and not campaign.was_reference_tried(model):
                continue
            reason = reason or "there is no reference of the model"
        campaign.add_checks(cell, name, [{"reason": reason or "the worker gave no figures"}])
