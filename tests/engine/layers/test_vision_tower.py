"""Pictures of mixed sizes side by side: features are those of each alone, layouts are reused."""

from __future__ import annotations

import pytest
import torch

from qwencli.config import Attention
from qwencli.engine.layers import vision_tower
from qwencli.engine.layers.vision_tower import VisionTower
from qwencli.engine.loading import weights
from qwencli.engine.ops import attention
from qwencli.models.shape_reader import read_shape
from tests.checkpoints import VISION_FAMILIES, hub_config
from tests.engine.native.host_graphs import flash_forward

CPU = torch.device("cpu")
GRIDS = [(1, 8, 12), (1, 4, 4), (2, 6, 10), (1, 8, 12), (1, 12, 8)]


def tower_of(family: str) -> VisionTower:
    shape = read_shape(hub_config(family))
    assert shape.vision is not None
    loaded = weights.dummy(shape, torch.float32, CPU)
    return VisionTower(shape.vision, loaded.tensors, Attention.SDPA)


def drawn(tower: VisionTower) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    size = tower.shape.patch_elements
    return [torch.randn(t * h * w, size, generator=generator) for t, h, w in GRIDS]


@torch.inference_mode()
@pytest.mark.parametrize("one_kernel", [False, True])
@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_side_by_side_as_alone(family, one_kernel, monkeypatch):
    tower = tower_of(family)
    pictures = drawn(tower)
    alone = [tower.encode(each, [grid]) for each, grid in zip(pictures, GRIDS, strict=True)]
    if one_kernel:
        monkeypatch.setattr(attention, "forward", flash_forward)
        tower._packs_segments, tower._latest = True, None
    together = tower.encode(torch.cat(pictures), GRIDS)
    expected = [torch.cat([each.embeds for each in alone])]
    expected += [torch.cat(layer) for layer in zip(*(e.deepstack for e in alone), strict=True)]
    for found, wanted in zip((together.embeds, *together.deepstack), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@torch.inference_mode()
def test_a_new_mix_of_known_sizes_is_laid_out_from_what_is_there(monkeypatch):
    tower = tower_of("qwen3_vl")
    for each, grid in zip(drawn(tower), GRIDS, strict=True):
        tower.prepare(each, [grid])
    monkeypatch.setattr(vision_tower, "layout", None)  # which is what builds one
    ready = tower.prepare(torch.cat(drawn(tower)), GRIDS)
    assert ready.patches == sum(t * h * w for t, h, w in GRIDS)


@torch.inference_mode()
def test_layouts_kept_are_bounded_by_their_patches(monkeypatch):
    tower = tower_of("qwen3_vl")
    monkeypatch.setattr(vision_tower, "PATCHES_KEPT", 100)
    for side in range(2, 20, 2):
        tower.prepare(torch.empty(side * 4, tower.shape.patch_elements), [(1, side, 4)])
        assert sum(ready.patches for ready in tower._prepared.values()) <= 100
    assert len(tower._prepared) == 1
