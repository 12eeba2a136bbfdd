"""Reads a hub config.json into the fields of `ModelShape`.

Spellings differ between releases: text values nested under `text_config` or flat beside
`vision_config`, rope values under `rope_parameters` or `rope_scaling` + `rope_theta`, channels as
`in_channels` or `in_chans`. All of them end in the same fields.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from qwencli.engine.native.config_values import (
    child,
    contradiction,
    index_list,
    number,
    positive_int,
    positive_int_of,
)
from qwencli.engine.native.families import ACTIVATIONS, FAMILIES, VISION_FAMILIES, Family
from qwencli.engine.native.shapes import RopeShape, TextShape, VisionShape
from qwencli.errors import ModelFileError


def parse(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the keyword arguments of `ModelShape`.

    Raises:
        ModelFileError: see `ModelShape.from_hub_config`.
    """
    model_type = config.get("model_type")
    family = FAMILIES.get(model_type) if isinstance(model_type, str) else None
    if family is None:
        raise ModelFileError(
            f"config.json has model_type {model_type!r}, which the native engine does not know",
            f"it knows {', '.join(FAMILIES)}; try --engine transformers",
        )
    text = _text(config, family)
    fields: dict[str, Any] = {"model_type": model_type, "text": text}
    if family.vision is None:
        return fields
    vision_config = child(config, "vision_config")
    vision = _vision(vision_config, family.vision)
    if vision.out_hidden_size != text.hidden_size:
        raise contradiction(
            f"the vision tower ends in {vision.out_hidden_size} values, "
            f"the text decoder works with {text.hidden_size}"
        )
    if len(vision.deepstack_layers) > text.num_layers:
        raise contradiction(
            f"deepstack_visual_indexes has {len(vision.deepstack_layers)} entries, "
            f"the text decoder has {text.num_layers} layers"
        )
    for key in ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"):
        fields[key] = positive_int(config, key, "config.json")
    if max(fields["image_token_id"], fields["video_token_id"]) >= text.vocab_size:
        raise contradiction(
            f"image_token_id or video_token_id is not below vocab_size {text.vocab_size}"
        )
    fields["vision"] = vision
    fields["split_video_frames"] = family.split_video_frames
    if VISION_FAMILIES[family.vision].windows:
        fields["tokens_per_second"] = number(
            vision_config, "tokens_per_second", "vision_config", 4.0
        )
    return fields


def _text(config: Mapping[str, Any], family: Family) -> TextShape:
    nested = "text_config" in config and config["text_config"] is not None
    values = child(config, "text_config") if nested else config
    where = "text_config" if nested else "config.json"
    activation = values.get("hidden_act", "silu")
    if activation != "silu":
        raise ModelFileError(
            f"{where}.hidden_act is {activation!r}; Qwen text decoders use 'silu'",
            "check config.json",
        )
    hidden = positive_int(values, "hidden_size", where)
    heads = positive_int(values, "num_attention_heads", where)
    kv_heads = positive_int(values, "num_key_value_heads", where, default=heads)
    layers = positive_int(values, "num_hidden_layers", where)
    if heads % kv_heads:
        raise contradiction(f"{heads} attention heads do not divide by {kv_heads} key/value heads")
    default = family.default_head_dim
    if default is None:
        if hidden % heads and values.get("head_dim") is None:
            raise contradiction(f"hidden_size {hidden} does not divide by {heads} attention heads")
        default = hidden // heads
    head_dim = (
        positive_int(values, "head_dim", where, default=default) if family.head_dim_key else default
    )
    if head_dim % 2 or (not family.head_dim_key and head_dim * heads != hidden):
        raise contradiction(
            f"head_dim {head_dim} does not fit {heads} heads and hidden_size {hidden}"
        )
    if values.get("use_sliding_window") and values.get("max_window_layers", layers) < layers:
        raise ModelFileError(
            f"{where}.use_sliding_window is on, which the native engine does not have",
            "try --engine transformers",
        )
    own_bias = bool(values.get("attention_bias", False))
    # Releases differ in which of the two places carries the flag; either one ties the head.
    tied = bool(
        config.get("tie_word_embeddings", False) or values.get("tie_word_embeddings", False)
    )
    return TextShape(
        vocab_size=positive_int(values, "vocab_size", where),
        hidden_size=hidden,
        intermediate_size=positive_int(values, "intermediate_size", where),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rms_norm_eps=number(values, "rms_norm_eps", where, 1e-6),
        qk_norm=family.qk_norm,
        qkv_bias=own_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=own_bias if family.qkv_bias is None else False,
        tied_head=tied,
        rope=_rope(values, family, head_dim, where),
        max_position_embeddings=positive_int(
            values, "max_position_embeddings", where, default=32768
        ),
    )


