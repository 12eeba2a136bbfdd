"""A campaign in tables: labels, the main table, and the tables of details below it.

One list of columns (`DETAILS`) serves the terminal, the Markdown and the HTML report.
"""

from __future__ import annotations

import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from qwencli.bench.attribution import whole_cell
from qwencli.bench.attribution.summary import probe_line, why
from qwencli.bench.plan.matrix import AXES, shorten_modes
from qwencli.bench.report.cell_statistics import NOT_QUOTABLE, UNSTABLE, measurable
from qwencli.bench.statistics.robust import is_unstable, run_ratio
from qwencli.output import counted

if TYPE_CHECKING:
    from rich.console import RenderableType


CellRow = Mapping[str, Any]
Show = Callable[[CellRow], str]

NOTHING = "-"
# Percent of decode: less than this is as good as none.
LEAST_TAKEN = 0.1

VALUE_COLUMNS = ("tok/s", "ratio", "TTFT", "p50", "p99", "peak", "verdict")


@dataclass(frozen=True)
class Detail:
    """One column; a table leaves it out where no cell has anything in it.

    Args:
        means: what the note under the table says of it, where its head does not.
    """

    head: str
    show: Show
    means: str = ""


@dataclass(frozen=True)
class DetailTable:
    title: str
    columns: tuple[Detail, ...]
    lead: str = ""

    def shown(self, rows: Sequence[CellRow]) -> list[Detail]:
        return [c for c in self.columns if any(c.show(row) != NOTHING for row in rows)]

    def note(self, rows: Sequence[CellRow]) -> str:
        """What its columns mean, of those that are shown."""
        said = [f"{c.head.partition(' (')[0]}: {c.means}" for c in self.shown(rows) if c.means]
        return "; ".join([self.lead, *said] if self.lead else said)

    def rows(self, rows: Sequence[CellRow]) -> list[CellRow]:
        """The rows with anything to show in this table."""
        return [row for row in rows if any(c.show(row) != NOTHING for c in self.columns)]


def _figure(name: str, spec: str, scale: float = 1.0, unit: str = "") -> Show:
    def show(row: CellRow) -> str:
        value = row.get(name)
        return NOTHING if value is None else format(value * scale, spec) + unit

    return show


def _shown_share(name: str) -> Show:
    """A percentage that is worth a place."""
    show = _figure(name, ".1f")
    return lambda row: NOTHING if (row.get(name) or 0.0) < LEAST_TAKEN else show(row)


def _share(level: str) -> Show:
    return _figure(f"variance_{level}_percent", ".0f", unit=" %")


def _first(row: CellRow) -> str:
    found = [
        f"{name} {row[column]:.2f}x"
        for name, column in (("warm-up", "warm_up_ratio"), ("run 1", "first_run_ratio"))
        if row.get(column) is not None
    ]
    return ", ".join(found) or NOTHING


def _level(row: CellRow) -> str:
    change = row.get("level_change_percent")
    if change is not None:
        return f"{row['level']} {change:+.1f} %"
    return {"stationary": "level", None: NOTHING}.get(row.get("level"), NOTHING)


def _word(name: str) -> Show:
    return lambda row: str(row.get(name) or NOTHING)


# (quantization, attention) -> tok/s in the origin's notes: an RTX 5090, Qwen3-VL-4B, torch 2.9.1.
ORIGIN_MODES: Mapping[tuple[str, str], float] = {
    ("none", "sdpa"): 16.8,
    ("none", "flash_attention_2"): 16.3,
    ("none", "eager"): 12.8,
    ("4bit", "flash_attention_2"): 11.8,
    ("4bit", "sdpa"): 5.0,
    ("4bit", "eager"): 12.7,
}


def _origin_speed(row: CellRow) -> str:
    """The origin measured its modes with the model kept."""
    speed = ORIGIN_MODES.get((row["quantization"], row["attention"]))
    return NOTHING if speed is None or row["load_mode"] != "keep" else f"{speed:.1f}"


def _of_origin(show: Show) -> Show:
    """Shown where the cell has the origin's columns at all."""
    return lambda row: NOTHING if row.get("generate_s_median") is None else show(row)


