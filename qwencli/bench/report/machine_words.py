"""What the rows of one cell show of the machine: its GPU's clock, its host, its memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable

from qwencli.bench.attribution.summary import ONE_CORE_PERCENT, unlike_times
from qwencli.bench.measure.cpu_calibration import LONGER_WORK
from qwencli.bench.measure.roofline import DRIVER_MEAN_S, GPU_BUSY
from qwencli.bench.report.cell_rows import CellRows, Said
from qwencli.bench.report.cell_statistics import UNSTABLE_RATIO, run_ratio

# A share of a clock, of a run's time: below it is nothing to speak of.
CLOCK_DROP_SHARE = 0.9
GC_SHARE = 0.01
FRAGMENTED_PERCENT = 20.0
# Runs whose clocks differ less than this were clocked alike.
SAME_CLOCK_SHARE = 0.02
SLOWING = ("hw_slowdown", "hw_thermal", "sw_thermal", "hw_power_brake", "sw_power_cap")


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
    if ratio is None or ratio <= UNSTABLE_RATIO or len(means) != len(speeds):
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


# Fixed work of runs.csv, and what it says of a host where it took longer.
_PACES = {
    "core_loop_us": ("loop", "the core they ran on was slower"),
    "memory_walk_us": ("walk through memory", "others used the caches and memory that cores share"),
}
QUARTERS = 4


def pace(data: CellRows) -> Said:
    """Whether runs were slow when the host was. Quarters are compared, since the work is done after
    a run, and what slows a run may end within it."""
    ratio = run_ratio(data.numbers("decode_tok_per_s"))
    if ratio is None or ratio <= UNSTABLE_RATIO:
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
            f"in {runs} of {len(reasons)} runs"
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
            f"{max(retries):.0f} allocator retries",
        )
    if broken and max(broken) > FRAGMENTED_PERCENT:
        yield (
            "GPU memory is fragmented",
            f"{max(broken):.0f}% of what is reserved is idle pieces",
        )


MACHINE_RULES: tuple[Callable[[CellRows], Said], ...] = (
    clock,
    pace,
    throttling,
    host,
    garbage,
    allocator,
)
