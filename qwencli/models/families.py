"""The model families we know, as one table: how each writes config.json and names its tensors.

Everything that differs between families is a value here; the code that reads shapes, builds
tensor lists and checks folders is the same for all. Knows no sizes (see `builtin`), no files.

Sources: the `configuration_*.py` and `modeling_*.py` files of transformers 5.17 and 5.23 for
names, biases and defaults; a test compares the tensor lists with the models transformers builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class VisionFamily:
    """How a family writes its vision tower.

    Args:
        keys: our field name -> key in `vision_config`.
        defaults: values of transformers' config class, for files that leave keys out (the hub's
            Qwen2.5-VL-32B does). Keyed by our field name.
        norm_bias: LayerNorm (True) or RMSNorm (False) in the blocks.
        activation: of the blocks' MLP, for files that state none.
        mlp: names of the block's linear layers, up-projections first, the down-projection last.
        patch_bias: whether the patch embedding has a bias.
        merger_norm: name of the merger's norm.
        merger_linears: names of the merger's two linear layers.
        config: constant entries of the hub's `vision_config`.
    """

    keys: Mapping[str, str]
    defaults: Mapping[str, Any]
    norm_bias: bool
    activation: str
    mlp: tuple[str, ...]
    merger_norm: str
    merger_linears: tuple[str, str]
    patch_bias: bool = False
    config: Mapping[str, Any] = field(default_factory=dict)

    @property
    def gated_mlp(self) -> bool:
        """Whether the block's MLP has two up-projections, one of them the other's gate."""
        return len(self.mlp) == 3


@dataclass(frozen=True)
class MoeFamily:
    """How a family writes its experts.

    Args:
        defaults: of transformers' config class, by key of config.json.
        renormalize: see `shapes.MoeShape`; None = `norm_topk_prob` says so.
        some_dense: whether config.json may name layers without experts.
    """

    defaults: Mapping[str, int]
    renormalize: bool | None = True
    some_dense: bool = True


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        model_type: `model_type` in config.json; the key of `FAMILIES`.
        title: what people call it.
        architecture: the class name in config.json's `architectures`.
        nested: whether the hub's config.json has a `text_config` (else text keys are at the top).
        qkv_bias: whether q, k and v projections have a bias; None = the config's own
            `attention_bias`, which then covers the output projection too.
        qk_norm: whether q and k heads are normalised (one weight of `head_dim` each).
        head_dim: default when config.json states none; None = always
            hidden_size / num_attention_heads.
        rope_theta: base of the rotary frequencies when config.json states none.
        sections, interleaved: see `shapes.RopeShape`; of models with three position axes.
        rotary_factor: share of a head's dimensions that rotate when config.json states none.
        hybrid: whether config.json says of each layer what mixes its tokens (`layer_types`); then
            attention is gated and norms are zero-centred.
        moe: of a mixture of experts.
        split_video_frames: see `shapes.ModelShape`.
        box_grid: what coordinates in answers run to across a picture; None = they are pixels of
            the picture as the model sees it, resized.
        text_config: constant entries of the hub's text configuration.
        top_config: constant entries of the hub's config.json beside the text configuration.
    """

    model_type: str
    title: str
    architecture: str
    qkv_bias: bool | None
    qk_norm: bool
    rope_theta: float
    text_config: Mapping[str, Any]
    top_config: Mapping[str, Any] = field(default_factory=dict)
    nested: bool = False
    head_dim: int | None = None
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    rotary_factor: float = 1.0
    hybrid: bool = False
    moe: MoeFamily | None = None
    split_video_frames: bool = False
    box_grid: int | None = 1000
    vision: VisionFamily | None = None


_VISION_KEYS: Mapping[str, str] = {
    "depth": "depth",
    "hidden": "hidden_size",
    "heads": "num_heads",
    "intermediate": "intermediate_size",
    "out_hidden": "out_hidden_size",
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "spatial_merge_size": "spatial_merge_size",
    "in_channels": "in_channels",
}
_VISION_GRID: Mapping[str, Any] = {
    "heads": 16,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "in_channels": 3,
}
_VISION_TOKENS: Mapping[str, Any] = {
    "vision_start_token_id": 151652,
    "vision_end_token_id": 151653,
    "image_token_id": 151655,
    "video_token_id": 151656,
}
_TEXT: Mapping[str, Any] = {
    "attention_dropout": 0.0,
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-06,
    "use_cache": True,
}
_TEXT_TOKENS: Mapping[str, Any] = {"bos_token_id": 151643, "eos_token_id": 151645}
_NO_WINDOW: Mapping[str, Any] = {"use_sliding_window": False, "sliding_window": None}

