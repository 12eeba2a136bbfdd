"""Attention of many queries in one kernel, against plain operators."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
import torch.nn.functional as F

from qwencli.engine.kernels.flash_attention import FlashAttention, flash_attention_for
from qwencli.engine.kernels.launches import Gpu, planning
from qwencli.engine.kernels.tiles import ANY, FlashTiles
from qwencli.engine.layers.vision_layout import EqualSegments
from qwencli.engine.layers.vision_tower import Offsets, attend, eager
from qwencli.engine.ops.paged_attention import attend_alone

CPU = torch.device("cpu")
BLOCK = 16
TILES = ((ANY, FlashTiles(BLOCK, BLOCK, 4, 2)),)
HEADS, KV_HEADS = 4, 2
# 24 columns are 16 and a part of 16, 32 are 32, 40 are 32 and 8 of 16: as 72 and 80 are.
DIMS = (24, 32, 40)


def starts_of(lengths: Sequence[int]) -> torch.Tensor:
    return torch.tensor([0, *torch.tensor(lengths).cumsum(0)], dtype=torch.int32)


def whole(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    parts = (heads.transpose(0, 1)[None] for heads in (q, k, v))
    return F.scaled_dot_product_attention(*parts, enable_gqa=True)[0].transpose(0, 1).flatten(1)


@torch.inference_mode()
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("lengths", "contexts"),
    [
        ((1,), (0,)),
        ((BLOCK,), (BLOCK,)),  # blocks that are whole, and none that is not
        ((37,), (0,)),
        ((5,), (30,)),
        ((20, 1, 35), (3, 0, BLOCK)),
    ],
)
def test_each_query_sees_what_it_may(dim, causal, lengths, contexts):
    torch.manual_seed(dim)
    totals = [new + before for new, before in zip(lengths, contexts, strict=True)]
    # As projections leave them: heads of all three side by side, and more behind them.
    q = torch.randn(sum(lengths), HEADS + 3, dim)[:, :HEADS]
    keys, values = torch.randn(sum(totals), 2 * KV_HEADS, dim).split(KV_HEADS, 1)
    starts = (starts_of(lengths), starts_of(totals)) if len(lengths) > 1 else (None, None)
    found = FlashAttention(CPU, TILES, causal)(q, keys, values, max(lengths), *starts)
    alone = attend_alone if causal else whole
    parts = zip(q.split(lengths), keys.split(totals), values.split(totals), strict=True)
    expected = torch.cat([alone(*part) for part in parts])
    torch.testing.assert_close(found, expected, atol=2e-6, rtol=1e-5)


@torch.inference_mode()
def test_keys_may_lie_as_in_a_cache():
    """[KVH, slots, D], of which the last slots are not in use."""
    torch.manual_seed(1)
    q = torch.randn(7, HEADS, 32)
    cache = torch.randn(2 * KV_HEADS, 90, 32)
    keys, values = cache[:, :50].transpose(0, 1).split(KV_HEADS, 1)
    found = FlashAttention(CPU, TILES, True)(q, keys, values, len(q))
    torch.testing.assert_close(found, attend_alone(q, keys, values), atol=2e-6, rtol=1e-5)


@torch.inference_mode()
def test_tiles_go_by_the_longest_sequence():
    made = []
    tiles = ((8, FlashTiles(16, 16, 4, 1)), (ANY, FlashTiles(32, 16, 4, 1)))
    q, keys = torch.randn(40, HEADS, 32), torch.randn(40, KV_HEADS, 32)
    with planning(Gpu((9, 0), 132)) as found:
        kernel = FlashAttention(CPU, tiles, True)
        for longest in (8, 9):
            kernel(q[:longest], keys[:longest], keys[:longest], longest)
        made = [dict(launch.arguments)["QUERIES"] for launch in found]
    assert made == [16, 32]


@torch.inference_mode()
@pytest.mark.parametrize(
    "segments", [(EqualSegments(1, 20),), (EqualSegments(3, 8), EqualSegments(1, 17))]
)
def test_a_tower_attends_inside_its_segments(segments):
    torch.manual_seed(2)
    lengths = [run.length for run in segments for _ in range(run.count)]
    qkv = torch.randn(sum(lengths), 3 * HEADS, 24)
    expected = attend(qkv, segments, eager)
    varlen = FlashAttention(CPU, TILES, False)
    # Room for segments that are not there, as in a graph.
    starts = F.pad(starts_of(lengths), (0, 2), value=sum(lengths))
    packed = attend(qkv, Offsets(starts, sum(lengths)), eager, varlen)
    torch.testing.assert_close(packed, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("capability", "dim", "dtype", "there"),
    [
        ((9, 0), 128, torch.bfloat16, True),
        ((9, 0), 128, torch.float32, False),
        ((9, 0), 96, torch.bfloat16, False),
        ((12, 0), 128, torch.bfloat16, False),  # never measured there
    ],
)
def test_it_runs_where_it_was_measured_to_be_faster(capability, dim, dtype, there):
    with planning(Gpu(capability, 132)):
        found = flash_attention_for(CPU, dtype, dim, causal=True)
    assert (found is not None) == there
    assert flash_attention_for(CPU, dtype, dim, causal=True) is None  # no GPU
