"""From raw rows to findings: every gap and every slow phase of a run with its cause."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from qwencli.bench.attribution.baseline import Baseline, baseline
from qwencli.bench.attribution.between import slow_phases
from qwencli.bench.attribution.causes import Finding, Scope
from qwencli.bench.attribution.collect import observe
from qwencli.bench.attribution.gaps import gaps
from qwencli.bench.attribution.records import RawRow, RunRecord, records_by_cell
from qwencli.bench.attribution.rules import judge


def attribute(
    runs: Iterable[RawRow],
    tokens: Iterable[RawRow],
    host: Iterable[RawRow],
    gpu: Iterable[RawRow],
) -> list[Finding]:
    """The rows of causes.csv, from those of the other files, cell by cell in their order.

    Raises:
        BenchError: a raw row holds something else than a number where one belongs.
    """
    cells = records_by_cell(runs, tokens, host, gpu)
    return [finding for records in cells.values() for finding in _of_cell(records)]


def _of_cell(records: Sequence[RunRecord]) -> list[Finding]:
    usual = baseline(records)
    found = [finding for record in records for finding in _gaps(record, usual)]
    for slow in slow_phases(records):
        record = slow.record
        if not record.t_s:
            continue
        start, end = _phase_time(record, slow.scope)
        tokens = len(record.itl_ms) if slow.scope == "decode" else 1
        found.append(
            _finding(record, usual, slow.scope, start, end, slow.lost_ms, tokens, token=None)
        )
    return found


def _gaps(record: RunRecord, usual: Baseline) -> Iterator[Finding]:
    if usual.token is None:
        return
    for gap in gaps(record.itl_ms, usual.token):
        yield _finding(
            record,
            usual,
            "gap",
            record.t_s[gap.first - 1],
            record.t_s[gap.last],
            gap.lost_ms,
            gap.last + 1 - gap.first,
            token=gap.first,
        )


def _phase_time(record: RunRecord, scope: Scope) -> tuple[float, float]:
    first, last = record.t_s[0], record.t_s[-1]
    if scope == "decode":
        return first, last
    return first - record.figures["ttft_s"], first


def _finding(
    record: RunRecord,
    usual: Baseline,
    scope: Scope,
    start_s: float,
    end_s: float,
    lost_ms: float,
    tokens: int,
    *,
    token: int | None,
) -> Finding:
    claim = judge(observe(record, usual, scope, start_s, end_s, lost_ms, tokens))
    return Finding(
        cell_id=record.cell_id,
        run=record.run,
        scope=scope,
        token_index=token,
        tokens=tokens,
        t_s=end_s,
        span_ms=1e3 * (end_s - start_s),
        lost_ms=lost_ms,
        cause=claim.cause,
        confidence=claim.confidence,
        evidence=claim.evidence,
    )
