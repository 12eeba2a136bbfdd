"""Which tensors a model consists of, and where each comes from in a hub checkpoint.

One table serves the loader, the dummy load, the memory plan and the check of a folder: a
`TensorSpec` is a tensor the native engine keeps, made of one or more tensors of the checkpoint
stacked along the first dimension (q, k and v; gate and up).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from qwencli.models.families import FAMILIES, VisionFamily
from qwencli.models.shapes import ModelShape, TextShape, VisionShape

Section = Literal["text", "vision", "root"]

# Patterns of what stands before a section's names in the checkpoints that exist: a whole model or
# its base alone, saved from a class that wraps them once more or not.
PREFIXES: dict[Section, str] = {
    "text": r"(?:(?:model|language_model)\.)*(?=(?:embed_tokens|layers|norm)\.)",
    "vision": r"(?:model\.)*visual\.",
    "root": r"(?:(?:model|language_model)\.)*(?=lm_head\.)",
}


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint: its name below the section's prefix, and its shape there."""

    section: Section
    name: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class TensorSpec:
    """One tensor we keep.

    Args:
        shape: its first dimension is the sum over `parts`; the others hold as many elements as
            theirs (a patch convolution becomes a matrix).
        fill: what a dummy load puts here.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    fill: Literal["normal", "ones", "zeros"]

    @property
    def elements(self) -> int:
        return math.prod(self.shape)


def specs(shape: ModelShape) -> tuple[TensorSpec, ...]:
    """Every tensor of the model, in the order the forward pass reads them."""
    vision = _vision(shape.vision) if shape.vision is not None else iter(())
    return (*vision, *_text(shape.text))


def _spec(
    name: str, section: Section, *parts: tuple[str, tuple[int, ...]], fill: str = "normal"
) -> TensorSpec:
    rows = sum(part_shape[0] for _, part_shape in parts)
    width = math.prod(parts[0][1][1:])
    return TensorSpec(
        name,
        (rows, width) if len(parts[0][1]) > 1 else (rows,),
        tuple(Part(section, hub, part_shape) for hub, part_shape in parts),
        fill,  # type: ignore[arg-type]
    )


def _text(s: TextShape) -> Iterator[TensorSpec]:
    yield _spec("text.embed", "text", ("embed_tokens.weight", (s.vocab_size, s.hidden_size)))
    projections = {"q": s.q_size, "k": s.kv_size, "v": s.kv_size}
    for i in range(s.num_layers):
        at, hub = f"text.{i}.", f"layers.{i}."
        attn, mlp = hub + "self_attn.", hub + "mlp."
        hidden = (s.hidden_size,)
        yield _spec(at + "attn_norm", "text", (hub + "input_layernorm.weight", hidden), fill="ones")
        yield _spec(
            at + "qkv",
            "text",
            *((f"{attn}{p}_proj.weight", (n, s.hidden_size)) for p, n in projections.items()),
        )
        if s.qkv_bias:
            yield _spec(
                at + "qkv_bias",
                "text",
                *((f"{attn}{p}_proj.bias", (n,)) for p, n in projections.items()),
            )
        if s.qk_norm:
            yield _spec(at + "q_norm", "text", (attn + "q_norm.weight", (s.head_dim,)), fill="ones")
            yield _spec(at + "k_norm", "text", (attn + "k_norm.weight", (s.head_dim,)), fill="ones")
        yield _spec(at + "o", "text", (attn + "o_proj.weight", (s.hidden_size, s.q_size)))
        if s.o_bias:
            yield _spec(at + "o_bias", "text", (attn + "o_proj.bias", hidden))
        yield _spec(
            at + "mlp_norm", "text", (hub + "post_attention_layernorm.weight", hidden), fill="ones"
        )
        yield _spec(
            at + "gate_up",
            "text",
            *(
                (f"{mlp}{p}_proj.weight", (s.intermediate_size, s.hidden_size))
                for p in ("gate", "up")
            ),
        )
        yield _spec(
            at + "down", "text", (mlp + "down_proj.weight", (s.hidden_size, s.intermediate_size))
        )
    yield _spec("text.norm", "text", ("norm.weight", (s.hidden_size,)), fill="ones")
    if not s.tied_head:
        yield _spec("text.head", "root", ("lm_head.weight", (s.vocab_size, s.hidden_size)))


def _vision(s: VisionShape) -> Iterator[TensorSpec]:
    names = FAMILIES[s.names].vision
    assert names is not None, "a shape with a tower belongs to a family with one"
    conv = (s.hidden_size, s.in_channels, s.temporal_patch_size, s.patch_size, s.patch_size)
    yield _spec("vision.patch", "vision", ("patch_embed.proj.weight", conv))
    if s.patch_bias:
        yield _spec(
            "vision.patch_bias", "vision", ("patch_embed.proj.bias", (s.hidden_size,)), fill="zeros"
        )
    if s.position_side is not None:
        yield _spec(
            "vision.positions", "vision", ("pos_embed.weight", (s.position_side**2, s.hidden_size))
        )
    for i in range(s.depth):
        at, hub = f"vision.{i}.", f"blocks.{i}."
        yield from _norm(s, at + "attn_norm", hub + "norm1", s.hidden_size)
        yield from _linear(at + "qkv", (hub + "attn.qkv",), 3 * s.hidden_size, s.hidden_size)
        yield from _linear(at + "proj", (hub + "attn.proj",), s.hidden_size, s.hidden_size)
        yield from _norm(s, at + "mlp_norm", hub + "norm2", s.hidden_size)
        mlp_in = tuple(hub + "mlp." + name for name in names.mlp[:-1])
        yield from _linear(at + "mlp_in", mlp_in, s.intermediate_size, s.hidden_size)
        yield from _linear(
            at + "mlp_out", (hub + "mlp." + names.mlp[-1],), s.hidden_size, s.intermediate_size
        )
    merged = s.hidden_size * s.merge_area
    yield from _merger(s, names, "vision.merger", "merger.", s.hidden_size)
    for i in range(len(s.deepstack_layers)):
        yield from _merger(s, names, f"vision.deepstack.{i}", f"deepstack_merger_list.{i}.", merged)


def _merger(
    s: VisionShape, names: VisionFamily, at: str, hub: str, norm_width: int
) -> Iterator[TensorSpec]:
    merged = s.hidden_size * s.merge_area
    yield from _norm(s, at + ".norm", hub + names.merger_norm, norm_width)
    yield from _linear(at + ".in", (hub + names.merger_linears[0],), merged, merged)
    yield from _linear(at + ".out", (hub + names.merger_linears[1],), s.out_hidden_size, merged)


def _norm(s: VisionShape, at: str, hub: str, width: int) -> Iterator[TensorSpec]:
    yield _spec(at, "vision", (hub + ".weight", (width,)), fill="ones")
    if s.norm == "layer":
        yield _spec(at + "_bias", "vision", (hub + ".bias", (width,)), fill="zeros")


def _linear(at: str, hub: tuple[str, ...], rows_each: int, width: int) -> Iterator[TensorSpec]:
    yield _spec(at, "vision", *((name + ".weight", (rows_each, width)) for name in hub))
    yield _spec(
        at + "_bias", "vision", *((name + ".bias", (rows_each,)) for name in hub), fill="zeros"
    )
