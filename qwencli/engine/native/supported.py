"""What the native engine can run: which models, and where its Triton kernels replace torch."""

from __future__ import annotations

import functools

from qwencli.config import Attention, Kernels
from qwencli.engine.layers.vision_tower import ACTIVATIONS
from qwencli.engine.native.model import Fused, RowOps
from qwencli.engine.ops.gated_delta import TAPS
from qwencli.engine.quant.quantized_tensor import Quantizer, quantize
from qwencli.errors import ModelFileError, UnsupportedModeError
from qwencli.models.shapes import ModelShape


def check_supported(shape: ModelShape) -> None:
    """Raise ModelFileError for the first thing in `shape` that only the other engine can run."""
    text, vision = shape.text, shape.vision
    obstacles = {
        f"{text.rope.scaling!r} rotary scaling": text.rope.scaling not in ("default", "yarn"),
        "a sliding window": text.sliding_window,
        f"a convolution over other than {TAPS} tokens": text.delta is not None
        and text.delta.conv_kernel != TAPS,
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


def fused_for(kernels: Kernels, attention: Attention) -> Fused | None:
    """The fused operations, with attention among them unless the user named another."""
    if kernels is not Kernels.TRITON:
        return None
    from qwencli.engine.kernels.fused_ops import fused_ops

    return functools.partial(fused_ops, own_attention=attention is Attention.AUTO)


def quantizer_for(kernels: Kernels) -> Quantizer:
    """What quantizes a model's matrices as it loads."""
    if kernels is not Kernels.TRITON:
        return quantize
    from qwencli.engine.kernels import int4_quant

    return int4_quant.quantize


def batch_invariant_for(kernels: Kernels, device: str) -> RowOps:
    """Operations of rows of which none depends on the others.

    Raises:
        UnsupportedModeError: there are none for these kernels on this device.
    """
    if kernels is Kernels.TRITON:
        from qwencli.engine.kernels.batch_invariant import batch_invariant_ops

        return batch_invariant_ops
    if device != "cpu":
        raise UnsupportedModeError(
            f"--batch-invariant cannot run: on {device} sums of --kernels {kernels} depend on the "
            "number of rows",
            "use --kernels triton --cache static-graph on an NVIDIA GPU, or --device cpu",
        )
    from qwencli.engine.ops.batch_invariant import BATCH_INVARIANT_OPS

    return lambda step: BATCH_INVARIANT_OPS
