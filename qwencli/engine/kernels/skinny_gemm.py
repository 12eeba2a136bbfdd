"""Skinny GEMM: matrices times 2 to 8 vectors, through the kernel that fits the weights.

`gemm_float16_kernel`, `gemm_quantized_kernel`, and `gemm_kernel` for what neither takes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

from qwencli.engine.kernels.activation_buffers import (
    BLOCK_ROWS,
    ActivationConsumer,
    BatchedActivationBuffers,
    BatchedActivationView,
    Options,
    WordFormat,
    is_read_as_stored,
    takes_float16_kernel,
    word_format,
)
from qwencli.engine.kernels.activation_quant import chunk_columns
from qwencli.engine.kernels.dequantize import dequantize
from qwencli.engine.kernels.gemm import gemm_kernel
from qwencli.engine.kernels.gemm_float16 import CHUNK, gemm_float16_kernel
from qwencli.engine.kernels.gemm_quantized import gemm_quantized_kernel
from qwencli.engine.kernels.tiles import MOST_SHARING, GemvTiles, MatrixKind, Storage
from qwencli.engine.ops.decoder_ops import Matrix, RMSNorm, SamplingBuffers, dense
from qwencli.engine.ops.next_tokens import RowBuffers
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme

Tensor = torch.Tensor
TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}


@dataclass(frozen=True)
class Epilogue:
    """What happens around a product, as the kernels call it.

    Args:
        sampling, input_ids: of the head, where the likeliest row of each token is looked for;
            `input_ids` are the tokens of the step.
        after: who reads the result.
    """

    norm: RMSNorm | None = None
    bias: Tensor | None = None
    gated: bool = False
    add: bool = False
    sampling: SamplingBuffers | RowBuffers | None = None
    input_ids: Tensor | None = None
    after: ActivationConsumer | None = None


class SkinnyGemm:
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
        self._best, self._tiles_of = best, tiles_of
        self._options, self._precision = options, precision
        self.ready = BatchedActivationBuffers(longest, best.device, options)
        # See `splitk_epilogue`.
        sums = 8 * MOST_SHARING * longest
        self._sums = torch.zeros(sums, dtype=torch.float32, device=best.device)
        self._semaphore = torch.zeros(sums // (8 * BLOCK_ROWS) + 1, dtype=torch.int32).to(
            best.device
        )

    def buffers(self) -> tuple[Tensor, ...]:
        """For tests that poison what a step must not read."""
        return *self.ready.buffers(), self._sums

    def __call__(self, x: Tensor, matrix: Matrix, y: Tensor, around: Epilogue) -> None:
        """y [S, rows] = epilogue(matrix norm(x)), x [S, columns]."""
        way = word_format(matrix)
        if isinstance(matrix, QuantizedTensor) and way is not None and is_read_as_stored(matrix):
            self._quantized_product(x, matrix, way, y, around)
        elif isinstance(matrix, QuantizedTensor) and not is_read_as_stored(matrix):
            self._float_product(x, dequantize(matrix, x.dtype).t(), y, around, self._without_pdl)
        else:
            self._float_product(x, matrix, y, around, self._options)

    def _quantized_product(
        self, x: Tensor, matrix: QuantizedTensor, way: WordFormat, y: Tensor, around: Epilogue
    ) -> None:
        rows = matrix.rows // 2 if around.gated else matrix.rows
        columns = matrix.columns
        kind = MatrixKind(rows, columns, way.storage, around.gated, tokens=len(x))
        tiles, splits = self._tiles(kind, around)
        vectors = self.ready.input_for(x, ActivationConsumer(around.norm, matrix))
        ready = self.ready.output_for(around.after, y)
        gemm_quantized_kernel[triton.cdiv(rows, BLOCK_ROWS) * splits,](
            vectors.buffers[0].view(torch.int32),
            *vectors.buffers[1:],
            matrix.data.view(torch.int32),
            matrix.scale,
            matrix.scale if matrix.zero_point is None else matrix.zero_point,
            *self._ends(y, around),
            *self._handing(ready),
            rows,
            0.0 if around.norm is None else around.norm.eps,
            K=columns,
            DEPTH=max(tiles.block // (tiles.num_warps * chunk_columns(way.bits)), 1),
            WARPS=tiles.num_warps,
            SPLITS=splits,
            SHARES=vectors.shares,
            ACT_FORMAT=int(ready.layout.act_format),
            NEXT_RUN=ready.layout.run,
            BITS=way.bits,
            FP8=matrix.scheme is Scheme.FP8,
            RUN=vectors.layout.run,
            G=matrix.group,
            **_modes(x, around),
            **self._options(tiles.num_warps),
        )
        self.ready.commit(y, ready)

    def _float_product(
        self, x: Tensor, matrix: Matrix, y: Tensor, around: Epilogue, launch: Options
    ) -> None:
        """Float weights, and bytes that are multiplied as such."""
        quantized = matrix if isinstance(matrix, QuantizedTensor) else None
        weight = dense(matrix, x).t() if quantized is None else quantized.data
        assert weight.is_contiguous(), "kernels read rows of the weight"
        rows, columns = weight.shape
        rows = rows // 2 if around.gated else rows
        storage = Storage.FLOAT if quantized is None else Storage.BYTES
        kind = MatrixKind(rows, columns, storage, around.gated, tokens=len(x))
        if takes_float16_kernel(ActivationConsumer(around.norm, matrix), x):
            self._float16_product(x, matrix, weight, y, around, launch, kind)
            return
        tiles, norm = self._tiles_of(kind), around.norm
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
            NORM=norm is not None,
            SCALED=quantized is not None,
            PRECISION=self._precision,
            **_modes(x, around),
            **launch(tiles.num_warps),
        )
        self.ready.commit(y, self.ready.no_output())

    def _float16_product(
        self,
        x: Tensor,
        matrix: Matrix,
        weight: Tensor,
        y: Tensor,
        around: Epilogue,
        launch: Options,
        kind: MatrixKind,
    ) -> None:
        tiles, splits = self._tiles(kind, around)
        norm = around.norm
        gain = None
        if norm is not None:
            gain = (norm.weight if norm.shift is None else norm.shift).view(torch.int32)
        vectors = self.ready.find(x, ActivationConsumer(norm, matrix))
        ready = self.ready.output_for(around.after, y)
        gemm_float16_kernel[triton.cdiv(kind.rows, BLOCK_ROWS) * splits,](
            x.view(torch.int32),
            gain,
            ready.buffers[3] if vectors is None else vectors.buffers[3],
            weight.view(torch.int32),
            *self._ends(y, around),
            *self._handing(ready),
            kind.rows,
            0.0 if norm is None else norm.eps,
            K=kind.columns,
            DEPTH=max(tiles.block // (tiles.num_warps * CHUNK), 1),
            WARPS=tiles.num_warps,
            SPLITS=splits,
            SHARES=0 if vectors is None else vectors.shares,
            ACT_FORMAT=int(ready.layout.act_format),
            RUN=ready.layout.run,
            TYPE=TYPES[x.dtype],
            ZERO_CENTRED=norm is not None and norm.shift is not None,
            **_modes(x, around),
            **launch(tiles.num_warps),
        )
        self.ready.commit(y, ready)

    def _tiles(self, kind: MatrixKind, around: Epilogue) -> tuple[GemvTiles, int]:
        """How a matrix is cut up, and how many programs share its columns: one where each ends its
        rows alone, or where the sums of more have no room."""
        tiles = self._tiles_of(kind)
        alone = kind.gated or around.sampling is not None
        room = len(self._sums) // (8 * kind.rows)
        return tiles, 1 if alone else max(min(tiles.splits, room), 1)

    def _ends(self, y: Tensor, around: Epilogue) -> tuple[Tensor | None, ...]:
        sampling = around.sampling
        return (
            around.bias,
            y,
            y if sampling is None else sampling.seen,
            y if sampling is None else sampling.penalty,
            y if around.input_ids is None else around.input_ids,
            self._best,
        )

    def _handing(self, ready: BatchedActivationView) -> tuple[Tensor | None, ...]:
        return self._sums, self._semaphore, ready.gain, *ready.buffers

    def _without_pdl(self, num_warps: int) -> Mapping[str, Any]:
        """Where the kernel in front writes the weights, of which some are read before the wait."""
        options = {**self._options(num_warps), "PDL": False}
        options.pop("launch_pdl", None)
        return options


def _modes(x: Tensor, around: Epilogue) -> dict[str, Any]:
    return {
        "TOKENS": len(x),
        "SWIGLU": around.gated,
        "ADD": around.add,
        "ARGMAX": around.sampling is not None,
    }
