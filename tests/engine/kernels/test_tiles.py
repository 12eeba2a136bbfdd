"""How attention deals out queries and parts of a sequence."""

from __future__ import annotations

import pytest

from qwencli.engine.kernels.fused_ops import MAX_BATCH_ROWS
from qwencli.engine.kernels.tiles import attention_tiles


@pytest.mark.parametrize("heads", [1, 2, 4, 8, 16, 32])
@pytest.mark.parametrize("tokens", range(1, MAX_BATCH_ROWS + 1))
def test_programs_of_several_tokens_fit_where_those_of_one_do(heads: int, tokens: int) -> None:
    tiles = attention_tiles(num_kv_heads=8, num_processors=132, exact=False)
    each = tiles.tokens_each(heads, tokens)
    query_tiles = -(-tokens // each)
    splits = tiles.splits_for(query_tiles)
    # Lanes and parts are axes of tensors: powers of two.
    assert each & (each - 1) == 0 and splits & (splits - 1) == 0
    # What they leave for each other to join fits in the buffers, and they run at once.
    assert MAX_BATCH_ROWS // tokens * query_tiles * each <= MAX_BATCH_ROWS
    assert splits * query_tiles <= tiles.splits
    # One matrix instruction's rows, unless one token has more heads.
    assert heads * each <= max(heads, 16)
    at_once = tiles.parts_at_once(heads * each, 128, splits)
    assert at_once & (at_once - 1) == 0 and 1 <= at_once <= splits


def test_one_token_is_joined_in_one_go_and_split_as_far_as_processors_go() -> None:
    tiles = attention_tiles(num_kv_heads=8, num_processors=132, exact=False)
    assert tiles.tokens_each(heads=4, tokens=1) == 1
    assert tiles.splits_for(query_tiles=1) == tiles.splits == 32
    assert tiles.parts_at_once(lanes=4, head_dim=128, splits=32) == 32


@pytest.mark.parametrize("lanes", [1, 4, 8, 16])
@pytest.mark.parametrize("head_dim", [32, 128, 256])
def test_every_warp_has_whole_instructions_of_a_quantized_cache(lanes: int, head_dim: int) -> None:
    tiles = attention_tiles(num_kv_heads=8, num_processors=132, exact=False)
    assert tiles.fits_words(lanes) and not tiles.fits_words(32)
    block = tiles.block_in_words(lanes, head_dim)
    assert block % (16 * tiles.warps_for(lanes)) == 0
    assert block == (128 if lanes <= 8 and head_dim <= 128 else 64)


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_a_thread_has_as_much_of_large_heads_as_of_small_ones(rows: int) -> None:
    small, large = (attention_tiles(4, 132, False, rows, head_dim) for head_dim in (128, 256))
    assert small.block * 128 // small.num_warps == 2 * large.block * 256 // large.num_warps
    assert large.splits == small.splits
