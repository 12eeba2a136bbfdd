"""The parts of the page that are read rather than drawn: header, tables, causes, environment."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from typing import Any

from qwencli.bench.attribution.summary import probe_line, why
from qwencli.bench.plan.stopping import repetition, rule_of
from qwencli.bench.report.tables import (
    DETAILS,
    STEADINESS,
    DetailTable,
    by_speed,
    is_quotable,
    row_label,
    speed_text,
    varying_axes,
)
from qwencli.output import counted

CellRow = Mapping[str, Any]
# Share of variance -> its class in assets/style.css and its name in the legend.
_LEVELS = {
    "variance_within_run_percent": ("within", "within runs"),
    "variance_between_runs_percent": ("between", "between runs"),
    "variance_between_processes_percent": ("processes", "between processes"),
}


def header(plan: Mapping[str, Any], environment: Mapping[str, Any]) -> str:
    """On what, with which versions, and what every run did."""
    device, versions, cpu = (environment[key] for key in ("device", "versions", "cpu"))
    where = device["name"] or cpu["model"] or "an unnamed processor"
    memory = device.get("total_memory_bytes")
    facts = [
        ("device", f"{device['device']}, {memory / 1e9:.0f} GB" if memory else device["device"]),
        ("driver", device["driver"]),
        ("processor", f"{cpu['model'] or 'unnamed'}, {cpu['logical_cores']} threads"),
        *((name, versions.get(name)) for name in ("qwencli", "torch", "transformers", "triton")),
        ("work", repetition(rule_of(plan), plan["max_new_tokens"])),
        ("prompt", f"“{plan['prompt']}”"),
        ("images", ", ".join(image["name"] for image in plan["images"]) or "none"),
        ("weights", plan["load_format"]),
        ("dtype", plan["dtype"]),
        ("seed", str(environment["seed"])),
    ]
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(str(value))}</dd></div>"
        for name, value in facts
        if value
    )
    return f'<h1>{escape(where)}</h1><dl class="facts">{items}</dl>'


def speed_range(row: CellRow, fastest: float) -> str:
    """A bar as long as the fastest run: pale from the slowest run on, a mark at the median where
    that is a figure to show."""
    if not row["decode_tok_per_s_median"]:
        return ""
    low, middle, high = (row[f"decode_tok_per_s_{name}"] for name in ("min", "median", "max"))
    kind = "range" if is_quotable(row) else "range unquoted"
    return (
        f'<i class="{kind}" style="--high:{high / fastest:.2%};--steady:{low / high:.2%};'
        f'--mid:{middle / fastest:.2%}"></i>'
    )


@dataclass(frozen=True)
class Column:
    """`scale` turns the row's value into the unit of the heading."""

    head: str
    unit: str
    name: str
    spec: str
    scale: float = 1.0

    def text(self, row: CellRow) -> str:
        value = row[self.name]
        return "–" if value is None else format(value * self.scale, self.spec)


SPEED = Column("speed", "tok/s", "decode_tok_per_s_median", ".1f")
COLUMNS = (
    SPEED,
    Column("slowest", "tok/s", "decode_tok_per_s_min", ".1f"),
    Column("fastest", "tok/s", "decode_tok_per_s_max", ".1f"),
    Column("ratio", "max/min", "run_ratio_max_min", ".2f"),
    Column("TTFT", "ms", "ttft_s_median", ".0f", 1e3),
    Column("ITL p50", "ms", "itl_p50_ms", ".2f"),
    Column("p90", "ms", "itl_p90_ms", ".2f"),
    Column("p99", "ms", "itl_p99_ms", ".2f"),
    Column("max", "ms", "itl_max_ms", ".1f"),
    Column("peak", "GB", "peak_allocated_bytes", ".2f", 1e-9),
)


