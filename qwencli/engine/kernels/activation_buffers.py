"""Buffers for activations that one kernel hands to the next, in the format that its matrix reads.

`ActivationBuffers` for steps of one row, `BatchedActivationBuffers` for 2 to 8. Which format a
matrix reads is `word_format` (see `activation_quant`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from qwencli.engine.kernels.activation_quant import (
    ACT_GROUPS,
    ActivationFormat,
    chunk_columns,
    quantize_activation_chunks_kernel,
    quantize_activation_kernel,
    words_in_a_row,
)
from qwencli.engine.kernels.tiles import Storage
from qwencli.engine.ops.decoder_ops import Matrix, RMSNorm
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme

Tensor = torch.Tensor

BLOCK_WORDS = 4  # int32 of a row that a thread reads at once
# What is left of a value; forms that are not here keep float32.
ACT_FORMAT_BITS = {
    ActivationFormat.BYTES: 8,
    ActivationFormat.HALVES: 8,
    ActivationFormat.FLOAT16: 16,
}
# Columns and warps of a program that hands over a whole vector.
SHARE, SHARE_WARPS = 256, 2


@dataclass(frozen=True)
class WordFormat:
    """How a matrix is multiplied in words: bits of a weight, its storage and its vector's form."""

    bits: int
    storage: Storage
    act_format: ActivationFormat


WORD_FORMATS = {
    Scheme.INT8: WordFormat(8, Storage.INT8, ActivationFormat.BYTES),
    Scheme.FP8: WordFormat(8, Storage.FP8, ActivationFormat.FLOAT16),
    Scheme.INT4: WordFormat(4, Storage.INT4, ActivationFormat.HALVES),
    Scheme.NF4: WordFormat(4, Storage.INT4, ActivationFormat.HALVES),
    Scheme.FP4: WordFormat(4, Storage.INT4, ActivationFormat.HALVES),
}


