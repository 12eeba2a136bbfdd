"""What a Qwen model looks like, as data: every difference between families is a field here.

Whatever plans memory, checks weights or runs a model works on these fields and knows no family by
name. This module knows no tensor names (`models.tensors`) and reads nothing (`shape_reader`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Norm = Literal["layer", "rms"]


@dataclass(frozen=True)
class YarnShape:
    """YaRN (arXiv 2309.00071): frequencies stretched for texts longer than in training.

    Frequencies that turn more than `beta_fast` times within `original_positions` stay, those that
    turn less than `beta_slow` times are divided by `factor`, those between by something between.

    Args:
        attention_factor: what cosines and sines are multiplied by.
        truncate: whether the bounds between these are whole frequencies.
    """

    factor: float
    original_positions: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class RopeShape:
    """Rotary embedding of the text decoder.

    Args:
        sections: frequencies that follow the temporal, height and width position, in that order
            (they sum to head_dim / 2); None for a model that knows one axis only.
        interleaved: whether the axes alternate (THWTHW...TT, Qwen3-VL) or come in blocks.
        scaling: how frequencies are stretched for long texts, as config.json calls it;
            "default" = not at all.
        yarn: how, where that is "yarn".
    """

    theta: float
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    scaling: str = "default"
    yarn: YarnShape | None = None


@dataclass(frozen=True)
class TextShape:
    """The text decoder. `qkv_bias` and `o_bias` say which projections carry a bias.

    `head_dim` is per head and need not be hidden_size / num_heads. With `tied_head` the embedding
    is the output projection too and no `lm_head` is stored. `activation` is config.json's name.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    qk_norm: bool
    qkv_bias: bool
    o_bias: bool
    tied_head: bool
    rope: RopeShape
    max_position_embeddings: int
    activation: str = "silu"
    sliding_window: bool = False

    @property
    def q_size(self) -> int:
        return self.num_heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.num_kv_heads * self.head_dim

    @property
    def group_size(self) -> int:
        """Query heads that share one key/value head."""
        return self.num_heads // self.num_kv_heads

    def kv_bytes_per_token(self, itemsize: int) -> int:
        """Bytes of keys and values that one token of one sequence takes in the cache."""
        return 2 * self.num_layers * self.kv_size * itemsize


@dataclass(frozen=True)
class VisionShape:
    """The vision tower.

    Args:
        merge_size: side of the square of patches that becomes one text token.
        position_side: side of the learned position grid that is resampled to each image;
            None where the tower has rotary positions only.
        deepstack_layers: blocks whose output is also handed to the first text layers, in order.
        window_patches: side of an attention window in patches; None = full attention everywhere.
        full_attention_layers: blocks that see a whole frame where the others see one window.
        activation: of the blocks' MLP, config.json's name for it.
        names: the family whose spelling of tensor names the hub files use.
    """

    depth: int
    hidden_size: int
    intermediate_size: int
    num_heads: int
    out_hidden_size: int
    in_channels: int
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    norm: Norm
    activation: str
    gated_mlp: bool
    patch_bias: bool
    names: str
    position_side: int | None = None
    deepstack_layers: tuple[int, ...] = ()
    window_patches: int | None = None
    full_attention_layers: tuple[int, ...] = ()

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_elements(self) -> int:
        """Values of one flattened patch: channels x frames x height x width."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_area(self) -> int:
        return self.merge_size**2


@dataclass(frozen=True)
class ModelShape:
    """A whole model.

    Args:
        split_video_frames: whether a video's frames stand apart in the prompt (timestamps between
            them), each with positions of its own.
        tokens_per_second: temporal positions that a second of video spans; None = one a frame.
    """

    model_type: str
    text: TextShape
    vision: VisionShape | None = None
    image_token_id: int | None = None
    video_token_id: int | None = None
    vision_start_token_id: int | None = None
    vision_end_token_id: int | None = None
    split_video_frames: bool = False
    tokens_per_second: float | None = None
