"""Reads a model's config.json into a `ModelShape`, whichever family wrote it.

Spellings differ between releases: text values nested under `text_config` or flat beside
`vision_config`, rope values under `rope_parameters` or `rope_scaling` + `rope_theta`, channels as
`in_channels` or `in_chans`. All of them end in the same fields. What one engine cannot run (a
rotary scaling, say) is that engine's to refuse; here only what no model can be is refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qwencli.errors import ModelFileError
from qwencli.models.config_values import (
    MOST_LAYERS,
    child,
    contradiction,
    index_list,
    number,
    positive_int,
    positive_int_of,
    refused,
)
from qwencli.models.families import (
    FAMILIES,
    INSTEAD,
    REFUSED,
    Family,
    MoeFamily,
    VisionFamily,
    supported,
)
from qwencli.models.shapes import (
    DeltaShape,
    Mixer,
    ModelShape,
    MoeShape,
    RopeShape,
    TextShape,
    VisionShape,
    YarnShape,
)

# transformers' `max_window_layers` where a config.json states none.
_FULL_LAYERS = 28
# transformers' `full_attention_interval` where a config.json states neither it nor the layers.
_ATTENTION_INTERVAL = 4
# What files call it.
_EXPERT_COUNTS = ("num_experts", "num_local_experts")
_MIXERS: Mapping[str, Mixer] = {"linear_attention": "delta", "full_attention": "attention"}
_GATES: Mapping[str, tuple[object, ...]] = {
    "attn_output_gate": (None, True),
    "output_gate_type": (None, "swish", "silu"),
}
_TOKENS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")


def stored_dtype(config: Mapping[str, Any]) -> str | None:
    """The dtype that a config.json states, in either of its spellings and places."""
    for part in (config, config.get("text_config") or {}):
        for key in ("dtype", "torch_dtype"):
            if part.get(key):
                return str(part[key])
    return None


def read_shape(config: Mapping[str, Any], where: str = "config.json") -> ModelShape:
    """Sizes of the model that `config` (the contents of a config.json) describes.

    Args:
        where: the file, for the error line.

    Raises:
        ModelFileError: an unsupported `model_type`, a value that is missing or impossible, or
            values that contradict each other; the message names the key.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None and isinstance(model_type, str) and _base_type(model_type) in REFUSED:
        raise ModelFileError(
            f"{where}: model_type {model_type!r} is {REFUSED[_base_type(model_type)]}", INSTEAD
        )
    if family is None:
        said = (
            f"model_type {model_type!r}"[:60] + " is not supported"
            if model_type
            else "no model_type"
        )
        raise ModelFileError(f"{where}: {said}", f"supported are: {supported()}")
    text = _text(config, family, where)
    if family.vision is None:
        return ModelShape(family.model_type, text)
    section = child(config, "vision_config", where)
    place = f"{where}: vision_config"
    vision = _vision(section, family.model_type, family.vision, place)
    if vision.out_hidden_size != text.hidden_size:
        raise contradiction(
            where,
            f"the vision tower ends in {vision.out_hidden_size} values, "
            f"the text decoder works with {text.hidden_size}",
        )
    if len(vision.deepstack_layers) > text.num_layers:
        raise contradiction(
            where,
            f"deepstack_visual_indexes has {len(vision.deepstack_layers)} entries, "
            f"the text decoder has {text.num_layers} layers",
        )
    tokens = {key: positive_int(config, key, where, family.top_config[key]) for key in _TOKENS}
    if max(tokens["image_token_id"], tokens["video_token_id"]) >= text.vocab_size:
        raise contradiction(
            where, f"image_token_id or video_token_id is not below vocab_size {text.vocab_size}"
        )
    seconds = (
        None
        if vision.window_patches is None
        else number(section, "tokens_per_second", place, default=4.0)
    )
    return ModelShape(
        family.model_type,
        text,
        vision,
        **tokens,
        split_video_frames=family.split_video_frames,
        tokens_per_second=seconds,
    )


def _base_type(model_type: str) -> str:
    """The family of a part that was saved alone (`qwen3_omni_moe_thinker`)."""
    return next((each for each in REFUSED if model_type.startswith(each)), model_type)


