"""Steps of several tokens, and of several sequences: the kernels against the plain operators and
both against the same tokens one at a time. In Triton's interpreter."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from qwencli.config import Quantization, SamplingParams
from qwencli.engine.kernels import activation_buffers as ready_module
from qwencli.engine.kernels import fused_ops as fused_module
from qwencli.engine.kernels.activation_buffers import ActivationConsumer
from qwencli.engine.kernels.fused_ops import fused_ops
from qwencli.engine.kernels.skinny_gemm import Epilogue, SkinnyGemm
from qwencli.engine.kernels.tiles import AttentionTiles, GemvTiles, MatrixKind
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.model import Fused, QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.native.sampler import SamplerKind
from qwencli.engine.ops.attention import AttentionPlan, decode_mask
from qwencli.engine.ops.decoder_ops import RMSNorm
from qwencli.engine.quant.quantized_tensor import Scheme, quantize
from tests.engine.kernels.test_fused_ops import OWN, SLOTS, TORCH_ATTENTION, model_of, prompt_of
from tests.engine.kernels.test_gemv_quantized import MADE, ops, rounded, values

MOST = 1e-4
FEW_WORDS = 77  # a head takes as long as a layer
# Lanes that only fill up to a power of two have no weights; what they give is not stored.
WITH_IDLE_LANES = pytest.mark.filterwarnings(
    "ignore:invalid value encountered in divide:RuntimeWarning"
)


@pytest.fixture(autouse=True)
def short_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """More parts of a sequence than join at once; eight tokens of five heads are four query
    tiles."""
    tiles = AttentionTiles(16, 8, 1)
    monkeypatch.setattr(fused_module, "attention_tiles", lambda *_: tiles)
    assert tiles.parts_at_once(lanes=16, head_dim=64, splits=8) < tiles.splits_for(query_tiles=1)
    assert tiles.tokens_each(heads=8, tokens=8) == 2


def two_share(matrix: MatrixKind) -> GemvTiles:
    return GemvTiles(128, 128 if matrix.tokens == 1 else 32, 1, splits=2)


def config(heads: int, kv_heads: int, dim: int, hidden: int = 96) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "vocab_size": 301,
        "hidden_size": hidden,
        "intermediate_size": 72,
        "num_hidden_layers": 2,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": dim,
        "rope_theta": 1e4,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
        "attention_bias": True,
    }


@torch.inference_mode()
def logits_of(
    model: QwenModel, prompts: list[list[int]], tokens: list[list[int]], size: int
) -> torch.Tensor:
    """Logits [B, S, V] of `tokens` fed `size` at a time after prompts of equal length."""
    inputs = model.prepare([ModelPrompt(prompt) for prompt in prompts])
    cache = model.static_cache(len(prompts))
    model.prefill(inputs, cache)
    positions = inputs.next_positions.clone()
    rows = []
    for start in range(0, len(tokens[0]), size):
        fed = torch.tensor([row[start : start + size] for row in tokens])
        slots = torch.arange(cache.length, cache.length + fed.shape[1])
        cache.length += fed.shape[1]
        mask = decode_mask(torch.arange(cache.length), slots, None, torch.float32)
        plan = AttentionPlan(cache.length, mask)
        logits = model.decode_step(fed.flatten(), positions, slots[:1], cache, plan)
        rows.append(logits.view(*fed.shape, -1).clone())
        positions += fed.shape[1]
    return torch.cat(rows, dim=1)


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max() / b.abs().max())


# Every shape of heads with a step that fills its lanes and with one that does not.
@WITH_IDLE_LANES
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "size"),
    [(4, 2, 64, 2), (4, 2, 64, 5), (3, 1, 32, 3), (3, 1, 32, 8), (5, 1, 128, 5), (5, 1, 128, 8)],
)
def test_several_tokens_give_the_logits_of_one_at_a_time(
    heads: int, kv_heads: int, dim: int, size: int
) -> None:
    shape = config(heads, kv_heads, dim)
    prompt = prompt_of(2 if heads == 3 else 70)
    tokens = [[7, 7, 250, 3, 3, 3, 17, 60, 7][: 2 * size + 1]]
    one = logits_of(model_of(shape, None), [prompt], tokens, 1)
    plain = logits_of(model_of(shape, None), [prompt], tokens, size)
    own = logits_of(model_of(shape, OWN), [prompt], tokens, size)
    assert relative(plain, one) < MOST
    assert relative(own, one) < MOST


@pytest.mark.parametrize("fused", [OWN, TORCH_ATTENTION])
def test_a_batch_is_read_with_the_same_kernels(fused: Fused) -> None:
    shape = config(4, 2, 64)
    prompts = [prompt_of(70), prompt_of(71)[1:], prompt_of(72)[2:]]
    tokens = [[7, 8], [9, 10], [11, 12]]
    plain = logits_of(model_of(shape, None), prompts, tokens, 1)
    own = logits_of(model_of(shape, fused), prompts, tokens, 1)
    assert relative(own, plain) < MOST
    assert relative(plain[1:], plain[:-1]) > 0.1


@pytest.mark.parametrize("quantization", [q for q in Quantization if q is not Quantization.NONE])
def test_several_tokens_through_quantized_matrices(quantization: Quantization) -> None:
    shape = config(4, 2, 32, hidden=192) | {"num_hidden_layers": 1, "vocab_size": FEW_WORDS}
    tokens, prompt = [[7, 8, 9, 10]], [word % FEW_WORDS for word in prompt_of(5)]
    one = logits_of(model_of(shape, OWN, quantization), [prompt], tokens, 1)
    own = logits_of(model_of(shape, OWN, quantization), [prompt], tokens, 4)
    # What is rounded is multiplied in float16: now and then a later value meets the next step.
    assert relative(own, one) < (1e-3 if quantization is Quantization.FP8 else 0.02)


class Counted:
    """Stands in for a kernel and counts its launches."""

    def __init__(self, kernel: Any) -> None:
        self.kernel, self.launches = kernel, 0

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.launches += 1
        return self.kernel[grid]


@WITH_IDLE_LANES
@pytest.mark.parametrize("quantization", [q for q in Quantization if q is not Quantization.NONE])
def test_kernels_hand_each_other_rounded_vectors(
    quantization: Quantization, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the first product of a step find their vectors ready: heads and rows that several
    programs make included."""
    counted = Counted(ready_module.quantize_activation_chunks_kernel)
    monkeypatch.setattr(ready_module, "quantize_activation_chunks_kernel", counted)
    shape = config(2, 1, 128, hidden=192) | {"intermediate_size": 96, "vocab_size": FEW_WORDS}
    shared = functools.partial(fused_ops, own_attention=True, tiles_of=two_share)
    tokens, prompt = [[7, 8, 9]], [word % FEW_WORDS for word in prompt_of(33)]
    one = logits_of(model_of(shape, OWN, quantization), [prompt], tokens, 1)
    assert counted.launches == 0
    own = logits_of(model_of(shape, shared, quantization), [prompt], tokens, 2)
    assert counted.launches == 1  # the second step has one token
    assert relative(own, one) < (1e-3 if quantization is Quantization.FP8 else 0.02)


