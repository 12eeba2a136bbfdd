"""The vectors that kernels hand to each other (`handover`): buffers, and who gets which form."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import triton

from qwencli.engine.kernels.activation_quant import SPANS, Form, hand_over_kernel
from qwencli.engine.kernels.tiles import Storage
from qwencli.engine.ops.decoder_ops import Matrix
from qwencli.engine.ops.rms_norm import RMSNorm
from qwencli.engine.quant.quantized_tensor import Quantized, Scheme

Tensor = torch.Tensor

BLOCK_WORDS = 4  # int32 of a row that a thread reads at once
# What is left of a value; forms that are not here keep float32.
FORM_BITS = {Form.BYTES: 8, Form.HALVES: 8, Form.FLOAT16: 16}
# Columns and warps of a program that hands over a whole vector.
SHARE, SHARE_WARPS = 256, 2


@dataclass(frozen=True)
class InWords:
    """How a matrix is multiplied in words: bits of a weight, its storage and its vector's form."""

    bits: int
    storage: Storage
    form: Form


IN_WORDS = {
    Scheme.INT8: InWords(8, Storage.INT8, Form.BYTES),
    Scheme.FP8: InWords(8, Storage.FP8, Form.FLOAT16),
    Scheme.INT4: InWords(4, Storage.INT4, Form.HALVES),
    Scheme.NF4: InWords(4, Storage.INT4, Form.HALVES),
    Scheme.FP4: InWords(4, Storage.INT4, Form.HALVES),
}


def in_words(matrix: Matrix) -> InWords | None:
    """How products with `matrix` take several weights at a time; None = one by one, as floats."""
    if not isinstance(matrix, Quantized):
        return None
    way = IN_WORDS.get(matrix.scheme)
    if way is None or matrix.columns % (BLOCK_WORDS * 32 // way.bits):
        return None
    return way


def vector_bits(matrix: Quantized) -> int | None:
    """Bits to which a vector is rounded for products with `matrix`; None = not at all."""
    way = in_words(matrix)
    return None if way is None else FORM_BITS[way.form]


@dataclass(frozen=True)
class Reader:
    """What a vector is made for: the norm in front of a matrix, and the matrix."""

    norm: RMSNorm | None
    matrix: Matrix


@dataclass(frozen=True)
class Handed:
    """A vector as a kernel handed it over, or is about to.

    Args:
        values: room for the longest vector, of the form's type where that is FLOATS, else int8.
        steps, squares: float32.
        norm: whose gain is in it, and shares: programs that wrote squares; None and 0 without one.
    """

    form: Form
    values: Tensor
    steps: Tensor
    squares: Tensor
    norm: RMSNorm | None = None
    shares: int = 0

    @property
    def span(self) -> int:
        return SPANS.get(self.form, 1)


class Vectors:
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
        self._latest: tuple[Tensor, Handed] | None = None

    def buffers(self) -> tuple[Tensor, ...]:
        """All of them; for tests that poison what a step must not read."""
        return tuple(buffer for buffers in self._buffers for buffer in buffers)

    def form_for(self, reader: Reader) -> Form:
        way = in_words(reader.matrix)
        if way is not None:
            return way.form
        return Form.NONE if reader.norm is None else Form.FLOATS

    def offer(self, reader: Reader | None, rows: int, programs: int) -> Handed:
        """Where a kernel whose programs make `rows` values each puts what `reader` wants.

        Its form is NONE where nobody waits for one, or no program makes a whole block. A kernel
        that takes the offer says so to `handed`.
        """
        if reader is None or _ordered(reader.matrix):
            return self._vector(Form.NONE, None, 0)
        form = self.form_for(reader)
        if form is Form.NONE or rows % SPANS[form]:
            return self._vector(Form.NONE, None, 0)
        return self._vector(form, reader.norm, programs)

    def _vector(self, form: Form, norm: RMSNorm | None, programs: int) -> Handed:
        shares = 0 if norm is None else programs
        values, steps, squares = self._buffers[1 - self._turn]
        if form is Form.FLOATS:
            values = values.view(self._floats)
        return Handed(form, values, steps, squares, norm, shares)

    def handed(self, x: Tensor, vector: Handed) -> None:
        """The kernel that makes `x` has been launched, and hands over `vector`."""
        self._latest = None
        if vector.form is not Form.NONE:
            self._turn = 1 - self._turn
            self._latest = x, vector

    def read(self, x: Tensor, reader: Reader) -> Handed:
        """`x` [1, K] in the form that the matrix multiplies, by a kernel of its own if it must."""
        form = self.form_for(reader)
        if self._latest is not None:
            of, vector = self._latest
            if of is x and vector.norm is reader.norm and vector.form is form:
                return vector
        columns = x.shape[1]
        assert columns <= len(self._buffers[0][1]), "longer than any vector of the model"
        programs = triton.cdiv(columns, SHARE)
        vector = self._vector(form, reader.norm, programs)
        if form is not Form.NONE:
            matrix = reader.matrix
            hand_over_kernel[programs,](
                x,
                None if reader.norm is None else reader.norm.weight,
                matrix.order if isinstance(matrix, Quantized) else None,
                vector.values,
                vector.steps,
                vector.squares,
                columns,
                FORM=int(form),
                SPAN=vector.span,
                BLOCK=SHARE,
                **self._options(SHARE_WARPS),
            )
            self.handed(x, vector)
        return vector


def _ordered(matrix: Matrix) -> bool:
    return isinstance(matrix, Quantized) and matrix.order is not None
