"""The vectors of a step of several tokens that kernels hand to each other (`joining`): buffers, and
who gets what. For one token: `vectors`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from qwencli.engine.kernels.activation_buffers import Reader, in_words
from qwencli.engine.kernels.activation_quant import Form
from qwencli.engine.kernels.rounding import chunk_columns, round_kernel, words_in_a_row
from qwencli.engine.ops.rms_norm import RMSNorm
from qwencli.engine.quant.quantized_tensor import Quantized, Scheme

Tensor = torch.Tensor
# For a number of warps.
Options = Callable[[int], Mapping[str, Any]]

BLOCK_ROWS = 16  # of a program: what a matrix instruction takes
WORD_BITS = {Form.BYTES: 8, Form.HALVES: 4, Form.FLOAT16: 8}
NO_RUN = 4  # where nothing is rounded


@dataclass(frozen=True)
class Wanted:
    """How a product reads its vectors.

    Args:
        form: FLOATS for the squares of the norm alone. run: see `words_in_a_row`.
    """

    form: Form
    run: int = NO_RUN

    @property
    def chunk(self) -> int:
        """Columns whose squares are one share: of a chunk, or of a program that rounds nothing."""
        bits = WORD_BITS.get(self.form)
        return BLOCK_ROWS if bits is None else chunk_columns(bits)


NOTHING = Wanted(Form.NONE)


@dataclass(frozen=True)
class Ready:
    """Vectors that a kernel hands over, or is about to.

    Args:
        buffers: values, units, starts and squares, as `round_kernel` has them.
        norm: whose gain is in them, and shares: sums of squares there are; None and 0 without one.
    """

    wanted: Wanted
    buffers: tuple[Tensor, Tensor, Tensor, Tensor]
    norm: RMSNorm | None = None
    shares: int = 0

    @property
    def gain(self) -> Tensor | None:
        return None if self.norm is None else self.norm.weight


def wanted_by(reader: Reader, like: Tensor) -> Wanted:
    """What a product with vectors of `like`'s type wants of the kernel in front."""
    matrix = reader.matrix
    way = in_words(matrix)
    if isinstance(matrix, Quantized):
        if way is None or not is_read(matrix):
            return NOTHING
        return Wanted(way.form, words_in_a_row(matrix.group, matrix.columns))
    return Wanted(Form.FLOATS) if reader.norm is not None and in_lanes(reader, like) else NOTHING


def is_read(matrix: Quantized) -> bool:
    """Whether a kernel here reads `matrix` as it is stored; others are read back whole first.

    Those are kinds that ready-made checkpoints have: groups of bytes, tables, columns reordered.
    """
    grouped_bytes = matrix.grouped and matrix.scheme is not Scheme.INT4
    return matrix.table is None and matrix.order is None and not grouped_bytes


def in_lanes(reader: Reader, like: Tensor) -> bool:
    """Whether a product with vectors of `like`'s type is of 16-bit floats that lanes read as
    `gemm_float16` has it."""
    matrix, norm = reader.matrix, reader.norm
    if isinstance(matrix, Quantized) or like.dtype.itemsize != 2 or len(matrix) % 8:
        return False
    return matrix.dtype == like.dtype and (norm is None or norm.weight.dtype == like.dtype)


class ReadyVectors:
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
        self._latest: tuple[Tensor, Ready] | None = None

    def buffers(self) -> tuple[Tensor, ...]:
        """For tests that poison what a step must not read."""
        return tuple(buffer for buffers in self._sets for buffer in buffers)

    def offer(self, reader: Reader | None, y: Tensor) -> Ready:
        """Where the kernel that makes `y` [S, rows] puts what `reader` wants of it. A kernel that
        takes the offer says so to `handed`."""
        wanted = NOTHING if reader is None else wanted_by(reader, y)
        norm = None if reader is None or wanted.form is Form.NONE else reader.norm
        shares = 0 if norm is None else triton.cdiv(y.shape[1], wanted.chunk)
        return Ready(wanted, self._sets[1 - self._turn], norm, shares)

    def offer_heads(self, reader: Reader | None, attended: Tensor, dim: int) -> Ready:
        """Likewise for attention, where heads are whole chunks."""
        ready = self.offer(reader, attended)
        rounded = ready.wanted.form in WORD_BITS and dim % ready.wanted.chunk == 0
        return ready if rounded else self.nothing()

    def nothing(self) -> Ready:
        return self.offer(None, self._sets[0][0])

    def handed(self, y: Tensor, ready: Ready) -> None:
        """The kernel that makes `y` has been launched, and hands over `ready`."""
        self._latest = None
        if ready.wanted.form is not Form.NONE:
            self._turn = 1 - self._turn
            self._latest = y, ready

    def found(self, x: Tensor, reader: Reader) -> Ready | None:
        """What was handed over of `x`, if it is what `reader` wants."""
        if self._latest is None:
            return None
        of, ready = self._latest
        fits = of is x and ready.norm is reader.norm and ready.wanted == wanted_by(reader, x)
        return ready if fits else None

    def rounded(self, x: Tensor, reader: Reader) -> Ready:
        """`x` [S, K] as the quantized matrix reads it, by a kernel of its own if it must."""
        ready = self.found(x, reader)
        if ready is None:
            ready = self.offer(reader, x)
            assert x.shape[1] * 8 <= len(ready.buffers[0]), "longer than any vector of the model"
            round_kernel[triton.cdiv(x.shape[1], ready.wanted.chunk), len(x)](
                x,
                ready.gain,
                *ready.buffers,
                x.shape[1],
                FORM=int(ready.wanted.form),
                RUN=ready.wanted.run,
                **self._options(1),
            )
            self.handed(x, ready)
        return ready
