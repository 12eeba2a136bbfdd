"""The three tables that this project started from, made again from a study's rows.

In the origin's own columns: tok/s is tokens over the time of the whole `generate()`, and the first
stall is the time to the first token. Beside them stand the clocks before and during a run, which
nobody had read, and the native engine.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from qwencli.bench.report.tables import ORIGIN_MODES
from qwencli.bench.statistics.robust import Interval, ratio_interval, run_ratio
from qwencli.bench.studies.conditions import PLAIN
from qwencli.bench.studies.metrics import value
from qwencli.bench.studies.study_evidence import Evidence, Row

Table = tuple[Sequence[str], list[list[str]]]
# Runs by engine, quantization and attention.
Modes = Mapping[tuple[str, str, str], Sequence[Row]]
# Engine, load mode, and the runs of both in their order.
Series = tuple[str, str, Sequence[Row]]
SPEED = "generate_tok_per_s"
# Identical runs with a load before each (tok/s), and the first tokens of a later series (s), there.
ORIGIN_RUNS = (3.30, 7.60, 2.75, 5.29)
ORIGIN_STALLS_S = (8.7, 9.8, 14.1, 63.6, 47.2, 49.3)
ORIGIN_RATIO = 2.76  # fastest over slowest
RELOAD = "reload"
# Conditions that only look, or that are no way to run a model, explain no slow run.
_NO_FACTOR = (PLAIN, "watched-sdpa", "watched-sdpa-emptied", "timed-first-forward",
              "slow-processor", "one-core")  # fmt: skip
_BASE = {"shared-core": "one-core", "reload-through-cpu": RELOAD, "reload-matmul": RELOAD,
         "reload-answer": RELOAD}  # fmt: skip


@dataclass(frozen=True)
class Factor:
    """What one factor did to the time of generate(): `slowdown` above 1 = slower with it.

    Args:
        share_percent: of the origin's ratio, on a logarithmic scale: 100 = 2.76 times.
    """

    name: str
    engine: str
    slowdown: Interval
    share_percent: float
    n: int


def speeds(rows: Sequence[Row]) -> list[float]:
    return [found for row in rows if (found := value(SPEED, row)) is not None]


def kept_modes(evidence: Evidence) -> Modes:
    """Runs by mode, model kept, of a study: transformers as the origin had it, and native."""
    found: dict[tuple[str, str, str], Sequence[Row]] = {}
    for name in evidence.processes():
        axes = evidence.axes(name)
        usual = axes["engine"] == "native" or axes["cache"] == "dynamic"
        if usual and evidence.is_usual(name) and evidence.in_rounds(name, PLAIN):
            key = (axes["engine"], axes["quantization"], axes["attention"])
            found[key] = evidence.in_rounds(name, PLAIN)
    return found


def mode_table(measured: Modes, elsewhere: Container[tuple[str, str, str]] = ()) -> Table:
    """Speed by mode, model kept: the origin's first table, and the native engine below it.

    Args:
        measured: by engine, quantization and attention.
        elsewhere: modes that another table has, which are left out where they were not run here.
    """
    origins = {("transformers", *mode): speed for mode, speed in ORIGIN_MODES.items()}
    body = []
    for mode, origin in origins.items():
        rows = measured.get(mode)
        if rows or mode not in elsewhere:
            body.append([*mode, f"{origin:.1f}", *_speed_cells(rows)])
    for mode in sorted(measured.keys() - origins.keys(), reverse=True):
        body.append([*mode, "-", *_speed_cells(measured[mode])])
    head = ["engine", "quantization", "attention", "origin tok/s", "here tok/s",
            "slowest-fastest", "n"]  # fmt: skip
    return head, body


def _speed_cells(rows: Sequence[Row] | None) -> list[str]:
    if not rows:
        return ["not run here", "-", "0"]
    found = speeds(rows)
    middle = statistics.median(found)
    return [f"{middle:.4g}", f"{min(found):.4g}-{max(found):.4g}", str(len(found))]


def series(evidence: Evidence) -> Iterator[Series]:
    """The runs, kept loaded and loaded anew, of each engine that has both; without the stretches
    after the rounds."""
    for name in evidence.processes():
        if not evidence.runs(name, RELOAD):
            continue
        engine = evidence.axes(name)["engine"]
        for mode, condition in (("keep", PLAIN), ("reload", RELOAD)):
            if rows := evidence.in_rounds(name, condition):
                yield engine, mode, rows


def run_table(found: Iterable[Series]) -> Table:
    """Run after run, kept and loaded anew, with the clock before and during: the second table."""
    head = ["engine", "model", "run", "tok/s", "s", "tokens", "load s", "MHz before", "MHz during"]
    body = []
    for engine, mode, rows in found:
        for row in rows:
            seconds = float(row["e2e_s"]) - float(row["preprocess_s"])
            body.append(
                [
                    engine,
                    mode,
                    row["run"],
                    f"{value(SPEED, row) or math.nan:.4g}",
                    f"{seconds:.3g}",
                    row["num_new_tokens"],
                    _number(row["load_s"], 3),
                    _number(row["sm_clock_mhz_before"], 4),
                    _number(row["sm_clock_mhz_mean"], 4),
                ]
            )
    return head, body


def _number(text: str, digits: int) -> str:
    return f"{float(text):.{digits}g}" if text else "-"


def stall_table(evidence: Evidence) -> Table:
    """The first token and the others: the third table; run 0 is the first of its process."""
    head = ["engine", "model", "run", "first stall s", "median token ms", "stalls", "tok/s"]
    body = []
    for name in evidence.processes():
        if not evidence.runs(name, RELOAD):
            continue
        engine = evidence.axes(name)["engine"]
        rows = [("first ever", row) for row in evidence.warm_ups(name)]
        rows += [("keep", row) for row in evidence.in_rounds(name, PLAIN)]
        rows += [("reload", row) for row in evidence.in_rounds(name, RELOAD)]
        for mode, row in rows:
            figures = [f"{float(row['ttft_s']):.3g}", f"{float(row['itl_p50_ms']):.3g}"]
            speed = f"{value(SPEED, row) or math.nan:.4g}"
            body.append([engine, mode, row["run"], *figures, row["stall_count"], speed])
    return head, body


def steadiness_table(found: Iterable[Series]) -> Table:
    """Both engines by what was to be reached: spread, first stalls, reload against keep."""
    head = ["engine", "model", "n", "tok/s of generate()", "fastest over slowest",
            "worst TTFT over median", "decode tok/s against keep"]  # fmt: skip
    stall = max(ORIGIN_STALLS_S) / statistics.median(ORIGIN_STALLS_S)
    middle = f"{statistics.median(ORIGIN_RUNS):.4g}"
    origin = ["origin's transformers", RELOAD, str(len(ORIGIN_RUNS)), middle]
    body = [[*origin, f"{max(ORIGIN_RUNS) / min(ORIGIN_RUNS):.3f}", f"{stall:.3f}", "-"]]
    kept: dict[str, float] = {}
    for engine, mode, rows in found:
        ttft = [float(row["ttft_s"]) for row in rows]
        decode = statistics.median(float(row["decode_tok_per_s"]) for row in rows)
        kept.setdefault(engine, decode)
        whole = speeds(rows)
        body.append(
            [
                engine,
                mode,
                str(len(rows)),
                f"{statistics.median(whole):.4g}",
                f"{run_ratio(whole) or math.nan:.3f}",
                f"{max(ttft) / statistics.median(ttft):.3f}",
                f"{100 * (decode / kept[engine] - 1):+.1f}%",
            ]
        )
    return head, body


def factors(evidence: Evidence) -> list[Factor]:
    """What makes equal runs differ, the largest share of the origin's ratio first."""
    found = []
    for name in evidence.processes():
        for condition in evidence.conditions(name):
            if condition in _NO_FACTOR:
                continue
            with_it, without = evidence.alike(name, condition, _BASE.get(condition, PLAIN), SPEED)
            slowdown = ratio_interval(with_it, without)
            if slowdown is None:
                continue
            share = 100 * math.log(slowdown.estimate) / math.log(ORIGIN_RATIO)
            engine = evidence.axes(name)
            label = engine["engine"]
            if engine["quantization"] != "none":
                label += f" {engine['quantization']}"
            found.append(Factor(condition, label, slowdown, share, len(with_it)))
    return sorted(found, key=lambda factor: -factor.share_percent)


def factor_table(evidence: Evidence) -> Table:
    """`factors` as a table."""
    head = ["factor", "engine", "times slower", "95 % interval", "share of 2.76x", "n"]
    body = [
        [
            factor.name,
            factor.engine,
            f"{factor.slowdown.estimate:.3f}",
            f"{factor.slowdown.low:.3f} to {factor.slowdown.high:.3f}",
            f"{factor.share_percent:.0f}%",
            str(factor.n),
        ]
        for factor in factors(evidence)
    ]
    return head, body