def _span(name: str, spec: str) -> Show:
    low, high = _figure(f"{name}_min", spec), _figure(f"{name}_max", spec)
    return lambda row: NOTHING if row.get(f"{name}_min") is None else f"{low(row)}-{high(row)}"


def _quoted(show: Show) -> Show:
    """A median, where it is one to show."""
    return lambda row: show(row) if is_quotable(row) else NOTHING


def _spread(row: CellRow) -> str:
    low, high = row.get("generate_tok_per_s_min"), row.get("generate_tok_per_s_max")
    return f"{high / low:.2f}" if low and high else NOTHING


AS_ORIGIN = DetailTable(
    "As the origin counted",
    (
        Detail(
            "origin",
            _of_origin(_origin_speed),
            "tok/s in its notes (RTX 5090, Qwen3-VL-4B, kept loaded)",
        ),
        Detail(
            "tok/s",
            _quoted(_figure("generate_tok_per_s_median", ".1f")),
            "tokens over the time of the whole generate(), median",
        ),
        Detail("runs", _span("generate_tok_per_s", ".1f"), "slowest to fastest of these"),
        Detail("max/min", _spread, "the origin's identical runs: 2.76"),
        Detail("s", _quoted(_figure("generate_s_median", ".2f")), "that whole time"),
        Detail("tokens", _figure("num_new_tokens_median", ".0f")),
        Detail("load s", _figure("load_s_median", ".1f"), "of one load, 4 to 16 there"),
        Detail(
            "stall s",
            _of_origin(_figure("ttft_s_median", ".2f")),
            "to the first token, 8.7 to 63.6 there",
        ),
        Detail("ms", _of_origin(_figure("itl_p50_ms", ".1f")), "median token, 29 to 110 there"),
        Detail(
            "stalls", _figure("stall_count_median", ".0f"), "slow tokens of a run, 1 to 62 there"
        ),
    ),
)
STEADINESS = DetailTable(
    "How steady",
    (
        Detail(
            "±",
            _figure("noise_percent", ".1f", unit=" %"),
            "half the 95 % interval of the median, in percent of it",
        ),
        Detail("within", _share("within_run"), "share of the variance of token times within runs"),
        Detail("runs", _share("between_runs"), "that between runs"),
        Detail("procs.", _share("between_processes"), "that between processes"),
        Detail("first", _first, "first runs that differ from the rest, and by what"),
        Detail("speed", _level, "over the runs of a process"),
        Detail("stopped by", _word("stop_reason")),
    ),
)
LIMITS = DetailTable(
    "How near the limits, and how right",
    (
        Detail("MB/token", _figure("bytes_per_token", ",.0f", 1e-6), "what a token has to read"),
        Detail(
            "GB/s",
            _figure("read_bandwidth_bytes_per_s", ".0f", 1e-9),
            "read bandwidth measured here",
        ),
        Detail("MBU", _figure("mbu_percent", ".0f", unit=" %"), "share of that bandwidth in use"),
        Detail("launches", _figure("launches_per_token", ".0f"), "of the device, a token"),
        Detail(
            "busy", _figure("gpu_busy_percent", ".0f", unit=" %"), "share of time the GPU works"
        ),
        Detail("bottleneck", _word("bottleneck"), "what holds the cell (rule in docs/bench.md)"),
        Detail(
            "exact",
            _figure("exact_match_percent", ".0f", unit=" %"),
            "held-out captions that are exactly right",
        ),
        Detail(
            "KL",
            _figure("mean_kl", ".2g"),
            "mean divergence from the unquantized reference, in nats a token",
        ),
    ),
)
QUIET = DetailTable(
    "What the machine took, in percent of decode",
    tuple(
        Detail(f"{limit.head} ({limit.percent:g})", _shown_share(limit.column), limit.words)
        for limit in whole_cell.LIMITS
    ),
    "beyond the limit in brackets a figure is not to be quoted",
)
DETAILS = (AS_ORIGIN, STEADINESS, LIMITS, QUIET)


