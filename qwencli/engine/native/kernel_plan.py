"""The kernels that a model will need: all that its steps, prompts and pictures launch.

The model itself is run over tensors without values (`kernels.launches`), in every shape of step
that the engine has: so the list is right for every family and mode, and there is no second one to
keep up to date.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

from qwencli.config import Attention, Kernels, KVDType, Quantization, Speculate
from qwencli.engine.cache.kv_cache import KV_SCHEMES
from qwencli.engine.cache.paged_kv import DecodePages, PackedPrompts, PagedKVCache, pages_for
from qwencli.engine.cache.recurrent_state import RecurrentStates
from qwencli.engine.kernels.launches import Gpu, KernelLaunch, planning
from qwencli.engine.loading import weights
from qwencli.engine.native.batch_plan import BATCH_LIMITS
from qwencli.engine.native.decode_state import DecodeState
from qwencli.engine.native.model import PREFILL_CHUNK, QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.native.sampler import SamplerKind
from qwencli.engine.native.supported import batch_invariant_for, fused_for, quantizer_for
from qwencli.engine.ops.next_tokens import RowBuffers
from qwencli.engine.row_state import RowState
from qwencli.engine.runner import ROW_BUCKETS
from qwencli.engine.spec_decode.mtp import HeadInputs, likeliest
from qwencli.engine.spec_decode.ngram import MAX_VERIFY_TOKENS
from qwencli.engine.spec_decode.policy import MOST_VERIFIED
from qwencli.engine.spec_decode.verify import verify_sizes
from qwencli.models.shapes import ModelShape

META = torch.device("meta")
# Slots of the caches that steps are planned with: no kernel depends on how many there are.
SLOTS = 2 * PREFILL_CHUNK
# Tokens of prompts between which products are cut up alike: few share columns, many do not.
PRODUCT_TOKENS = (16, 32, *range(48, 257, 16), *range(320, 1025, 64), 1536, PREFILL_CHUNK)
PROMPT_TOKENS = 40
# A layer hands its result to the next one, or to the head.
LAYERS = 2


@dataclass(frozen=True)
class PlannedModel:
    """A model and its modes, as far as kernels depend on them.

    Args:
        rows: most rows of a batch; 0 = requests come one at a time.
    """

    shape: ModelShape
    dtype: torch.dtype
    quantization: Quantization = Quantization.NONE
    kv_dtype: KVDType = KVDType.AUTO
    attention: Attention = Attention.AUTO
    speculate: Speculate = Speculate.OFF
    batch_invariant: bool = False
    rows: int = BATCH_LIMITS["cuda"].max_rows


@dataclass(frozen=True)
class PlannedPass:
    """Work that launches kernels.

    Args:
        tokens: of a sequence that takes a step, or of a prompt. rows: sequences that share a pool
            of pages; 0 = one, with a cache of its own.
    """

    name: str
    tokens: int
    rows: int
    run: Callable[[], None]


def plan_kernels(planned: PlannedModel, gpu: Gpu | None) -> list[KernelLaunch]:
    """All launches of a model on a GPU, lone requests' first; None = in Triton's interpreter."""
    with planning(gpu) as found, torch.inference_mode(), _ShapesAlone():
        for each in planned_passes(planned):
            each.run()
    return list(found)


class _ShapesAlone(TorchFunctionMode):
    """Answers operators over tensors without values whose shapes torch works out in Python, which
    takes long, and longer the first time, for what it imports (a second, sympy among it)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        short = _SHORT.get(func)
        return (short or func)(*args, **(kwargs or {}))


def _elementwise(x: torch.Tensor, y: Any, **more: Any) -> torch.Tensor:
    dtype = torch.result_type(x, y)
    if not isinstance(y, torch.Tensor) or y.ndim == 0:
        return torch.empty_strided(x.shape, x.stride(), dtype=dtype, device=x.device)
    sides = zip_longest(reversed(x.shape), reversed(y.shape), fillvalue=1)
    shape = [side if other == 1 else other for side, other in sides]
    return x.new_empty(shape[::-1], dtype=dtype)


def _quotient(x: torch.Tensor, y: Any, **more: Any) -> torch.Tensor:
    if torch.result_type(x, y).is_floating_point:
        return _elementwise(x, y)
    return _elementwise(x, y).to(torch.get_default_dtype())


def _same(x: torch.Tensor, *rest: Any, **more: Any) -> torch.Tensor:
    return x


