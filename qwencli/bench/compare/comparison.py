"""Two campaigns cell by cell: SAME, FASTER, SLOWER or AMBIGUOUS.

The ratio of decode speeds (B over A) is held against a band of practical equivalence,
1 / (1 + threshold) to 1 + threshold. Its 90 % interval wholly inside the band is SAME: that is the
two one-sided tests at 5 % each (Schuirmann 1987, J. Pharmacokinetics and Biopharmaceutics 15). Its
99 % interval wholly above it is FASTER, wholly below SLOWER: a change that is none is the worst
answer, so it needs more certainty. Anything else is AMBIGUOUS: too few processes, or too noisy, to
say. "Not significantly different" alone is never SAME. What the intervals are made of, and what
they take for granted, stands in `intervals`.

By simulation (see the tests): unchanged cells come out FASTER or SLOWER in 1 % or less where
processes scatter as they do on busy CPUs. On a GPU whose processes scatter by 0.1 % they are SAME
in 95 % or more, and cells that are 3 % slower SLOWER in 95 % or more, one process a side and ten
runs of up to 0.3 % scatter. With processes that scatter by 0.3 % this takes five a side.

Where the machine moved between the runs of a cell, so that the middle half of them differs as an
unstable cell's do (see `stats`), its intervals span all pairs of that half besides: it changes only
where none of A's overlaps B's. A quarter of far runs at either end costs nothing.

A side whose figure is not to be quoted, because the machine was not its own (`whole_cell`), is
never FASTER or SLOWER. Only sides that took turns (`bench compare --run`) and met the same may be:
they are judged by paired differences and ranks (`paired_interval`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

from qwencli.bench.attribution.whole_cell import over_limits
from qwencli.bench.compare.intervals import Intervals, paired_intervals, ratio_intervals
from qwencli.bench.compare.sides import (
    KERNELS,
    RAN,
    Side,
    SideCell,
    changes,
    device_kind,
    took_turns,
    unlike,
)
from qwencli.bench.plan.matrix import AXES
from qwencli.bench.statistics.robust import MIN_RUNS, Interval, is_unstable, run_ratio
from qwencli.errors import BenchError, UsageError
from qwencli.models.memory import stored_label

THRESHOLD = 0.01

Pair = tuple[SideCell, SideCell]


class Verdict(StrEnum):
    SAME = "SAME"
    FASTER = "FASTER"
    SLOWER = "SLOWER"
    AMBIGUOUS = "AMBIGUOUS"


@dataclass(frozen=True)
class CellComparison:
    """One cell with figures on both sides; `ratio` is None where they allow no interval."""

    a: SideCell
    b: SideCell
    verdict: Verdict
    ratio: Intervals | None
    remarks: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All cells of two campaigns.

    Args:
        a, b: their names.
        threshold: half the width of the band of equivalence, as a fraction.
        no_figure: pairs of which one side or both have no speed.
        forced: differences that would have refused the comparison.
        changes: versions and drivers that differ.
        in_turns: their processes alternated.
    """

    a: str
    b: str
    threshold: float
    cells: tuple[CellComparison, ...]
    no_figure: tuple[Pair, ...]
    only_in_a: tuple[SideCell, ...]
    only_in_b: tuple[SideCell, ...]
    forced: tuple[str, ...]
    changes: tuple[str, ...]
    in_turns: bool = False

    @property
    def lost(self) -> list[Pair]:
        """Cells that had a speed in A and, though planned, have none in B."""
        return [(a, b) for a, b in self.no_figure if a.speeds]

    @property
    def got_slower(self) -> bool:
        """Whether a cell is SLOWER, or no longer gives a figure at all."""
        return bool(self.lost) or any(cell.verdict is Verdict.SLOWER for cell in self.cells)


def decide(ratio: Intervals | None, threshold: float = THRESHOLD) -> Verdict:
    """Hold the intervals of B / A against the band of equivalence (see the module)."""
    low, high = 1 / (1 + threshold), 1 + threshold
    if ratio is None:
        return Verdict.AMBIGUOUS
    if low <= ratio.same.low and ratio.same.high <= high:
        return Verdict.SAME
    if ratio.change.low > high:
        return Verdict.FASTER
    return Verdict.SLOWER if ratio.change.high < low else Verdict.AMBIGUOUS


def compare(a: Side, b: Side, *, threshold: float = THRESHOLD, force: bool = False) -> Comparison:
    """Compare B with A.

    Raises:
        UsageError: the threshold is not above zero.
        BenchError: model, device, CPU or work differ and `force` is off, or no cell is in both.
    """
    if not threshold > 0:
        raise UsageError(
            f"--threshold {threshold * 100:g} is not above zero", "give a percentage, such as 1"
        )
    pairs, only_a, only_b = match(a, b)
    differences = unlike(a, b, pairs)
    if differences and not force:
        raise BenchError(
            f"{a.name} and {b.name} are not alike: {'; '.join(differences)}",
            "compare campaigns of the same model, machine and work, or add --force",
        )
    if not pairs:
        raise BenchError(
            f"{a.name} and {b.name} have no cell in common", "measure the same modes in both"
        )
    in_turns = took_turns(a, b)
    gpu = all(device_kind(one) == "cuda" for one in (a, b))
    return Comparison(
        a=a.name,
        b=b.name,
        threshold=threshold,
        cells=tuple(
            _compare_cell(x, y, threshold, gpu=gpu, in_turns=in_turns)
            for x, y in pairs
            if x.speeds and y.speeds
        ),
        no_figure=tuple((x, y) for x, y in pairs if not (x.speeds and y.speeds)),
        only_in_a=tuple(only_a),
        only_in_b=tuple(only_b),
        forced=tuple(differences),
        changes=tuple(changes(a, b)),
        in_turns=in_turns,
    )