_QWEN2_5_TOWER = VisionFamily(
    keys={
        **_VISION_KEYS,
        "window_size": "window_size",
        "full_attention_indexes": "fullatt_block_indexes",
    },
    defaults={
        **_VISION_GRID,
        "depth": 32,
        "hidden": 3584,
        "intermediate": 3420,
        "out_hidden": 3584,
        "patch_size": 14,
        "window_size": 112,
        "full_attention_indexes": (7, 15, 23, 31),
    },
    norm_bias=False,
    activation="silu",
    mlp=("gate_proj", "up_proj", "down_proj"),
    merger_norm="ln_q",
    merger_linears=("mlp.0", "mlp.2"),
    config={
        "hidden_act": "silu",
        "in_chans": 3,
        "spatial_patch_size": 14,
        "tokens_per_second": 2,
    },
)

_QWEN2_TOWER = replace(
    _QWEN2_5_TOWER,
    # Here `hidden_size` is the output width and the block's own width is `embed_dim`.
    keys={
        **_VISION_KEYS,
        "hidden": "embed_dim",
        "out_hidden": "hidden_size",
        "mlp_ratio": "mlp_ratio",
    },
    defaults={
        **_VISION_GRID,
        "depth": 32,
        "hidden": 1280,
        "out_hidden": 3584,
        "patch_size": 14,
        "mlp_ratio": 4,
    },
    norm_bias=True,
    activation="quick_gelu",
    mlp=("fc1", "fc2"),
    config={"in_chans": 3, "spatial_patch_size": 14},
)

_QWEN3_5_TOWER = VisionFamily(
    keys={**_VISION_KEYS, "num_position_embeddings": "num_position_embeddings"},
    defaults={
        **_VISION_GRID,
        "depth": 27,
        "hidden": 1152,
        "intermediate": 4304,
        "out_hidden": 3584,
        "patch_size": 16,
        "num_position_embeddings": 2304,
    },
    norm_bias=True,
    activation="gelu_pytorch_tanh",
    mlp=("linear_fc1", "linear_fc2"),
    merger_norm="norm",
    merger_linears=("linear_fc1", "linear_fc2"),
    patch_bias=True,
    config={
        "deepstack_visual_indexes": [],
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "initializer_range": 0.02,
        "model_type": "qwen3_5",
    },
)

_QWEN3_TOWER = replace(
    _QWEN3_5_TOWER,
    keys={**_QWEN3_5_TOWER.keys, "deepstack_indexes": "deepstack_visual_indexes"},
    defaults={**_QWEN3_5_TOWER.defaults, "deepstack_indexes": (8, 16, 24)},
    config={
        "hidden_act": "gelu_pytorch_tanh",
        "in_channels": 3,
        "initializer_range": 0.02,
        "model_type": "qwen3_vl",
    },
)

_QWEN2 = Family(
    model_type="qwen2",
    title="Qwen2.5",
    architecture="Qwen2ForCausalLM",
    qkv_bias=True,
    qk_norm=False,
    rope_theta=10_000.0,
    text_config={
        **_TEXT,
        **_TEXT_TOKENS,
        **_NO_WINDOW,
        "max_position_embeddings": 32768,
        "rope_theta": 1000000.0,
        "torch_dtype": "bfloat16",
    },
)

_QWEN2_VL = replace(
    _QWEN2,
    model_type="qwen2_vl",
    title="Qwen2-VL",
    architecture="Qwen2VLForConditionalGeneration",
    rope_theta=1_000_000.0,
    sections=(16, 24, 24),
    text_config={
        **_QWEN2.text_config,
        "rope_scaling": {"type": "mrope", "mrope_section": [16, 24, 24]},
    },
    top_config={**_VISION_TOKENS, "vision_token_id": 151654},
    vision=_QWEN2_TOWER,
)

_QWEN2_5_VL = replace(
    _QWEN2_VL,
    model_type="qwen2_5_vl",
    title="Qwen2.5-VL",
    architecture="Qwen2_5_VLForConditionalGeneration",
    box_grid=None,
    text_config={**_QWEN2_VL.text_config, "max_position_embeddings": 128000},
    vision=_QWEN2_5_TOWER,
)

_QWEN3 = Family(
    model_type="qwen3",
    title="Qwen3",
    architecture="Qwen3ForCausalLM",
    qkv_bias=None,
    qk_norm=True,
    rope_theta=10_000.0,
    head_dim=128,
    text_config={
        **_TEXT,
        **_TEXT_TOKENS,
        **_NO_WINDOW,
        "attention_bias": False,
        "max_position_embeddings": 40960,
        "rope_scaling": None,
        "rope_theta": 1000000,
        "torch_dtype": "bfloat16",
    },
)

