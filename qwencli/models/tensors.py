"""The tensors a checkpoint of a given shape holds: names and shapes, without loading anything.

Names are those of transformers 5's state dict. Hub files of older families name the same
tensors differently; `canonical_name` maps every layout seen on the hub to these names.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import prod

from qwencli.models.shapes import ModelShape, VisionShape

TensorShapes = dict[str, tuple[int, ...]]

# (prefix in the file, canonical prefix); the first that fits is used. Vision models only.
_VISION_LAYOUTS = (
    ("model.language_model.", "model.language_model."),
    ("model.visual.", "model.visual."),
    ("visual.", "model.visual."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "model.language_model."),
    ("model.", "model.language_model."),
)


def expected_tensors(shape: ModelShape) -> TensorShapes:
    """Name -> shape of every parameter; a tied `lm_head` is not listed, it is not stored."""
    return dict(_all_tensors(shape))


def parameter_count(shape: ModelShape) -> int:
    """Number of parameters, tied weights counted once."""
    return sum(prod(size) for size in expected_tensors(shape).values())


def canonical_name(name: str, shape: ModelShape) -> str:
    """The state-dict name of a tensor that a file calls `name`."""
    if shape.vision is None:
        return name
    for stored, canonical in _VISION_LAYOUTS:
        if name.startswith(stored):
            return canonical + name.removeprefix(stored)
    return name


def is_quantizable(name: str, size: tuple[int, ...]) -> bool:
    """Whether bitsandbytes replaces this tensor: the weight of a linear layer, not `lm_head`.

    Source: `replace_with_bnb_linear` and `get_modules_to_not_convert` of transformers, which
    convert every `nn.Linear` but the output embedding. Embeddings are two-dimensional as well.
    """
    return len(size) == 2 and not name.endswith(
        ("embed_tokens.weight", "pos_embed.weight", "lm_head.weight")
    )


def _all_tensors(shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    decoder = "model.language_model" if shape.vision else "model"
    if shape.vision:
        yield from _vision_tensors(shape, shape.vision)
    yield f"{decoder}.embed_tokens.weight", (shape.vocab, shape.hidden)
    for layer in range(shape.layers):
        yield from _layer_tensors(f"{decoder}.layers.{layer}", shape)
    yield f"{decoder}.norm.weight", (shape.hidden,)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, shape.hidden)


def _layer_tensors(prefix: str, shape: ModelShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    hidden, width = shape.hidden, shape.heads * shape.head_dim
    kv_width = shape.kv_heads * shape.head_dim
    for name, out in (("q_proj", width), ("k_proj", kv_width), ("v_proj", kv_width)):
        yield f"{prefix}.self_attn.{name}.weight", (out, hidden)
        if shape.family.qkv_bias:
            yield f"{prefix}.self_attn.{name}.bias", (out,)
    yield f"{prefix}.self_attn.o_proj.weight", (hidden, width)
    if shape.family.qk_norm:
        yield f"{prefix}.self_attn.q_norm.weight", (shape.head_dim,)
        yield f"{prefix}.self_attn.k_norm.weight", (shape.head_dim,)
    yield f"{prefix}.mlp.gate_proj.weight", (shape.intermediate, hidden)
    yield f"{prefix}.mlp.up_proj.weight", (shape.intermediate, hidden)
    yield f"{prefix}.mlp.down_proj.weight", (hidden, shape.intermediate)
    yield f"{prefix}.input_layernorm.weight", (hidden,)
    yield f"{prefix}.post_attention_layernorm.weight", (hidden,)


def _vision_tensors(shape: ModelShape, tower: VisionShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    family = shape.family.vision
    assert family is not None, "a shape with a tower belongs to a family with one"
    root, hidden = "model.visual", tower.hidden
    patch = (tower.in_channels, tower.temporal_patch_size, tower.patch_size, tower.patch_size)
    yield f"{root}.patch_embed.proj.weight", (hidden, *patch)
    if family.patch_bias:
        yield f"{root}.patch_embed.proj.bias", (hidden,)
    if tower.num_position_embeddings:
        yield f"{root}.pos_embed.weight", (tower.num_position_embeddings, hidden)
    for block in range(tower.depth):
        at = f"{root}.blocks.{block}"
        for norm in ("norm1", "norm2"):
            yield from _norm(f"{at}.{norm}", hidden, bias=family.norm_bias)
        yield from _linear(f"{at}.attn.qkv", 3 * hidden, hidden)
        yield from _linear(f"{at}.attn.proj", hidden, hidden)
        *ups, down = family.mlp
        for up in ups:
            yield from _linear(f"{at}.mlp.{up}", tower.intermediate, hidden)
        yield from _linear(f"{at}.mlp.{down}", hidden, tower.intermediate)
    merged = hidden * tower.spatial_merge_size**2
    # DeepStack's mergers normalise after the patches are merged, the main one before.
    mergers = [("merger", hidden)]
    mergers += [
        (f"{family.deepstack_prefix}.{i}", merged) for i in range(len(tower.deepstack_indexes))
    ]
    for name, norm_width in mergers:
        first, second = family.merger_linears
        at = f"{root}.{name}"
        yield from _norm(f"{at}.{family.merger_norm}", norm_width, bias=family.norm_bias)
        yield from _linear(f"{at}.{first}", merged, merged)
        yield from _linear(f"{at}.{second}", tower.out_hidden, merged)


def _linear(name: str, out: int, inside: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (out, inside)
    yield f"{name}.bias", (out,)


def _norm(name: str, width: int, *, bias: bool) -> Iterator[tuple[str, tuple[int, ...]]]:
    yield f"{name}.weight", (width,)
    if bias:
        yield f"{name}.bias", (width,)
