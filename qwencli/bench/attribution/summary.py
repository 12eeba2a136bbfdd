"""Findings counted for each cell: the columns of cells.csv, and the same in words."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qwencli.bench.attribution.records import RawRow
from qwencli.bench.attribution.whole_cell import over_limits
from qwencli.bench.causes import MEANINGS, Cause, Finding
from qwencli.bench.measure.probe_overhead import Pair, overhead_percent, sampler_percent
from qwencli.bench.measure.roofline import GPU_BUSY
from qwencli.bench.statistics.robust import Interval, is_unstable
from qwencli.output import counted

CellRow = Mapping[str, Any]
# A thread that has this much of a core has never waited for long.
ONE_CORE_PERCENT = 90.0


@dataclass(frozen=True)
class Tally:
    """How often a cause was found in a cell, and what it cost."""

    cause: Cause
    count: int
    lost_ms: float


def tallies(findings: Iterable[Finding]) -> list[Tally]:
    """By what they cost, most first."""
    counts: dict[Cause, list[float]] = defaultdict(list)
    for finding in findings:
        counts[finding.cause].append(finding.lost_ms)
    found = [Tally(cause, len(lost), sum(lost)) for cause, lost in counts.items()]
    return sorted(found, key=lambda tally: -tally.lost_ms)


def write_tallies(found: Iterable[Tally]) -> str | None:
    """As one field of a CSV file: `cause:count:lost_ms` joined by "|"; None for none."""
    return "|".join(f"{t.cause}:{t.count}:{t.lost_ms:.3f}" for t in found) or None


def read_tallies(text: str | None) -> list[Tally]:
    """What `write_tallies` wrote."""
    parts = [part.split(":") for part in (text or "").split("|") if part]
    return [Tally(Cause(cause), int(count), float(lost)) for cause, count, lost in parts]


def with_causes(
    rows: Sequence[CellRow],
    findings: Sequence[Finding],
    runs: Iterable[RawRow],
    probes: Iterable[RawRow],
) -> list[dict[str, Any]]:
    """The rows of cells.csv with the columns that attribution and the probes' A/B add."""
    decode_s: dict[str, float] = defaultdict(float)
    for run in runs:
        if run["status"] == "ok" and run["decode_s"]:
            decode_s[run["cell_id"]] += float(run["decode_s"])
    probed: dict[str, list[RawRow]] = defaultdict(list)
    for probe in probes:
        probed[probe["cell_id"]].append(probe)
    by_cell: dict[str, list[Finding]] = defaultdict(list)
    for finding in findings:
        by_cell[finding.cell_id].append(finding)
    return [
        {
            **row,
            **_cause_columns(by_cell[row["cell_id"]], decode_s.get(row["cell_id"])),
            **_probe_columns(probed[row["cell_id"]]),
        }
        for row in rows
    ]


def _cause_columns(findings: Sequence[Finding], decode_s: float | None) -> dict[str, Any]:
    if not decode_s:
        return dict.fromkeys(
            ("gap_count", "gap_lost_percent", "gap_causes", "slow_run_causes"), None
        )
    gaps = [finding for finding in findings if finding.scope == "gap"]
    slow = [finding for finding in findings if finding.scope in ("decode", "prefill")]
    return {
        "gap_count": len(gaps),
        "gap_lost_percent": sum(gap.lost_ms for gap in gaps) / decode_s / 10.0,
        "gap_causes": write_tallies(tallies(gaps)),
        "slow_run_causes": write_tallies(tallies(slow)),
    }


def _probe_columns(probes: Sequence[RawRow]) -> dict[str, float | None]:
    found = overhead_percent(
        Pair(
            int(p["run"]), int(p["pair"]), float(p["itl_probe_on_ms"]), float(p["itl_probe_off_ms"])
        )
        for p in probes
    )
    by_run: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in probes:
        by_run[row["sampler"], row["run"]].append(float(row["itl_probe_off_ms"]))
    medians: dict[str, list[float]] = defaultdict(list)
    for (sampler, _), values in by_run.items():
        medians[sampler].append(statistics.median(values))
    return {
        **_interval_columns("probe_overhead", found),
        **_interval_columns("sampler_overhead", sampler_percent(medians["on"], medians["off"])),
    }


