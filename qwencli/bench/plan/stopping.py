"""When a cell has enough runs: after a fixed number, or when its median is known well enough.

One pure rule, asked by the worker after each run, by the campaign when it resumes, and by the
report: what stopped a cell can always be told again from the raw rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from enum import StrEnum
from typing import Any

from qwencli.bench.statistics.robust import MIN_RUNS, median_interval
from qwencli.errors import UsageError
from qwencli.output import counted

RawRow = Mapping[str, str]
# Bounds of an adaptive cell where nobody names them. Five runs are the fewest whose interval holds
# the median with a probability above 90 % (see `robust.median_interval`).
LEAST_RUNS, MOST_RUNS = 5, 50
FIXED_RUNS = 5

# What only a number of runs that adapts has.
_ADAPTIVE = ("max_noise", "min_runs", "max_runs", "max_time_s")


class StopReason(StrEnum):
    """Why a cell has no more runs. The words stand in cells.csv."""

    RUNS = "runs"
    NOISE = "max-noise"
    MAX_RUNS = "max-runs"
    TIME = "max-time"


@dataclass(frozen=True)
class StopRule:
    """How many runs a cell gets, over all of its processes.

    Args:
        min_runs, max_runs: equal for a fixed number.
        max_noise: percent; enough once half the width of the 95 % interval of the median decode
            speed is at most this share of the median. None = a fixed number of runs.
        max_time_s: of loading and generating; no run after the fewest begins once it is spent.
        processes: fresh processes the runs are spread over, in turns.
    """

    min_runs: int
    max_runs: int
    max_noise: float | None = None
    max_time_s: float | None = None
    processes: int = 1

    def turn(self, number: int) -> TurnRule:
        """What the cell must have reached when process `number` (from 1) ends."""
        part = number / self.processes
        return TurnRule(
            # A fixed number is split by the sums alone: a resumed cell makes no run too many.
            own_runs=1 if self.max_noise is None else max(1, self.min_runs // self.processes),
            min_runs=-(-self.min_runs * number // self.processes),
            max_runs=-(-self.max_runs * number // self.processes),
            max_noise=self.max_noise,
            max_time_s=None if self.max_time_s is None else self.max_time_s * part,
        )


@dataclass(frozen=True)
class Progress:
    """What a cell has so far; warm-ups count in `spent_s` alone.

    Args:
        speeds: decode tokens per second of the measured runs that have one.
        spent_s: loading and generating.
        process_runs: measured runs of each process.
    """

    speeds: tuple[float, ...] = ()
    spent_s: float = 0.0
    process_runs: tuple[int, ...] = ()

    @property
    def runs(self) -> int:
        return sum(self.process_runs)

    def plus(self, row: Mapping[str, Any]) -> Progress:
        """With one more row of runs.csv, as a worker sends it or as text. Each warm-up begins a
        process; rows of runs that did not end change nothing."""
        if row["status"] not in ("ok", "warmup"):
            return self
        spent_s = self.spent_s + sum(float(row.get(name) or 0) for name in ("load_s", "e2e_s"))
        if row["status"] == "warmup":
            return Progress(self.speeds, spent_s, (*self.process_runs, 0))
        *others, last = self.process_runs or (0,)
        speed = row.get("decode_tok_per_s")
        speeds = (*self.speeds, float(speed)) if speed else self.speeds
        return Progress(speeds, spent_s, (*others, last + 1))


@dataclass(frozen=True)
class TurnRule:
    """A `StopRule` up to the end of one process.

    A cell's processes take turns with those of other cells: turn 2 is the second process of each.
    `own_runs` is the least that each process makes.
    """

    own_runs: int
    min_runs: int
    max_runs: int
    max_noise: float | None = None
    max_time_s: float | None = None

    def reached(self, progress: Progress, own_runs: int) -> StopReason | None:
        """The condition that is met, or None: one more run.

        Args:
            own_runs: measured runs of the process in question.
        """
        if own_runs < self.own_runs or progress.runs < self.min_runs:
            return None
        if self.max_noise is None:
            return StopReason.RUNS
        noise = noise_percent(progress.speeds)
        if noise is not None and noise <= self.max_noise:
            return StopReason.NOISE
        if progress.runs >= self.max_runs:
            return StopReason.MAX_RUNS
        if self.max_time_s is not None and progress.spent_s >= self.max_time_s:
            return StopReason.TIME
        return None


def noise_percent(speeds: Sequence[float]) -> float | None:
    """Half the width of the median's 95 % interval, in percent of it; None below three runs."""
    interval = median_interval(speeds)
    if interval is None or interval.estimate <= 0:
        return None
    return 100 * (interval.high - interval.low) / 2 / interval.estimate


