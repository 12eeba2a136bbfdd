"""What the machine did while a cell ran: its clocks, its processor, its memory.

Small rules of the rows of one cell, each giving (sentence, figure).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from qwencli.bench.attribution.cause_rules import LONGER_WORK
from qwencli.bench.attribution.summary import ONE_CORE_PERCENT, unlike_times
from qwencli.bench.measure.roofline import DRIVER_MEAN_S, GPU_BUSY
from qwencli.bench.report.cell_statistics import CellRows, RawRow
from qwencli.bench.statistics.robust import is_unstable, run_ratio
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
# Sentence and figure, for each thing that there is to say.
Sentences = Iterator[tuple[str, str]]


def clock(data: CellRows) -> Sentences:
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


def clock_of_tokens(data: CellRows) -> Sentences:
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

    def numbers(rows: Sequence[RawRow], names: Sequence[str], *words: str) -> DataFrame:
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
_CPU_WORK = {
    "cpu_loop_us": ("loop", "the core they ran on was slower"),
    "pointer_chase_us": (
        "walk through memory",
        "others used the caches and memory that cores share",
    ),
}


QUARTERS = 4


def host_speed(data: CellRows) -> Sentences:
    """Whether runs were slow when the host was. Quarters are compared, since the work is done after
    a run, and what slows a run may end within it."""
    ratio = run_ratio(data.numbers("decode_tok_per_s"))
    if not is_unstable(ratio):
        return
    for column, (work, slower) in _CPU_WORK.items():
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


def throttling(data: CellRows) -> Sentences:
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


def host(data: CellRows) -> Sentences:
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


def garbage(data: CellRows) -> Sentences:
    pauses, whole = data.median("gc_pause_ms"), data.median("e2e_s")
    if pauses and whole and pauses / 1e3 > GC_SHARE * whole:
        yield (
            "Python's garbage collection interrupts runs",
            f"{pauses:.0f} ms, {pauses / 1e3 / whole:.1%} of a run",
        )


def allocator(data: CellRows) -> Sentences:
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


MACHINE_RULES: tuple[Callable[[CellRows], Sentences], ...] = (
    clock,
    clock_of_tokens,
    host_speed,
    throttling,
    host,
    garbage,
    allocator,
)