def _rope(values: Mapping[str, Any], family: Family, head_dim: int, where: str) -> RopeShape:
    # `rope_parameters` is the newer spelling and carries the base itself.
    key = "rope_parameters" if values.get("rope_parameters") is not None else "rope_scaling"
    rope = child(values, key) if values.get(key) is not None else {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "mrope"):
        raise ModelFileError(
            f"{where}.{key} asks for {kind!r} rotary scaling; the native engine has none",
            "remove the scaling from config.json or try --engine transformers",
        )
    base = number(values, "rope_theta", where, family.rope_theta)
    theta = number(rope, "rope_theta", f"{where}.{key}", base)
    if family.sections is None:
        return RopeShape(theta)
    sections = rope.get("mrope_section", family.sections)
    if not isinstance(sections, list | tuple) or len(sections) != 3:
        raise ModelFileError(
            f"{where}.{key}.mrope_section is {sections!r}", "expected three whole numbers"
        )
    t, h, w = (positive_int_of(value, f"{where}.{key}.mrope_section") for value in sections)
    if t + h + w != head_dim // 2:
        raise contradiction(
            f"mrope_section {[t, h, w]} does not sum to half of head_dim {head_dim}"
        )
    if bool(rope.get("mrope_interleaved", family.interleaved)) is not family.interleaved:
        raise contradiction(
            f"mrope_interleaved is {rope['mrope_interleaved']!r}, not what this family does"
        )
    return RopeShape(theta, (t, h, w), family.interleaved)


def _vision(values: Mapping[str, Any], name: str) -> VisionShape:
    family = VISION_FAMILIES[name]
    where = "vision_config"
    width = positive_int(values, family.width_key, where)
    heads = positive_int(values, "num_heads", where)
    # Rotary angles of rows and columns each take half of a head, in pairs.
    if width % heads or (width // heads) % 4:
        raise contradiction(
            f"vision width {width} and {heads} heads give no head size divisible by 4"
        )
    depth = positive_int(values, "depth", where)
    activation = values.get("hidden_act", family.default_activation)
    if activation not in ACTIVATIONS:
        raise ModelFileError(
            f"{where}.hidden_act is {activation!r}",
            f"the native engine knows {', '.join(ACTIVATIONS)}",
        )
    patch = positive_int(values, "patch_size", where)
    merge = positive_int(values, "spatial_merge_size", where)
    return VisionShape(
        depth=depth,
        hidden_size=width,
        intermediate_size=_vision_mlp_width(values, width, where),
        num_heads=heads,
        out_hidden_size=positive_int(values, family.out_key, where),
        in_channels=positive_int(values, "in_channels", where, default=values.get("in_chans", 3)),
        patch_size=patch,
        temporal_patch_size=positive_int(values, "temporal_patch_size", where),
        merge_size=merge,
        norm=family.norm,
        activation=ACTIVATIONS[activation],
        gated_mlp=family.gated_mlp,
        patch_bias=family.patch_bias,
        names=name,
        position_side=_position_side(values, where) if family.learned_positions else None,
        deepstack_layers=index_list(values, "deepstack_visual_indexes", where, depth)
        if family.learned_positions
        else (),
        window_patches=_window_patches(values, patch, merge, where) if family.windows else None,
        full_attention_layers=index_list(values, "fullatt_block_indexes", where, depth)
        if family.windows
        else (),
    )


def _vision_mlp_width(values: Mapping[str, Any], width: int, where: str) -> int:
    if "intermediate_size" in values:
        return positive_int(values, "intermediate_size", where)
    return int(width * number(values, "mlp_ratio", where, 4.0))


def _position_side(values: Mapping[str, Any], where: str) -> int:
    count = positive_int(values, "num_position_embeddings", where)
    side = math.isqrt(count)
    if side * side != count:
        raise contradiction(f"num_position_embeddings {count} is not a square")
    return side


def _window_patches(values: Mapping[str, Any], patch: int, merge: int, where: str) -> int:
    pixels = positive_int(values, "window_size", where)
    # The reference rounds down to whole merged tokens; less than one has no meaning.
    side = pixels // merge // patch * merge
    if side == 0:
        raise contradiction(
            f"window_size {pixels} is smaller than {merge} patches of {patch} pixels"
        )
    return side
