"""What the rows of one cell show, as tables of small rules: (sentence, figure)."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qwencli.bench.attribution.cause_rules import LONGER_WORK
from qwencli.bench.attribution.summary import ONE_CORE_PERCENT, unlike_times
from qwencli.bench.attribution.whole_cell import over_limits
from qwencli.bench.causes import MEANINGS, Cause
from qwencli.bench.measure.roofline import DRIVER_MEAN_S, GPU_BUSY
from qwencli.bench.report.steadiness import Steadiness
from qwencli.bench.statistics.robust import is_unstable, run_ratio
from qwencli.bench.statistics.slow_tokens import FACTOR, run_limit_ms
from qwencli.output import counted

if TYPE_CHECKING:
    from pandas import DataFrame

# A share of a clock, of a run's time: below it is nothing to speak of.
CLOCK_DROP_SHARE = 0.9
GC_SHARE = 0.01
FRAGMENTED_PERCENT = 20.0
# Runs whose clocks differ less than this were clocked alike.
SAME_CLOCK_SHARE = 0.02
# Tokens are set beside the sample of the clock that is nearest in time, at most this far away.
CLOCK_NEAR_S = 0.1
# From this rank correlation on, over so many tokens, slow tokens and low clocks go together.
CLOCK_FOLLOWED, LEAST_JOINED = -0.5, 50
SLOWING = ("hw_slowdown", "hw_thermal", "sw_thermal", "hw_power_brake", "sw_power_cap")
Row = Mapping[str, str]
# Sentence and figure, for each thing that there is to say.
Said = Iterator[tuple[str, str]]
# How the sentence about runs that are far apart begins.
DIFFER = "identical runs differ"
# A share of the first token: below it is nothing to speak of.
LONG_FIRST_TOKEN_SHARE = 0.2


def clock(data: CellRows) -> Said:
    means, speeds = data.numbers("sm_clock_mhz_mean"), data.numbers("decode_tok_per_s")
    lowest = data.numbers("sm_clock_mhz_min")
    if not means:
        return
    if lowest and min(lowest) < CLOCK_DROP_SHARE * statistics.median(means):
        yield (
            "the GPU's clock falls while it decodes",
            f"mean {statistics.median(means):.0f}, lowest {min(lowest):.0f} MHz",
        )
    ratio = run_ratio(speeds)
    if not is_unstable(ratio) or len(means) != len(speeds):
        return
    if max(means) - min(means) <= SAME_CLOCK_SHARE * max(means):
        yield (
            "the GPU's clock does not explain why runs differ: it was the same in all of them",
            f"{min(means):.0f} to {max(means):.0f} MHz",
        )
    elif len(means) > 2 and abs(found := statistics.correlation(means, speeds)) > 0.8:
        yield (
            f"{'faster' if found > 0 else 'slower'} runs had the higher clock",
            f"correlation {found:.2f} over {len(means)} runs",
        )


def clock_of_tokens(data: CellRows) -> Said:
    """Whether tokens took longer while the GPU's clock was lower: within runs, where means over
    runs hide it."""
    clocks = [float(row["sm_clock_mhz"]) for row in data.gpu if row.get("sm_clock_mhz")]
    if not clocks or max(clocks) - min(clocks) <= SAME_CLOCK_SHARE * max(clocks):
        return
    middle, late = data.median("itl_p50_ms"), data.median("itl_p99_ms")
    if middle and late and late - middle <= SAME_CLOCK_SHARE * middle:  # tokens are alike
        return
    joined = tokens_with_clocks(data)
    if len(joined) < LEAST_JOINED:
        return
    clock = joined["sm_clock_mhz"]
    # Against the same token of other runs: later ones take longer, whatever the clock.
    slower = joined["itl_ms"] / joined.groupby("token_index")["itl_ms"].transform("median")
    found = slower.rank().corr(clock.rank())
    if clock.max() - clock.min() > SAME_CLOCK_SHARE * clock.max() and found <= CLOCK_FOLLOWED:
        yield (
            "tokens take longer while the GPU's clock is lower",
            f"rank correlation {found:.2f} over {len(joined)} tokens, {clock.min():.0f} to "
            f"{clock.max():.0f} MHz",
        )


def tokens_with_clocks(data: CellRows) -> DataFrame:
    """The tokens of measured runs, each with the clock that was read nearest to it in time.

    Columns run, token_index, t_s, itl_ms, sm_clock_mhz. Of several GPUs the one that drew most
    power is the run's.
    """
    import pandas

    measured = {row["run"] for row in data.measured}

    def numbers(rows: Sequence[Row], names: Sequence[str], *words: str) -> DataFrame:
        kept = [row for row in rows if row["run"] in measured]
        table = pandas.DataFrame(
            {name: [float(row[name] or "nan") for row in kept] for name in names}
        )
        return table.assign(
            # Typed, since what has no rows would become a column of numbers.
            **{word: pandas.Series([row[word] for row in kept], dtype=str) for word in words}
        )

    tokens = numbers(data.tokens, ("token_index", "t_s", "itl_ms"), "run").dropna()
    samples = numbers(data.gpu, ("t_s", "sm_clock_mhz", "power_w"), "run", "gpu_index")
    power = samples.groupby("gpu_index")["power_w"].mean().fillna(0.0)
    ours = samples[samples["gpu_index"] == power.idxmax()] if len(power) else samples
    return pandas.merge_asof(
        tokens.sort_values("t_s"),
        ours[["run", "t_s", "sm_clock_mhz"]].dropna().sort_values("t_s"),
        on="t_s",
        by="run",
        direction="nearest",
        tolerance=CLOCK_NEAR_S,  # type: ignore[arg-type]  # keys are floats, so it may be one
    ).dropna()


# Fixed work of runs.csv, and what it says of a host where it took longer.
_PACES = {
    "cpu_loop_us": ("loop", "the core they ran on was slower"),
    "pointer_chase_us": (
        "walk through memory",
        "others used the caches and memory that cores share",
    ),
}
QUARTERS = 4


def pace(data: CellRows) -> Said:
    """Whether runs were slow when the host was. Quarters are compared, since the work is done after
    a run, and what slows a run may end within it."""
    ratio = run_ratio(data.numbers("decode_tok_per_s"))
    if not is_unstable(ratio):
        return
    for column, (work, slower) in _PACES.items():
        runs = [row for row in data.measured if row.get(column)]
        by_speed = sorted(runs, key=lambda row: float(row["decode_tok_per_s"]))
        took = [float(row[column]) for row in by_speed]
        quarter = len(took) // QUARTERS
        if quarter < 2:
            continue
        slowest, fastest = statistics.median(took[:quarter]), statistics.median(took[-quarter:])
        if slowest >= LONGER_WORK * fastest:
            yield (
                f"slow runs came while {slower}",
                f"a fixed {work} took {slowest:.3g} us after the slowest quarter of the runs, "
                f"{fastest:.3g} after the fastest",
            )


def throttling(data: CellRows) -> Said:
    reasons = [set(row.get("throttle_reasons", "").split("|")) for row in data.measured]
    held = [reason for reason in SLOWING if any(reason in run for run in reasons)]
    if held:
        runs = sum(bool(run & set(held)) for run in reasons)
        hottest = data.numbers("temperature_c_max")
        yield (
            f"the driver held the clock back: {', '.join(held)}",
            f"in {runs} of {counted(len(reasons), 'run')}"
            + (f", up to {max(hottest):.0f} C" if hottest else ""),
        )


def host(data: CellRows) -> Said:
    thread, busy = data.median("main_thread_cpu_percent"), _gpu_busy_percent(data)
    if thread is not None and busy is not None:
        if thread >= ONE_CORE_PERCENT and busy < GPU_BUSY:
            yield (
                "bound by one CPU core: it launches without pause while the GPU waits",
                f"main thread {thread:.0f}% of a core, GPU busy {busy:.0f}% of the time",
            )
        elif thread < ONE_CORE_PERCENT and busy >= GPU_BUSY:
            yield (
                "the GPU is the one that works",
                f"GPU busy {busy:.0f}%, main thread {thread:.0f}% of a core",
            )
    if found := unlike_times(data.cell):
        yield found
    switches, whole = data.median("involuntary_switches"), data.median("e2e_s")
    if switches is not None and whole and switches / whole > 100:
        yield (
            "other programs take the processor away while it decodes",
            f"{switches / whole:.0f} involuntary switches a second",
        )


def _gpu_busy_percent(data: CellRows) -> float | None:
    """Between tokens, as measured, or else what the driver says, which is a mean over up to a
    second: of no use for shorter requests."""
    if measured := data.cell.get("gpu_busy_percent"):
        return float(measured)
    runs = {row["run"] for row in data.measured}
    samples = (row["utilization_percent"] for row in data.gpu if row["run"] in runs)
    used = [float(percent) for percent in samples if percent]
    long_enough = (data.median("e2e_s") or 0.0) >= DRIVER_MEAN_S
    return statistics.fmean(used) if used and long_enough else None


def garbage(data: CellRows) -> Said:
    pauses, whole = data.median("gc_pause_ms"), data.median("e2e_s")
    if pauses and whole and pauses / 1e3 > GC_SHARE * whole:
        yield (
            "Python's garbage collection interrupts runs",
            f"{pauses:.0f} ms, {pauses / 1e3 / whole:.1%} of a run",
        )


def allocator(data: CellRows) -> Said:
    retries, broken = data.numbers("num_alloc_retries"), data.numbers("fragmentation_percent")
    if any(retries):
        yield (
            "GPU memory ran out and was collected in the middle of runs",
            counted(round(max(retries)), "allocator retry", "allocator retries"),
        )
    if broken and max(broken) > FRAGMENTED_PERCENT:
        yield (
            "GPU memory is fragmented",
            f"{max(broken):.0f}% of what is reserved is idle pieces",
        )


MACHINE_RULES: tuple[Callable[[CellRows], Said], ...] = (
    clock,
    clock_of_tokens,
    pace,
    throttling,
    host,
    garbage,
    allocator,
)


@dataclass(frozen=True)
class CellRows:
    """All rows of one cell; `steady` is None where nothing was measured, `causes` is empty where
    nothing was slow or a campaign has no causes.csv."""

    cell: Row
    runs: Sequence[Row]
    tokens: Sequence[Row]
    gpu: Sequence[Row]
    steady: Steadiness | None
    causes: Sequence[Row] = ()

    @property
    def measured(self) -> list[Row]:
        return [row for row in self.runs if row["status"] == "ok"]

    def numbers(self, column: str) -> list[float]:
        """Of the measured runs; runs without a figure are left out."""
        return [float(row[column]) for row in self.measured if row.get(column)]

    def median(self, column: str) -> float | None:
        found = self.numbers(column)
        return statistics.median(found) if found else None


def speed(data: CellRows) -> Said:
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


def differing_runs(data: CellRows) -> Said:
    speeds = data.numbers("decode_tok_per_s")
    ratio = run_ratio(speeds)
    if is_unstable(ratio):
        yield (
            f"{DIFFER} {ratio:.2f}x in decode speed, so no single figure may be quoted",
            f"fastest {max(speeds):.1f}, slowest {min(speeds):.1f} tok/s",
        )


def disturbed(data: CellRows) -> Said:
    """What slowed the whole cell down, each with its limit."""
    for over in over_limits(data.cell):
        yield (
            f"{over.words}, so its figure may not be quoted",
            f"{over.percent:.1f}%, the limit is {over.limit.percent:g}%",
        )


def first_runs(data: CellRows) -> Said:
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


def levels(data: CellRows) -> Said:
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


def variance(data: CellRows) -> Said:
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


def stalls(data: CellRows) -> Said:
    by_run: dict[str, list[tuple[float, Row]]] = {row["run"]: [] for row in data.measured}
    for token in data.tokens:
        if token["itl_ms"] and token["run"] in by_run:
            by_run[token["run"]].append((float(token["itl_ms"]), token))
    found: list[tuple[float, float, Row]] = []  # times its run's median, ms, token
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


def tail(data: CellRows) -> Said:
    middle, late = data.median("itl_p50_ms"), data.median("itl_p99_ms")
    if middle and late and late >= FACTOR * middle and not any(stalls(data)):
        yield (
            "one token in a hundred takes far longer than usual",
            f"between tokens p50 {middle:.1f}, p99 {late:.1f} ms",
        )


def first_token(data: CellRows) -> Said:
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


def loading(data: CellRows) -> Said:
    loads = data.numbers("load_s")
    if len(loads) > 1:
        yield (
            "every run loads the model anew",
            f"{statistics.median(loads):.1f} s, {min(loads):.1f} to {max(loads):.1f}",
        )


def bottleneck(data: CellRows) -> Said:
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


def causes(data: CellRows) -> Said:
    """What attribution found, each cause with its dearest case."""
    for scope, what in _SCOPES.items():
        found: dict[str, list[Row]] = defaultdict(list)
        for row in data.causes:
            if row["scope"] == scope:
                found[row["cause"]].append(row)
        for cause, rows in sorted(found.items(), key=lambda item: -_lost(item[1])):
            worst = max(rows, key=lambda row: float(row["lost_ms"]))
            token = f", token {worst['token_index']}" if worst["token_index"] else ""
            yield (
                f"{counted(len(rows), what)} because {MEANINGS[Cause(cause)]}",
                f"{_lost(rows):.0f} ms lost; the worst {float(worst['lost_ms']):.0f} in run "
                f"{worst['run']}{token}: {worst['evidence']}; confidence "
                f"{float(worst['confidence']):.2g}",
            )


def _lost(rows: Sequence[Row]) -> float:
    return sum(float(row["lost_ms"]) for row in rows)


CELL_RULES: tuple[Callable[[CellRows], Said], ...] = (
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