def cells_table(rows: Sequence[CellRow], axes: Sequence[str]) -> str:
    """One line a cell, fastest first, those without a speed last; empty columns left out."""
    shown = [c for c in COLUMNS if any(row[c.name] is not None for row in rows)]
    places = {row["cell_id"]: place for place, row in enumerate(rows)}
    fastest = max((row["decode_tok_per_s_max"] or 0.0 for row in rows), default=0.0)
    heads = ["".join(_heading("cell", "", "text")), '<th scope="col">range</th>']
    heads += [_heading(column.head, column.unit, "number") for column in shown]
    heads.append(_heading("verdict", "", "text"))
    measured, blank = [], []
    for row in by_speed(rows):
        label = escape(row_label(row, axes))
        link = f'<a href="#cell-{places[row["cell_id"]]}">{label}</a>'
        line = f'<tr class="{_mood(row)}"><th scope="row">{link}</th>'
        verdict = escape(status_text(row))
        if row["decode_tok_per_s_median"] is None:
            blank.append(
                f'{line}<td class="verdict" colspan="{len(shown) + 2}">{verdict}</td></tr>'
            )
            continue
        numbers = "".join(
            f"<td>{speed_text(row) if column is SPEED else column.text(row)}</td>"
            for column in shown
        )
        bar = speed_range(row, fastest)
        measured.append(f'{line}<td>{bar}</td>{numbers}<td class="verdict">{verdict}</td></tr>')
    return (
        f'<div class="wide"><table class="cells"><thead><tr>{"".join(heads)}</tr></thead>'
        f"<tbody>{''.join(measured)}</tbody><tbody>{''.join(blank)}</tbody></table></div>"
    )


def _heading(head: str, unit: str, kind: str) -> str:
    small = f" <small>{unit}</small>" if unit else ""
    return f'<th scope="col"><button data-sort="{kind}">{head}{small}</button></th>'


def status_text(row: CellRow) -> str:
    """Why a cell's figures are missing or doubtful; "ok" where they are neither."""
    if row["status"] != "ok":
        return f"{row['status']}: {row['reason']}" if row["reason"] else str(row["status"])
    return row["verdict"] or "no speed"


def skipped_section(rows: Sequence[CellRow]) -> str:
    """The cells that cannot run here, by their reasons; "" where all can.

    Args:
        rows: all of the campaign's.
    """
    axes = varying_axes(rows)
    cells: dict[str, list[str]] = defaultdict(list)
    for row in rows:
        if row["status"] == "skipped":
            cells[str(row["reason"])].append(row_label(row, axes))
    if not cells:
        return ""
    lines = [
        f"<li>{escape(reason)}<details><summary>{counted(len(labels), 'cell')}</summary>"
        f"{escape(', '.join(labels))}</details></li>"
        for reason, labels in cells.items()
    ]
    lead = f"{counted(sum(map(len, cells.values())), 'cell')} of the matrix cannot run here."
    return (
        f'<section id="skipped"><h2>Skipped</h2><p class="lead">{lead}</p>'
        f'<ul class="why">{"".join(lines)}</ul></section>'
    )


def _mood(row: CellRow) -> str:
    if row["status"] not in ("ok", "unfinished") or status_text(row).startswith("FAIL"):
        return "bad"
    return "good" if status_text(row) == "ok" else "doubt"


def blank_section(place: int, row: CellRow, label: str) -> str:
    """A cell of which there is nothing to draw."""
    return (
        f'<div id="cell-{place}" class="blank {_mood(row)}">'
        f'<span class="name">{escape(label)}</span>'
        f'<span class="verdict">{escape(status_text(row))}</span></div>'
    )


def cell_section(place: int, row: CellRow, label: str, fastest: float, *, opened: bool) -> str:
    """The heading of one cell; its charts are drawn into it when it is opened."""
    known = row["decode_tok_per_s_median"]
    figure = f"<b>{speed_text(row)}</b> tok/s" if known else "–"
    return (
        f'<details id="cell-{place}" class="cell {_mood(row)}"{" open" * opened}><summary>'
        f'<span class="name">{escape(label)}</span>{speed_range(row, fastest)}'
        f'<span class="figure">{figure}</span>'
        f'<span class="verdict">{escape(status_text(row))}</span>'
        f'</summary><div class="charts" data-charts="charts-{place}"></div></details>'
    )


def environment_table(environment: Mapping[str, Any]) -> str:
    """Everything in environment.json, section by section."""
    parts = []
    for name, value in environment.items():
        facts = value if isinstance(value, Mapping) else {"": value}
        lines = "".join(
            f'<tr><th scope="row">{escape(_fact_name(name, str(key)))}</th>'
            f"<td>{escape(_amount(str(key), fact))}</td></tr>"
            for key, fact in facts.items()
        )
        title = escape(name.replace("_", " "))
        parts.append(f"<table><caption>{title}</caption><tbody>{lines}</tbody></table>")
    return f'<div class="environment">{"".join(parts)}</div>'