def turn_over(rule: StopRule, number: int, progress: Progress) -> StopReason | None:
    """Why process `number` of a cell need not run (any more), or None.

    A process that made no measured run does not count as one.
    """
    turn = rule.turn(number)
    if sum(runs > 0 for runs in progress.process_runs) < number:
        return None
    return turn.reached(progress, turn.own_runs)


def next_turn(rule: StopRule, progress: Progress) -> int | None:
    """Number of the first process still wanted; None when the cell has enough."""
    turns = range(1, rule.processes + 1)
    return next((turn for turn in turns if turn_over(rule, turn, progress) is None), None)


def stop_reason(rule: StopRule, progress: Progress) -> StopReason | None:
    """What ended the cell; None while it is not over."""
    if next_turn(rule, progress) is not None:
        return None
    return turn_over(rule, rule.processes, progress)


def progress_of(rows: Iterable[RawRow]) -> Progress:
    """From the rows of one cell in runs.csv, in their order."""
    progress = Progress()
    for row in rows:
        progress = progress.plus(row)
    return progress


def document(rule: StopRule) -> dict[str, Any]:
    """The rule as plan.json holds it, beside its `runs`."""
    return {
        "min_runs": rule.min_runs,
        "max_noise_percent": rule.max_noise,
        "max_time_s": rule.max_time_s,
        "processes": rule.processes,
    }


def rule_of(plan: Mapping[str, Any]) -> StopRule:
    """The rule in a plan.json; campaigns from before there was one made a fixed number of runs."""
    stop = plan.get("stop") or {}
    return StopRule(
        min_runs=stop.get("min_runs", plan["runs"]),
        max_runs=plan["runs"],
        max_noise=stop.get("max_noise_percent"),
        max_time_s=stop.get("max_time_s"),
        processes=stop.get("processes", 1),
    )


def repetition(rule: StopRule, tokens: int) -> str:
    """In words: "5 runs of 128 tokens", and what ends an adaptive cell."""
    words = f"{counted(rule.max_runs, 'run')} of {counted(tokens, 'token')}"
    if rule.processes > 1:
        words += f" in {counted(rule.processes, 'process', 'processes')}"
    if rule.max_noise is None:
        return words
    return f"{rule.min_runs} to {words}, until the speed is known within {rule.max_noise:g} %"


@dataclass(frozen=True)
class RepetitionOptions:
    """Repetition as asked for; None = not said."""

    runs: int | None = None
    max_noise: float | None = None
    min_runs: int | None = None
    max_runs: int | None = None
    max_time_s: float | None = None
    processes: int | None = None

    def over(self, other: RepetitionOptions) -> RepetitionOptions:
        """This, and what it does not say from `other`; a fixed number drops what adapts."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        merged = replace(other, **{key: value for key, value in said.items() if value is not None})
        if self.runs is not None:
            return replace(merged, **{name: said[name] for name in _ADAPTIVE})
        return replace(merged, runs=None) if self.max_noise is not None else merged


def stop_rule(wanted: RepetitionOptions) -> StopRule:
    """Check and complete what was asked for.

    Raises:
        UsageError: options that contradict each other.
    """
    processes = wanted.processes or 1
    if wanted.max_noise is None:
        for name in _ADAPTIVE[1:]:
            if getattr(wanted, name) is not None:
                flag = "--" + name.removesuffix("_s").replace("_", "-")
                raise UsageError(f"{flag} goes with --max-noise", "add --max-noise, or give --runs")
        rule = StopRule(wanted.runs or FIXED_RUNS, wanted.runs or FIXED_RUNS)
    else:
        if wanted.runs is not None:
            raise UsageError(
                "--runs and --max-noise exclude each other", "bound them by --min-runs, --max-runs"
            )
        if not wanted.max_noise > 0:
            raise UsageError(
                f"--max-noise {wanted.max_noise:g} is not above zero", "give a percentage: 1, say"
            )
        least = wanted.min_runs or min(LEAST_RUNS, wanted.max_runs or LEAST_RUNS)
        most = wanted.max_runs or max(MOST_RUNS, least)
        if least < MIN_RUNS:
            raise UsageError(
                f"an interval needs {MIN_RUNS} runs, not {least}",
                f"give --min-runs {MIN_RUNS} or more, and --max-runs not below it",
            )
        if least > most:
            raise UsageError(
                f"--min-runs {least} is above --max-runs {most}", "lower one or raise the other"
            )
        rule = StopRule(least, most, wanted.max_noise, wanted.max_time_s)
    if processes > rule.min_runs:
        raise UsageError(
            f"--processes {processes}: {counted(rule.min_runs, 'run')} cannot be spread over them",
            "give each process at least one run",
        )
    return replace(rule, processes=processes)