@torch.inference_mode()
@pytest.mark.parametrize("scheme", [*MADE, None])
@pytest.mark.parametrize("splits", [2, 4])
def test_programs_that_share_columns_add_up_the_same_every_time(
    scheme: Scheme | None, splits: int
) -> None:
    """And leave their counters as they found them, for the next product and the next replay."""
    own = ops(torch.float16 if scheme is None else torch.float32)
    own._skinny_gemm._tiles_of = lambda _: GemvTiles(128, 16, 2, splits)
    x, weight, start = values(5, 640), values(40, 640), values(5, 40)
    after = ActivationConsumer(RMSNorm(1 + 0.1 * values(40), 1e-6), values(40, 8))
    matrix: Any = weight.half().t() if scheme is None else quantize(weight, scheme)
    if scheme is None:
        x, start = x.half(), start.half()
        after = ActivationConsumer(RMSNorm(after.norm.weight.half(), 1e-6), after.matrix.half())
    expected = torch.zeros_like(start)
    alone = ops(x.dtype)
    alone._skinny_gemm._tiles_of = lambda _: GemvTiles(128, 16, 2)
    alone._gemv(x, ActivationConsumer(None, matrix), expected)
    found = []
    for _ in range(2):
        for buffer in own._skinny_gemm.buffers():
            buffer.fill_(float("nan"))
        y = start.clone()
        own._gemv(x, ActivationConsumer(None, matrix), y, after=after, add=True)
        found.append(y)
    assert torch.equal(found[0], found[1])
    assert not own._skinny_gemm._semaphore.any()
    assert relative(found[0], expected + start) < (2e-3 if scheme is None else 1e-5)