def cell_summary(
    status: str,
    reason: str | None,
    speeds: Sequence[float],
    over: Sequence[whole_cell.ExceededLimit] = (),
) -> str:
    """One line on a process that has just ended; no median where its runs differ too much, or were
    above a limit (`over`)."""
    parts = [] if status == "ok" else [f"{status}: {reason}" if reason else status]
    if status == "ok" and reason:
        parts.append(reason)
    if speeds and (over or is_unstable(run_ratio(speeds))):
        low, high = f"{min(speeds):.1f}", f"{max(speeds):.1f}"
        parts.append(f"{low} tok/s" if low == high else f"{low} to {high} tok/s")
        parts += [f"{NOT_QUOTABLE}: {over[0].words}"] if over else []
    elif speeds:
        spread = f" ({min(speeds):.1f} to {max(speeds):.1f})" if len(speeds) > 1 else ""
        parts.append(f"{statistics.median(speeds):.1f} tok/s{spread}")
    return ", ".join(parts) or "ok"


def varying_axes(rows: Sequence[CellRow]) -> list[str]:
    """The axes that tell these cells apart; the model alone when there is one cell."""
    axes = [axis for axis in AXES if len({row[axis] for row in rows}) > 1]
    return axes or ["model"]


def title(rows: Sequence[CellRow]) -> str:
    """The axes that all cells share."""
    shared = [axis for axis in AXES if axis not in varying_axes(rows)]
    return ", ".join(f"{axis.replace('_', ' ')} {rows[0][axis]}" for axis in shared)


def row_label(row: CellRow, axes: Sequence[str]) -> str:
    return shorten_modes(str(row[axis]) for axis in axes)


def row_values(row: CellRow) -> tuple[str, ...]:
    """The cells of VALUE_COLUMNS; "-" for what was not measured."""
    return (
        speed_text(row),
        _number(row["run_ratio_max_min"], ".2f"),
        _seconds(row["ttft_s_median"]),
        _number(row["itl_p50_ms"], ".1f"),
        _number(row["itl_p99_ms"], ".1f"),
        _gigabytes(row["peak_allocated_bytes"]),
        verdict_text(row).partition(":")[0],
    )


def is_quotable(row: CellRow) -> bool:
    """Whether the median is a figure to show: its runs agree and the machine was theirs."""
    return not str(row["verdict"]).startswith((NOT_QUOTABLE, UNSTABLE))


def speed_text(row: CellRow) -> str:
    """The median; where that is not to be quoted, the range that the runs span."""
    speed = row["decode_tok_per_s_median"]
    if speed is None or is_quotable(row):
        return _number(speed, ".1f")
    low, high = row["decode_tok_per_s_min"], row["decode_tok_per_s_max"]
    spec = ".0f" if high >= 100 else ".1f"
    return f"{low:{spec}}-{high:{spec}}"


def verdict_text(row: CellRow) -> str:
    return (row["verdict"] if row["status"] == "ok" else row["status"]) or "no speed"


def _number(value: float | None, spec: str) -> str:
    return "-" if value is None else format(value, spec)


def _seconds(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value * 1e3:.0f} ms" if value < 1 else f"{value:.1f} s"


def _gigabytes(value: int | None) -> str:
    return "-" if value is None else f"{value / 1e9:.2f} GB"


def remarks(rows: Sequence[CellRow]) -> list[str]:
    """What the table's last column had no room for: reasons by cell, equal ones together."""
    of_table, of_all = varying_axes(measurable(rows)), varying_axes(rows)
    of_cells: list[tuple[str, str]] = []
    for row in rows:
        said = row["verdict"] or ""
        # What the table leaves out is told from the other cells by other axes, too.
        axes = of_all if row["status"] == "skipped" else of_table
        if row["status"] != "ok":
            of_cells.append((f"{row['status']}: {row['reason']}", row_label(row, axes)))
        if ":" in said:
            of_cells.append((said, row_label(row, axes)))
    return [
        f"{said}{' - ' * (len(rows) > 1)}{_where(labels, rows)}"
        for said, labels in by_kind(of_cells)
    ]


_PERCENT = re.compile(r"(\d+(?:\.\d+)?)%")