def _fact_name(section: str, key: str) -> str:
    """In words; a variable of the environment is looked for by its whole name."""
    if section == "variables":
        return key
    return key.removesuffix("_bytes").replace("_", " ")


def _amount(key: str, fact: Any) -> str:
    if key.endswith("_bytes") and isinstance(fact, int):
        return f"{fact / 1e9:.1f} GB"
    return _plain(fact)


_FORMATS: tuple[tuple[type, Callable[[Any], str]], ...] = (
    (type(None), lambda _: "–"),
    (list, lambda items: " ".join(map(str, items))),
)


def _plain(value: Any) -> str:
    return next((show(value) for kind, show in _FORMATS if isinstance(value, kind)), str(value))


def detail_sections(rows: Sequence[CellRow], axes: Sequence[str]) -> str:
    """A section for each table that has anything in it."""
    return "\n".join(_section(detail, rows, axes) for detail in DETAILS if detail.shown(rows))


def _section(detail: DetailTable, rows: Sequence[CellRow], axes: Sequence[str]) -> str:
    shown = detail.shown(rows)
    bars = detail is STEADINESS and any(_shares(row) for row in rows)
    heads = [escape(column.head) for column in shown] + ["variance of token times"] * bars
    places = {row["cell_id"]: place for place, row in enumerate(rows)}
    lines = []
    for row in by_speed(detail.rows(rows)):
        label = escape(row_label(row, axes))
        cells = [f"<td>{escape(column.show(row))}</td>" for column in shown]
        cells += [f"<td>{_bar(row)}</td>"] * bars
        link = f'<a href="#cell-{places[row["cell_id"]]}">{label}</a>'
        lines.append(f'<tr><th scope="row">{link}</th>{"".join(cells)}</tr>')
    head = "".join(f'<th scope="col">{name}</th>' for name in ("cell", *heads))
    return (
        f"<section><h2>{escape(detail.title)}</h2>"
        f'<p class="lead">{escape(_sentence(detail.note(rows)))}.'
        f"{_legend(rows) if bars else ''}</p>"
        f'<div class="wide"><table class="cells details"><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div></section>"
    )


def _sentence(words: str) -> str:
    """With a capital at its beginning, the rest as it is."""
    return words[:1].upper() + words[1:]


def _shares(row: CellRow) -> list[tuple[str, str, float]]:
    return [
        (kind, name, row[column])
        for column, (kind, name) in _LEVELS.items()
        if row.get(column) is not None
    ]


def _bar(row: CellRow) -> str:
    """A bar of the shares; the figures stand in the columns beside it."""
    parts = "".join(
        f'<i class="{kind}" style="width:{share:.1f}%" title="{name}: {share:.0f} %"></i>'
        for kind, name, share in _shares(row)
    )
    return f'<span class="shares">{parts}</span>' if parts else ""


def _legend(rows: Sequence[CellRow]) -> str:
    found = {kind for row in rows for kind, _, _ in _shares(row)}
    keys = "".join(
        f'<span class="key"><i class="{kind}"></i> {name}</span> '
        for kind, name in _LEVELS.values()
        if kind in found
    )
    return f'<span class="sharekeys">{keys}</span>'


def why_section(rows: Sequence[CellRow], axes: Sequence[str]) -> str:
    """A line or two for each cell that was slowed, fastest cell first; "" where there is nothing
    to say at all."""
    places = {row["cell_id"]: place for place, row in enumerate(rows)}
    names = {row["cell_id"]: row_label(row, axes) if len(rows) > 1 else "this cell" for row in rows}
    lines = [
        f'<li><a href="#cell-{places[row["cell_id"]]}">{escape(names[row["cell_id"]])}</a>: '
        f"{escape(said)}</li>"
        for row in by_speed(rows)
        for said in why(row)
    ]
    probes = probe_line(rows)
    if not lines and probes is None:
        return ""
    lead = f'<p class="lead">{escape(_sentence(probes))}.</p>' if probes else ""
    items = f'<ul class="why">{"".join(lines)}</ul>' if lines else "<p>No gaps, no slow runs.</p>"
    return f'<section id="why"><h2>Why</h2>{lead}{items}</section>'
