from __future__ import annotations

import copy
from typing import Any

import pytest

from qwencli.errors import ModelFileError
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import RopeShape

TEXT: dict[str, Any] = {
    "vocab_size": 300,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION3: dict[str, Any] = {
    "depth": 6,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_heads": 4,
    "num_position_embeddings": 25,
    "out_hidden_size": 256,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "deepstack_visual_indexes": [5, 1],
}
TOKENS = {
    "image_token_id": 290,
    "video_token_id": 291,
    "vision_start_token_id": 292,
    "vision_end_token_id": 293,
}


def qwen3_vl() -> dict[str, Any]:
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True}
    return {
        "model_type": "qwen3_vl",
        "text_config": TEXT | {"head_dim": 128, "rope_scaling": rope, "rope_theta": 5e6},
        "vision_config": dict(VISION3),
        "tie_word_embeddings": True,
        **TOKENS,
    }


def qwen2_5_vl() -> dict[str, Any]:
    """The flat layout of the hub, with its own spellings."""
    vision = {
        k: v for k, v in VISION3.items() if k not in ("deepstack_visual_indexes", "patch_size")
    }
    return {
        "model_type": "qwen2_5_vl",
        **TEXT,
        "rope_theta": 1e6,
        "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
        "vision_config": vision
        | {
            "patch_size": 14,
            "in_chans": 3,
            "window_size": 112,
            "fullatt_block_indexes": [5],
            "tokens_per_second": 2,
        },
        **TOKENS,
    }


def test_qwen3_vl() -> None:
    shape = read_shape(qwen3_vl())
    text, vision = shape.text, shape.vision
    assert vision is not None
    assert (text.head_dim, text.qk_norm, text.qkv_bias, text.tied_head) == (128, True, False, True)
    assert text.rope == RopeShape(5e6, (24, 20, 20), interleaved=True)
    assert (vision.position_side, vision.deepstack_layers, vision.window_patches) == (
        5,
        (5, 1),
        None,
    )
    assert shape.split_video_frames
    assert text.kv_bytes_per_token(2) == 2 * 4 * 2 * 128 * 2


def test_flat_qwen2_5_vl() -> None:
    shape = read_shape(qwen2_5_vl())
    text, vision = shape.text, shape.vision
    assert vision is not None
    assert (text.head_dim, text.qk_norm, text.qkv_bias, text.o_bias) == (64, False, True, False)
    assert not text.tied_head
    assert text.rope == RopeShape(1e6, (8, 12, 12))
    assert (vision.window_patches, vision.full_attention_layers) == (8, (5,))
    assert (vision.in_channels, vision.gated_mlp, vision.norm) == (3, True, "rms")
    assert shape.tokens_per_second == 2


def test_qwen2_vl_takes_its_width_from_embed_dim_and_ratio() -> None:
    config = qwen2_5_vl() | {"model_type": "qwen2_vl"}
    config["vision_config"] = {
        "depth": 2,
        "embed_dim": 64,
        "hidden_size": 256,
        "mlp_ratio": 4,
        "num_heads": 4,
        "in_chans": 3,
        "patch_size": 14,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
    }
    vision = read_shape(config).vision
    assert vision is not None
    assert (vision.hidden_size, vision.intermediate_size, vision.out_hidden_size) == (64, 256, 256)
    assert vision.activation == "quick_gelu"


def test_text_models_and_defaults() -> None:
    qwen3 = read_shape({"model_type": "qwen3", **TEXT, "attention_bias": True})
    assert qwen3.vision is None
    assert (qwen3.text.head_dim, qwen3.text.qkv_bias, qwen3.text.o_bias) == (128, True, True)
    assert qwen3.text.rope == RopeShape(10_000.0)
    qwen2 = read_shape({"model_type": "qwen2", **TEXT, "num_key_value_heads": None})
    assert (qwen2.text.head_dim, qwen2.text.num_kv_heads, qwen2.text.qkv_bias) == (64, 4, True)


def test_rope_parameters_is_the_newer_spelling() -> None:
    config = qwen3_vl()
    scaling = config["text_config"].pop("rope_scaling")
    config["text_config"]["rope_parameters"] = scaling | {"rope_theta": 7e6}
    assert read_shape(config).text.rope.theta == 7e6


