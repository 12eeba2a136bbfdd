"""A mixture of experts in plain torch: the readable reference of `kernels.moe`.

Each token goes through the `top_k` experts that a router likes best, and where the model has one
through a shared expert; the results are added up by weight. Router: softmax in float32 over all
experts (Qwen3 report, arXiv 2505.09388; DeepSeekMoE, arXiv 2401.06066, for shared experts).

Matrices of all experts lie in one, expert after expert, so whatever cuts, quantizes or stores a
matrix needs to know nothing of experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from qwencli.engine.quant.quantized_tensor import QuantizedTensor

Tensor = torch.Tensor
Matrix = Tensor | QuantizedTensor
# The device that may be asked which experts were chosen.
HOST = "cpu"
DequantizeFn = Callable[[QuantizedTensor, torch.dtype], Tensor]


@dataclass(frozen=True)
class Routing:
    """Which experts a token goes through, and how their matrices are cut.

    Args:
        router: [num_experts, hidden], and behind it the gate of the shared expert, if there is one.
        renormalize: whether the weights of the experts of a token add up to 1.
        shared: how many experts stand behind those that are chosen among, in the same matrices,
            each of every token with the sigmoid of its gate as weight: 1 or 0.
        shared_mlp: gate_up and down of a shared expert of another width, which stands alone.
    """

    router: Tensor
    num_experts: int
    top_k: int
    renormalize: bool
    shared: int = 0
    shared_mlp: tuple[Matrix, Matrix] | None = None

    @property
    def slots(self) -> int:
        """Experts of the stacked matrices that a token goes through."""
        return self.top_k + self.shared

    @property
    def stacked(self) -> int:
        """Experts in the stacked matrices."""
        return self.num_experts + self.shared


def choose_experts(logits: Tensor, routing: Routing) -> tuple[Tensor, Tensor]:
    """Logits [N, experts and gate] -> weights (float32) and experts (int64), [N, slots] each."""
    logits = logits.float()
    likes = logits[:, : routing.num_experts].softmax(-1)
    weights, experts = likes.topk(routing.top_k, dim=-1)
    if routing.renormalize:
        weights = weights / weights.sum(-1, keepdim=True)
    if routing.shared:
        own = torch.full_like(experts[:, :1], routing.num_experts)
        experts = torch.cat((experts, own), 1)
        weights = torch.cat((weights, logits[:, routing.num_experts :].sigmoid()), 1)
    return weights, experts


def part_of(
    matrix: Matrix,
    index: int,
    count: int,
    dtype: torch.dtype,
    dequantize: DequantizeFn = QuantizedTensor.dequantize,
) -> Tensor:
    """The matrix [in, out] of one of `count` experts, of a [in, count * out] view or quantized."""
    rows = (matrix.rows if isinstance(matrix, QuantizedTensor) else matrix.shape[1]) // count
    own = slice(index * rows, (index + 1) * rows)
    if isinstance(matrix, QuantizedTensor):
        return dequantize(matrix.part(own), dtype).t()
    return matrix[:, own]


def _mlp(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = torch.mm(x, gate_up).chunk(2, 1)
    return torch.mm(F.silu(gate).mul_(up), down)


def mixture(
    x: Tensor,
    gate_up: Matrix,
    down: Matrix,
    routing: Routing,
    dequantize: DequantizeFn = QuantizedTensor.dequantize,
) -> Tensor:
    """Normed hidden states [N, hidden] -> what the experts make of them, [N, hidden].

    On the CPU each expert runs on the tokens that chose it. Elsewhere nobody asks the device which
    those are, so that a graph can hold it: every expert runs on all tokens.

    Args:
        gate_up: [hidden, stacked * 2 I], gate in front of up. down: [I, stacked * hidden].
    """
    weights, chosen = choose_experts(torch.mm(x, routing.router.t()), routing)
    on_host = x.device.type == HOST
    experts: Iterable[int] = (
        sorted(set(chosen.flatten().tolist())) if on_host else range(routing.stacked)
    )
    out = torch.zeros(x.shape, dtype=torch.float32, device=x.device)
    for expert in experts:
        own = part_of(gate_up, expert, routing.stacked, x.dtype, dequantize)
        back = part_of(down, expert, routing.stacked, x.dtype, dequantize)
        here = chosen == expert
        share = torch.where(here, weights, 0.0).sum(1, keepdim=True)
        if on_host:
            rows = here.any(1).nonzero()[:, 0]
            out.index_add_(0, rows, _mlp(x[rows], own, back) * share[rows])
        else:
            out += torch.where(here.any(1, keepdim=True), _mlp(x, own, back) * share, 0.0)
    if routing.shared_mlp is not None:
        out += shared_expert(x, routing)
    return out.to(x.dtype)


def shared_expert(x: Tensor, routing: Routing) -> Tensor:
    """What a shared expert that stands alone makes of x [N, hidden], by the sigmoid of its gate."""
    assert routing.shared_mlp is not None, "the caller looked"
    gate_up, down = (part_of(matrix, 0, 1, x.dtype) for matrix in routing.shared_mlp)
    gate = torch.mm(x, routing.router[routing.num_experts :].t()).float().sigmoid()
    return _mlp(x, gate_up, down) * gate
