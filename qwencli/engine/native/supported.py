"""What the native engine can run: which models, and where its Triton kernels replace torch."""

from __future__ import annotations

import functools
import importlib.util

import torch

from qwencli.config import Attention, Cache, Kernels
from qwencli.engine.layers.vision_tower import ACTIVATIONS
from qwencli.engine.native.model import Fused
from qwencli.errors import ModelFileError, UnsupportedModeError
from qwencli.models.shapes import ModelShape


def check_supported(shape: ModelShape) -> None:
    """Raise ModelFileError for the first thing in `shape` that only the other engine can run."""
    text, vision = shape.text, shape.vision
    obstacles = {
        f"{text.rope.scaling!r} rotary scaling": text.rope.scaling not in ("default", "yarn"),
        "a sliding window": text.sliding_window,
        f"hidden_act {text.activation!r} in the text decoder": text.activation != "silu",
    }
    if vision is not None:
        known = vision.activation in ACTIVATIONS
        obstacles[f"hidden_act {vision.activation!r} in the vision tower"] = not known
    for what, there in obstacles.items():
        if there:
            raise ModelFileError(
                f"config.json asks for {what}, which the native engine does not have",
                "try --engine transformers",
            )


# Matrix units for bfloat16, and everything else the kernels use.
SMALLEST_CAPABILITY = (8, 0)


def resolve_kernels(wanted: Kernels, device: str, cache: Cache) -> Kernels:
    """`auto` is triton wherever that can run.

    Raises:
        UnsupportedModeError: triton was asked for and cannot run here, with the reason.
    """
    reason = _why_not_triton(device, cache)
    if reason is None:
        return Kernels.TORCH if wanted is Kernels.TORCH else Kernels.TRITON
    if wanted is Kernels.TRITON:
        raise UnsupportedModeError(
            f"--kernels triton: {reason}", nearest=f"--kernels {Kernels.TORCH}"
        )
    return Kernels.TORCH


def fused_for(kernels: Kernels, attention: Attention) -> Fused | None:
    """The fused operations, with attention among them unless the user named another."""
    if kernels is not Kernels.TRITON:
        return None
    from qwencli.engine.kernels.fused_ops import fused_ops

    return functools.partial(fused_ops, own_attention=attention is Attention.AUTO)


def _why_not_triton(device: str, cache: Cache) -> str | None:
    if not device.startswith("cuda") or torch.version.cuda is None:
        return f"the kernels need an NVIDIA GPU, and this runs on {device}"
    if cache is not Cache.STATIC_GRAPH:
        # Launched one by one from Python they would take longer than they run.
        return f"the kernels run in CUDA graphs, and this is --cache {cache}"
    if torch.cuda.get_device_capability(device) < SMALLEST_CAPABILITY:
        return f"the GPU {device} is older than compute capability 8.0"
    if importlib.util.find_spec("triton") is None:
        return "the package triton is not installed (on Windows: pip install triton-windows)"
    return None
