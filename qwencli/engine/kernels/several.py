"""Launches `gemm_kernel` and `gemm_quantized_kernel`: products of a step of several tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from qwencli.engine.kernels.gemm import gemm_kernel
from qwencli.engine.kernels.gemm_quantized import ROWS, gemm_quantized_kernel
from qwencli.engine.kernels.handover import SPANS
from qwencli.engine.kernels.read_back import read_back
from qwencli.engine.kernels.rounding import chunk_columns, round_kernel, words_in_a_row
from qwencli.engine.kernels.tiles import GemvTiles, MatrixKind, Storage
from qwencli.engine.kernels.vectors import InWords, in_words
from qwencli.engine.native.decoder_ops import Choice, Matrix, dense
from qwencli.engine.native.quantized import Quantized, Scheme
from qwencli.engine.native.rms_norm import RMSNorm

Tensor = torch.Tensor
# For a number of warps.
Options = Callable[[int], Mapping[str, Any]]


@dataclass(frozen=True)
class Epilogue:
    """What happens around a product, as the kernels call it.

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
        longest: columns of the longest vector.
        options: launch options for a number of warps.
        precision: of float32 operands.
    """

    def __init__(
        self,
        best: Tensor,
        longest: int,
        tiles_of: Callable[[MatrixKind], GemvTiles],
        options: Options,
        precision: str,
    ) -> None:
        def floats() -> Tensor:
            return torch.zeros(8 * (longest // 32 + 4), dtype=torch.float32, device=best.device)

        self._best, self._tiles_of = best, tiles_of
        self._options, self._precision = options, precision
        # See `round_kernel`: of the longest vectors in the smallest parts.
        rounded = torch.zeros(8 * (longest + 128), dtype=torch.float16, device=best.device)
        self._rounded = (rounded, floats(), floats(), floats())

    def buffers(self) -> tuple[Tensor, ...]:
        """For tests that poison what a step must not read."""
        return self._rounded

    def __call__(self, x: Tensor, matrix: Matrix, y: Tensor, around: Epilogue) -> None:
        """y [S, rows] = epilogue(matrix norm(x)), x [S, columns]."""
        way = in_words(matrix)
        if isinstance(matrix, Quantized) and not is_read(matrix):
            self._as_floats(x, read_back(matrix, x.dtype).t(), y, around, self._in_turn)
        elif isinstance(matrix, Quantized) and way is not None:
            self._in_words(x, matrix, way, y, around)
        else:
            self._as_floats(x, matrix, y, around, self._options)

    def _in_words(
        self, x: Tensor, matrix: Quantized, way: InWords, y: Tensor, around: Epilogue
    ) -> None:
        rows = matrix.rows // 2 if around.gated else matrix.rows
        columns, norm = matrix.columns, around.norm
        kind = MatrixKind(rows, columns, way.storage, around.gated, tokens=len(x))
        tiles = self._tiles_of(kind)
        chunk = chunk_columns(way.bits)
        run = words_in_a_row(matrix.group, columns)
        fp8 = matrix.scheme is Scheme.FP8
        round_kernel[triton.cdiv(columns, chunk), len(x)](
            x,
            None if norm is None else norm.weight,
            *self._rounded,
            columns,
            BITS=way.bits,
            FP8=fp8,
            SPAN=SPANS[way.form],
            RUN=run,
            **self._options(1),
        )
        gemm_quantized_kernel[triton.cdiv(rows, ROWS),](
            *self._rounded,
            matrix.data.view(torch.int32),
            matrix.scale,
            matrix.scale if matrix.zero is None else matrix.zero,
            *self._ends(y, around),
            rows,
            0.0 if norm is None else norm.eps,
            K=columns,
            DEPTH=max(tiles.block // (tiles.num_warps * chunk), 1),
            WARPS=tiles.num_warps,
            BITS=way.bits,
            FP8=fp8,
            RUN=run,
            G=matrix.group,
            **_modes(x, around),
            **self._options(tiles.num_warps),
        )

    def _as_floats(
        self, x: Tensor, matrix: Matrix, y: Tensor, around: Epilogue, launch: Options
    ) -> None:
        """Float weights, and bytes that are multiplied as such."""
        quantized = matrix if isinstance(matrix, Quantized) else None
        weight = dense(matrix, x).t() if quantized is None else quantized.data
        assert weight.is_contiguous(), "kernels read rows of the weight"
        rows, columns = weight.shape
        norm = around.norm
        rows = rows // 2 if around.gated else rows
        storage = Storage.FLOAT if quantized is None else Storage.BYTES
        tiles = self._tiles_of(MatrixKind(rows, columns, storage, around.gated, tokens=len(x)))
        gemm_kernel[triton.cdiv(rows, tiles.rows),](
            x,
            x if norm is None else norm.weight,
            weight,
            x if quantized is None else quantized.scale,
            *self._ends(y, around),
            rows,
            0.0 if norm is None else norm.eps,
            K=columns,
            PARTS=tiles.num_warps,
            PART=tiles.block // tiles.num_warps,
            ROWS=tiles.rows,
            SCALED=quantized is not None,
            PRECISION=self._precision,
            **_modes(x, around),
            **launch(tiles.num_warps),
        )

    def _ends(self, y: Tensor, around: Epilogue) -> tuple[Tensor, ...]:
        choice = around.choice
        return (
            y if around.bias is None else around.bias,
            y,
            y if choice is None else choice.seen,
            y if choice is None else choice.penalty,
            y if around.fed is None else around.fed,
            self._best,
        )

    def _in_turn(self, num_warps: int) -> Mapping[str, Any]:
        """Where the kernel in front writes the weights, of which some are read before the wait."""
        options = {**self._options(num_warps), "PDL": False}
        options.pop("launch_pdl", None)
        return options


def _modes(x: Tensor, around: Epilogue) -> dict[str, Any]:
    return {
        "TOKENS": len(x),
        "NORM": around.norm is not None,
        "SWIGLU": around.gated,
        "BIAS": around.bias is not None,
        "ADD": around.add,
        "ARGMAX": around.choice is not None,
    }


def is_read(matrix: Quantized) -> bool:
    """Whether a kernel here reads `matrix` as it is stored; others are read back whole first.

    Those are kinds that ready-made checkpoints have: groups of bytes, tables, columns reordered.
    """
    grouped_bytes = matrix.grouped and matrix.scheme is not Scheme.INT4
    return matrix.table is None and matrix.order is None and not grouped_bytes
