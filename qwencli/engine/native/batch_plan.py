"""Decides how many requests run at once: rows, pages of the KV pool and slots of states.

Made when an engine first runs a batch, of the memory that is free beside the loaded model.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from qwencli.engine.cache.paged_kv import PAGE_SIZE, pages_for
from qwencli.engine.native.memory_plan import (
    STATES_KEPT,
    head_input_bytes,
    image_tokens,
    state_bytes,
    vision_bytes,
)
from qwencli.engine.request import Limits
from qwencli.models.memory import image_feature_bytes, native_kv_bytes, prefill_peak_bytes
from qwencli.models.shapes import ModelShape

# Rows that run at once and prompt tokens of a step, by device. So many tokens keep running rows
# waiting for 20 ms on an H200. `context_worth`: of a 4B model they are 12,200 by arithmetic;
# attention runs at half the speed of products. Of captions whose rows nobody waits for, as many
# pictures of 512x512 at a time as the vision tower and the decoder gain from (`MOST_PROMPTS`).
BATCH_LIMITS = {
    "cuda": Limits(
        max_rows=256,
        max_prefill_tokens=2048,
        max_prompts=64,
        context_worth=6144,
        powers_of_two=True,
        unstreamed_prefill_tokens=6144,
        unstreamed_prompts=16,
    ),
    "cpu": Limits(max_rows=16, max_prefill_tokens=512, max_prompts=8),
}
# Tokens that a row of a batch has room for on average, where memory does not say less.
BATCH_ROW_TOKENS = 1024
# What is said of a pool: pictures, and text around them with its answer.
CAPTION_SIZES = ((512, 512), (1024, 1024), (3840, 2160))
CAPTION_TOKENS = 192
# Of what is free, for what nobody counts.
POOL_SHARE = 0.9
# Of rows and of their pool, what longer passes over prompts may cost.
PASSES_SHARE = 0.05


@dataclass(frozen=True)
class BatchPlan:
    """What a batch may hold, and the bytes of its memory by use.

    Args:
        num_pages: of the KV pool. num_states: slots of recurrent states; 0 = the model keeps none.
        keep_dense: whether dequantized copies of the weights are worth their memory.
    """

    limits: Limits
    num_pages: int
    num_states: int
    keep_dense: bool
    parts: dict[str, int]


def plan_batch(
    shape: ModelShape,
    limits: Limits,
    *,
    max_seq_len: int,
    value_bytes: int,
    free_bytes: int | None,
    quantized_kv: bool,
    reserved: int,
    drafting: bool,
    dense_bytes: int,
) -> BatchPlan:
    """The batch that fits beside a loaded model.

    Args:
        limits: the device's, of which memory may leave less.
        value_bytes: of an activation.
        free_bytes: of the device, beside the weights; None = not known, everything fits.
        reserved: see `plan_pages`. drafting: see `plan_memory`.
        dense_bytes: what dequantized copies of the weights take, which products of many rows
            would read; 0 = they have no use for any.
    """

    def states_in(limits: Limits) -> tuple[int, int]:
        return plan_states(shape, limits, value_bytes, free_bytes, quantized_kv, reserved, drafting)

    def pages_in(free_bytes: int | None, limits: Limits) -> int:
        return plan_pages(
            shape, limits, max_seq_len, value_bytes, free_bytes, quantized_kv, reserved
        )

    limits = limits_within(limits, lambda each: states_in(each)[0])
    rows, num_states = states_in(limits)
    limits = replace(limits, max_rows=rows)
    each, updates = state_bytes(shape, value_bytes, drafting)
    states = num_states * each + updates
    head = head_input_bytes(shape, rows, value_bytes) if drafting else 0
    beside_states = None if free_bytes is None else free_bytes - states - head
    limits = limits_within(limits, lambda each: pages_in(beside_states, each))
    pages, keep_dense, parts = pages_in(beside_states, limits), False, dict[str, int]()
    if dense_bytes and beside_states is not None:
        # They are worth the memory that rows have no use for.
        beside = pages_in(beside_states - dense_bytes, limits)
        if beside >= min(pages, pages_for_captions(shape, limits)):
            pages, keep_dense = beside, True
            parts["weights once more, for batches"] = dense_bytes
    captions = captions_that_fit(shape, pages, limits.max_rows)
    page_bytes = PAGE_SIZE * native_kv_bytes(shape, quantized_kv, value_bytes)
    parts[f"pool for captions ({captions})"] = pages * page_bytes
    if states:
        parts["states of sequences"] = states
    if head:
        parts["hidden states for drafts"] = head
    return BatchPlan(limits, pages, num_states, keep_dense, parts)


def plan_pages(
    shape: ModelShape,
    limits: Limits,
    max_seq_len: int,
    value_bytes: int,
    free_bytes: int | None,
    quantized_kv: bool = False,
    reserved: int = 0,
) -> int:
    """Pages of the pool of a batch: for all rows, or at least one of `max_seq_len` tokens; fewer
    where no more than `free_bytes` are left beside the weights. At least one beside page 0.

    Args:
        reserved: what a lone request works in, and what is kept of pictures: a large picture takes
            as much in a batch.
    """
    wanted = pages_for(max(limits.max_rows * BATCH_ROW_TOKENS, max_seq_len)) + 1
    if free_bytes is None:
        return wanted
    working = _batch_working_bytes(shape, limits, value_bytes, reserved)
    page_bytes = PAGE_SIZE * native_kv_bytes(shape, quantized_kv, value_bytes)
    return max(2, min(wanted, int((free_bytes - working) * POOL_SHARE) // page_bytes))


def limits_within(limits: Limits, room_in: Callable[[Limits], int]) -> Limits:
    """The limits, without longer passes over prompts where these would take rows, or pages that
    rows need.

    Args:
        room_in: rows, or pages of the pool, beside what a step of such limits works in.
    """
    short = replace(limits, unstreamed_prefill_tokens=None)
    return limits if room_in(limits) >= (1 - PASSES_SHARE) * room_in(short) else short


def pages_for_captions(shape: ModelShape, limits: Limits) -> int:
    """Pages that a pool needs for captions of the smallest of `CAPTION_SIZES` in all rows."""
    width, height = CAPTION_SIZES[0]
    return limits.max_rows * pages_for(image_tokens(shape, width * height) + CAPTION_TOKENS) + 1


def plan_states(
    shape: ModelShape,
    limits: Limits,
    value_bytes: int,
    free_bytes: int | None,
    quantized_kv: bool = False,
    reserved: int = 0,
    drafting: bool = False,
) -> tuple[int, int]:
    """Rows of a batch, and slots of states: one a row, those for beginnings that are kept, and slot
    0. No slots, and all rows, for a model that keeps none.

    Rows are as many as fit with `BATCH_ROW_TOKENS` of each; at least one.

    Args:
        reserved: see `plan_pages`. drafting: see `plan_memory`.
    """
    state, updates = state_bytes(shape, value_bytes, drafting)
    if not state:
        return limits.max_rows, 0
    rows = limits.max_rows
    if free_bytes is not None:
        row = state + BATCH_ROW_TOKENS * native_kv_bytes(shape, quantized_kv, value_bytes)
        row += head_input_bytes(shape, 1, value_bytes)
        working = _batch_working_bytes(shape, limits, value_bytes, reserved)
        left = (free_bytes - working) * POOL_SHARE - (1 + STATES_KEPT) * state - updates
        rows = max(1, min(rows, int(left // row)))
    return rows, rows + 1 + STATES_KEPT


def captions_that_fit(shape: ModelShape, pages: int, max_rows: int) -> str:
    """How many captions run at once in a pool of so many pages, by size of picture."""
    counts = []
    for width, height in CAPTION_SIZES if shape.vision else ((0, 0),):
        tokens = image_tokens(shape, width * height) + CAPTION_TOKENS
        count = min(max_rows, (pages - 1) // pages_for(tokens))
        counts.append(f"{count} of {width}x{height}" if width else f"{count} of {tokens} tokens")
    return ", ".join(counts) + " at once"


def _batch_working_bytes(
    shape: ModelShape, limits: Limits, value_bytes: int, reserved: int
) -> float:
    """What a step of a batch works in."""
    tokens, scale = limits.most_prefill_tokens, value_bytes / 2
    vision = vision_bytes(shape, tokens) + image_feature_bytes(shape, tokens)
    working = max(reserved, scale * max(prefill_peak_bytes(shape, tokens), vision))
    # In float32, and once more as the sampler's.
    return working + 8 * limits.max_rows * shape.text.vocab_size