def _text(config: Mapping[str, Any], family: Family, where: str) -> TextShape:
    values = config
    if config.get("text_config") is not None:
        values = child(config, "text_config", where)
        where = f"{where}: text_config"
    hidden = positive_int(values, "hidden_size", where)
    heads = positive_int(values, "num_attention_heads", where)
    kv_heads = positive_int(values, "num_key_value_heads", where, heads)
    layers = positive_int(values, "num_hidden_layers", where, most=MOST_LAYERS)
    if heads % kv_heads:
        raise contradiction(
            where, f"{heads} attention heads do not divide by {kv_heads} key/value heads"
        )
    head_dim = _head_dim(values, family, hidden, heads, where)
    own_bias = bool(values.get("attention_bias", False))
    moe = None if family.moe is None else _moe(values, family.moe, layers, where)
    mixers = _mixers(values, layers, where) if family.hybrid else ()
    return TextShape(
        vocab_size=positive_int(values, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=moe.active_size
        if moe is not None and not moe.dense_layers
        else positive_int(values, "intermediate_size", where),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=number(values, "rms_norm_eps", where, 1e-6),
        qk_norm=family.qk_norm,
        qkv_bias=own_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=own_bias if family.qkv_bias is None else False,
        tied_head=_tied_head(config, values, where),
        rope=_rope(values, family, head_dim, where),
        max_position_embeddings=positive_int(values, "max_position_embeddings", where, 32768),
        activation=str(values.get("hidden_act", "silu")),
        sliding_window=_has_sliding_window(values, layers, where),
        mixers=mixers,
        delta=_delta(values, where) if "delta" in mixers else None,
        gated_attention=family.hybrid,
        zero_centred_norms=family.hybrid,
        moe=moe,
        mtp_layers=_mtp_layers(values, where) if family.hybrid else 0,
    )


def _mtp_layers(values: Mapping[str, Any], where: str) -> int:
    """Layers of the head that drafts tokens; a model that was saved without it may say 0."""
    key = "mtp_num_hidden_layers"
    if values.get(key) in (None, 0):
        return 0
    return positive_int(values, key, where, most=MOST_LAYERS)


def _moe(values: Mapping[str, Any], family: MoeFamily, layers: int, where: str) -> MoeShape:
    """As transformers reads it; it writes `num_local_experts` where the hub has `num_experts`."""

    def size(key: str) -> int:
        return positive_int(values, key, where, family.defaults[key])

    both = [values[key] for key in _EXPERT_COUNTS if values.get(key) is not None]
    if len(both) == 2 and both[0] != both[1]:
        raise contradiction(where, f"{' and '.join(_EXPERT_COUNTS)} are {both[0]} and {both[1]}")
    counted = next((key for key in _EXPERT_COUNTS if values.get(key) is not None), "num_experts")
    count = positive_int(values, counted, where, family.defaults["num_experts"])
    shared = "shared_expert_intermediate_size"
    moe = MoeShape(
        num_experts=count,
        top_k=size("num_experts_per_tok"),
        intermediate_size=size("moe_intermediate_size"),
        renormalize=bool(values.get("norm_topk_prob", False))
        if family.renormalize is None
        else family.renormalize,
        shared_intermediate_size=size(shared) if shared in family.defaults else 0,
        dense_layers=_dense_layers(values, layers, where) if family.some_dense else (),
    )
    if moe.top_k > count:
        raise contradiction(
            where, f"num_experts_per_tok {moe.top_k} is more than the {count} experts there are"
        )
    return moe


def _dense_layers(values: Mapping[str, Any], layers: int, where: str) -> tuple[int, ...]:
    """Layers without experts: those that are named, and all but every `decoder_sparse_step`th."""
    step = positive_int(values, "decoder_sparse_step", where, 1)
    named = index_list(values, "mlp_only_layers", where, MOST_LAYERS, ())
    return tuple(i for i in range(layers) if i in named or (i + 1) % step)


def _mixers(values: Mapping[str, Any], layers: int, where: str) -> tuple[Mixer, ...]:
    """What mixes the tokens of each layer: `layer_types`, else every so many one attends."""
    # Both have one value in all models there are; another one would be another architecture.
    for name, able in _GATES.items():
        if values.get(name) not in able:
            raise refused(where, name, values[name], repr(able[-1]))
    key = "full_attention_interval"
    interval = positive_int(values, key, where, _ATTENTION_INTERVAL)
    regular: tuple[Mixer, ...] = tuple(
        "delta" if (layer + 1) % interval else "attention" for layer in range(layers)
    )
    kinds = values.get("layer_types")
    if kinds is None:
        if "attention" not in regular:
            raise contradiction(where, f"{key} is {interval}, num_hidden_layers {layers}")
        return regular
    if not isinstance(kinds, list | tuple) or not all(
        isinstance(kind, str) and kind in _MIXERS for kind in kinds
    ):
        raise refused(where, "layer_types", kinds, f"a list of {' and '.join(_MIXERS)}")
    if len(kinds) != layers:
        raise contradiction(
            where, f"layer_types has {len(kinds)} entries, num_hidden_layers is {layers}"
        )
    stated = tuple(_MIXERS[kind] for kind in kinds)
    if "attention" not in stated:
        raise refused(where, "layer_types", list(kinds), "a full_attention layer at least")
    if values.get(key) is not None and stated != regular:
        first = next(i for i in range(layers) if stated[i] != regular[i])
        raise contradiction(
            where, f"layer_types makes layer {first} {kinds[first]}, {key} {interval} does not"
        )
    return stated


def _delta(values: Mapping[str, Any], where: str) -> DeltaShape:
    shape = DeltaShape(
        num_k_heads=positive_int(values, "linear_num_key_heads", where, 16),
        num_v_heads=positive_int(values, "linear_num_value_heads", where, 32),
        k_head_dim=positive_int(values, "linear_key_head_dim", where, 128),
        v_head_dim=positive_int(values, "linear_value_head_dim", where, 128),
        conv_kernel=positive_int(values, "linear_conv_kernel_dim", where, 4),
    )
    if shape.num_v_heads % shape.num_k_heads:
        raise contradiction(
            where,
            f"linear_num_value_heads {shape.num_v_heads} does not divide by "
            f"linear_num_key_heads {shape.num_k_heads}",
        )
    if shape.conv_kernel < 2:
        raise refused(
            where, "linear_conv_kernel_dim", shape.conv_kernel, "a whole number from 2 on"
        )
    return shape


def _tied_head(config: Mapping[str, Any], text: Mapping[str, Any], where: str) -> bool:
    """The top level decides; transformers 4 wrote the flag into the text section alone."""
    key = "tie_word_embeddings"
    said = text.get(key) if config.get(key) is None else config[key]
    if said not in (None, True, False):
        # The word "false" would be true.
        raise refused(where, key, said, "true or false")
    return bool(said)


def _head_dim(
    values: Mapping[str, Any], family: Family, hidden: int, heads: int, where: str
) -> int:
    """Stated by the newer families, hidden_size / num_attention_heads in the older ones."""
    if family.head_dim is None:
        if hidden % heads:
            raise contradiction(
                where, f"hidden_size {hidden} does not divide by {heads} attention heads"
            )
        head_dim = hidden // heads
    else:
        head_dim = positive_int(values, "head_dim", where, family.head_dim)
    if head_dim % 2:
        raise contradiction(where, f"head_dim {head_dim} is odd, rotary positions need pairs")
    return head_dim


def _has_sliding_window(values: Mapping[str, Any], layers: int, where: str) -> bool:
    """Whether a layer of the model sees a window only, by the rules of transformers' Qwen2Config:
    those of `layer_types`, else those from `max_window_layers` on (any number of them has no
    meaning while no window is used)."""
    if not values.get("use_sliding_window") or values.get("sliding_window", 1) is None:
        return False
    kinds = values.get("layer_types")
    if kinds is not None:
        if not isinstance(kinds, list | tuple):
            raise refused(where, "layer_types", kinds, "a list of names")
        return "sliding_attention" in kinds
    first = values.get("max_window_layers", _FULL_LAYERS)
    if type(first) is not int or first < 0:
        raise refused(where, "max_window_layers", first, "a whole number from 0 on")
    return first < layers


def _rope(values: Mapping[str, Any], family: Family, head_dim: int, where: str) -> RopeShape:
    # `rope_parameters` is the newer spelling and carries the base itself.
    key = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    rope = child(values, key, where) if values.get(key) is not None else {}
    kind = str(rope.get("rope_type", rope.get("type", "default")))
    base = number(values, "rope_theta", where, family.rope_theta)
    theta = number(rope, "rope_theta", f"{where}: {key}", base)
    # "mrope" is the older name for what `sections` says.
    scaling = "default" if kind == "mrope" else kind
    yarn = None
    if scaling == "yarn":
        if theta <= 1:
            raise refused(where, "rope_theta", theta, "a number above 1")
        positions = positive_int(values, "max_position_embeddings", where, 32768)
        yarn = _yarn(values, rope, positions, f"{where}: {key}")
    rotary = _rotary_dim(values, rope, family, head_dim, where)
    if family.sections is None:
        return RopeShape(theta, scaling=scaling, yarn=yarn, rotary_dim=rotary)
    sections = rope.get("mrope_section", family.sections)
    place = f"{where}: {key}"
    if not isinstance(sections, list | tuple) or len(sections) != 3:
        raise refused(place, "mrope_section", sections, "three whole numbers")
    t, h, w = (positive_int_of(value, "mrope_section", place) for value in sections)
    if t + h + w != (rotary or head_dim) // 2:
        of = f"the {rotary} rotary dimensions" if rotary else f"head_dim {head_dim}"
        raise contradiction(where, f"mrope_section {[t, h, w]} does not sum to half of {of}")
    if bool(rope.get("mrope_interleaved", family.interleaved)) is not family.interleaved:
        raise contradiction(
            where, f"mrope_interleaved is {rope['mrope_interleaved']!r}, not as in this family"
        )
    return RopeShape(theta, (t, h, w), family.interleaved, scaling, yarn, rotary)


def _rotary_dim(
    values: Mapping[str, Any],
    rope: Mapping[str, Any],
    family: Family,
    head_dim: int,
    where: str,
) -> int | None:
    """How many dimensions of a head rotate; None = all. Only some families read the share."""
    if family.rotary_factor == 1:
        return None
    key = "partial_rotary_factor"
    factor = number(rope, key, where, number(values, key, where, family.rotary_factor))
    dim = int(head_dim * factor)
    if factor > 1 or dim < 2 or dim % 2:
        raise contradiction(
            where, f"{key} {factor:g} of head_dim {head_dim} gives {dim} dimensions that rotate"
        )
    return None if dim == head_dim else dim


def _yarn(
    values: Mapping[str, Any], rope: Mapping[str, Any], positions: int, where: str
) -> YarnShape:
    """As transformers reads it (`_compute_yarn_parameters`)."""
    key = "original_max_position_embeddings"
    stated = values.get(key)
    original = positive_int(rope if stated is None else values, key, where, positions)
    factor = number(rope, "factor", where, positions / original)

    def scale(key: str) -> float:
        return 0.1 * number(rope, key, where, 1.0) * math.log(factor) + 1 if factor > 1 else 1.0

    both = rope.get("mscale") and rope.get("mscale_all_dim")
    attention = scale("mscale") / scale("mscale_all_dim") if both else scale("")
    return YarnShape(
        factor=factor,
        original_positions=original,
        attention_factor=number(rope, "attention_factor", where, attention),
        beta_fast=number(rope, "beta_fast", where, 32.0),
        beta_slow=number(rope, "beta_slow", where, 1.0),
        truncate=bool(rope.get("truncate", True)),
    )


def _vision(
    values: Mapping[str, Any], model_type: str, family: VisionFamily, where: str
) -> VisionShape:
    def size(name: str, most: int | None = None) -> int:
        limit = {} if most is None else {"most": most}
        return positive_int(values, family.keys[name], where, family.defaults.get(name), **limit)

    def indexes(name: str) -> tuple[int, ...]:
        if name not in family.keys:
            return ()
        return index_list(values, family.keys[name], where, depth, family.defaults[name])

    depth = size("depth", MOST_LAYERS)
    width, heads = size("hidden"), size("heads")
    # Rotary angles of rows and columns each take half of a head, in pairs.
    if width % heads or (width // heads) % 4:
        raise contradiction(
            where, f"vision width {width} and {heads} heads give no head size divisible by 4"
        )
    patch, merge = size("patch_size"), size("spatial_merge_size")
    channels = values.get("in_chans")
    return VisionShape(
        depth=depth,
        hidden_size=width,
        intermediate_size=_mlp_width(values, family, width, where),
        num_heads=heads,
        out_hidden_size=size("out_hidden"),
        in_channels=positive_int(values, "in_channels", where, 3 if channels is None else channels),
        patch_size=patch,
        temporal_patch_size=size("temporal_patch_size"),
        merge_size=merge,
        norm="layer" if family.norm_bias else "rms",
        activation=str(values.get("hidden_act", family.activation)),
        gated_mlp=family.gated_mlp,
        patch_bias=family.patch_bias,
        names=model_type,
        position_side=_position_side(size("num_position_embeddings"), where)
        if "num_position_embeddings" in family.keys
        else None,
        deepstack_layers=indexes("deepstack_indexes"),
        window_patches=_window_patches(size("window_size"), patch, merge, where)
        if "window_size" in family.keys
        else None,
        full_attention_layers=indexes("full_attention_indexes"),
    )


def _mlp_width(values: Mapping[str, Any], family: VisionFamily, width: int, where: str) -> int:
    if "mlp_ratio" in family.keys:
        return int(width * number(values, "mlp_ratio", where, family.defaults["mlp_ratio"]))
    return positive_int(values, "intermediate_size", where, family.defaults["intermediate"])


def _position_side(count: int, where: str) -> int:
    side = math.isqrt(count)
    if side * side != count:
        raise contradiction(where, f"num_position_embeddings {count} is not a square")
    return side


def _window_patches(pixels: int, patch: int, merge: int, where: str) -> int:
    # The reference rounds down to whole merged tokens; less than one has no meaning.
    side = pixels // merge // patch * merge
    if side == 0:
        raise contradiction(
            where, f"window_size {pixels} is smaller than {merge} patches of {patch} pixels"
        )
    return side
