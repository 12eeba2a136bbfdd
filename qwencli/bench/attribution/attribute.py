"""From raw rows to findings: every gap, every slow phase of a run and every cell that was slowed
down as a whole, with its cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qwencli.bench.attribution.cause_rules import judge
from qwencli.bench.attribution.evidence import Baseline, baseline, observe
from qwencli.bench.attribution.records import RawRow, RunRecord, records_by_cell
from qwencli.bench.attribution.slow_runs import SlowPhase, slow_phases
from qwencli.bench.attribution.whole_cell import over_limits
from qwencli.bench.causes import Finding, SlowInterval
from qwencli.bench.statistics.slow_tokens import TypicalToken, gaps


def attribute(
    runs: Iterable[RawRow],
    tokens: Iterable[RawRow],
    host: Iterable[RawRow],
    gpu: Iterable[RawRow],
    device_busy_percent: Mapping[str, float | None] | None = None,
    disturbed: Mapping[str, Mapping[str, Any]] | None = None,
) -> list[Finding]:
    """The rows of causes.csv, from those of the other files, cell by cell in their order.

    Args:
        device_busy_percent: cell -> how much of the time its device works, where measured.
        disturbed: cell -> its percentages, as `whole_cell` has them.

    Raises:
        BenchError: a raw row holds something else than a number where one belongs.
    """
    cells = records_by_cell(runs, tokens, host, gpu)
    busy, percentages = device_busy_percent or {}, disturbed or {}
    return [
        finding
        for cell_id, records in cells.items()
        for finding in (
            *_whole(records, percentages.get(cell_id, {})),
            *_of_cell(records, busy.get(cell_id)),
        )
    ]


def _whole(records: Sequence[RunRecord], percentages: Mapping[str, Any]) -> Iterator[Finding]:
    decodes = [decode for record in records if (decode := record.interval("decode"))]
    for over in over_limits(percentages) if decodes else ():
        span_ms = sum(decode.span_ms for decode in decodes)
        yield Finding(
            cell_id=records[0].cell_id,
            run="",
            scope="cell",
            token_index=None,
            tokens=sum(len(record.itl_ms) for record in records),
            t_s=max(decode.end_s for decode in decodes),
            span_ms=span_ms,
            lost_ms=span_ms * over.percent / 100,
            cause=over.limit.cause,
            confidence=over.limit.trust,
            evidence=f"{over.words}; the limit is {over.limit.percent:g}%",
        )


def _of_cell(records: Sequence[RunRecord], busy: float | None) -> list[Finding]:
    usual = baseline(records)
    found = [
        _finding(record, usual, gap, busy)
        for record in records
        for gap in _gaps(record, usual.token)
    ]
    return found + [
        _finding(slow.record, usual, _phase(slow), busy)
        for slow in slow_phases(records)
        if slow.record.t_s
    ]


def _gaps(record: RunRecord, usual: TypicalToken | None) -> Iterator[SlowInterval]:
    for gap in gaps(record.itl_ms, usual) if usual else ():
        start_s, end_s = record.t_s[gap.first - 1], record.t_s[gap.last]
        tokens = gap.last + 1 - gap.first
        yield SlowInterval("gap", start_s, end_s, gap.lost_ms, tokens, gap.first)


def _phase(slow: SlowPhase) -> SlowInterval:
    record = slow.record
    first, last = record.t_s[0], record.t_s[-1]
    if slow.scope == "decode":
        return SlowInterval("decode", first, last, slow.lost_ms, len(record.itl_ms))
    return SlowInterval("prefill", first - record.figures["ttft_s"], first, slow.lost_ms, 1)


def _finding(
    record: RunRecord, usual: Baseline, stretch: SlowInterval, busy: float | None
) -> Finding:
    claim = judge(observe(record, usual, stretch, busy))
    return Finding(
        cell_id=record.cell_id,
        run=record.run,
        scope=stretch.scope,
        token_index=stretch.token_index,
        tokens=stretch.tokens,
        t_s=stretch.end_s,
        span_ms=stretch.span_ms,
        lost_ms=stretch.lost_ms,
        cause=claim.cause,
        confidence=claim.confidence,
        evidence=claim.evidence,
    )
