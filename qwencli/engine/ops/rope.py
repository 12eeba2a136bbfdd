"""Rotary embedding of the text decoder: angles from positions, and the rotation itself.

With halves x = [a, b] of a head, the rotated head is [a cos - b sin, b cos + a sin], which is
x * cos + [b, a] * [-sin, sin]. The sign lives in the table, so the rotation is three kernels.
Source: RoFormer (arXiv 2104.09864) in the half-split layout of the Qwen checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F

from qwencli.engine.device_memory import lazy_zeros
from qwencli.models.shapes import RopeShape

# Few enough that the angles on the way to the table stay small beside it.
ROWS_AT_A_TIME = 1024

CosSin = tuple[torch.Tensor, torch.Tensor]
# See `apply_rope`.
ApplyRopeFn = Callable[[torch.Tensor, CosSin, int], None]


class Rope:
    """Angles of one model on one device.

    `rows` [positions, 2, D] holds cosine and signed sine for equal positions on all axes, so that
    a decode step is one gather. Prompts with pictures compute theirs from three axes. On the CPU
    the rows are filled as far as requests get (`reach`): most are never looked at.
    """

    def __init__(
        self,
        shape: RopeShape,
        head_dim: int,
        num_positions: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self._dtype = dtype
        self._inv_freq = inverse_frequencies(shape, head_dim).to(device)  # [D/2]
        self._scale = shape.yarn.attention_factor if shape.yarn else 1.0
        self._axis = axis_of_frequency(shape, head_dim).to(device)  # [D/2]
        self.rows = lazy_zeros((num_positions, 2, head_dim), dtype, device)
        self._flat_rows = self.rows.flatten(1)
        self._filled = 0
        if device.type != "cpu":
            self.reach(num_positions)

    def reach(self, num_positions: int) -> None:
        """Make sure that the rows of the first `num_positions` positions are filled."""
        assert num_positions <= len(self.rows), "positions stay below the slots of the cache"
        while self._filled < num_positions:
            rows = self.rows[self._filled : self._filled + ROWS_AT_A_TIME]
            places = torch.arange(self._filled, self._filled + len(rows), device=rows.device)
            rows.copy_(torch.stack(self._angles(places[:, None].float() * self._inv_freq), dim=1))
            self._filled += len(rows)

    def at(self, positions: torch.Tensor) -> CosSin:
        """Cosine and signed sine [B, S, 1, D] for positions [3, B, S]."""
        by_frequency = positions.float()[self._axis]  # [D/2, B, S]
        cos, sin = self._angles(by_frequency.movedim(0, -1) * self._inv_freq)
        return cos.unsqueeze(-2), sin.unsqueeze(-2)

    def step(self, positions: torch.Tensor) -> CosSin:
        """Cosine and signed sine [B, S, 1, D] for positions [B, S] that are equal on all axes.

        One gather, no synchronisation; positions must be below what `reach` was asked for.
        """
        cos, sin = self._step_rows(positions)
        return cos, sin

    def step_by_layer(self, positions: torch.Tensor, gains: torch.Tensor) -> Sequence[CosSin]:
        """`step` for each layer, times the gains of its query and key norms: [B, S, heads, D].

        Args:
            gains: `gains_of_halves`, [2, layers, heads, D].
        """
        cos, sin = self._step_rows(positions).unsqueeze(1) * gains[:, :, None, None]
        return list(zip(cos.unbind(), sin.unbind(), strict=True))

    def _step_rows(self, positions: torch.Tensor) -> torch.Tensor:
        """[2, B, S, 1, D]."""
        rows = F.embedding(positions, self._flat_rows)
        return rows.view(*positions.shape, 2, 1, -1).movedim(2, 0)

    def _angles(self, angles: torch.Tensor) -> CosSin:
        cos, sin = angles.cos(), angles.sin()
        if self._scale != 1.0:
            cos, sin = cos * self._scale, sin * self._scale
        return (
            torch.cat((cos, cos), dim=-1).to(self._dtype),
            torch.cat((-sin, sin), dim=-1).to(self._dtype),
        )


def inverse_frequencies(shape: RopeShape, head_dim: int) -> torch.Tensor:
    """Radians that each of the head_dim / 2 frequencies turns by from one position to the next."""
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    as_trained = 1.0 / shape.theta**exponent
    if shape.yarn is None:
        return as_trained
    yarn = shape.yarn

    def frequency(turns: float) -> float:
        """The frequency, as an index, that turns so often within the original positions."""
        wavelength = yarn.original_positions / (turns * 2 * math.pi)
        return head_dim * math.log(wavelength) / (2 * math.log(shape.theta))

    low, high = frequency(yarn.beta_fast), frequency(yarn.beta_slow)
    if yarn.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    width = high - low if high != low else 0.001
    stretched = ((torch.arange(head_dim // 2, dtype=torch.float32) - low) / width).clamp(0, 1)
    as_stretched = 1.0 / (yarn.factor * shape.theta**exponent)
    kept = 1 - stretched
    return as_stretched * (1 - kept) + as_trained * kept


def axis_of_frequency(shape: RopeShape, head_dim: int) -> torch.Tensor:
    """Which axis (0 time, 1 row, 2 column) each of the head_dim / 2 frequencies follows."""
    axis = torch.zeros(head_dim // 2, dtype=torch.int64)
    if shape.sections is None:
        return axis
    _, rows, columns = shape.sections
    if shape.interleaved:
        axis[1 : 3 * rows : 3] = 1
        axis[2 : 3 * columns : 3] = 2
        return axis
    return torch.repeat_interleave(torch.arange(3), torch.tensor(shape.sections))


def gains_of_halves(gains: torch.Tensor) -> torch.Tensor:
    """Gains [..., D] of heads -> [2, ..., D]: for the cosines, and for the sines.

    rotate(x * gain, cos, sin) is rotate(x, cos * first, sin * second), because the sines meet the
    head's other half.
    """
    return torch.stack((gains, gains.roll(gains.shape[-1] // 2, -1)))


def rotate(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, out: torch.Tensor | None = None
) -> torch.Tensor:
    """Rotate heads x [..., heads, D] by `cos` and the signed `sin`, which broadcast to it.

    `out` may be `x` itself.
    """
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, -1), sin, out=out)


def apply_rope(split: torch.Tensor, rope: CosSin, turned: int) -> None:
    """Rotate the first `turned` heads of `split` [B, S, heads, D] in place, in float32 as the
    reference does for pictures: angles are too coarse in bfloat16.

    Args:
        rope: float32, [B, S, 1, D].
    """
    heads = split.narrow(2, 0, turned)
    if heads.dtype is torch.float32:
        rotate(heads, *rope, out=heads)
    else:
        heads.copy_(rotate(heads.float(), *rope))
