"""Finds campaigns in results/ by what their folders are called, and reads their runs.

results/DATE-MACHINE-engines   both engines in one campaign, from a GPU: the newest one is shown.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from qwencli.bench.run.campaign import ENVIRONMENT, PLAN, RUNS
from qwencli.bench.storage.row_file import read_rows
from qwencli.bench.studies.origin_tables import Modes, Series

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "results"


def document(folder: Path, name: str) -> dict[str, Any]:
    """PLAN or ENVIRONMENT of a campaign."""
    read: dict[str, Any] = json.loads((folder / name).read_text(encoding="utf-8"))
    return read


def newest_of_gpu(kind: str) -> Path | None:
    """The newest campaign of a GPU whose folder ends in `-kind`."""
    found = (path.parent for path in RESULTS.glob(f"*-{kind}/{ENVIRONMENT}"))
    of_gpus = [path for path in found if document(path, ENVIRONMENT)["device"]["name"]]
    return max(of_gpus, key=lambda path: path.name, default=None)


def series(folder: Path) -> Iterator[Series]:
    """Kept and loaded anew, of each engine with plain weights that was measured both ways."""
    cells = document(folder, PLAN)["cells"]
    plain = [cell for cell in cells if cell["quantization"] == "none" and not cell["skip_reason"]]
    rows = [row for row in read_rows(folder / RUNS) if row["status"] == "ok"]
    for engine in dict.fromkeys(cell["engine"] for cell in plain):
        modes = {cell["load_mode"]: cell["cell_id"] for cell in plain if cell["engine"] == engine}
        if len(modes) < 2:
            continue
        for mode in ("keep", "reload"):
            runs = [row for row in rows if row["cell_id"] == modes[mode]]
            if runs:
                yield engine, mode, runs


def kept_modes(folder: Path) -> Modes:
    """Runs by mode of the cells that keep the model."""
    rows = [row for row in read_rows(folder / RUNS) if row["status"] == "ok"]
    return {
        (cell["engine"], cell["quantization"], cell["attention"]): own
        for cell in document(folder, PLAN)["cells"]
        if cell["load_mode"] == "keep"
        and (own := [row for row in rows if row["cell_id"] == cell["cell_id"]])
    }


def source(folder: Path) -> str:
    """Where its figures come from."""
    about, plan = document(folder, ENVIRONMENT), document(folder, PLAN)
    versions = about["versions"]
    weights = ", random weights" if plan["load_format"] == "dummy" else ""
    return (
        f"{about['device']['name']}, {plan['cells'][0]['model']}{weights}, "
        f"{plan['max_new_tokens']} new tokens, up to {plan['runs']} runs a cell, "
        f"torch {versions['torch']}, transformers {versions['transformers']}. "
        f"From `results/{folder.name}/`."
    )
