"""Two campaigns of the same cells with nothing changed between them: how many are SAME?

python benchmarks/a_against_a.py --out campaigns/aa --matrix benchmarks/a_against_a.toml \
    --load-format dummy --planted 3 --planted-cells 3 --max-time 520

Campaigns a and b are made process by process in turns, there and back, so that a drift of the
machine meets both alike. With --planted a third one follows, of the first --planted-cells cells,
whose tokens are made so many percent slower on purpose: how many are SLOWER? All rows are on disk
as they happen; past --max-time seconds no process begins, and what there is is compared.

Prints the comparisons and, as the last line, one JSON object with the share of each verdict; the
whole is written to comparisons.json beside the campaigns. Shares are of cells with a speed on both
sides; "none" counts the others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from qwencli.bench.compare.comparison import compare
from qwencli.bench.compare.comparison_tables import comparison_document, comparison_table
from qwencli.bench.compare.sides import read_side
from qwencli.bench.measure.telemetry import sampler_command
from qwencli.bench.plan.campaign_plan import Plan
from qwencli.bench.plan.environment import environment, read_machine_speed
from qwencli.bench.plan.predict import duration, planned_table, predict
from qwencli.bench.plan.prepare import BenchRequest, prepare
from qwencli.bench.plan.stopping import RepetitionOptions
from qwencli.bench.report.campaign_report import build_report
from qwencli.bench.run.bench_run import INTERRUPTED, worker_command_for
from qwencli.bench.run.campaign import Campaign
from qwencli.bench.run.campaign_runner import RunnerOptions, run_in_turns
from qwencli.config import DType, LoadFormat
from qwencli.engine.machine.device import DeviceFacts
from qwencli.output import Output


def main() -> int:
    end = time.monotonic()
    options = _options()
    end += options.max_time or float("inf")
    sink = Output()
    plan, facts = prepare(_request(options))
    planted = _of_first_cells(plan, options.planted_cells) if options.planted else None
    if options.dry_run:
        _show(plan, planted, sink)
        return 0
    code = 0
    try:
        _run(plan, facts, options.out, ("a", "b"), None, end, sink)
        _write(options.out, ("b",), sink)
        if planted:
            _run(planted, facts, options.out, ("planted",), options.planted, end, sink)
    except KeyboardInterrupt:
        code = INTERRUPTED
    there = [name for name in ("a", "b", "planted") if (options.out / name / "plan.json").exists()]
    for name in there:
        build_report(options.out / name)
    found = _write(options.out, there[1:], sink)
    print(json.dumps({name: _shares(document) for name, document in found.items()}))
    return code


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="a new folder for all campaigns")
    parser.add_argument("--planted", type=float, metavar="PERCENT")
    parser.add_argument("--planted-cells", type=int, metavar="N", help="default: all")
    parser.add_argument("--max-time", type=float, metavar="SECONDS")
    parser.add_argument("--dry-run", action="store_true", help="print the cells and their time")
    for name in ("matrix", "model", "device", "load-format"):
        parser.add_argument(f"--{name}", help="as in bench")
    for name in ("runs", "processes", "max-new-tokens", "seed"):
        parser.add_argument(f"--{name}", type=int, help="as in bench")
    return parser.parse_args()


def _request(options: argparse.Namespace) -> BenchRequest:
    return BenchRequest(
        matrix=options.matrix or "quick",
        axes={"model": options.model},
        exclude=(),
        repetition=RepetitionOptions(runs=options.runs, processes=options.processes),
        max_new_tokens=options.max_new_tokens,
        prompt=None,
        images=(),
        seed=options.seed or 0,
        device=options.device or "auto",
        dtype=DType.AUTO,
        load_format=LoadFormat(options.load_format or LoadFormat.AUTO),
        max_seq_len=None,
        quality_samples=0,
    )


def _of_first_cells(plan: Plan, count: int | None) -> Plan:
    """The same work for `count` of the cells, in the order in which they run."""
    able = [cell for cell in plan.order() if not cell.skip_reason]
    return replace(plan, cells=tuple(able[:count]))


def _show(plan: Plan, planted: Plan | None, sink: Output) -> None:
    speed = read_machine_speed(plan.settings.device)
    able = {cell.cell_id: predict(plan, cell, speed) for cell in plan.cells if not cell.skip_reason}
    sink.show(planned_table(plan.order(), able))
    ids = [*able, *able, *(cell.cell_id for cell in (planted.cells if planted else ()))]
    seconds = sum(able[cell_id].seconds or 0.0 for cell_id in ids)
    sink.show(f"{len(ids)} processes or more in all campaigns, about {duration(seconds)}")


def _run(
    plan: Plan,
    facts: DeviceFacts,
    out: Path,
    names: tuple[str, ...],
    planted: float | None,
    end: float,
    sink: Output,
) -> None:
    runner = RunnerOptions(
        command=worker_command_for(planted),
        sampler=sampler_command(facts.uuid) if facts.kind == "cuda" else None,
        timeout_s=1800.0,
        limits=False,
    )
    about = environment(facts, [Path(__file__).name, *sys.argv[1:]], plan.settings.seed)
    with ExitStack() as stack:
        campaigns = [
            stack.enter_context(Campaign(out / name, plan, about, resume=False)) for name in names
        ]
        run_in_turns(campaigns, runner, sink.notice, lambda: time.monotonic() < end)


def _write(out: Path, names: tuple[str, ...] | list[str], sink: Output) -> Mapping[str, Any]:
    """Compare each of `names` with campaign a, print it, and write comparisons.json."""
    base = read_side(out / "a")
    found = {name: compare(base, read_side(out / name)) for name in names}
    for comparison in found.values():
        sink.show(comparison_table(comparison))
    documents = {name: comparison_document(comparison) for name, comparison in found.items()}
    text = json.dumps(documents, indent=2)
    (out / "comparisons.json").write_text(text + "\n", encoding="utf-8")
    return documents


def _shares(document: Mapping[str, Any]) -> dict[str, Any]:
    counts: dict[str, int] = document["counts"]
    cells = sum(counts.values())
    shares = {name: round(100 * count / (cells or 1), 1) for name, count in counts.items()}
    return {"cells": cells, "percent": shares, "none": len(document["no_figure"])}


if __name__ == "__main__":
    raise SystemExit(main())