@torch.inference_mode()
@pytest.mark.parametrize(("rows", "columns"), [(40, 200), (7, 64), (72, 416)])
@pytest.mark.parametrize("size", [2, 8])
def test_products_of_16_bit_floats(rows: int, columns: int, size: int) -> None:
    """Bias, residual, gate and norm, by the squares that the kernel in front left or without."""
    half = torch.float16
    own = ops(half)
    own._skinny_gemm._tiles_of = lambda _: GemvTiles(128, 16, 2)
    x, weight = values(size, columns).half(), 0.1 * values(2 * rows, columns).half()
    norm = RMSNorm(1 + 0.1 * values(columns).half(), 1e-6)
    reader = ActivationConsumer(norm, weight.t())
    before = ActivationConsumer(None, torch.eye(columns, dtype=half).t())
    for handed in (False, True):
        normed_x = x
        if handed:
            normed_x = torch.zeros_like(x)
            own._gemv(x, before, normed_x, after=reader)
            assert torch.equal(normed_x, x)
        vectors = norm(normed_x).double()
        y = torch.zeros(size, rows, dtype=half)
        own._gemv(normed_x, reader, y, gated=True)
        gate, up = (vectors @ weight.double().t()).chunk(2, dim=1)
        wanted = torch.nn.functional.silu(gate) * up
        assert relative(y.double(), wanted) < 2e-3
        y, bias = values(size, rows).half(), values(rows).half()
        wanted = vectors @ weight[:rows].double().t() + bias.double() + y.double()
        own._gemv(normed_x, ActivationConsumer(norm, weight[:rows].t()), y, bias=bias, add=True)
        assert relative(y.double(), wanted) < 2e-3


@WITH_IDLE_LANES
@torch.inference_mode()
@pytest.mark.parametrize(("fused", "penalty"), [(OWN, 1.0), (TORCH_ATTENTION, 1.3)])
def test_checked_steps_choose_and_draft_what_the_plain_operators_do(
    fused: Fused, penalty: float
) -> None:
    prompt = [5, 6, 7, 5, 6, 7, 5, 6]
    sampling = SamplingParams(do_sample=False, repetition_penalty=penalty, max_new_tokens=7)
    states = []
    for kind in (None, fused):
        model = model_of(config(4, 2, 64), kind)
        inputs = model.prepare([ModelPrompt(prompt)])
        state = DecodeState(model, model.static_cache(), SLOTS, with_drafts=True)
        state.begin(sampling, inputs.ids[0], [], inputs.next_positions)
        state.kind = SamplerKind.GREEDY
        state.sample_first(model.prefill(inputs, state.cache))
        states.append(state)
    plain, own = states
    for size in (1, 4, 8, 2, 5, 8):
        for state in states:
            state.verify_masked(state.kind, size, len(prompt) + 40)
        assert plain.drafts is not None and own.drafts is not None
        assert torch.equal(
            plain.drafts.verify_output[: 2 + size], own.drafts.verify_output[: 2 + size]
        )
        assert torch.equal(plain.drafts.input_ids, own.drafts.input_ids)
        for name in ("token", "slot", "position", "step", "done"):
            assert torch.equal(getattr(plain, name), getattr(own, name)), name
        assert torch.equal(plain.sampler.seen, own.sampler.seen)
    assert bool(plain.done)


