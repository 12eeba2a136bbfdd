"""What kernels need of each card, as it was compiled last."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from qwencli.config import Quantization
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
