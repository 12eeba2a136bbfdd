"""What the rows of one cell show, as tables of small rules: (sentence, figure)."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Sequence

from qwencli.bench.attribution.whole_cell import over_limits
from qwencli.bench.causes import MEANINGS, Cause
from qwencli.bench.report.cell_statistics import CellRows, RawRow
from qwencli.bench.report.machine_rules import MACHINE_RULES, Sentences
from qwencli.bench.statistics.robust import is_unstable, run_ratio
from qwencli.bench.statistics.slow_tokens import FACTOR, run_limit_ms
from qwencli.output import counted

# How the sentence about runs that are far apart begins.
DIFFER = "identical runs differ"
# A share of the first token: below it is nothing to speak of.
LONG_FIRST_TOKEN_SHARE = 0.2


def speed(data: CellRows) -> Sentences:
    speeds = data.numbers("decode_tok_per_s")
    if not speeds:
        return
    if over_limits(data.cell):
        what = f"decodes {min(speeds):.1f} to {max(speeds):.1f} tok/s on a machine that was busy"
        yield what, counted(len(speeds), "run")
        return
    if is_unstable(run_ratio(speeds)):  # `differing_runs` says what they are
        return
    share = data.cell.get("mbu_percent")
    what = f"decodes {statistics.median(speeds):.1f} tok/s"
    if share:
        what += f", reading memory at {float(share):.0f}% of its bandwidth"
    yield (
        what,
        f"median of {counted(len(speeds), 'run')}, {min(speeds):.1f} to {max(speeds):.1f} tok/s",
    )


def differing_runs(data: CellRows) -> Sentences:
    speeds = data.numbers("decode_tok_per_s")
    ratio = run_ratio(speeds)
    if is_unstable(ratio):
        yield (
            f"{DIFFER} {ratio:.2f}x in decode speed, so no single figure may be quoted",
            f"fastest {max(speeds):.1f}, slowest {min(speeds):.1f} tok/s",
        )


def disturbed(data: CellRows) -> Sentences:
    """What slowed the whole cell down, each with its limit."""
    for over in over_limits(data.cell):
        yield (
            f"{over.words}, so its figure may not be quoted",
            f"{over.percent:.1f}%, the limit is {over.limit.percent:g}%",
        )


def first_runs(data: CellRows) -> Sentences:
    for first in data.steady.first_runs if data.steady else ():
        if first.differs:
            name = "the warm-up" if first.run == 0 else f"run {first.run}"
            # A machine that was taken away after the first run makes that one look odd.
            said = (
                f"{name} is slower than the later runs"
                if first.ratio < 1
                else f"the later runs are slower than {name}"
            )
            yield said, f"{name} at {first.ratio:.2f} of their median speed"


def levels(data: CellRows) -> Sentences:
    found = data.steady.stationarity if data.steady else None
    if found is None:
        return
    for step in found.steps:
        ratio = "" if step.ratio is None else f"{step.ratio:.2f} times the speed before, "
        yield (
            f"the speed changes for good before measured run {step.index + 1}",
            f"{ratio}p = {step.p_value:.3f}",
        )
    if found.kind == "drift" and found.drift is not None:
        yield (
            f"the speed {'rises' if found.drift.slope > 0 else 'falls'} from run to run",
            f"{found.drift.slope:+.2f} tok/s a run, p = {found.drift.p_value:.3f}",
        )


def variance(data: CellRows) -> Sentences:
    shares = data.steady.shares if data.steady else None
    if shares is None:
        return
    named = {
        "between processes": shares.between_processes,
        "between runs of one process": shares.between_runs,
        "within runs": shares.within_run,
    }
    known = {name: share for name, share in named.items() if share is not None}
    if len(known) < 2:
        return
    largest = max(known, key=lambda name: known[name])
    figure = ", ".join(f"{share:.0%} {name}" for name, share in known.items())
    yield f"tokens differ in time mostly {largest}", figure


def stalls(data: CellRows) -> Sentences:
    by_run: dict[str, list[tuple[float, RawRow]]] = {row["run"]: [] for row in data.measured}
    for token in data.tokens:
        if token["itl_ms"] and token["run"] in by_run:
            by_run[token["run"]].append((float(token["itl_ms"]), token))
    found: list[tuple[float, float, RawRow]] = []  # times its run's median, ms, token
    runs = 0
    for tokens in filter(None, by_run.values()):
        itl = [ms for ms, _ in tokens]
        limit, middle = run_limit_ms(itl), statistics.median(itl)
        slow = [(ms / middle, ms, token) for ms, token in tokens if ms >= limit]
        found += slow
        runs += bool(slow)
    if not found:
        return
    times, worst, token = max(found, key=lambda one: one[0])
    yield (
        f"{counted(len(found), 'token')} stall{'s' * (len(found) == 1)} in {runs} of "
        f"{counted(len(by_run), 'run')} ({FACTOR:g} times the run's median or more, and far "
        "beyond its noise)",
        f"worst {worst:.1f} ms, {times:.1f} times the median, token {token['token_index']} of run "
        f"{token['run']}",
    )


def tail(data: CellRows) -> Sentences:
    middle, late = data.median("itl_p50_ms"), data.median("itl_p99_ms")
    if middle and late and late >= FACTOR * middle and not any(stalls(data)):
        yield (
            "one token in a hundred takes far longer than usual",
            f"between tokens p50 {middle:.1f}, p99 {late:.1f} ms",
        )


def first_token(data: CellRows) -> Sentences:
    wait, whole = data.median("ttft_s"), data.median("e2e_s")
    if not wait or not whole or wait / whole < LONG_FIRST_TOKEN_SHARE:
        return
    phases = {
        name: seconds
        for name in ("preprocess", "vision_encode", "prefill")
        if (seconds := data.median(f"{name}_s"))
    }
    longest = max(phases, key=lambda name: phases[name], default="")
    yield (
        f"the wait for the first token is {wait / whole:.0%} of the request"
        + (f", most of it {longest}" if longest else ""),
        f"first token {wait * 1e3:.0f} ms"
        + "".join(f", {name} {seconds * 1e3:.0f}" for name, seconds in phases.items()),
    )


def loading(data: CellRows) -> Sentences:
    loads = data.numbers("load_s")
    if len(loads) > 1:
        yield (
            "every run loads the model anew",
            f"{statistics.median(loads):.1f} s, {min(loads):.1f} to {max(loads):.1f}",
        )


def bottleneck(data: CellRows) -> Sentences:
    said = data.cell.get("bottleneck")
    if said:
        figures = {"GPU busy": "gpu_busy_percent", "bandwidth used": "mbu_percent"}
        known = [
            f"{what} {float(data.cell[name]):.0f}%"
            for what, name in figures.items()
            if data.cell.get(name)
        ]
        yield f"bound by: {said}", ", ".join(known) or "no figure"


# What the rows of causes.csv are about, by their scope.
_SCOPES = {"gap": "late token", "decode": "slow answer", "prefill": "slow prefill"}


def causes(data: CellRows) -> Sentences:
    """What attribution found, each cause with its dearest case."""
    for scope, what in _SCOPES.items():
        found: dict[str, list[RawRow]] = defaultdict(list)
        for row in data.causes:
            if row["scope"] == scope:
                found[row["cause"]].append(row)
        for cause, rows in sorted(found.items(), key=lambda item: -_lost_ms(item[1])):
            worst = max(rows, key=lambda row: float(row["lost_ms"]))
            token = f", token {worst['token_index']}" if worst["token_index"] else ""
            yield (
                f"{counted(len(rows), what)} because {MEANINGS[Cause(cause)]}",
                f"{_lost_ms(rows):.0f} ms lost; the worst {float(worst['lost_ms']):.0f} in run "
                f"{worst['run']}{token}: {worst['evidence']}; confidence "
                f"{float(worst['confidence']):.2g}",
            )


def _lost_ms(rows: Sequence[RawRow]) -> float:
    return sum(float(row["lost_ms"]) for row in rows)


CELL_RULES: tuple[Callable[[CellRows], Sentences], ...] = (
    speed,
    disturbed,
    differing_runs,
    first_runs,
    levels,
    variance,
    bottleneck,
    causes,
    stalls,
    tail,
    first_token,
    *MACHINE_RULES,
    loading,
)
