"""How often cells are repeated, as the command line and the matrix say it, made into one rule."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

from qwencli.bench.plan.stopping import StopRule
from qwencli.bench.statistics.robust import MIN_RUNS
from qwencli.errors import UsageError

# Bounds of an adaptive cell where nobody names them. Five runs are the fewest whose interval holds
# the median with a probability above 90 % (see `robust.median_interval`).
LEAST_RUNS, MOST_RUNS = 5, 50
FIXED_RUNS = 5

# What only a number of runs that adapts has.
_ADAPTIVE = ("max_noise", "min_runs", "max_runs", "max_time_s")


@dataclass(frozen=True)
class Wanted:
    """Repetition as asked for; None = not said."""

    runs: int | None = None
    max_noise: float | None = None
    min_runs: int | None = None
    max_runs: int | None = None
    max_time_s: float | None = None
    processes: int | None = None

    def over(self, other: Wanted) -> Wanted:
        """This, and what it does not say from `other`; a fixed number drops what adapts."""
        said = {field.name: getattr(self, field.name) for field in fields(self)}
        merged = replace(other, **{key: value for key, value in said.items() if value is not None})
        if self.runs is not None:
            return replace(merged, **{name: said[name] for name in _ADAPTIVE})
        return replace(merged, runs=None) if self.max_noise is not None else merged


def stop_rule(wanted: Wanted) -> StopRule:
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
            f"--processes {processes}: there are only {rule.min_runs} runs to spread",
            "give each process at least one run",
        )
    return replace(rule, processes=processes)
