"""Launches `gemm_kernel`: matrix products of a step of several tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from qwencli.engine.kernels.gemm import gemm_kernel
from qwencli.engine.kernels.handover import SPANS
from qwencli.engine.kernels.read_back import read_back
from qwencli.engine.kernels.tiles import GemvTiles, MatrixKind, Storage
from qwencli.engine.kernels.vectors import BLOCK_WORDS, in_words
from qwencli.engine.native.decoder_ops import Choice, Matrix, dense
from qwencli.engine.native.quantized import Quantized, Scheme
from qwencli.engine.native.rms_norm import RMSNorm

Tensor = torch.Tensor


@dataclass(frozen=True)
class Epilogue:
    """What happens around a product, as `gemm_kernel` calls it.

    Args:
        choice, fed: of the head, where the likeliest row of each token is looked for; `fed` are
            the tokens of the step.
    """

    norm: RMSNorm | None = None
    bias: Tensor | None = None
    gated: bool = False
    add: bool = False
    choice: Choice | None = None
    fed: Tensor | None = None


class SeveralProducts:
    """Products of matrices with 2 to 8 vectors.

    Args:
        best: int64 [8], where the keys of the likeliest rows go.
        options: launch options for a number of warps.
        precision: of float32 operands.
    """

    def __init__(
        self,
        best: Tensor,
        tiles_of: Callable[[MatrixKind], GemvTiles],
        options: Callable[[int], Mapping[str, Any]],
        precision: str,
    ) -> None:
        self._best, self._tiles_of = best, tiles_of
        self._options, self._precision = options, precision

    def __call__(self, x: Tensor, matrix: Matrix, y: Tensor, around: Epilogue) -> None:
        """y [S, rows] = epilogue(matrix norm(x)), x [S, columns]."""
        launch = self._options
        if isinstance(matrix, Quantized) and not is_read(matrix):
            matrix, launch = read_back(matrix, x.dtype).t(), self._in_turn
        quantized = matrix if isinstance(matrix, Quantized) else None
        weight = dense(matrix, x).t() if quantized is None else quantized.data
        assert weight.is_contiguous(), "kernels read rows of the weight"
        rows, columns = weight.shape if quantized is None else (quantized.rows, quantized.columns)
        zero = None if quantized is None else quantized.zero
        norm, choice = around.norm, around.choice
        rows = rows // 2 if around.gated else rows
        bits, storage = 0, Storage.FLOAT if quantized is None else Storage.BYTES
        way = in_words(matrix)
        if way is not None:
            bits, storage = way.bits, way.storage
        tiles = self._tiles_of(MatrixKind(rows, columns, storage, around.gated, tokens=len(x)))
        part = BLOCK_WORDS * 32 // bits if bits else tiles.block // tiles.num_warps
        gemm_kernel[triton.cdiv(rows, tiles.rows),](
            x,
            x if norm is None else norm.weight,
            weight,
            x if quantized is None else quantized.scale,
            x if zero is None else zero,
            y if around.bias is None else around.bias,
            y,
            y if choice is None else choice.seen,
            y if choice is None else choice.penalty,
            y if around.fed is None else around.fed,
            self._best,
            rows,
            0.0 if norm is None else norm.eps,
            K=columns,
            PARTS=tiles.block // part,
            PART=part,
            ROWS=tiles.rows,
            TOKENS=len(x),
            NORM=norm is not None,
            SWIGLU=around.gated,
            BIAS=around.bias is not None,
            ADD=around.add,
            ARGMAX=choice is not None,
            SCALED=quantized is not None and zero is None,
            BITS=bits,
            FP8=quantized is not None and quantized.scheme is Scheme.FP8,
            SPAN=1 if way is None else SPANS[way.form],
            G=columns if quantized is None else quantized.group,
            PRECISION=self._precision,
            **launch(tiles.num_warps),
        )

    def _in_turn(self, num_warps: int) -> Mapping[str, Any]:
        """Where the kernel in front writes the weights, of which some are read before the wait."""
        options = {**self._options(num_warps), "PDL": False}
        options.pop("launch_pdl", None)
        return options


def is_read(matrix: Quantized) -> bool:
    """Whether `gemm_kernel` reads `matrix` as it is stored; others are read back whole first.

    Those are kinds that ready-made checkpoints have: groups of bytes, tables, columns reordered.
    """
    grouped_bytes = matrix.grouped and matrix.scheme is not Scheme.INT4
    return matrix.table is None and matrix.order is None and not grouped_bytes
