"""What kernels need of each card, as it was compiled last."""

from __future__ import annotations

import csv
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from qwencli.config import Quantization
from qwencli.engine.kernels.launches import KernelLaunch
from tests.engine.kernels.test_compiled import CARDS
from tools import kernels_by_card

TABLE = Path(__file__).parents[2] / "results/2026-11-30-kernels-by-card/kernels.csv"
ROWS = list(csv.DictReader(TABLE.read_text().splitlines()))
# Bytes of a thread: a register or two outside of loops, and what was measured to be faster so.
FEW_SPILLED = 16
MOST_SPILLED = {"flash_attention_kernel": 48}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row['kernel']}-{row['card']}")
def test_every_kernel_fits_its_card(row) -> None:
    assert int(row["shared_bytes"]) <= CARDS[int(row["card"])]
    assert int(row["spilled_bytes"]) <= MOST_SPILLED.get(row["kernel"], FEW_SPILLED)


def test_all_kernels_of_a_plan_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """`make kernels` writes the table; a new kernel is not in it until then."""
    few = [job for job in kernels_by_card.JOBS if job[1] is Quantization.INT4]
    monkeypatch.setattr(kernels_by_card, "JOBS", few)
    for card in (90, 120):
        known = {row["kernel"] for row in ROWS if int(row["card"]) == card}
        assert {launch.kernel for launch in kernels_by_card.planned(card)} <= known


def test_registers_and_stack_are_read_from_what_the_compiler_says(monkeypatch) -> None:
    said = "Function k:\n  REG:128 STACK:48 SHARED:0 LOCAL:0 CONSTANT[0]:592\n"

    class Ran:
        stdout = said

    monkeypatch.setattr(kernels_by_card.subprocess, "run", lambda *a, **k: Ran)
    assert kernels_by_card.resources(b"") == (128, 48)


def test_kernels_that_are_named_are_compiled_and_others_kept(tmp_path, monkeypatch) -> None:
    table = tmp_path / "kernels.csv"
    table.write_text(TABLE.read_text())
    names = ("add_norm_kernel", "gated_norm_kernel")
    launches = [KernelLaunch("module", name, ()) for name in names]
    monkeypatch.setattr(kernels_by_card, "planned", lambda card: launches)
    monkeypatch.setattr(kernels_by_card, "ProcessPoolExecutor", ThreadPoolExecutor)
    monkeypatch.setattr(kernels_by_card, "need", lambda job: kernels_by_card.Need(7, 8, 0))
    given = [str(tmp_path), "--cards", "90", "--kernels", "gated_norm_kernel"]
    monkeypatch.setattr("sys.argv", ["kernels_by_card.py", *given])
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    kernels_by_card.main()
    rows = list(csv.DictReader(table.read_text().splitlines()))
    assert len(rows) == len(ROWS)
    new = [row for row in rows if row not in ROWS]
    assert [(row["card"], row["kernel"], row["registers"]) for row in new] == [
        ("90", "gated_norm_kernel", "7")
    ]