@pytest.mark.parametrize("scheme", MADE)
@pytest.mark.parametrize("columns", [64, 224, 640, 1376])
def test_several_vectors_are_rounded_as_a_single_one_is(scheme: Scheme, columns: int) -> None:
    """So that a token checked is the token that a plain step would have chosen."""
    matrix = quantize(values(40, columns), scheme)
    x = values(3, columns)
    y = torch.zeros(3, 40)
    ops()._gemv(x, ActivationConsumer(None, matrix), y)
    steps = torch.stack([rounded(row, scheme) for row in x]).double()
    assert relative(y.double(), steps @ matrix.dequantize(torch.float64).t()) < 3e-4


@pytest.mark.parametrize("scheme", MADE)
@pytest.mark.parametrize(("block", "warps"), [(256, 4), (512, 2), (1024, 2)])
def test_however_the_columns_are_shared_the_product_is_the_same(
    scheme: Scheme, block: int, warps: int
) -> None:
    """More chunks than a row has included, and rows that fill no program."""
    matrix, x = quantize(values(24, 1376), scheme), values(5, 1376)
    norm = RMSNorm(1 + 0.1 * values(1376), 1e-6)
    expected = torch.zeros(5, 24)
    ops()._gemv(x, ActivationConsumer(norm, matrix), expected)
    own = ops()
    own._skinny_gemm._tiles_of = lambda _: GemvTiles(block, 16, warps)
    y = torch.zeros(5, 24)
    own._gemv(x, ActivationConsumer(norm, matrix), y)
    assert relative(y, expected) < 1e-5
    one = torch.zeros(1, 24)
    own._gemv(x[3:4], ActivationConsumer(norm, matrix), one)
    assert relative(y[3:4], one) < 3e-4


@pytest.mark.parametrize("scheme", MADE)
def test_vectors_of_any_size_keep_their_small_values(scheme: Scheme) -> None:
    """float16 holds neither end: each chunk is in units of its largest value."""
    matrix, x = quantize(values(16, 640), scheme), values(2, 640)
    x[:, :128] *= 1e6
    x[:, 128:] *= 1e-6
    x[0, :128] = 0
    y = torch.zeros(2, 16)
    ops()._gemv(x, ActivationConsumer(None, matrix), y)
    steps = torch.stack([rounded(row, scheme) for row in x]).double()
    expected = steps @ matrix.dequantize(torch.float64).t()
    for row in range(2):
        assert relative(y[row].double(), expected[row]) < 3e-4


@torch.inference_mode()
@pytest.mark.parametrize("tokens", [2, 3])
def test_a_zero_centred_norm_multiplies_by_one_and_its_weight(tokens: int) -> None:
    """1 + weight has no 16-bit type, and the kernel reads the weight two values at a time."""
    make = torch.Generator().manual_seed(tokens)
    x = torch.randn(tokens, 96, generator=make).half()
    weight = torch.randn(40, 96, generator=make).mul_(0.1).half()
    shift = torch.randn(96, generator=make).mul_(0.05).half()
    norm = RMSNorm(shift.float() + 1, 1e-6, shift)
    y = torch.zeros(tokens, 40, dtype=torch.float16)
    assert ready_module.takes_float16_kernel(ActivationConsumer(norm, weight.t()), x)
    best = torch.zeros(8, dtype=torch.int64)
    options = {"PDL": False}
    product = SkinnyGemm(best, 96, two_share, lambda warps: options | {"num_warps": warps}, "ieee")
    product(x, weight.t(), y, Epilogue(norm))
    expected = norm(x).float() @ weight.float().t()
    torch.testing.assert_close(y.float(), expected, atol=5e-3, rtol=5e-3)