def by_kind(of_cells: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Sentences, each with the labels of the cells that it is about.

    Those that differ in percentages alone are one, which has what the percentages span.

    Args:
        of_cells: sentences, each with the label of its cell.
    """
    kinds: dict[str, list[tuple[str, str]]] = defaultdict(list)
    for said, label in of_cells:
        kinds[_PERCENT.sub("%", said)].append((said, label))
    return [
        (_spanning([said for said, _ in found]), [label for _, label in found])
        for found in kinds.values()
    ]


def _spanning(sentences: Sequence[str]) -> str:
    spans = []
    for column in zip(*map(_PERCENT.findall, sentences), strict=True):
        low, high = min(column, key=float), max(column, key=float)
        spans.append(f"{low}%" if float(low) == float(high) else f"{low} to {high}%")
    given = iter(spans)
    return _PERCENT.sub(lambda _: next(given), sentences[0])


def _where(labels: Sequence[str], rows: Sequence[CellRow]) -> str:
    """Which cells of all; "" where there is one alone."""
    if len(rows) == 1:
        return ""
    return labels[0] if len(labels) == 1 else counted(len(labels), "cell")


def why_lines(rows: Sequence[CellRow]) -> list[str]:
    """What slowed each cell, fastest cell first, and what measuring cost."""
    axes = varying_axes(rows)
    of_cells = [(said, row_label(row, axes)) for row in by_speed(rows) for said in why(row)]
    lines = [
        f"{_where(labels, rows)}{': ' * (len(rows) > 1)}{said}"
        for said, labels in by_kind(of_cells)
    ]
    probes = probe_line(rows)
    return lines + ([probes] if probes else [])


def terminal_table(rows: Sequence[CellRow]) -> RenderableType:
    """A table that fits 80 columns, fastest cell first, with the remarks under it, if any ran."""
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    said = [Text(line, style="dim") for line in remarks(rows)]
    if not (rows := measurable(rows)):
        return Group(*said)
    axes = varying_axes(rows)
    # Every column of padding is one less for the axes, whose words would be cut at 80.
    table = Table(
        title=title(rows), box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
        title_justify="left",
    )  # fmt: skip
    table.add_column(_axes_head(axes), overflow="fold")
    for name in VALUE_COLUMNS[:-1]:
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column(VALUE_COLUMNS[-1], no_wrap=True)
    for row in by_speed(rows):
        table.add_row(row_label(row, axes), *row_values(row), style=_style(row))
    whys = [Text(f"why: {line}") for line in why_lines(rows)]
    details = [_detail_table(detail, rows, axes) for detail in DETAILS if detail.shown(rows)]
    return Group(table, Text(UNITS, style="dim"), *said, *whys, *details)


def _detail_table(
    detail: DetailTable, rows: Sequence[CellRow], axes: Sequence[str]
) -> RenderableType:
    from rich.box import SIMPLE_HEAD
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title=f"\n{detail.title}", box=SIMPLE_HEAD, pad_edge=False, collapse_padding=True,
        title_justify="left",
    )  # fmt: skip
    table.add_column(_axes_head(axes), overflow="fold")
    shown = detail.shown(rows)
    for column in shown:
        table.add_column(column.head, justify="right", overflow="fold")
    for row in by_speed(detail.rows(rows)):
        table.add_row(row_label(row, axes), *(column.show(row) for column in shown))
    return Group(table, Text(detail.note(rows), style="dim"))


def _axes_head(axes: Sequence[str]) -> str:
    return " ".join(axis.replace("_", " ") for axis in axes)


UNITS = (
    "tok/s: median of the runs, or what they span where none is to be quoted; ratio: "
    "fastest/slowest run; TTFT: time to the first token; p50, p99: ms between tokens"
)


def _style(row: CellRow) -> str:
    failed = (row["verdict"] or "").startswith("FAIL")
    return "red" if failed or row["status"] not in ("ok", "unfinished") else ""


def by_speed(rows: Sequence[CellRow]) -> list[CellRow]:
    """Fastest first; what has no speed last, in its own order."""
    return sorted(rows, key=lambda row: -(row["decode_tok_per_s_median"] or 0.0))