def _interval_columns(name: str, found: Interval | None) -> dict[str, float | None]:
    return {
        f"{name}_percent": found.estimate if found else None,
        f"{name}_low_percent": found.low if found else None,
        f"{name}_high_percent": found.high if found else None,
    }


def unlike_times(row: CellRow) -> tuple[str, str] | None:
    """Why the runs of a cell differ whose host never waited while its device did: sentence and
    figures; None where that is not so, or not known."""
    names = ("main_thread_cpu_percent_min", "gpu_busy_percent", "run_ratio_max_min")
    thread, busy, ratio = (float(row.get(name) or "nan") for name in names)
    if not (thread >= ONE_CORE_PERCENT and busy < GPU_BUSY and is_unstable(ratio)):
        return None
    return (
        "runs differ because the core that launches takes longer for the same work in some",
        f"main thread at least {thread:.0f}% of a core in each, GPU busy {busy:.0f}% of the time",
    )


def why(row: CellRow) -> list[str]:
    """What slowed this cell, in sentences; [] where nothing did."""
    lines = []
    if over := over_limits(row):
        lines.append(
            f"not to be quoted: {'; '.join(one.words for one in over)} (limits: "
            f"{', '.join(f'{one.limit.percent:g}%' for one in over)})"
        )
    if found := unlike_times(row):
        lines.append(f"{found[0]}; it was never idle, and the GPU was most of the time")
    if gaps := read_tallies(row.get("gap_causes")):
        total = sum(tally.lost_ms for tally in gaps)
        parts = ", ".join(f"{t.cause} {100 * t.lost_ms / total:.0f}% ({t.count})" for t in gaps)
        lines.append(
            f"{_count(gaps, 'gap')} took {row['gap_lost_percent']:.1f}% of decode, "
            f"{_mostly(gaps)} because {MEANINGS[gaps[0].cause]}: {parts}"
        )
    if slow := read_tallies(row.get("slow_run_causes")):
        parts = ", ".join(f"{tally.cause} {tally.count}" for tally in slow)
        lines.append(
            f"{_count(slow, 'slow phase')} of runs, {_mostly(slow)} because "
            f"{MEANINGS[slow[0].cause]}: {parts}"
        )
    return lines


def _count(found: Sequence[Tally], what: str) -> str:
    return counted(sum(tally.count for tally in found), what)


def _mostly(found: Sequence[Tally]) -> str:
    """How much of the lost time the first cause stands for, in words."""
    share = found[0].lost_ms / sum(tally.lost_ms for tally in found)
    if len(found) == 1:
        return "all of it"
    return "most of it" if share > 0.5 else "the largest part"


# What measures -> its columns in cells.csv, without their ends.
_MEASURING = {"measuring": "probe_overhead", "the sensor sampler": "sampler_overhead"}


def probe_line(rows: Sequence[CellRow]) -> str | None:
    """What measuring cost, over all cells; None where it was not measured."""
    said = [
        _worst(rows, who, name)
        for who, name in _MEASURING.items()
        if any(row.get(f"{name}_percent") is not None for row in rows)
    ]
    return "; ".join(said) or None


def _worst(rows: Sequence[CellRow], who: str, name: str) -> str:
    known = [row for row in rows if row.get(f"{name}_percent") is not None]
    worst = max(known, key=lambda row: row[f"{name}_percent"])
    low, high = worst[f"{name}_low_percent"], worst[f"{name}_high_percent"]
    where = ", in the worst cell" * (len(known) > 1)
    return (
        f"{who} adds {worst[f'{name}_percent']:.1f}% to a token ({low:.1f} to {high:.1f}%){where}"
    )
