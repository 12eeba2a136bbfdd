"""Our attention of many queries on a CUDA device, with the tiles that it has there."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from qwencli.engine.kernels.flash_attention import FlashAttention, flash_attention_for
from qwencli.engine.kernels.tiles import ANY, FLASH, flash_tiles
from qwencli.engine.ops.attention import forward

CUDA = torch.device("cuda")
CAPABILITY = torch.cuda.get_device_capability()
KINDS = [(dim, causal) for card, dim, causal in FLASH if card == CAPABILITY]
# Tokens of each sequence, and in front of them: of every tile, with whole blocks and without.
SEQUENCES = (
    ((300, 0), (7, 600), (1, 0)),
    ((512, 512),),
    ((1100, 0), (640, 2000)),
)

if not KINDS:
    pytest.skip("this GPU was not measured: torch's own attention runs", allow_module_level=True)


def made(sequences, dim, kv_heads, dtype):
    torch.manual_seed(dim)
    group = 4
    tokens, total = sum(n for n, _ in sequences), sum(n + m for n, m in sequences)
    q = torch.randn(tokens, (group + 2) * kv_heads, dim, dtype=dtype, device=CUDA)
    seen = torch.randn(total, 2 * kv_heads, dim, dtype=dtype, device=CUDA)
    starts = [0, *itertools.accumulate(n for n, _ in sequences)]
    key_starts = [0, *itertools.accumulate(n + m for n, m in sequences)]
    device = [torch.tensor(each, dtype=torch.int32, device=CUDA) for each in (starts, key_starts)]
    keys, values = seen.split(kv_heads, 1)
    return q[:, : group * kv_heads], keys, values, starts, key_starts, device


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("sequences", SEQUENCES)
@pytest.mark.parametrize(("dim", "causal"), KINDS)
def test_it_is_as_near_to_float32_as_torchs_own(dim, causal, sequences, dtype):
    q, keys, values, starts, key_starts, device = made(sequences, dim, 2, dtype)
    longest, longest_keys = max(n for n, _ in sequences), max(n + m for n, m in sequences)
    kernel = flash_attention_for(CUDA, dtype, dim, causal)
    assert kernel is not None
    found = kernel(q, keys, values, longest, *device)
    torchs = forward(q, keys, values, *device, longest, longest_keys, 0.0, causal, False)[0]
    exact = []
    for n, (a, b) in enumerate(itertools.pairwise(starts)):
        part = keys[key_starts[n] : key_starts[n + 1]], values[key_starts[n] : key_starts[n + 1]]
        heads = [each.float().transpose(0, 1)[None] for each in (q[a:b], *part)]
        mask = None
        if causal:
            own = torch.arange(heads[1].shape[2] - (b - a), heads[1].shape[2], device=CUDA)
            mask = torch.arange(heads[1].shape[2], device=CUDA) <= own[:, None]
        out = F.scaled_dot_product_attention(*heads, attn_mask=mask, enable_gqa=True)
        exact.append(out[0].transpose(0, 1).flatten(1))
    exact = torch.cat(exact)
    ours, theirs = ((each.flatten(1).float() - exact).abs() for each in (found, torchs))
    assert ours.max() <= 1.5 * theirs.max() and ours.mean() <= 1.05 * theirs.mean()


@torch.inference_mode()
@pytest.mark.parametrize(("dim", "causal"), KINDS)
def test_a_sequence_gives_the_same_bits_alone_and_beside_others(dim, causal):
    """With the same tiles; and lone ones need no starts."""
    _, tiles = flash_tiles(CAPABILITY, dim, causal)[-1]
    kernel = FlashAttention(CUDA, ((ANY, tiles),), causal)
    q, keys, values, starts, key_starts, device = made(SEQUENCES[2], dim, 2, torch.bfloat16)
    together = kernel(q, keys, values, max(n for n, _ in SEQUENCES[2]), *device)
    for n, (a, b) in enumerate(itertools.pairwise(starts)):
        c, d = key_starts[n], key_starts[n + 1]
        alone = kernel(q[a:b], keys[c:d], values[c:d], b - a)
        assert torch.equal(alone, together[a:b])
