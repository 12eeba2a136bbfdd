"""The two sides of a comparison: a campaign read back, and what keeps two from being comparable."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qwencli.bench.attribution.whole_cell import machine_of
from qwencli.bench.report.cell_statistics import CellRow, cell_rows
from qwencli.bench.report.steadiness import by_process, has_speed
from qwencli.bench.storage.campaign_files import GPU, HOST, RUNS, StoredCampaign

Document = Mapping[str, Any]

WORK = ("num_prompt_tokens", "num_image_tokens", "num_new_tokens")
RAN = ("ran_quantization", "ran_attention", "ran_cache")
KERNELS = "ran_kernels"
# In environment.json of sides that took turns: the name of their pair.
IN_TURNS = "in_turns"


@dataclass(frozen=True)
class SideCell:
    """One cell: its row of cells.csv, and its measured runs in order (the warm-up is left out).

    Args:
        processes: decode tokens per second of each run that has one, by the process that made it.
        seen: column -> the values it had, of WORK, RAN, KERNELS and text_sha256.
    """

    row: CellRow
    processes: tuple[tuple[float, ...], ...]
    seen: Mapping[str, frozenset[str]]

    @property
    def speeds(self) -> tuple[float, ...]:
        return tuple(speed for process in self.processes for speed in process)

    @property
    def level(self) -> float:
        """Geometric mean of the processes' medians: what a comparison compares. Needs a speed."""
        return statistics.geometric_mean(map(statistics.median, self.processes))


@dataclass(frozen=True)
class Side:
    name: str
    plan: Document
    environment: Document
    cells: tuple[SideCell, ...]

    @property
    def models(self) -> set[str]:
        return {cell.row["model"] for cell in self.cells}


def read_side(folder: Path) -> Side:
    """Read a campaign from its raw rows.

    Raises:
        BenchError: the folder holds no campaign, or one of its files is broken.
    """
    stored = StoredCampaign(folder)
    rows = (stored.rows(name) for name in (RUNS, HOST, GPU))
    return side(str(folder), stored.plan, stored.environment, *rows)


def side(
    name: str,
    plan: Document,
    environment: Document,
    runs: Sequence[Mapping[str, str]],
    host: Sequence[Mapping[str, str]] = (),
    gpu: Sequence[Mapping[str, str]] = (),
) -> Side:
    """From what `StoredCampaign` has read."""
    of_cell: dict[str, list[Mapping[str, str]]] = {}
    for row in runs:
        of_cell.setdefault(row["cell_id"], []).append(row)
    cells = []
    machine = machine_of(environment)
    for row in cell_rows(plan, runs, (), host=host, gpu=gpu, machine=machine):
        rows = of_cell.get(row["cell_id"], [])
        speeds = [
            tuple(float(run["decode_tok_per_s"]) for run in process if has_speed(run))
            for process in by_process(rows)
        ]
        seen = {
            column: frozenset(run[column] for run in rows if run["status"] == "ok")
            for column in (*WORK, *RAN, "text_sha256")
        }
        seen[KERNELS] = frozenset(  # not in the oldest
            run.get(KERNELS, "") for run in rows if run["status"] == "ok"
        )
        cells.append(SideCell(row, tuple(process for process in speeds if process), seen))
    return Side(name, plan, environment, tuple(cells))


def _at(document: Document, *keys: str) -> Any:
    value: Any = document
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value


def device_kind(a: Side) -> str:
    """cuda, cpu, mps; "None" where the campaign does not say."""
    return str(_at(a.environment, "device", "device")).partition(":")[0]


def took_turns(a: Side, b: Side) -> bool:
    """Whether their processes alternated (`compare_run`)."""
    pair = _at(a.environment, IN_TURNS)
    return pair is not None and pair == _at(b.environment, IN_TURNS)


def _device(a: Side) -> str:
    return f"{_at(a.environment, 'device', 'name') or 'no GPU'} ({device_kind(a)})"


def _cpu(a: Side) -> str:
    return (
        f"{_at(a.environment, 'cpu', 'model')}, {_at(a.environment, 'cpu', 'logical_cores')} cores"
    )


def _images(a: Side) -> str:
    images = a.plan.get("images") or ()
    return ", ".join(f"{_at(i, 'name')} {str(_at(i, 'sha256'))[:8]}" for i in images) or "none"


# What must be equal for a ratio of speeds to mean anything.
_ALIKE: tuple[tuple[str, Callable[[Side], Any]], ...] = (
    ("device", _device),
    ("CPU", _cpu),
    ("images", _images),
    ("prompt", lambda a: a.plan.get("prompt")),
    ("max_new_tokens", lambda a: a.plan.get("max_new_tokens")),
    ("dtype", lambda a: a.plan.get("dtype")),
    ("load_format", lambda a: a.plan.get("load_format")),
)


def unlike(a: Side, b: Side, pairs: Sequence[tuple[SideCell, SideCell]]) -> list[str]:
    """Differences in model, hardware or work that forbid a comparison, one line each."""
    found = []
    if not a.models & b.models:
        found.append(f"model: {_names(a.models)} against {_names(b.models)}")
    for name, read in _ALIKE:
        left, right = read(a), read(b)
        if left != right:
            found.append(f"{name}: {left} against {right}")
    for column in WORK:
        cells = [
            (x.seen[column], y.seen[column])
            for x, y in pairs
            if x.speeds and y.speeds and x.seen[column] != y.seen[column]
        ]
        if cells:
            left, right = (_names(values) for values in cells[0])
            more = f" and {len(cells) - 1} more cells" if len(cells) > 1 else ""
            found.append(f"{column}: {left} against {right}{more}")
    return found


def changes(a: Side, b: Side) -> list[str]:
    """Versions and drivers that differ: possible causes, no obstacle."""
    versions = [_at(one.environment, "versions") or {} for one in (a, b)]
    names = dict.fromkeys([*versions[0], *versions[1]])
    found = [(name, versions[0].get(name), versions[1].get(name)) for name in names]
    for name, keys in (("driver", ("device", "driver")), ("system", ("os", "release"))):
        found.append((name, _at(a.environment, *keys), _at(b.environment, *keys)))
    return [f"{name} {old} -> {new}" for name, old, new in found if old != new]


def _names(values: set[str] | frozenset[str]) -> str:
    return "/".join(sorted(values))