@pytest.mark.parametrize("text", [True, False, None])
@pytest.mark.parametrize("top", [True, False, None])
def test_the_top_level_ties_the_head_and_the_text_section_where_it_is_silent(
    top: bool | None, text: bool | None
) -> None:
    config = qwen3_vl()
    for section, value in ((config, top), (config["text_config"], text)):
        section.pop("tie_word_embeddings", None)
        section |= {} if value is None else {"tie_word_embeddings": value}
    assert read_shape(config).text.tied_head is bool(text if top is None else top)


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        (("model_type",), "llama", "model_type 'llama'"),
        (("model_type",), None, "no model_type"),
        (("model_type",), ["qwen3"], "model_type"),
        (("text_config", "vocab_size"), None, "vocab_size is missing"),
        (("text_config", "hidden_size"), -1, "hidden_size is -1"),
        (("text_config", "hidden_size"), "256", "hidden_size is '256'"),
        (("text_config", "num_hidden_layers"), True, "num_hidden_layers is True"),
        (("text_config", "num_key_value_heads"), 3, "4 attention heads do not divide by 3"),
        (("text_config", "head_dim"), 127, "head_dim 127"),
        (("text_config", "rms_norm_eps"), float("nan"), "rms_norm_eps is nan"),
        (("text_config", "rope_scaling", "mrope_section"), [24, 20], "mrope_section"),
        (("text_config", "rope_scaling", "mrope_section"), [24, 20, 21], "does not sum"),
        (("text_config", "rope_scaling", "mrope_interleaved"), False, "mrope_interleaved"),
        (("text_config",), 7, "text_config is missing or not an object"),
        (("vision_config",), None, "vision_config is missing"),
        (("vision_config", "num_heads"), 3, "vision width 64 and 3 heads"),
        (("vision_config", "num_heads"), 32, "vision width 64 and 32 heads"),
        (("vision_config", "out_hidden_size"), 128, "ends in 128 values"),
        (("vision_config", "num_position_embeddings"), 26, "26 is not a square"),
        (("vision_config", "deepstack_visual_indexes"), [6], "deepstack_visual_indexes is [6]"),
        (("vision_config", "deepstack_visual_indexes"), [1, 1], "deepstack_visual_indexes"),
        (("vision_config", "deepstack_visual_indexes"), None, "deepstack_visual_indexes"),
        (("vision_config", "deepstack_visual_indexes"), [0, 1, 2, 3, 4], "has 5 entries"),
        (("image_token_id",), 300, "not below vocab_size 300"),
        (("video_token_id",), None, "not below vocab_size 300"),
    ],
)
def test_bad_values_are_named(path: tuple[str, ...], value: object, said: str) -> None:
    config = copy.deepcopy(qwen3_vl())
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(ModelFileError) as caught:
        read_shape(config)
    assert said in caught.value.message
    assert caught.value.hint


def test_heads_that_do_not_divide_the_width() -> None:
    with pytest.raises(ModelFileError, match="254 does not divide by 4 attention heads"):
        read_shape(qwen2_5_vl() | {"hidden_size": 254})


@pytest.mark.parametrize(
    ("keys", "window"),
    [
        ({"use_sliding_window": False, "max_window_layers": 0}, False),
        ({"use_sliding_window": False, "max_window_layers": None}, False),
        ({"use_sliding_window": None, "max_window_layers": "x"}, False),
        ({"use_sliding_window": True, "sliding_window": None, "max_window_layers": 0}, False),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0}, True),
        ({"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 28}, False),
        ({"use_sliding_window": True, "sliding_window": 64, "num_hidden_layers": 29}, True),
        ({"use_sliding_window": True, "layer_types": ["full_attention"]}, False),
        (
            {"use_sliding_window": True, "max_window_layers": 28, "sliding_window": 64,
             "layer_types": ["full_attention", "sliding_attention"]},
            True,
        ),
    ],
)  # fmt: skip
def test_a_window_counts_where_it_is_used(keys: dict[str, Any], window: bool) -> None:
    config = qwen2_5_vl() | {"num_hidden_layers": 28}
    config.pop("max_window_layers", None)
    assert read_shape(config | keys).text.sliding_window is window


@pytest.mark.parametrize("value", ["false", "true", 2, [], {}])
@pytest.mark.parametrize("at_top", [True, False])
def test_a_tied_head_is_true_or_false(value: object, at_top: bool) -> None:
    config = qwen3_vl()
    del config["tie_word_embeddings"]
    (config if at_top else config["text_config"])["tie_word_embeddings"] = value
    with pytest.raises(ModelFileError, match="expected true or false"):
        read_shape(config)


