"""What was injected against what attribution says: from the files of a campaign alone.

A run is said to suffer from the cause that made a phase longer by the largest share, and from
"none" where that is less than LEAST_SHARE. A single disturbance is said to have the cause of the
gap that it overlaps most.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwencli.bench.attribution.records import RawRow
from qwencli.bench.causes import Cause
from qwencli.bench.storage.campaign_files import CAUSES, HOST, RUNS, read_file
from qwencli.bench.storage.columns import check_table
from qwencli.bench.storage.row_file import read_table, replace_file, write_rows
from qwencli.output import markdown_page

TRUTH = "truth.csv"
TRUTH_COLUMNS = ("run", "cause", "t_s", "span_ms")
# The cause of a run that was left alone.
NONE = "none"
CSV, MARKDOWN = "confusion.csv", "confusion.md"
COLUMNS = ("unit", "injected", "attributed", "count")
# Causes without a moment of their own inside a decode.
_WHOLE_RUN = (Cause.RELOAD.value, Cause.HOST_SYNC.value)
# A run whose thread waited longer than this for a processor was disturbed, whoever did it.
MOST_WAITING = 0.01
LEAST_SHARE = 0.03
LEAST_ACCURACY, MOST_BLAMED = 0.90, 0.02

Counts = Counter[tuple[str, str]]


def rows_of(run: int, cause: str, spans: Iterable[tuple[float, float]]) -> list[dict[str, Any]]:
    """A row for each time the fault was on, `t_s` its end; one without times where it was not."""
    rows = [
        {"run": run, "cause": cause, "t_s": end, "span_ms": 1e3 * (end - start)}
        for start, end in spans
    ]
    return rows or [{"run": run, "cause": cause, "t_s": None, "span_ms": None}]


def read_truth(folder: Path) -> list[dict[str, str]]:
    """The rows of a campaign's truth.csv; [] where nothing was injected.

    Raises:
        BenchError: it is broken.
    """
    table = read_table(folder / TRUTH)
    causes = {"cause": (NONE, *map(str, Cause))}
    check_table(table, TRUTH_COLUMNS, len(TRUTH_COLUMNS), ("run", "cause"), causes)
    return table.rows


@dataclass(frozen=True)
class Confusion:
    """(injected, attributed) -> how often; `runs` with the undisturbed ones, `events` without.

    `quiet` are the runs left alone that nothing else disturbed either, as far as the kernel counts:
    the thread waited for a processor for less than MOST_WAITING of each phase, and the hypervisor
    took none.
    """

    runs: Counts
    events: Counts
    quiet: Counts

    @property
    def accuracy(self) -> float | None:
        """Share of disturbed runs whose cause is named; None for none."""
        return _share(self.runs, lambda pair: pair[0] == pair[1], injected=True)

    @property
    def event_accuracy(self) -> float | None:
        return _share(self.events, lambda pair: pair[0] == pair[1], injected=True)

    def blamed(self, counts: Counts) -> float | None:
        """Share of undisturbed runs that are given a cause; `unknown` blames nobody."""
        return _share(counts, lambda pair: pair[1] not in (NONE, Cause.UNKNOWN), injected=False)


def _share(
    counts: Counts, good: Callable[[tuple[str, str]], bool], *, injected: bool
) -> float | None:
    total = sum(n for pair, n in counts.items() if (pair[0] != NONE) == injected)
    hits = sum(n for pair, n in counts.items() if (pair[0] != NONE) == injected and good(pair))
    return hits / total if total else None


def holds(found: Confusion) -> bool:
    """Whether attribution is as good as it has to be, on all that was counted."""
    accuracy, blamed = found.accuracy, found.blamed(found.quiet)
    return (accuracy is None or accuracy >= LEAST_ACCURACY) and (blamed or 0.0) <= MOST_BLAMED


def rebuilt(folder: Path) -> Confusion | None:
    """As `build_confusion`; None for an ordinary campaign."""
    return build_confusion(folder) if read_truth(folder) else None


def build_confusion(folder: Path) -> Confusion:
    """Write confusion.csv and confusion.md into a campaign that was injected."""
    found = confusion(
        read_truth(folder), *(read_file(folder, name) for name in (CAUSES, RUNS, HOST))
    )
    rows = [
        {"unit": unit, "injected": injected, "attributed": attributed, "count": count}
        for unit, counts in (("run", found.runs), ("event", found.events), ("quiet", found.quiet))
        for (injected, attributed), count in sorted(counts.items())
    ]
    write_rows(folder / CSV, COLUMNS, rows)
    replace_file(folder / MARKDOWN, markdown(found).encode())
    return found


def confusion(
    truth: Iterable[RawRow],
    causes: Iterable[RawRow],
    runs: Iterable[RawRow],
    host: Iterable[RawRow],
) -> Confusion:
    """Count; runs that did not finish are left out."""
    finished = {row["run"]: row for row in runs if row["status"] == "ok"}
    findings: dict[str, list[RawRow]] = defaultdict(list)
    for row in causes:
        findings[row["run"]].append(row)
    quiet_runs = _quiet(host)
    counted, events, quiet = Counts(), Counts(), Counts()
    seen: set[str] = set()
    for row in truth:
        run, cause = row["run"], row["cause"]
        if run not in finished:
            continue
        if run not in seen:
            seen.add(run)
            said = verdict(findings[run], finished[run])
            counted[cause, said] += 1
            if cause == NONE and run in quiet_runs:
                quiet[cause, said] += 1
        if cause != NONE and cause not in _WHOLE_RUN and row["t_s"]:
            end = float(row["t_s"])
            events[cause, _gap_at(findings[run], end - float(row["span_ms"]) / 1e3, end)] += 1
    return Confusion(counted, events, quiet)


def verdict(findings: Sequence[RawRow], run: RawRow) -> str:
    """What a run suffered from, by the findings about it."""
    shares: dict[str, float] = defaultdict(float)
    for row in findings:
        phase_s = float(run["ttft_s" if row["scope"] == "prefill" else "decode_s"] or 0.0)
        if phase_s:
            shares[row["cause"]] += float(row["lost_ms"]) / (1e3 * phase_s)
    if max(shares.values(), default=0.0) < LEAST_SHARE:
        return NONE
    return max(shares, key=lambda cause: shares[cause])


def _gap_at(findings: Sequence[RawRow], start_s: float, end_s: float) -> str:
    best, longest = NONE, 0.0
    for row in findings:
        last = float(row["t_s"])
        first = last - float(row["span_ms"]) / 1e3
        overlap = min(last, end_s) - max(first, start_s)
        if row["scope"] == "gap" and overlap > longest:
            best, longest = row["cause"], overlap
    return best


def _quiet(host: Iterable[RawRow]) -> set[str]:
    """Runs that the kernel let run; all where it keeps no account."""
    known: set[str] = set()
    held_up: set[str] = set()
    for row in host:
        if row["event"] in ("prefill", "decode"):
            known.add(row["run"])
            waited_ms = float(row["runqueue_ms"] or 0.0)
            if (
                waited_ms > MOST_WAITING * float(row["span_ms"])
                or float(row["steal_ms"] or 0.0) > 0
            ):
                held_up.add(row["run"])
    return known - held_up


def markdown(found: Confusion) -> str:
    """The matrices and the shares as a page."""
    lines = ["# Injected faults against attributed causes", ""]
    lines += [f"- {line}" for line in summary(found)]
    for name, counts in (("Runs", found.runs), ("Single disturbances", found.events)):
        if counts:
            lines += ["", f"## {name}", "", *_matrix(counts)]
    return markdown_page(lines)


def summary(found: Confusion) -> list[str]:
    """The figures that matter, a line each."""
    disturbed = sum(n for pair, n in found.runs.items() if pair[0] != NONE)
    figures: Mapping[str, tuple[float | None, int]] = {
        "disturbed runs whose cause is named": (found.accuracy, disturbed),
        "single disturbances whose cause is named": (found.event_accuracy, found.events.total()),
        "undisturbed runs blamed": (
            found.blamed(found.runs),
            sum(n for pair, n in found.runs.items() if pair[0] == NONE),
        ),
        "undisturbed runs blamed, of those that the kernel let run": (
            found.blamed(found.quiet),
            found.quiet.total(),
        ),
    }
    return [
        f"{said}: {100 * share:.1f}% of {total}"
        for said, (share, total) in figures.items()
        if share is not None
    ]


def _matrix(counts: Counts) -> list[str]:
    injected = sorted({pair[0] for pair in counts})
    attributed = sorted({pair[1] for pair in counts})
    lines = [
        "| injected | " + " | ".join(attributed) + " |",
        "| --- |" + " ---: |" * len(attributed),
    ]
    for cause in injected:
        cells = [str(counts[cause, said] or "") for said in attributed]
        lines.append(f"| {cause} | " + " | ".join(cells) + " |")
    return lines
