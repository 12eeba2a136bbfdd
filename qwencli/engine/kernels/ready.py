"""The vectors of a step of several tokens that kernels hand to each other (`splitk_epilogue`):
buffers, and who gets what. For one token: `vectors`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from qwencli.engine.kernels.activation_buffers import ActivationConsumer, word_format
from qwencli.engine.kernels.activation_quant import ActivationFormat
from qwencli.engine.kernels.rounding import (
    chunk_columns,
    quantize_activation_chunks_kernel,
    words_in_a_row,
)
from qwencli.engine.ops.rms_norm import RMSNorm
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme

Tensor = torch.Tensor
# For a number of warps.
Options = Callable[[int], Mapping[str, Any]]

BLOCK_ROWS = 16  # of a program: what a matrix instruction takes
WORD_BITS = {ActivationFormat.BYTES: 8, ActivationFormat.HALVES: 4, ActivationFormat.FLOAT16: 8}
NO_RUN = 4  # where nothing is rounded


@dataclass(frozen=True)
class ActivationLayout:
    """How a product reads its vectors.

    Args:
        form: FLOATS for the squares of the norm alone. run: see `words_in_a_row`.
    """

    act_format: ActivationFormat
    run: int = NO_RUN

    @property
    def chunk(self) -> int:
        """Columns whose squares are one share: of a chunk, or of a program that rounds nothing."""
        bits = WORD_BITS.get(self.act_format)
        return BLOCK_ROWS if bits is None else chunk_columns(bits)


NO_LAYOUT = ActivationLayout(ActivationFormat.NONE)


@dataclass(frozen=True)
class BatchedActivationView:
    """Vectors that a kernel hands over, or is about to.

    Args:
        buffers: values, units, starts and squares, as `quantize_activation_chunks_kernel` has them.
        norm: whose gain is in them, and shares: sums of squares there are; None and 0 without one.
    """

    layout: ActivationLayout
    buffers: tuple[Tensor, Tensor, Tensor, Tensor]
    norm: RMSNorm | None = None
    shares: int = 0

    @property
    def gain(self) -> Tensor | None:
        return None if self.norm is None else self.norm.weight


def layout_for(consumer: ActivationConsumer, like: Tensor) -> ActivationLayout:
    """What a product with vectors of `like`'s type wants of the kernel in front."""
    matrix = consumer.matrix
    way = word_format(matrix)
    if isinstance(matrix, QuantizedTensor):
        if way is None or not is_read_as_stored(matrix):
            return NO_LAYOUT
        return ActivationLayout(way.act_format, words_in_a_row(matrix.group, matrix.columns))
    return (
        ActivationLayout(ActivationFormat.FLOATS)
        if consumer.norm is not None and takes_float16_kernel(consumer, like)
        else NO_LAYOUT
    )


def is_read_as_stored(matrix: QuantizedTensor) -> bool:
    """Whether a kernel here reads `matrix` as it is stored; others are dequantized whole first.

    Those are kinds that ready-made checkpoints have: groups of bytes, tables, columns reordered.
    """
    grouped_bytes = matrix.grouped and matrix.scheme is not Scheme.INT4
    return matrix.codebook is None and matrix.g_idx_sort_indices is None and not grouped_bytes


def takes_float16_kernel(consumer: ActivationConsumer, like: Tensor) -> bool:
    """Whether a product with vectors of `like`'s type is of 16-bit floats that lanes read as
    `gemm_float16` has it."""
    matrix, norm = consumer.matrix, consumer.norm
    if isinstance(matrix, QuantizedTensor) or like.dtype.itemsize != 2 or len(matrix) % 8:
        return False
    return matrix.dtype == like.dtype and (norm is None or norm.weight.dtype == like.dtype)


class BatchedActivationBuffers:
    """Two sets of buffers in turns: a kernel reads one while it writes the other.

    Args:
        longest: columns of the longest vector.
        options: launch options for a number of warps.
    """

    def __init__(self, longest: int, device: torch.device, options: Options) -> None:
        def floats(count: int) -> Tensor:
            return torch.zeros(8 * count, dtype=torch.float32, device=device)

        def buffers() -> tuple[Tensor, Tensor, Tensor, Tensor]:
            # Of the longest vectors in the smallest parts, and of the smallest programs' shares.
            values = torch.zeros(8 * (longest + 128), dtype=torch.float16, device=device)
            parts, shares = longest // 32 + 4, longest // BLOCK_ROWS + 1
            return values, floats(parts), floats(parts), floats(shares)

        self._sets = (buffers(), buffers())
        self._turn = 0
        self._options = options
        self._latest: tuple[Tensor, BatchedActivationView] | None = None

    def buffers(self) -> tuple[Tensor, ...]:
        """For tests that poison what a step must not read."""
        return tuple(buffer for buffers in self._sets for buffer in buffers)

    def output_for(self, consumer: ActivationConsumer | None, y: Tensor) -> BatchedActivationView:
        """Where the kernel that makes `y` [S, rows] puts what `consumer` wants of it. A kernel that
        takes the offer says so to `commit`."""
        layout = NO_LAYOUT if consumer is None else layout_for(consumer, y)
        norm = (
            None
            if consumer is None or layout.act_format is ActivationFormat.NONE
            else consumer.norm
        )
        shares = 0 if norm is None else triton.cdiv(y.shape[1], layout.chunk)
        return BatchedActivationView(layout, self._sets[1 - self._turn], norm, shares)

    def output_for_heads(
        self, consumer: ActivationConsumer | None, attended: Tensor, dim: int
    ) -> BatchedActivationView:
        """Likewise for attention, where heads are whole chunks."""
        ready = self.output_for(consumer, attended)
        rounded = ready.layout.act_format in WORD_BITS and dim % ready.layout.chunk == 0
        return ready if rounded else self.no_output()

    def no_output(self) -> BatchedActivationView:
        return self.output_for(None, self._sets[0][0])

    def commit(self, y: Tensor, ready: BatchedActivationView) -> None:
        """The kernel that makes `y` has been launched, and hands over `ready`."""
        self._latest = None
        if ready.layout.act_format is not ActivationFormat.NONE:
            self._turn = 1 - self._turn
            self._latest = y, ready

    def find(self, x: Tensor, consumer: ActivationConsumer) -> BatchedActivationView | None:
        """What was handed over of `x`, if it is what `consumer` wants."""
        if self._latest is None:
            return None
        of, ready = self._latest
        fits = of is x and ready.norm is consumer.norm and ready.layout == layout_for(consumer, x)
        return ready if fits else None

    def input_for(self, x: Tensor, consumer: ActivationConsumer) -> BatchedActivationView:
        """`x` [S, K] as the quantized matrix reads it, by a kernel of its own if it must."""
        ready = self.find(x, consumer)
        if ready is None:
            ready = self.output_for(consumer, x)
            assert x.shape[1] * 8 <= len(ready.buffers[0]), "longer than any vector of the model"
            quantize_activation_chunks_kernel[triton.cdiv(x.shape[1], ready.layout.chunk), len(x)](
                x,
                ready.gain,
                *ready.buffers,
                x.shape[1],
                ACT_FORMAT=int(ready.layout.act_format),
                RUN=ready.layout.run,
                **self._options(1),
            )
            self.commit(x, ready)
        return ready
