"""Reads a campaign's files back; every value is checked before anything is computed from it.

Campaigns are copied, edited, merged by hand and cut off by full disks. What is wrong is named with
its file, line and column (or its key, in a JSON file), whoever reads it: report, compare, explain,
or a resumed campaign. Columns and keys of newer versions are passed on unread; columns that came
after a campaign was written are empty in its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from qwencli.bench.causes import SCOPES, Cause
from qwencli.bench.storage import columns
from qwencli.bench.storage.columns import check_table, refuse
from qwencli.bench.storage.json_documents import PLAN, read_environment, read_plan
from qwencli.bench.storage.row_file import RENAMED, Table, read_table

RUNS, TOKENS, GPU, HOST = "runs.csv", "tokens.csv", "gpu.csv", "host.csv"
PROBES, ROOFLINE, QUALITY, REFERENCE = "probes.csv", "roofline.csv", "quality.csv", "reference.csv"
CELLS, CAUSES = "cells.csv", "causes.csv"

GENERATED = ("ok", "warmup")
STATUSES = (*GENERATED, "skipped", "oom", "failed", "crashed", "killed", "timeout")

RawRow = dict[str, str]


@dataclass(frozen=True)
class _File:
    """What a CSV file holds.

    Args:
        columns: all that this version writes.
        first: how many of them the first version wrote; a file that lacks one of these is broken.
        filled: columns that are never empty.
        choices: the words that a column may hold.
        check: what else must hold of its rows; raises BenchError.
    """

    columns: tuple[str, ...]
    first: int
    filled: tuple[str, ...]
    choices: Mapping[str, Collection[str]] = field(default_factory=dict)
    check: Callable[[Table], None] = lambda table: None


def _check_runs(table: Table) -> None:
    seen: set[tuple[str, str]] = set()
    for place, row in enumerate(table.rows):
        if row["prefill_s"].startswith("-"):
            _join_phases(table, place, row)
        if row["status"] not in GENERATED:
            continue
        for name in ("run", "num_new_tokens"):
            if not row[name]:
                refuse(table, place, name, "is empty")
        key = row["cell_id"], row["run"]
        if row["status"] == "ok" and key in seen:
            refuse(table, place, "run", f"is a second run {row['run']} of cell {row['cell_id']}")
        seen.add(key)


def _join_phases(table: Table, place: int, row: RawRow) -> None:
    """Put right a prefill below zero, as earlier versions wrote it where the tower ran each step.

    They took all its runs off the first step's time. That time is known, its parts are not.
    """
    first_step_s = float(row["vision_encode_s"] or 0) + float(row["prefill_s"])
    if first_step_s <= 0:
        refuse(table, place, "prefill_s", f"{row['prefill_s']} is not a number from 0")
    row["vision_encode_s"], row["prefill_s"] = "", repr(round(first_step_s, 9))


def _check_tokens(table: Table) -> None:
    """The tokens of a run stand together, in order from 0; a warm-up may come several times."""
    key, index, before = ("", ""), -1, 0.0
    for place, row in enumerate(table.rows):
        this, at, time = (row["cell_id"], row["run"]), int(row["token_index"]), float(row["t_s"])
        if at:
            if this != key or at != index + 1:
                refuse(table, place, "token_index", f"{at} does not follow the token before")
            if not row["itl_ms"]:
                refuse(table, place, "itl_ms", "is empty")
            if time < before:
                refuse(table, place, "t_s", f"{row['t_s']} is earlier than the token before")
        elif row["itl_ms"]:
            refuse(table, place, "itl_ms", "is not empty at the first token")
        key, index, before = this, at, time


def _check_quality(table: Table) -> None:
    for place, row in enumerate(table.rows):
        if row["mean_kl"] and int(row["positions"] or 0) == 0:
            refuse(table, place, "positions", "is empty or 0 beside a mean_kl")


def _check_causes(table: Table) -> None:
    for place, row in enumerate(table.rows):
        for name in ("run", "t_s", "span_ms"):
            if row["scope"] != "cell" and not row[name]:
                refuse(table, place, name, "is empty")


_FILES: Mapping[str, _File] = {
    RUNS: _File(columns.RUNS, 40, ("cell_id", "status"), {"status": STATUSES}, _check_runs),
    TOKENS: _File(columns.TOKENS, 7, ("cell_id", "run", "token_index", "t_s"), check=_check_tokens),
    GPU: _File(columns.GPU, 14, ("cell_id", "run", "t_s", "gpu_index")),
    HOST: _File(columns.HOST, 19, ("cell_id", "run", "t_s", "event", "span_ms")),
    PROBES: _File(
        columns.PROBES,
        6,
        ("cell_id", "run", "pair", "itl_probe_on_ms", "itl_probe_off_ms"),
        {"sampler": ("", "on", "off")},
    ),
    ROOFLINE: _File(columns.ROOFLINE, 11, ("cell_id",)),
    QUALITY: _File(columns.QUALITY, 9, ("cell_id",), check=_check_quality),
    REFERENCE: _File(columns.REFERENCE, 5, columns.REFERENCE),
    CELLS: _File(
        columns.CELLS,
        23,
        ("cell_id", "model", "status"),
        {"status": (*STATUSES, "unfinished")},
    ),
    CAUSES: _File(
        columns.CAUSES,
        11,
        ("cell_id", "scope", "lost_ms", "cause", "confidence"),
        {"cause": tuple(map(str, Cause)), "scope": SCOPES},
        _check_causes,
    ),
}


def read_file(folder: Path, name: str, cells: Collection[str] | None = None) -> list[RawRow]:
    """The rows of one of a campaign's CSV files, as strings; [] where there is none.

    Args:
        cells: the cells that there are; None = not known.

    Raises:
        BenchError: it is broken.
    """
    file = _FILES[name]
    table = read_table(folder / name)
    check_table(table, file.columns, file.first, file.filled, file.choices)
    if cells is not None and "cell_id" in file.columns:
        for place, row in enumerate(table.rows):
            if row["cell_id"] not in cells:
                refuse(table, place, "cell_id", f"{row['cell_id']!r} is not a cell of {PLAN}")
    file.check(table)
    return table.rows


def renamed_columns(*folders: Path) -> str | None:
    """One line on the columns that stand in these folders by their names of earlier versions."""
    found = {
        f"{old} ({RENAMED[old]})"
        for folder in folders
        for path in folder.rglob("*.csv")
        for old in _header(path)
        if old in RENAMED
    }
    return f"columns of an earlier version are read: {', '.join(sorted(found))}" if found else None


def _header(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            return file.readline().strip().split(",")
    except OSError:  # whoever needs the file says so
        return []


class StoredCampaign:
    """The files of a finished, stopped or running campaign.

    Raises:
        BenchError: the folder holds none, or plan.json or environment.json is broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.plan = read_plan(folder)
        self.environment = read_environment(folder)
        self._cells = frozenset(cell["cell_id"] for cell in self.plan["cells"])

    def rows(self, name: str) -> list[RawRow]:
        """As `read_file`; every row belongs to a cell of the plan."""
        return read_file(self.folder, name, self._cells)
