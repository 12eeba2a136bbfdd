"""ComfyUI nodes on a GPU: their memory goes back, and batches run together."""

from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest
import torch

from qwencli.comfyui import nodes, schemas
from qwencli.comfyui.engine_keeper import KEEPER
from tests.comfyui import comfy_stub
from tests.comfyui.conftest import picture

BASE = {"model": "scenes", "temperature": 0.0, "max_new_tokens": 48}


@pytest.fixture
def management() -> Iterator[comfy_stub.Management]:
    yield comfy_stub.install()
    KEEPER.close()
    for name in [each for each in sys.modules if each.partition(".")[0] in ("comfy", "comfy_api")]:
        del sys.modules[name]


def test_a_batch_on_the_gpu_is_what_its_pictures_are_alone(
    management: comfy_stub.Management,
) -> None:
    batch = torch.cat([picture(), picture("two_objects.png"), picture()]).cuda()
    # As ComfyUI runs nodes.
    with torch.inference_mode():
        _, texts, statistics = nodes.run(schemas.CAPTION, {"images": batch, **BASE})
        alone = [
            nodes.run(schemas.CAPTION, {"images": batch[n : n + 1], **BASE})[0] for n in range(3)
        ]
    assert texts == alone and texts[0] != texts[1] and "on cuda" in statistics


def test_comfyui_gets_all_of_the_memory_back(management: comfy_stub.Management) -> None:
    torch.cuda.empty_cache()
    before = torch.cuda.memory_reserved()
    with torch.inference_mode():
        nodes.run(schemas.CHAT, {"prompt": "Say something.", **BASE})
        nodes.run(schemas.CAPTION, {"images": torch.cat([picture(), picture()]), **BASE})
    with_batch = torch.cuda.memory_reserved()
    assert KEEPER.is_loaded and with_batch > before
    KEEPER.trim("cuda:0")
    assert KEEPER.is_loaded and torch.cuda.memory_reserved() < with_batch
    with torch.inference_mode():
        nodes.run(schemas.CAPTION, {"images": torch.cat([picture(), picture()]), **BASE})
    management.free_memory(1e30, torch.device("cpu"))
    assert KEEPER.is_loaded  # not ours
    management.free_memory(1e30, torch.device("cuda", 0))
    assert not KEEPER.is_loaded
    assert torch.cuda.memory_reserved() <= before + 2**20
    nodes.run(schemas.CHAT, {"prompt": "Say something.", **BASE})
    assert KEEPER.is_loaded