def word_format(matrix: Matrix) -> WordFormat | None:
    """How products with `matrix` take several weights at a time; None = one by one, as floats."""
    if not isinstance(matrix, QuantizedTensor):
        return None
    way = WORD_FORMATS.get(matrix.scheme)
    if way is None or matrix.columns % (BLOCK_WORDS * 32 // way.bits):
        return None
    return way


def activation_bits(matrix: QuantizedTensor) -> int | None:
    """Bits to which a vector is rounded for products with `matrix`; None = not at all."""
    way = word_format(matrix)
    return None if way is None else ACT_FORMAT_BITS[way.act_format]


@dataclass(frozen=True)
class ActivationConsumer:
    """What a vector is made for: the norm in front of a matrix, and the matrix."""

    norm: RMSNorm | None
    matrix: Matrix


@dataclass(frozen=True)
class ActivationView:
    """A vector as a kernel handed it over, or is about to.

    Args:
        values: room for the longest vector, of the form's type where that is FLOATS, else int8.
        steps, squares: float32.
        norm: whose gain is in it, and shares: programs that wrote squares; None and 0 without one.
    """

    act_format: ActivationFormat
    values: Tensor
    steps: Tensor
    squares: Tensor
    norm: RMSNorm | None = None
    shares: int = 0

    @property
    def span(self) -> int:
        return ACT_GROUPS.get(self.act_format, 1)


class ActivationBuffers:
    """Two sets of buffers in turns: a kernel reads one while it writes the other.

    Args:
        longest: columns of the longest vector.
        dtype: of the model.
        options: launch options for a number of warps.
    """

    def __init__(
        self,
        longest: int,
        dtype: torch.dtype,
        device: torch.device,
        options: Callable[[int], Mapping[str, Any]],
    ) -> None:
        def buffers() -> tuple[Tensor, Tensor, Tensor]:
            def floats() -> Tensor:
                return torch.zeros(longest, dtype=torch.float32, device=device)

            return torch.zeros(4 * longest, dtype=torch.int8, device=device), floats(), floats()

        self._buffers = (buffers(), buffers())
        # The gain of a norm can take a float16 out of its range.
        self._floats = torch.bfloat16 if dtype == torch.bfloat16 else torch.float32
        self._turn = 0
        self._options = options
        self._latest: tuple[Tensor, ActivationView] | None = None

    def buffers(self) -> tuple[Tensor, ...]:
        """All of them; for tests that poison what a step must not read."""
        return tuple(buffer for buffers in self._buffers for buffer in buffers)

    def format_for(self, consumer: ActivationConsumer) -> ActivationFormat:
        way = word_format(consumer.matrix)
        if way is not None:
            return way.act_format
        return ActivationFormat.NONE if consumer.norm is None else ActivationFormat.FLOATS

    def output_for(
        self, consumer: ActivationConsumer | None, rows: int, programs: int
    ) -> ActivationView:
        """Where a kernel whose programs make `rows` values each puts what `consumer` wants.

        Its form is NONE where nobody waits for one, or no program makes a whole block. A kernel
        that takes the offer says so to `commit`.
        """
        if consumer is None or _ordered(consumer.matrix):
            return self._vector(ActivationFormat.NONE, None, 0)
        act_format = self.format_for(consumer)
        if act_format is ActivationFormat.NONE or rows % ACT_GROUPS[act_format]:
            return self._vector(ActivationFormat.NONE, None, 0)
        return self._vector(act_format, consumer.norm, programs)

    def _vector(
        self, act_format: ActivationFormat, norm: RMSNorm | None, programs: int
    ) -> ActivationView:
        shares = 0 if norm is None else programs
        values, steps, squares = self._buffers[1 - self._turn]
        if act_format is ActivationFormat.FLOATS:
            values = values.view(self._floats)
        return ActivationView(act_format, values, steps, squares, norm, shares)

    def commit(self, x: Tensor, vector: ActivationView) -> None:
        """The kernel that makes `x` has been launched, and hands over `vector`."""
        self._latest = None
        if vector.act_format is not ActivationFormat.NONE:
            self._turn = 1 - self._turn
            self._latest = x, vector

    def read(self, x: Tensor, consumer: ActivationConsumer) -> ActivationView:
        """`x` [1, K] in the form that the matrix multiplies, by a kernel of its own if it must."""
        act_format = self.format_for(consumer)
        if self._latest is not None:
            of, vector = self._latest
            if of is x and vector.norm is consumer.norm and vector.act_format is act_format:
                return vector
        columns = x.shape[1]
        assert columns <= len(self._buffers[0][1]), "longer than any vector of the model"
        programs = triton.cdiv(columns, SHARE)
        vector = self._vector(act_format, consumer.norm, programs)
        if act_format is not ActivationFormat.NONE:
            matrix = consumer.matrix
            quantize_activation_kernel[programs,](
                x,
                None if consumer.norm is None else consumer.norm.weight,
                matrix.g_idx_sort_indices if isinstance(matrix, QuantizedTensor) else None,
                vector.values,
                vector.steps,
                vector.squares,
                columns,
                ACT_FORMAT=int(act_format),
                ACT_GROUP=vector.span,
                BLOCK=SHARE,
                **self._options(SHARE_WARPS),
            )
            self.commit(x, vector)
        return vector


def _ordered(matrix: Matrix) -> bool:
    return isinstance(matrix, QuantizedTensor) and matrix.g_idx_sort_indices is not None


# For a number of warps.
Options = Callable[[int], Mapping[str, Any]]

BLOCK_ROWS = 16  # of a program: what a matrix instruction takes
WORD_BITS = {ActivationFormat.BYTES: 8, ActivationFormat.HALVES: 4, ActivationFormat.FLOAT16: 8}
NO_RUN = 4  # where nothing is rounded


@dataclass(frozen=True)
class ActivationLayout:
    """How a product reads its vectors.

    Args:
        act_format: FLOATS for the squares of the norm alone. run: see `words_in_a_row`.
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

    Those are kinds that pre-quantized checkpoints have: groups of bytes, tables, columns reordered.
    """
    grouped_bytes = matrix.grouped and matrix.scheme is not Scheme.INT4
    return matrix.codebook is None and matrix.g_idx_sort_indices is None and not grouped_bytes


def takes_float16_kernel(consumer: ActivationConsumer, like: Tensor) -> bool:
    """Whether a product with vectors of `like`'s type is of 16-bit floats that lanes read as
    `gemm_float16` has it."""
    matrix, norm = consumer.matrix, consumer.norm
    if isinstance(matrix, QuantizedTensor) or like.dtype.itemsize != 2 or len(matrix) % 8:
        return False
    if norm is None:
        return matrix.dtype == like.dtype
    stored = norm.weight if norm.shift is None else norm.shift
    return matrix.dtype == stored.dtype == like.dtype


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