_QWEN3_VL = replace(
    _QWEN3,
    model_type="qwen3_vl",
    title="Qwen3-VL",
    architecture="Qwen3VLForConditionalGeneration",
    nested=True,
    rope_theta=500_000.0,
    sections=(24, 20, 20),
    interleaved=True,
    split_video_frames=True,
    text_config={
        **_TEXT,
        **_TEXT_TOKENS,
        "attention_bias": False,
        "dtype": "bfloat16",
        "max_position_embeddings": 262144,
        "model_type": "qwen3_vl_text",
        "rope_scaling": {
            "mrope_interleaved": True,
            "mrope_section": [24, 20, 20],
            "rope_type": "default",
        },
        "rope_theta": 5000000,
    },
    top_config=_VISION_TOKENS,
    vision=_QWEN3_TOWER,
)

_QWEN3_5 = replace(
    _QWEN3_VL,
    model_type="qwen3_5",
    title="Qwen3.5",
    architecture="Qwen3_5ForConditionalGeneration",
    rope_theta=10_000.0,
    sections=(11, 11, 10),
    rotary_factor=0.25,
    hybrid=True,
    head_dim=256,
    text_config={
        **_TEXT,
        "attention_bias": False,
        "attn_output_gate": True,
        "dtype": "bfloat16",
        "eos_token_id": 248044,
        "full_attention_interval": 4,
        "mamba_ssm_dtype": "float32",
        "max_position_embeddings": 262144,
        "model_type": "qwen3_5_text",
        "mtp_num_hidden_layers": 1,
        "rope_parameters": {
            "mrope_interleaved": True,
            "mrope_section": [11, 11, 10],
            "partial_rotary_factor": 0.25,
            "rope_theta": 10000000,
            "rope_type": "default",
        },
    },
    top_config={
        "vision_start_token_id": 248053,
        "vision_end_token_id": 248054,
        "image_token_id": 248056,
        "video_token_id": 248057,
    },
    vision=_QWEN3_5_TOWER,
)

_SPARSE: Mapping[str, Any] = {
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}

_QWEN3_MOE = replace(
    _QWEN3,
    model_type="qwen3_moe",
    title="Qwen3 MoE",
    architecture="Qwen3MoeForCausalLM",
    text_config={**_QWEN3.text_config, **_SPARSE},
    moe=MoeFamily(
        {"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
        renormalize=None,
    ),
)

_QWEN3_VL_MOE = replace(
    _QWEN3_VL,
    model_type="qwen3_vl_moe",
    title="Qwen3-VL MoE",
    architecture="Qwen3VLMoeForConditionalGeneration",
    text_config={**_QWEN3_VL.text_config, **_SPARSE, "model_type": "qwen3_vl_moe_text"},
    moe=MoeFamily({"num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408}),
    vision=replace(_QWEN3_TOWER, config={**_QWEN3_TOWER.config, "model_type": "qwen3_vl_moe"}),
)

_QWEN3_5_MOE = replace(
    _QWEN3_5,
    model_type="qwen3_5_moe",
    title="Qwen3.5 MoE",
    architecture="Qwen3_5MoeForConditionalGeneration",
    text_config={**_QWEN3_5.text_config, "model_type": "qwen3_5_moe_text"},
    moe=MoeFamily(
        {
            "num_experts": 256,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 512,
            "shared_expert_intermediate_size": 512,
        },
        some_dense=False,
    ),
    vision=replace(_QWEN3_5_TOWER, config={**_QWEN3_5_TOWER.config, "model_type": "qwen3_5_moe"}),
)

FAMILIES: Mapping[str, Family] = {
    family.model_type: family
    for family in (
        _QWEN3_5,
        _QWEN3_5_MOE,
        _QWEN3_VL,
        _QWEN3_VL_MOE,
        _QWEN2_5_VL,
        _QWEN2_VL,
        _QWEN3,
        _QWEN3_MOE,
        _QWEN2,
    )
}

# Families of Qwen that no engine here runs -> what they are, and why not.
REFUSED: Mapping[str, str] = {
    "qwen4_exp": "Qwen4 (experimental), which is too large for one device",
    "qwen3_omni_moe": "Qwen3-Omni, which listens and speaks",
    "qwen2_5_omni": "Qwen2.5-Omni, which listens and speaks",
    "qwen2_audio": "Qwen2-Audio, which listens",
    "qwen3_next": "Qwen3-Next, which is too large for one device",
}
# What to run in their place.
INSTEAD = "qwen3.5-9b looks at pictures, or any other of: qwencli models"


def can_see(model_type: object) -> bool | None:
    """Whether models of this `model_type` look at pictures; None for a family not known here."""
    family = FAMILIES.get(str(model_type))
    return None if family is None else family.vision is not None


def supported() -> str:
    """The supported `model_type`s as one phrase for error lines."""
    return ", ".join(FAMILIES)