def match(a: Side, b: Side) -> tuple[list[Pair], list[SideCell], list[SideCell]]:
    """Pairs in the order of A, and what is left on each side.

    By cell_id, then by the axes, then without those that set the sides apart as a whole: each side
    has one model, or one engine, and not the same. Another engine has attention and cache of its
    own, which are left out likewise.
    """
    keys: list[Callable[[SideCell], Any]] = [lambda c: c.row["cell_id"], _axes(AXES)]
    apart = {axis for axis in ("model", "engine") if _sets_apart(axis, a, b)}
    if "engine" in apart:
        apart |= {axis for axis in ("attention", "cache") if _sets_apart(axis, a, b)}
    if apart:
        keys.append(_axes(axis for axis in AXES if axis not in apart))
    partner: dict[str, SideCell] = {}
    left, right = list(a.cells), list(b.cells)
    for key in keys:
        of_b = {key(cell): cell for cell in right}
        partner |= {c.row["cell_id"]: of_b[key(c)] for c in left if key(c) in of_b}
        taken = {cell.row["cell_id"] for cell in partner.values()}
        left = [cell for cell in left if cell.row["cell_id"] not in partner]
        right = [cell for cell in right if cell.row["cell_id"] not in taken]
    pairs = [(c, partner[c.row["cell_id"]]) for c in a.cells if c.row["cell_id"] in partner]
    return pairs, left, right


def _sets_apart(axis: str, a: Side, b: Side) -> bool:
    values = [{cell.row[axis] for cell in side.cells} for side in (a, b)]
    return all(len(value) == 1 for value in values) and values[0] != values[1]


def _axes(axes: Iterable[str]) -> Callable[[SideCell], Any]:
    names = tuple(axes)
    return lambda cell: tuple(cell.row[axis] for axis in names)


def _compare_cell(
    a: SideCell, b: SideCell, threshold: float, *, gpu: bool, in_turns: bool
) -> CellComparison:
    paired = paired_intervals(a.processes, b.processes) if in_turns else None
    ratio = paired or ratio_intervals(a.processes, b.processes, gpu=gpu)
    middles = [_middle_half(side.speeds) for side in (a, b)]
    unstable = not paired and any(is_unstable(run_ratio(m)) for m in middles)
    if ratio and unstable:
        of_a, of_b = middles
        low, high = min(of_b) / max(of_a), max(of_b) / min(of_a)
        ratio = replace(
            ratio, same=_spanning(ratio.same, low, high), change=_spanning(ratio.change, low, high)
        )
    verdict = decide(ratio, threshold)
    failed = [
        f"{name} {cell.row['verdict']}"
        for name, cell in (("A", a), ("B", b))
        if (cell.row["verdict"] or "").startswith("FAIL")
    ]
    remarks = list(failed)
    busy = {name: over for name, cell in (("A", a), ("B", b)) if (over := over_limits(cell.row))}
    if busy and verdict in (Verdict.FASTER, Verdict.SLOWER) and not (paired and len(busy) == 2):
        verdict = Verdict.AMBIGUOUS
    remarks += [
        f"the {'GPU' if over[0].limit.of_gpu else 'host'} was busy in {name}: {over[0].words}"
        for name, over in busy.items()
    ]
    if failed:  # speeds of other work, or of another mode, than the cell is named for
        verdict = Verdict.AMBIGUOUS
    if ratio is None:
        remarks.append(f"an interval needs {MIN_RUNS} runs on each side")
    if ratio and unstable:
        remarks.append("unstable: the interval spans half of the runs")
    remarks += [
        f"{column} {'/'.join(sorted(a.seen[column]))} -> {'/'.join(sorted(b.seen[column]))}"
        for column in RAN
        if _ran(a, b, column) != _ran(b, a, column)
    ]
    if a.seen["text_sha256"] != b.seen["text_sha256"]:
        remarks.append("the text differs")
    return CellComparison(a, b, verdict, ratio, tuple(remarks))


def _ran(cell: SideCell, other: SideCell, column: str) -> frozenset[str]:
    """What ran, as far as both sides' labels tell.

    Labels from before vectors were part of them say only how the weights are stored: those of
    fused kernels on quantized weights without an ending (`models.memory`).
    """
    values = cell.seen[column]
    sides = (cell, other)
    if column != "ran_quantization" or any(side.seen[KERNELS] != {"triton"} for side in sides):
        return values
    stored = [frozenset(map(stored_label, side.seen[column])) for side in sides]
    older = any(side.seen[column] == labels for side, labels in zip(sides, stored, strict=True))
    return stored[0] if older else values


def _middle_half(speeds: Sequence[float]) -> list[float]:
    cut = len(speeds) // 4
    return sorted(speeds)[cut : len(speeds) - cut]


def _spanning(interval: Interval, low: float, high: float) -> Interval:
    return replace(interval, low=min(interval.low, low), high=max(interval.high, high))


def counts(cells: Sequence[CellComparison]) -> dict[str, int]:
    """How many cells have each verdict, all four named."""
    found = Counter(cell.verdict for cell in cells)
    return {str(verdict): found[verdict] for verdict in Verdict}
