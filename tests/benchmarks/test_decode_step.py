"""Steps of one and of several tokens, whole and with kernels left out, in Triton's interpreter."""

from __future__ import annotations

import functools
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

if sys.platform != "linux":
    pytest.skip("Triton has wheels for Linux alone", allow_module_level=True)

from benchmarks import decode_step, step_search
from benchmarks.measured_step import MeasuredStep, Tiles
from benchmarks.step_search import BITS, candidates
from qwencli.config import KVDType, Quantization
from qwencli.engine.kernels.tiles import (
    FEW_ROWS,
    GemvTiles,
    MatrixKind,
    Storage,
    default_tiles,
)
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape
from tests.engine.kernels.test_skinny_gemm import config

CPU = torch.device("cpu")
GROUPS = ("", "norm_qkv", "attend", "o_residual", "norm_gate_up", "down_residual", "choose")
# Of a model of 4B: rows, columns, whether two such matrices are read at once.
MATRICES = ((6144, 2560, False), (2560, 9728, False), (9728, 2560, True), (151936, 2560, False))


class FewPrograms(Tiles):
    """Which the interpreter runs one after the other."""

    def __call__(self, matrix: MatrixKind) -> GemvTiles:
        tiles = super().__call__(matrix)
        return replace(tiles, rows=64)


def step_of(quantization: Quantization, tiles: Tiles) -> MeasuredStep:
    shape = read_shape(config(4, 2, 32) | {"num_hidden_layers": 1, "vocab_size": 77})
    return MeasuredStep(shape, quantization, 64, tiles, device=CPU)


@torch.inference_mode()
@pytest.mark.parametrize("quantization", [Quantization.NONE, Quantization.INT8])
def test_a_step_runs_without_any_of_its_kernels(quantization: Quantization) -> None:
    tiles = FewPrograms()
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
    assert 4 <= len(found) <= 16
    for tiles in found:
        columns_of_a_warp = tiles.block // tiles.num_warps
        assert columns_of_a_warp % (512 // BITS[storage]) == 0
        assert tiles.block * tiles.splits <= columns
        assert tiles.splits == 1 or rows <= FEW_ROWS


def test_a_run_keeps_every_number_of_tokens_and_the_best_tiles(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """On the CPU, with a stopwatch that likes programs of 4 warps, of several tokens of 2."""
    tiles_of: list[Tiles] = []

    def step(
        shape: ModelShape, quantization: Quantization, slots: int, tiles: Tiles, kv: KVDType
    ) -> MeasuredStep:
        tiles_of.append(tiles)
        return MeasuredStep(shape, quantization, slots, tiles, kv, CPU)

    def us(self: MeasuredStep, context: int, tokens: int = 1, *_: int) -> list[float]:
        kinds = [kind for kind in tiles_of[-1].asked if kind.tokens == tokens]
        if not kinds:
            self.begin(context)
            self.run(tokens)
            return us(self, context, tokens)
        liked = 4 if tokens == 1 else 2
        off = sum(abs(tiles_of[-1](kind).num_warps - liked) for kind in kinds)
        return [off + (1.0 if self.model.step_ops == self.kernels else 0.5)]

    wide = config(4, 2, 64) | {
        "hidden_size": 256,
        "intermediate_size": 256,
        "num_hidden_layers": 1,
    }
    pool = functools.partial(ThreadPoolExecutor, max_workers=1)
    monkeypatch.setattr(decode_step, "text_shape", lambda name: read_shape(wide))
    monkeypatch.setattr(decode_step, "read_bandwidth", lambda *_: 1e9)
    monkeypatch.setattr(decode_step, "MeasuredStep", step)
    monkeypatch.setattr(MeasuredStep, "us", us)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "none")
    monkeypatch.setattr(step_search, "compile_all", lambda *_: 0.0)
    monkeypatch.setattr(step_search, "ProcessPoolExecutor", lambda workers, mp_context: pool())
    out = tmp_path / "step.json"
    command = "decode_step --quantization 8bit --tokens 1,4,8 --context 20 --search --out"
    monkeypatch.setattr(sys, "argv", [*command.split(), str(out)])
    decode_step.main()
    one, four, eight = json.loads(out.read_text())["rows"]
    assert (one["tokens"], four["tokens"], eight["tokens"]) == (1, 4, 8)
    assert "search" not in eight
    assert eight["searched"][0]["step_us"] == four["searched"][0]["step_us"]
    assert one["default"][0]["step_us"][0] > one["searched"][0]["step_us"][0] == 1
    assert four["default"][0]["step_us"][0] > four["searched"][0]["step_us"][0]
    best = {(f["matrix"]["gated"], f["best"]["num_warps"]) for f in four["search"]}
    assert (True, 2) in best
    assert {found["matrix"]["tokens"] for found in four["search"]} == {4}
