"""The measured step of a batch, in Triton's interpreter."""

from __future__ import annotations

import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton has wheels for Linux alone", allow_module_level=True)

from benchmarks.measured_step import MeasuredStep
from benchmarks.rows_step import LONG, RowsStep, checked, cuts
from qwencli.config import Quantization
from qwencli.engine.native.sampler import SamplerKind
from qwencli.models.shape_reader import read_shape
from tests.benchmarks.test_decode_step import FewPrograms
from tests.engine.kernels.test_skinny_gemm import config


@torch.inference_mode()
def test_a_step_of_rows_moves_each_on_by_one_however_it_is_cut_up() -> None:
    shape = read_shape(config(4, 2, 32) | {"num_hidden_layers": 1})
    step = MeasuredStep(shape, Quantization.NONE, 128, FewPrograms(), device=torch.device("cpu"))
    batch = RowsStep(step, 9, 16, 128)
    before = [LONG * 7, *[7] * 7, LONG * 7]
    for rows, run in (
        (1, lambda rows: batch.run(SamplerKind.ARGMAX, rows)),
        (9, lambda rows: batch.run(SamplerKind.ARGMAX, rows, cuts(16)[0])),
        (2, lambda rows: batch.run_without_attention(SamplerKind.ARGMAX, rows)),
        (9, lambda rows: batch.run_without_attention(SamplerKind.ARGMAX, rows)),
    ):
        batch.begin(7, mixed=True)
        run(rows)
        slots = batch.runner.state.slot.tolist()
        assert slots == [slot + (row < rows) for row, slot in enumerate(before)]


@torch.inference_mode()
def test_a_step_that_checks_drafts_moves_rows_on_and_is_held_against_plain_ones() -> None:
    shape = read_shape(config(4, 2, 32) | {"num_hidden_layers": 1})
    step = MeasuredStep(shape, Quantization.NONE, 128, FewPrograms(), device=torch.device("cpu"))
    batch = RowsStep(step, 2, 16, 128, drafting=True)
    batch.begin(7, mixed=False)
    batch.check(2, 2)
    assert all(slot in (8, 9) for slot in batch.runner.state.slot.tolist())
    found = checked("2 check 4", [150.0, 120.0], [100.0, 100.0])
    assert (found["all_right"], found["all_wrong"]) == (2.963, 0.741)
