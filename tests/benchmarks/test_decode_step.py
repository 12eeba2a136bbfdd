"""Steps of one and of several tokens, whole and with kernels left out, in Triton's interpreter."""

from __future__ import annotations

import sys

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton has wheels for Linux alone", allow_module_level=True)

from benchmarks import decode_step
from benchmarks.measured_step import MeasuredStep, Tiles
from benchmarks.step_search import BITS, IN_WORDS, candidates
from qwencli.config import Quantization
from qwencli.engine.kernels.tiles import MatrixKind, Storage, default_tiles
from qwencli.models.shape_reader import read_shape
from tests.engine.kernels.test_several_tokens import config

CPU = torch.device("cpu")
GROUPS = ("", "norm_qkv", "attend", "o_residual", "norm_gate_up", "down_residual", "choose")
# Of a model of 4B: rows, columns, whether two such matrices are read at once.
MATRICES = ((6144, 2560, False), (2560, 9728, False), (9728, 2560, True), (151936, 2560, False))


def step_of(quantization: Quantization, tiles: Tiles) -> MeasuredStep:
    return MeasuredStep(read_shape(config(4, 2, 32)), quantization, 64, tiles, device=CPU)


@torch.inference_mode()
@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.INT8])
def test_a_step_runs_without_any_of_its_kernels(quantization: Quantization) -> None:
    tiles = Tiles()
    step = step_of(quantization, tiles)
    for tokens in (1, 4):
        for name in GROUPS:
            step.without(name)
            step.begin(20)
            step.run(tokens)
            moved = int(step.state.slot) - 20
            assert moved == (1 if tokens == 1 else 0), (name, tokens)
    assert {kind.tokens for kind in tiles.asked} == {1, 4}


@torch.inference_mode()
def test_the_ratio_is_to_the_step_of_one_token(monkeypatch: pytest.MonkeyPatch) -> None:
    step = step_of(Quantization.NONE, Tiles())

    def us(self: MeasuredStep, context: int, tokens: int = 1) -> list[float]:
        left_out = self.model.step_ops is not whole and self.model.step_ops != whole
        return [100.0 + 10 * tokens - (5.0 if left_out else 0.0)]

    whole = step.model.step_ops
    monkeypatch.setattr(MeasuredStep, "us", us)
    row = decode_step.roofline(step, 20, 1e9, 4)
    assert row["over_one_token"] == pytest.approx(140 / 110)
    assert {part["us"] for part in row["parts"].values()} == {5.0}
    assert decode_step.roofline(step, 20, 1e9)["over_one_token"] == 1


@pytest.mark.parametrize("storage", [s for s in Storage if s is not Storage.BYTES])
@pytest.mark.parametrize(("rows", "columns", "gated"), MATRICES)
def test_candidates_for_several_tokens_give_every_lane_columns(
    storage: Storage, rows: int, columns: int, gated: bool
) -> None:
    kind = MatrixKind(rows, columns, storage, gated, tokens=4)
    found = list(candidates(kind))
    assert default_tiles(kind) in found
    assert 4 <= len(found) <= 24
    for tiles in found:
        columns_of_a_warp = tiles.block // tiles.num_warps
        assert columns_of_a_warp >= (512 // BITS[storage] if storage in IN_WORDS else 16)
        assert tiles.block <= columns
