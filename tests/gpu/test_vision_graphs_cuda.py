"""One graph for pictures of many sizes gives what the tower gives operator by operator."""

from __future__ import annotations

import functools

import pytest
import torch

from qwencli.config import Attention
from qwencli.engine.kernels.fused_ops import fused_ops
from qwencli.engine.layers.vision_tower import VisionTower
from qwencli.engine.loading import weights
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prefill_graphs import PrefillGraphs
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.models.shape_reader import read_shape
from tests.checkpoints import VISION_FAMILIES, hub_config

CUDA = torch.device("cuda")
MODERN = torch.cuda.get_device_capability() >= (8, 0)
# Pictures, one small one among them, several at once, and a video.
ASKED = [
    [(1, 16, 24)], [(1, 24, 16)], [(1, 2, 2)], [(1, 8, 4), (1, 12, 20)], [(4, 6, 14)],
    [(1, 30, 40)], [(1, 16, 24)], [(3, 2, 2), (1, 10, 8)], [(1, 44, 46)],
]  # fmt: skip


@pytest.mark.skipif(not MODERN, reason="flash attention needs compute capability 8.0")
@torch.inference_mode()
@pytest.mark.parametrize("hidden", [64, 144, 160])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_features_are_those_of_the_tower(family, hidden):
    """Heads of 32, of 72 as the 4B and 8B towers have them, and of 80."""
    config = hub_config(family)
    vision = config["vision_config"]
    vision["embed_dim" if "embed_dim" in vision else "hidden_size"] = hidden
    vision["num_heads"] = 2
    shape = read_shape(config)
    model = QwenModel(shape, weights.dummy(shape, torch.bfloat16, CUDA), 1100)
    graphs = PrefillGraphs(model, model.static_cache(), 1100)
    generator = torch.Generator(CUDA).manual_seed(5)
    assert graphs._pictures is not None
    for grids in ASKED:
        count = sum(t * h * w for t, h, w in grids)
        patches = torch.randn(
            count, shape.vision.patch_elements, device=CUDA, dtype=torch.bfloat16,
            generator=generator,
        )  # fmt: skip
        found, expected = (of.encode_images(patches, grids) for of in (graphs, model))
        for mine, theirs in zip(
            (found.embeds, *found.deepstack), (expected.embeds, *expected.deepstack), strict=True
        ):
            error = (mine.float() - theirs.float()).norm() / theirs.float().norm()
            assert mine.shape == theirs.shape
            assert float(error) <= 1e-2, grids
    assert 1 < len(graphs._pictures._sizes) < len(ASKED)


@pytest.mark.skipif(not MODERN, reason="flash attention needs compute capability 8.0")
@torch.inference_mode()
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_a_mix_of_pictures_by_kernels_as_by_plain_operators_in_float32(family):
    """With the sum in the norm, GELU in the product, and all segments in one attention kernel."""
    config = hub_config(family)
    vision = config["vision_config"]
    vision["embed_dim" if "embed_dim" in vision else "hidden_size"] = 144
    vision["num_heads"] = 2
    shape = read_shape(config)
    loaded = weights.dummy(shape, torch.bfloat16, CUDA)
    fused = functools.partial(fused_ops, own_attention=True)
    model = QwenModel(shape, loaded, 1100, fused=fused)
    exact = {name: tensor.float() for name, tensor in loaded.tensors.items()}
    reference = VisionTower(shape.vision, exact, Attention.EAGER)
    reference._gelu_in_product = False
    grids = [(1, 16, 24), (1, 8, 4), (2, 6, 14), (1, 16, 24)]
    count = sum(t * h * w for t, h, w in grids)
    patches = torch.randn(count, shape.vision.patch_elements, device=CUDA, dtype=torch.bfloat16)
    found, expected = model.encode_images(patches, grids), reference.encode(patches, grids)
    for mine, theirs in zip(
        (found.embeds, *found.deepstack), (expected.embeds, *expected.deepstack), strict=True
    ):
        assert float((mine.float() - theirs).norm() / theirs.norm()) <= 2e-2


@pytest.mark.skipif(not MODERN, reason="flash attention needs compute capability 8.0")
@torch.inference_mode()
@pytest.mark.parametrize("kernels", [False, True])
def test_a_size_that_comes_first_gives_the_bits_of_its_graph(kernels):
    """Operator by operator, captured when it comes again, and replayed."""
    shape = read_shape(hub_config("qwen3_vl"))
    fused = functools.partial(fused_ops, own_attention=True) if kernels else None
    model = QwenModel(shape, weights.dummy(shape, torch.bfloat16, CUDA), 1100, fused=fused)
    cache = model.static_cache()
    graphs = PrefillGraphs(model, cache, 1100)
    graphs.at_once = False
    patches = torch.randn(384, shape.vision.patch_elements, device=CUDA, dtype=torch.bfloat16)
    prompt = model.prepare([ModelPrompt(list(range(3, 203)))])
    features, logits, counts = [], [], []
    for _ in range(3):
        cache.truncate(0)
        features.append(graphs.encode_images(patches, [(1, 16, 24)]).embeds)
        logits.append(graphs.prefill(prompt, cache).clone())
        counts.append(len(graphs._graphs._graphs))
    assert counts == [0, 2, 2]
    assert torch.equal(features[0], features[1])
    assert torch.equal(features[1], features[2])
    assert torch.equal(logits[0], logits[1])
    assert torch.equal(logits[1], logits[2])
