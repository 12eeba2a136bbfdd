"""The kernels of a mixture of experts against `ops.moe`, through Triton's interpreter."""

from __future__ import annotations

import pytest
import torch

from qwencli.engine.kernels.batch_invariant import BatchInvariantOps
from qwencli.engine.kernels.moe import ExpertKernels, sort_pairs_kernel
from qwencli.engine.ops.decoder_ops import Layer, Matrix, RMSNorm, experts_residual, swiglu
from qwencli.engine.ops.moe import Routing
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme, quantize, quantize_rows

CPU = torch.device("cpu")
NONE = RMSNorm(torch.ones(1), 1e-6)


def options(num_warps: int) -> dict[str, object]:
    return {"PDL": False, "num_warps": num_warps}


def grouped_bytes(weight: torch.Tensor, scheme: Scheme, group: int = 32) -> QuantizedTensor:
    """As pre-quantized checkpoints have them: a scale for each group of columns."""
    data, scale = quantize_rows(weight.float().view(len(weight), -1, group), scheme)
    zero = torch.randint(-3, 4, scale.shape).to(torch.float16) if scheme is Scheme.INT8 else None
    return QuantizedTensor(scheme, data.reshape(weight.shape), scale, zero)


MAKE = {
    "none": lambda weight: weight.t(),
    "int8": lambda weight: quantize(weight, Scheme.INT8),
    "fp8": lambda weight: quantize(weight, Scheme.FP8),
    "int4": lambda weight: quantize(weight, Scheme.INT4),
    "int8-grouped": lambda weight: grouped_bytes(weight, Scheme.INT8),
    "fp8-grouped": lambda weight: grouped_bytes(weight, Scheme.FP8),
}


def layer_of(
    kind: str,
    dtype: torch.dtype = torch.float32,
    experts: int = 5,
    top_k: int = 2,
    hidden: int = 64,
    inner: int = 32,
    shared: bool = False,
    renormalize: bool = True,
    alone: int | None = None,
) -> Layer:
    """A layer whose feed-forward alone is real."""
    torch.manual_seed(0)

    def matrix(rows: int, columns: int) -> Matrix:
        return MAKE[kind]((torch.randn(rows, columns) / columns**0.5).to(dtype))

    stacked = experts + shared
    router = torch.randn(experts + (shared or alone is not None), hidden).to(dtype)
    own = None if alone is None else (matrix(2 * alone, hidden), matrix(hidden, alone))
    return Layer(
        index=0,
        num_heads=1,
        num_kv_heads=1,
        head_dim=1,
        attn_norm=NONE,
        qkv=router,
        qkv_bias=None,
        qk_norm=None,
        o=router,
        o_bias=None,
        mlp_norm=RMSNorm((torch.rand(hidden) + 0.5).to(dtype), 1e-6),
        gate_up=matrix(stacked * 2 * inner, hidden),
        down=matrix(stacked * hidden, inner),
        next_norm=NONE,
        next_matrix=router,
        routing=Routing(router, experts, top_k, renormalize, int(shared), own),
    )


class OneStep:
    """Stands for the lone step's operations, of which the shared expert takes two."""

    swiglu = staticmethod(swiglu)
    dequantize = staticmethod(QuantizedTensor.dequantize)


def differ(layer: Layer, hidden: torch.Tensor, tolerance: float = 2e-5) -> None:
    """All ways give what the reference gives."""
    kernels = ExpertKernels(8, CPU, options, "ieee")
    expected = experts_residual(hidden.clone(), layer)
    invariant = BatchInvariantOps(OneStep())  # type: ignore[arg-type]
    for way in (kernels.few, kernels.many, invariant.experts_residual):
        found = way(hidden.clone(), layer)
        torch.testing.assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("kind", ["none", "int8", "int4", "fp8-grouped"])
def test_kinds_of_weights(kind: str) -> None:
    torch.manual_seed(1)
    differ(layer_of(kind), torch.randn(2, 64))


def test_what_one_layer_leaves_is_ready_for_the_next() -> None:
    layer = layer_of("none", experts=5, top_k=1, hidden=32, inner=32)
    kernels, hidden = ExpertKernels(8, CPU, options, "ieee"), torch.randn(2, 32)
    first = kernels.few(hidden.clone(), layer)
    assert torch.equal(kernels.few(hidden.clone(), layer), first)


@pytest.mark.parametrize("kind", ["none", "int4"])
def test_a_shared_expert_and_weights_that_do_not_add_up(kind: str) -> None:
    layer = layer_of(kind, shared=True, renormalize=False, top_k=3)
    differ(layer, torch.randn(1, 64))


def test_a_shared_expert_of_another_width() -> None:
    differ(layer_of("none", alone=48, top_k=1), torch.randn(1, 64))


@pytest.mark.parametrize("shape", [(1, 1), (5, 5), (4, 3)])
def test_few_experts_and_odd_sizes(shape: tuple[int, int]) -> None:
    experts, top_k = shape
    layer = layer_of("none", experts=experts, top_k=top_k, hidden=40, inner=24)
    differ(layer, torch.randn(1, 40))


def test_halves() -> None:
    differ(layer_of("int4", torch.float16), torch.randn(2, 64).half(), 5e-3)


def test_more_rows_of_one_expert_than_a_tile_has() -> None:
    layer = layer_of("none", experts=3, top_k=1, hidden=32, inner=32)
    torch.manual_seed(2)
    hidden = torch.randn(40, 32)
    hidden[5:] = hidden[5] * torch.linspace(1, 2, 35)[:, None]  # all but five choose the same
    kernels = ExpertKernels(8, CPU, options, "ieee")
    expected = experts_residual(hidden.clone(), layer)
    torch.testing.assert_close(kernels.many(hidden.clone(), layer), expected, atol=2e-5, rtol=2e-5)


def test_pairs_are_sorted_by_expert_in_their_order() -> None:
    torch.manual_seed(3)
    experts = torch.randint(0, 7, (300,), dtype=torch.int32)
    order = torch.full((300,), -1, dtype=torch.int32)
    starts = torch.full((8,), -1, dtype=torch.int32)
    sort_pairs_kernel[8,](experts, order, starts, 300, BLOCK=128, num_warps=4)
    assert order.tolist() == experts.argsort(stable=True).tolist()
    assert starts.diff().tolist() == experts.bincount(minlength=7).tolist()


def test_a_table_of_values_is_read_by_the_reference() -> None:
    """Kinds that the kernels do not take are multiplied all the same."""
    layer = layer_of("none")
    weight = layer.gate_up
    assert isinstance(weight, torch.Tensor)
    reordered = quantize(weight.t(), Scheme.INT4)
    order = torch.arange(64, dtype=torch.int32)
    strange = QuantizedTensor(
        reordered.scheme,
        reordered.data,
        reordered.scale,
        reordered.zero_point,
        g_idx_sort_indices=order,
    )
    differ(Layer(**{**vars(layer), "gate_up": strange}), torch.randn(2, 64))