def _cat(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    sides = list(parts[0].shape)
    sides[dim] = sum(part.shape[dim] for part in parts)
    return parts[0].new_empty(sides)


def _stack(parts: Sequence[torch.Tensor], dim: int = 0) -> torch.Tensor:
    return _cat([part.unsqueeze(dim) for part in parts], dim)


def _alike(
    x: torch.Tensor, *rest: Any, dtype: torch.dtype | None = None, **more: Any
) -> torch.Tensor:
    return torch.empty_strided(x.shape, x.stride(), dtype=dtype or x.dtype, device=x.device)


def _sum(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.new_empty([side for place, side in enumerate(x.shape) if place != dim % x.ndim])


def _item(x: torch.Tensor, place: Any) -> torch.Tensor:
    """One table of indices in front takes the place of the first axis; the rest is views."""
    if isinstance(place, torch.Tensor) and place.dtype != torch.bool:
        return x.new_empty(*place.shape, *x.shape[1:])
    return x[place]


def _scaled_mm(
    x: torch.Tensor, weight: torch.Tensor, *scales: Any, out_dtype: torch.dtype, **more: Any
) -> torch.Tensor:
    return x.new_empty(len(x), weight.shape[1], dtype=out_dtype)


def _arange(*ends: int, dtype: torch.dtype = torch.int64, device: Any = None) -> torch.Tensor:
    if torch.device(device or "cpu") != META:
        return torch.arange(*ends, dtype=dtype, device=device)
    return torch.empty(len(range(*ends)), dtype=dtype, device=META)


_SHORT: Mapping[Any, Callable[..., torch.Tensor]] = {
    **dict.fromkeys((F.scaled_dot_product_attention, F.rms_norm, F.layer_norm), _alike),
    **dict.fromkeys(
        (torch.Tensor.cos, torch.Tensor.sin, torch.Tensor.neg, torch.Tensor.sigmoid), _alike
    ),
    **dict.fromkeys((torch.empty_like, torch.zeros_like, torch.Tensor.roll), _alike),
    F.embedding: lambda ids, weight, **more: weight.new_empty(*ids.shape, weight.shape[1]),
    **dict.fromkeys((torch.Tensor.add, torch.Tensor.sub, torch.Tensor.mul), _elementwise),
    **dict.fromkeys((torch.Tensor.div, torch.Tensor.__rtruediv__), _quotient),
    torch.Tensor.__rpow__: _elementwise,
    torch.Tensor.sum: _sum,
    torch.Tensor.__getitem__: _item,
    torch.arange: _arange,
    torch.cat: _cat,
    torch.stack: _stack,
    torch.addmm: lambda bias, x, weight: x.new_empty(len(x), weight.shape[1]),
    **dict.fromkeys((torch.Tensor.add_, torch.Tensor.mul_, torch.Tensor.addmm_), _same),
    torch._addmm_activation: lambda bias, x, weight: x.new_empty(len(x), weight.shape[1]),
    torch._scaled_mm: _scaled_mm,
    torch.mm: lambda x, weight: x.new_empty(len(x), weight.shape[1]),
    F.linear: lambda x, weight, *rest: x.new_empty(*x.shape[:-1], len(weight)),
    torch.ops.aten.gelu_: _same,
}


def planned_passes(planned: PlannedModel) -> Iterator[PlannedPass]:
    """Every kind of pass that the engine makes, over tensors without values."""
    shape = _shortened(planned.shape)
    model = _model(planned, shape, planned.quantization)
    if not shape.text.rows_only:
        yield from _lone_passes(planned, model)
    for tokens in (PROMPT_TOKENS, PREFILL_CHUNK):

        def attention(tokens: int = tokens) -> None:
            _prompt_attention(model, tokens)

        yield PlannedPass("attention of prompts", tokens, 0, attention)
    for tokens in PRODUCT_TOKENS if model.quantized or shape.text.moe is not None else ():

        def products(tokens: int = tokens) -> None:
            _prompt_products(model, tokens)

        yield PlannedPass("products of prompts", tokens, 0, products)
    if model.vision is not None:
        yield PlannedPass("picture", 64, 0, lambda: _encode(model))
        yield PlannedPass("pictures", 64, 0, lambda: _picture_attention(model, 64))
    if planned.quantization is not Quantization.NONE and not shape.text.rows_only:
        # What a load lets torch get ready with (`warmup`), whose weights are not quantized.
        plain = _model(planned, shape, Quantization.NONE)
        yield PlannedPass("prompt, unquantized", PROMPT_TOKENS, 0, lambda: _prefill(plain))
    if planned.rows or shape.text.rows_only:
        yield from _row_passes(planned, model)


def _model(planned: PlannedModel, shape: ModelShape, quantization: Quantization) -> QwenModel:
    quantizer = quantizer_for(Kernels.TRITON)
    loaded = weights.dummy(shape, planned.dtype, META, quantization, quantizer)
    invariant = None
    if planned.batch_invariant:
        invariant = batch_invariant_for(Kernels.TRITON, "cuda")
    return QwenModel(
        shape,
        loaded,
        SLOTS,
        Attention.SDPA,  # which kernels there are does not depend on what else attends
        fused_for(Kernels.TRITON, planned.attention),
        KV_SCHEMES[planned.kv_dtype],
        planned.attention is Attention.AUTO,
        invariant,
    )


def _shortened(shape: ModelShape) -> ModelShape:
    """The model with as many layers as have each kind, and each next to each."""
    text = shape.text
    layers, mixers = min(text.num_layers, LAYERS), text.mixers
    if text.delta is not None:
        mixers = ("delta", "attention")
        layers = LAYERS
    return replace(shape, text=replace(text, num_layers=layers, mixers=mixers))


def _lone_passes(planned: PlannedModel, model: QwenModel) -> Iterator[PlannedPass]:
    drafting = planned.speculate is not Speculate.OFF
    state = DecodeState(model, model.static_cache(), SLOTS, with_drafts=drafting)
    state.logits = torch.zeros(1, model.shape.text.vocab_size, device=META)
    for kind in (SamplerKind.ARGMAX, SamplerKind.GREEDY, SamplerKind.LOGITS):

        def step(kind: SamplerKind = kind) -> None:
            state.advance_masked(kind, SLOTS)

        yield PlannedPass("step", 1, 0, step)
    for size in verify_sizes(planned.speculate) if drafting else ():

        def verify(size: int = size) -> None:
            state.verify_masked(SamplerKind.ARGMAX, size, SLOTS)
            state.verify_masked(SamplerKind.GREEDY, size, SLOTS)

        yield PlannedPass("verify", size, 0, verify)
    yield PlannedPass("prompt", PROMPT_TOKENS, 0, lambda: _prefill(model))


def _prefill(model: QwenModel) -> None:
    model.prefill(model.prepare([ModelPrompt([0] * PROMPT_TOKENS)]), model.static_cache())


def _prompt_products(model: QwenModel, tokens: int) -> None:
    """A layer's products with so many tokens of prompts."""
    text, layer, ops = model.shape.text, model.decoder.layers[0], model.prompt_ops
    hidden = torch.empty(tokens, text.hidden_size, dtype=model.dtype, device=META)
    ops.norm_qkv(hidden, layer)
    ops.o_residual(hidden.new_empty(tokens, text.q_size), layer, hidden)
    if layer.routing is None:
        ops.down_residual(ops.norm_gate_up(hidden, layer), layer, hidden)
    else:
        ops.experts_residual(hidden, layer)


def _prompt_attention(model: QwenModel, tokens: int) -> None:
    """A layer's attention over so many tokens of a prompt."""
    attend, text = model.step_ops.attend_prompts, model.shape.text
    if attend is None:
        return
    heads = text.num_heads + 2 * text.num_kv_heads
    split = torch.empty(tokens, heads, text.head_dim, dtype=model.dtype, device=META)
    sizes = text.num_heads, text.num_kv_heads, text.num_kv_heads
    q, keys, values = split.split_with_sizes(sizes, dim=1)
    attend(q, keys, values, tokens, None, None)


def _encode(model: QwenModel) -> None:
    """One picture of the smallest size that fills a window."""
    tower = model.shape.vision
    assert tower is not None, "the caller looked"
    side = 8 * tower.merge_size
    patches = torch.empty(side * side, tower.patch_elements, dtype=model.dtype, device=META)
    model.encode_images(patches, [(1, side, side)])


def _picture_attention(model: QwenModel, patches: int) -> None:
    """A block's attention over pictures of several sizes, or over one in a graph."""
    tower = model.shape.vision
    assert model.vision is not None and tower is not None, "the caller looked"
    attend = model.vision.varlen
    if attend is None:
        return
    heads = tower.num_heads, tower.head_dim
    qkv = torch.empty(patches, 3, *heads, dtype=model.dtype, device=META)
    q, keys, values = qkv.unbind(1)
    starts = torch.empty(3, dtype=torch.int32, device=META)
    attend(q, keys, values, patches, starts, starts)


def _row_passes(planned: PlannedModel, model: QwenModel) -> Iterator[PlannedPass]:
    most = planned.rows or 1  # a lone request of a model that runs in rows alone
    drafting = planned.speculate is not Speculate.OFF
    inputs = None if model.draft_head is None else HeadInputs(most, model)
    sizes = verify_sizes(planned.speculate, by_head=inputs is not None) if drafting else ()
    cache = model.paged_cache(2)
    step_tokens, checked = (MAX_VERIFY_TOKENS, MOST_VERIFIED) if drafting else (1, 0)
    states = model.recurrent_states(2, step_tokens, checked)
    pages = pages_for(SLOTS)
    state = RowState(most, pages, model.shape.text.vocab_size, SLOTS, META, drafting)

    def part(rows: int) -> tuple[RowBuffers, DecodePages]:
        buffers = state.buffers(rows)
        kept, done = state.states[:rows], buffers.done
        return buffers, DecodePages(state.tables[:rows], buffers.slot, SLOTS, kept, done)

    for rows in sorted({min(each, most) for each in ROW_BUCKETS}):

        def step(rows: int = rows) -> None:
            (buffers, table), ops = part(rows), model.row_ops(rows)

            def hidden() -> torch.Tensor:
                token, position = buffers.token, buffers.position
                return model.decode_rows(token, position, cache, table, states)

            if ops.lm_head_rows is not None:
                # Each takes what the layers leave beside their result, so each has its own.
                for with_penalty in (False, True):
                    model.decoder.next_tokens(hidden(), ops, buffers, with_penalty)
            logits = model.decoder.logits(hidden(), ops)
            for with_penalty in (False, True):
                ops.choose_likeliest(logits, buffers, with_penalty)
            ops.advance_rows(buffers.token, buffers)

        yield PlannedPass("rows", 1, rows, step)
    for size in sizes:
        for rows in sorted({min(each, most, MOST_VERIFIED // size) for each in ROW_BUCKETS}):

            def verify(rows: int = rows, size: int = size) -> None:
                (buffers, table), drafts = part(rows), state.narrow_drafts(rows)
                if inputs is not None and size > 1:
                    tables = table.tables
                    inputs.draft(model, cache, buffers, drafts, tables, SLOTS, size - 1, likeliest)
                fed = drafts.input_ids[:, :size].flatten()
                hidden = model.decode_rows(fed, buffers.position, cache, table, states)
                ops = model.row_ops(rows * size)
                logits = model.decoder.logits(hidden, ops)
                assert ops.verify_rows is not None, "kernels have it"
                ops.verify_rows(logits, buffers, drafts)
                if states is not None and size > 1:
                    model.adopt_accepted(states, table, size, drafts.verify_output[:, 0])

            yield PlannedPass("verify rows", size, rows, verify)
    yield PlannedPass("prompts", PROMPT_TOKENS, 1, lambda: _prefill_packed(model, cache, states))
    limit = BATCH_LIMITS["cuda"].max_prompts
    for prompts in sorted({min(each, limit) for each in ROW_BUCKETS}):

        def head(prompts: int = prompts) -> None:
            text = model.shape.text
            model.prompt_logits(
                torch.empty(prompts, text.hidden_size, dtype=model.dtype, device=META)
            )

        yield PlannedPass("heads of prompts", 1, prompts, head)


def _prefill_packed(model: QwenModel, cache: PagedKVCache, states: RecurrentStates | None) -> None:
    """A prompt over a pool of pages, all of it new."""
    tokens = PROMPT_TOKENS
    starts = torch.zeros(2, dtype=torch.int32, device=META)
    tables = None
    if model.batch_invariant:
        tables = torch.zeros(1, pages_for(tokens), dtype=torch.int32, device=META)
    prompts = PackedPrompts([tokens], [0], starts, starts, None, model.flash_decode, tables)
    if states is not None:
        prompts = replace(prompts, states=torch.zeros(1, dtype=torch.int64, device=META))
    hidden = torch.empty(tokens, model.shape.text.hidden_size, dtype=model.dtype, device=META)
    positions = torch.zeros(3, tokens, dtype=torch.int64, device=META)
    slots = torch.zeros(tokens, dtype=torch.int64, device=META)
    model.prefill_packed(hidden, positions, slots, cache, prompts, None, states)
