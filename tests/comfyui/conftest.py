from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from tests.comfyui import comfy_stub

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture(scope="session", autouse=True)
def comfy() -> Iterator[comfy_stub.Management]:
    """The stub; there for all tests of a process, as classes are made of it once."""
    yield comfy_stub.install()
    for name in [each for each in sys.modules if each.partition(".")[0] in ("comfy", "comfy_api")]:
        del sys.modules[name]


@pytest.fixture
def management(comfy: comfy_stub.Management) -> comfy_stub.Management:
    """`comfy.model_management` as it is in the beginning."""
    comfy.begin()
    comfy_stub.ProgressBar.shown.clear()
    return comfy


def picture(name: str = "scene.png", size: tuple[int, int] = (288, 288)) -> torch.Tensor:
    """An example as ComfyUI's Load Image gives it: [1, H, W, 3]."""
    with Image.open(EXAMPLES / name) as image:
        pixels = np.asarray(image.convert("RGB").resize(size), np.float32) / 255.0
    return torch.from_numpy(pixels)[None]


@pytest.fixture(scope="session")
def pictures() -> dict[str, Any]:
    scene, other = picture(), picture("two_objects.png")
    return {"scene": scene, "other": other, "batch": torch.cat([scene, other, scene])}
