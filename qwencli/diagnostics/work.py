"""The sizes of a model that probes and advice work with."""

from __future__ import annotations

from dataclasses import replace

from qwencli.config import Quantization
from qwencli.engine.instruments.probes.answers import Work
from qwencli.models.memory import native_weight_bytes
from qwencli.models.shapes import ModelShape


def work_of(shape: ModelShape) -> Work:
    text, tower = shape.text, shape.vision
    return Work(
        hidden=text.hidden_size,
        intermediate=text.intermediate_size,
        layers=text.num_layers,
        heads=text.num_heads,
        kv_heads=text.num_kv_heads,
        head_dim=text.head_dim,
        decoder_bytes=token_bytes(shape),
        vision_heads=tower.num_heads if tower else None,
        vision_head_dim=tower.head_dim if tower else None,
        vision_hidden=tower.hidden_size if tower else None,
        patch_size=tower.patch_size if tower else None,
        temporal_patch_size=tower.temporal_patch_size if tower else None,
        in_channels=tower.in_channels if tower else None,
    )


def token_bytes(shape: ModelShape, quantization: Quantization = Quantization.NONE) -> int:
    """Bytes of weights that one decode step of the native engine reads: the decoder and the head.

    Of the embedding a step reads one row, unless the head is tied to it and reads all of it; a
    quantized head is a copy of its own.
    """
    text = shape.text
    read = text.tied_head and quantization is Quantization.NONE
    unread = 0 if read else 2 * text.vocab_size * text.hidden_size
    return native_weight_bytes(replace(shape, vision=None), quantization, 2) - unread


def image_tokens(shape: ModelShape, pixels: int) -> int:
    """Tokens of a picture of so many pixels; 0 for a model that does not see."""
    if shape.vision is None:
        return 0
    return -(-pixels // (shape.vision.patch_size * shape.vision.merge_size) ** 2)
