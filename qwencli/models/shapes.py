"""What a Qwen model looks like, as data: every difference between families is a field here.

Whatever plans memory, checks weights or runs a model works on these fields and knows no family by
name. This module knows no tensor names (`models.tensors`) and reads nothing (`shape_reader`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from qwencli.capabilities import KEEPS_STATES, ROWS_ONLY

Norm = Literal["layer", "rms"]
# What mixes the tokens of a layer: softmax attention over keys and values, or the gated delta rule
# over a state of one size (Gated DeltaNet, arXiv 2412.06464).
Mixer = Literal["attention", "delta"]


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
        rotary_dim: how many dimensions of a head rotate, the first ones; None = all of them.
    """

    theta: float
    sections: tuple[int, int, int] | None = None
    interleaved: bool = False
    scaling: str = "default"
    yarn: YarnShape | None = None
    rotary_dim: int | None = None


@dataclass(frozen=True)
class DeltaShape:
    """Gated DeltaNet: what mixes the tokens of a `delta` layer.

    Args:
        num_k_heads, num_v_heads: heads of queries and keys, and of values; each of the former
            serves num_v_heads / num_k_heads consecutive ones of the latter.
        conv_kernel: inputs that the causal convolution in front of it sees.
    """

    num_k_heads: int
    num_v_heads: int
    k_head_dim: int
    v_head_dim: int
    conv_kernel: int

    @property
    def key_dim(self) -> int:
        return self.num_k_heads * self.k_head_dim

    @property
    def value_dim(self) -> int:
        return self.num_v_heads * self.v_head_dim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: queries, keys and values."""
        return 2 * self.key_dim + self.value_dim

    @property
    def state_size(self) -> int:
        """Values of one sequence's state in one layer."""
        return self.num_v_heads * self.k_head_dim * self.v_head_dim

    def conv_size(self, step_tokens: int) -> int:
        """Inputs of the convolution that one sequence keeps in one layer, where steps have so many
        tokens of it at most."""
        return self.conv_dim * (self.conv_kernel - 1 + step_tokens)

    @property
    def update_size(self) -> int:
        """Values that say what one token does to a state."""
        return self.key_dim + self.value_dim + self.num_v_heads


@dataclass(frozen=True)
class MoeShape:
    """A mixture of experts: a feed-forward of which each token takes few parts.

    Args:
        num_experts: among which a router chooses `top_k` for each token.
        intermediate_size: of one expert.
        renormalize: whether the weights of a token's experts add up to 1.
        shared_intermediate_size: of an expert that all tokens take; 0 = there is none.
        dense_layers: layers whose feed-forward is whole.
        apart: whether the weights have a tensor for each expert, where others have one for all.
        apart_in_head: the same of a head that drafts tokens.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    renormalize: bool = True
    shared_intermediate_size: int = 0
    dense_layers: tuple[int, ...] = ()
    apart: bool = False
    apart_in_head: bool = False

    @property
    def shared_is_stacked(self) -> bool:
        """Whether the shared expert is kept as one more of the others, being as wide."""
        return self.shared_intermediate_size == self.intermediate_size

    @property
    def stacked(self) -> int:
        """Experts that are kept in one matrix."""
        return self.num_experts + self.shared_is_stacked

    @property
    def active_size(self) -> int:
        """Width of all that one token takes."""
        return self.top_k * self.intermediate_size + self.shared_intermediate_size


@dataclass(frozen=True)
class TextShape:
    """The text decoder. `qkv_bias` and `o_bias` say which projections carry a bias.

    `head_dim` is per head and need not be hidden_size / num_heads. With `tied_head` the embedding
    is the output projection too and no `lm_head` is stored. `activation` is config.json's name.

    Args:
        mixers: of each layer; empty = attention in all of them.
        delta: the layers of kind `delta`; None where there are none.
        gated_attention: whether attention's result is multiplied by the sigmoid of a gate, which
            the query projection makes too: twice as wide, by head [query | gate].
        zero_centred_norms: whether norms multiply by 1 + weight.
        moe: the layers whose feed-forward is a mixture of experts; None where there are none.
            Then `intermediate_size` is what one token takes, or that of layers without experts.
        mtp_layers: of the head that drafts further tokens (multi-token prediction), as config.json
            says; 0 = there is none.
        draft_head: whether that head is used: only then it is loaded, and has keys and values.
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
    mixers: tuple[Mixer, ...] = ()
    delta: DeltaShape | None = None
    gated_attention: bool = False
    zero_centred_norms: bool = False
    moe: MoeShape | None = None
    mtp_layers: int = 0
    draft_head: bool = False

    def mixer(self, layer: int) -> Mixer:
        return self.mixers[layer] if self.mixers else "attention"

    def experts(self, layer: int) -> MoeShape | None:
        """The mixture of experts of a layer; None where its feed-forward is whole."""
        return None if self.moe is None or layer in self.moe.dense_layers else self.moe

    @property
    def rows_only(self) -> bool:
        """Whether requests are rows of batches over pages, a lone one too."""
        return self.delta is not None or self.moe is not None

    @property
    def traits(self) -> Mapping[str, bool]:
        """What `capabilities` asks of a model."""
        return {ROWS_ONLY: self.rows_only, KEEPS_STATES: self.delta is not None}

    @property
    def attention_layers(self) -> tuple[int, ...]:
        """Layers that keep keys and values."""
        return tuple(i for i in range(self.num_layers) if self.mixer(i) == "attention")

    @property
    def draft_layer(self) -> int:
        """The number that the layer of a head that drafts tokens has, behind the decoder's."""
        return self.num_layers

    @property
    def kv_layers(self) -> tuple[int, ...]:
        """Layers that keep keys and values, that of a head that drafts tokens included."""
        return (*self.attention_layers, *([self.draft_layer] if self.draft_head else []))

    @property
    def delta_layers(self) -> tuple[int, ...]:
        """Layers that keep a recurrent state, whose size does not grow."""
        return tuple(i for i in range(self.num_layers) if self.mixer(i) == "delta")

    @property
    def rotary_dim(self) -> int:
        """Dimensions of a head that rotate, the first ones."""
        return self.rope.rotary_dim or self.head_dim

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
        return 2 * len(self.kv_layers) * self.kv_size * itemsize

    def state_bytes(self, itemsize: int, step_tokens: int = 1) -> int:
        """Bytes of state that one sequence takes, however long it is: float32, and the earlier
        inputs of convolutions of `itemsize` bytes each.

        Args:
            step_tokens: of a sequence in the longest step.
        """
        if self.delta is None:
            return 0
        each = 4 * self.delta.state_size + itemsize * self.delta.conv_size(step_tokens)
        return len(self.delta_layers) * each

    def update_bytes(self, tokens: int) -> int:
        """Bytes of what so many tokens, which may turn out wrong, would do to states."""
        if self.delta is None:
            return 0
        return 4 * tokens * len(self.delta_layers) * self.delta.update_size


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

    def with_draft_head(self) -> ModelShape:
        """The same model, with its head that drafts tokens in use."""
        return replace(self, text=replace(self.text, draft_head=True))

    @property
    def head_dims(self) -> tuple[int, ...]:
        """Sizes of the heads of attention, of text and of pictures."""
        vision = () if self.vision is None else (self.vision.head_dim,)
        return (self.text.head_dim, *vision)