def test_what_only_one_engine_can_run_is_read_and_not_refused() -> None:
    window = read_shape(qwen2_5_vl() | {"use_sliding_window": True, "max_window_layers": 2})
    assert window.text.sliding_window
    config = qwen3_vl()
    config["text_config"] |= {"hidden_act": "gelu"}
    config["text_config"]["rope_scaling"]["rope_type"] = "yarn"
    text = read_shape(config).text
    assert (text.activation, text.rope.scaling) == ("gelu", "yarn")


def test_token_ids_that_a_file_leaves_out_are_the_familys() -> None:
    config = {k: v for k, v in qwen3_vl().items() if k not in TOKENS}
    config["text_config"]["vocab_size"] = 152000
    assert read_shape(config).image_token_id == 151655


def test_a_window_smaller_than_a_merged_token() -> None:
    config = qwen2_5_vl()
    config["vision_config"]["window_size"] = 27
    with pytest.raises(ModelFileError, match="window_size 27"):
        read_shape(config)


def qwen3_5() -> dict[str, Any]:
    rope = {
        "rope_type": "default",
        "mrope_section": [4, 2, 2],
        "mrope_interleaved": True,
        "partial_rotary_factor": 0.25,
        "rope_theta": 1e7,
    }
    text = TEXT | {"head_dim": 64, "rope_parameters": rope, "full_attention_interval": 4}
    vision = {k: v for k, v in VISION3.items() if k != "deepstack_visual_indexes"}
    return {"model_type": "qwen3_5", "text_config": text, "vision_config": vision, **TOKENS}


def test_a_hybrid_says_what_mixes_the_tokens_of_each_layer() -> None:
    text = read_shape(qwen3_5()).text
    assert text.mixers == ("delta", "delta", "delta", "attention")
    assert (text.attention_layers, text.delta_layers) == ((3,), (0, 1, 2))
    assert text.rotary_dim == 16 and text.gated_attention and text.zero_centred_norms
    assert text.delta is not None and text.delta.conv_dim == 2 * 16 * 128 + 32 * 128
    # Keys and values of one layer, and a state of three.
    assert text.kv_bytes_per_token(2) == 2 * 2 * 64 * 2
    assert text.state_bytes(2) == 3 * (4 * 32 * 128 * 128 + 2 * 4 * text.delta.conv_dim)
    config = qwen3_5()
    del config["text_config"]["full_attention_interval"]
    config["text_config"]["layer_types"] = ["full_attention", *["linear_attention"] * 3]
    assert read_shape(config).text.mixers == ("attention", "delta", "delta", "delta")


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"layer_types": ["full_attention"] * 4}, "layer 0 full_attention, full_attention_interv"),
        ({"layer_types": ["linear_attention"] * 3}, "has 3 entries, num_hidden_layers is 4"),
        ({"layer_types": ["mamba"] * 4}, "expected a list of linear_attention and full_attention"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention'"),
        ({"layer_types": [["full_attention"]] * 4}, "expected a list of"),
        ({"full_attention_interval": 5}, "full_attention_interval is 5, num_hidden_layers 4"),
        ({"full_attention_interval": 0}, "full_attention_interval is 0"),
        ({"linear_num_value_heads": 24}, "24 does not divide by linear_num_key_heads 16"),
        ({"linear_num_key_heads": "16"}, "linear_num_key_heads is '16'"),
        ({"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim is 1"),
        ({"attn_output_gate": False}, "attn_output_gate is False"),
        ({"output_gate_type": "tanh"}, "output_gate_type is 'tanh'"),
        ({"rope_parameters": {"partial_rotary_factor": 2}}, "partial_rotary_factor 2"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "half of the 32 rotary dimensions"),
    ],
)
def test_a_hybrid_that_contradicts_itself_is_refused(values: dict[str, Any], said: str) -> None:
    config = qwen3_5()
    rope = config["text_config"]["rope_parameters"]
    rope.update(values.get("rope_parameters", {}))
    config["text_config"] |= values | {"rope_parameters": rope}
    with pytest.raises(ModelFileError, match=said):
        read_shape(config)


@pytest.mark.parametrize("model_type", ["qwen4_exp", "qwen3_omni_moe", "qwen3_omni_moe_thinker"])
def test_a_family_that_cannot_run_is_named_with_what_can(model_type: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        read_shape(qwen3_5() | {"model_type": model_type})
    assert model_type in caught.value.message and "Qwen" in caught.value.message
    assert "qwen3.5-9b" in caught.value.hint
