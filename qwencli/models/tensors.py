"""The tensors of a model, by shape alone: those in a checkpoint, and the fused ones the engine
keeps.

Names are those of transformers 5's state dict. Hub files of older families name the same
tensors differently; `canonical_name` maps every layout that transformers reads to these names.

One table serves the loader, the dummy load, the memory plan and the check of a folder: a
`TensorSpec` is a tensor the native engine keeps, made of one or more tensors of the checkpoint
stacked along the first dimension (q, k and v; gate and up).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import prod
from types import MappingProxyType
from typing import Literal

from qwencli.models.families import FAMILIES, VisionFamily
from qwencli.models.shapes import Mixer, ModelShape, MoeShape, TextShape, VisionShape
from qwencli.models.weight_files import StoredTensor

Section = Literal["text", "vision", "root"]
Fill = Literal["normal", "ones", "zeros", "decay"]

# Patterns of what stands before a section's names in the checkpoints that exist: a whole model or
# its base alone, saved from a class that wraps them once more or not.
PREFIXES: dict[Section, str] = {
    "text": r"(?:(?:model|language_model)\.)*(?=(?:embed_tokens|layers|norm)\.)",
    "vision": r"(?:model\.)*visual\.",
    "root": r"(?:(?:model|language_model)\.)*(?=lm_head\.)",
}

# By what a tensor of the decoder is called behind its layer, see `TensorSpec.split_axis`.
_OF_HEADS = ("qkv", "qkv_bias", "beta_decay", "conv", "decay_log", "decay_bias")
_BY_RESULTS = (*_OF_HEADS, "gate_up", "shared_gate_up", "embed", "head")
_BY_INPUTS = ("o", "down", "shared_down")
_SPLIT_AXES = dict.fromkeys(_BY_RESULTS, 0) | dict.fromkeys(_BY_INPUTS, 1)


@dataclass(frozen=True)
class Part:
    """One tensor of the checkpoint: its name below the section's prefix, and its shape there.

    Args:
        stacked: whether it is the matrices of all experts [experts, out, in]. Some checkpoints have
            them transposed.
    """

    section: Section
    name: str
    shape: tuple[int, ...]
    stacked: bool = False

    @property
    def rows(self) -> int:
        """Rows of the matrix, or values of the vector, that it is kept as."""
        return self.shape[0] * self.shape[1] if self.stacked else self.shape[0]

    @property
    def columns(self) -> int:
        return math.prod(self.shape[2:] if self.stacked else self.shape[1:])

    def is_transposed(self, stored: tuple[int, ...]) -> bool:
        """Whether a tensor of this shape is this one with its matrices transposed."""
        turned = (self.shape[0], *reversed(self.shape[1:]))
        return self.stacked and stored == turned != self.shape


@dataclass(frozen=True)
class TensorSpec:
    """One tensor we keep.

    Args:
        shape: its first dimension is the sum over `parts`; the others hold as many elements as
            theirs (a patch convolution becomes a matrix).
        fill: what a dummy load puts here; "decay" = logarithms of rates between 1 and 16.
        float32: kept so whatever type the model has: what is added to or exponentiated before it
            is used loses too much in fewer bits.
    """

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]
    fill: Fill
    float32: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def split_axis(self) -> int | None:
        """Along which axis several GPUs could share the tensor (tensor parallelism); None = each
        has all of it, as of the vision tower. No engine does so yet.

        0: by results, whole heads or rows of the vocabulary (column-parallel); queries, keys and
        values, or gate and up, of each expert, are split each by itself. 1: by inputs, so that
        results are sums to be added up (row-parallel).
        """
        section, _, name = self.name.partition(".")
        return _SPLIT_AXES.get(name.rpartition(".")[2]) if section == "text" else None


def specs(shape: ModelShape) -> tuple[TensorSpec, ...]:
    """Every tensor of the model, in the order the forward pass reads them."""
    vision = _vision(shape.vision) if shape.vision is not None else iter(())
    return (*vision, *_text(shape.text))


def _spec(
    name: str,
    section: Section,
    *parts: tuple[str, tuple[int, ...]],
    fill: Fill = "normal",
    float32: bool = False,
) -> TensorSpec:
    made = (Part(section, hub, part_shape) for hub, part_shape in parts)
    return _spec_of(name, tuple(made), fill, float32)


def _spec_of(
    name: str, parts: tuple[Part, ...], fill: Fill = "normal", float32: bool = False
) -> TensorSpec:
    rows = sum(part.rows for part in parts)
    shape = (rows, parts[0].columns) if len(parts[0].shape) > 1 else (rows,)
    return TensorSpec(name, shape, parts, fill, float32)


def _text_norm(s: TextShape, at: str, hub: str, width: int) -> TensorSpec:
    """A norm of the decoder: its weight, or how much that is above 1."""
    centred = s.zero_centred_norms
    fill: Fill = "zeros" if centred else "ones"
    return _spec(at, "text", (hub + ".weight", (width,)), fill=fill, float32=centred)


def _attention(s: TextShape, at: str, hub: str) -> Iterator[TensorSpec]:
    queries = 2 * s.q_size if s.gated_attention else s.q_size
    projections = {"q": queries, "k": s.kv_size, "v": s.kv_size}
    yield _spec(
        at + "qkv",
        "text",
        *((f"{hub}{p}_proj.weight", (n, s.hidden_size)) for p, n in projections.items()),
    )
    if s.qkv_bias:
        yield _spec(
            at + "qkv_bias",
            "text",
            *((f"{hub}{p}_proj.bias", (n,)) for p, n in projections.items()),
        )
    if s.qk_norm:
        yield _text_norm(s, at + "q_norm", hub + "q_norm", s.head_dim)
        yield _text_norm(s, at + "k_norm", hub + "k_norm", s.head_dim)
    yield _spec(at + "o", "text", (hub + "o_proj.weight", (s.hidden_size, s.q_size)))
    if s.o_bias:
        yield _spec(at + "o_bias", "text", (hub + "o_proj.bias", (s.hidden_size,)))


def _delta(s: TextShape, at: str, hub: str) -> Iterator[TensorSpec]:
    """A gated delta net; `qkv` is queries, keys, values and the gate of the output in one."""
    d = s.delta
    assert d is not None, "a shape with such layers says how large they are"
    hidden, heads = s.hidden_size, (d.num_v_heads,)
    yield _spec(
        at + "qkv",
        "text",
        (hub + "in_proj_qkv.weight", (d.conv_dim, hidden)),
        (hub + "in_proj_z.weight", (d.value_dim, hidden)),
    )
    yield _spec(
        at + "beta_decay",
        "text",
        (hub + "in_proj_b.weight", (d.num_v_heads, hidden)),
        (hub + "in_proj_a.weight", (d.num_v_heads, hidden)),
    )
    yield _spec(at + "conv", "text", (hub + "conv1d.weight", (d.conv_dim, 1, d.conv_kernel)))
    yield _spec(at + "decay_log", "text", (hub + "A_log", heads), fill="decay", float32=True)
    yield _spec(at + "decay_bias", "text", (hub + "dt_bias", heads), fill="ones", float32=True)
    # It alone multiplies by its weight as it is.
    norm = (hub + "norm.weight", (d.v_head_dim,))
    yield _spec(at + "out_norm", "text", norm, fill="ones", float32=True)
    yield _spec(at + "o", "text", (hub + "out_proj.weight", (hidden, d.value_dim)))


# What mixes a layer's tokens -> its tensors, and where their names stand below the layer's.
_MIXERS: Mapping[Mixer, tuple[Callable[[TextShape, str, str], Iterator[TensorSpec]], str]] = {
    "attention": (_attention, "self_attn."),
    "delta": (_delta, "linear_attn."),
}


def _mlp_parts(hub: str, inner: int, hidden: int) -> tuple[tuple[Part, Part], Part]:
    """Gate and up, and down, of a whole feed-forward or of one expert."""

    def part(name: str, rows: int, columns: int) -> Part:
        return Part("text", f"{hub}{name}_proj.weight", (rows, columns))

    gate_up = part("gate", inner, hidden), part("up", inner, hidden)
    return gate_up, part("down", hidden, inner)


def _mlp(at: str, hub: str, inner: int, hidden: int) -> Iterator[TensorSpec]:
    gate_up, down = _mlp_parts(hub, inner, hidden)
    yield _spec_of(at + "gate_up", gate_up)
    yield _spec_of(at + "down", (down,))


def _experts(moe: MoeShape, at: str, hub: str, hidden: int) -> Iterator[TensorSpec]:
    """A mixture of experts: the matrices of all of them are kept as one, expert after expert, and
    behind them a shared one that is as wide."""
    router = [Part("text", hub + "gate.weight", (moe.num_experts, hidden))]
    if moe.shared_intermediate_size:
        router.append(Part("text", hub + "shared_expert_gate.weight", (1, hidden)))
    yield _spec_of(at + "router", tuple(router))
    count, inner = moe.num_experts, moe.intermediate_size
    gate_up: tuple[Part, ...]
    down: tuple[Part, ...]
    if moe.apart:
        each = [_mlp_parts(f"{hub}experts.{i}.", inner, hidden) for i in range(count)]
        gate_up = tuple(part for both, _ in each for part in both)
        down = tuple(back for _, back in each)
    else:
        experts = hub + "experts."
        gate_up = (Part("text", experts + "gate_up_proj", (count, 2 * inner, hidden), True),)
        down = (Part("text", experts + "down_proj", (count, hidden, inner), True),)
    shared = moe.shared_intermediate_size
    if shared:
        own, back = _mlp_parts(hub + "shared_expert.", shared, hidden)
        if moe.shared_is_stacked:
            gate_up, down = (*gate_up, *own), (*down, back)
        else:
            yield _spec_of(at + "shared_gate_up", own)
            yield _spec_of(at + "shared_down", (back,))
    yield _spec_of(at + "gate_up", gate_up)
    yield _spec_of(at + "down", down)


def _text(s: TextShape) -> Iterator[TensorSpec]:
    yield _spec("text.embed", "text", ("embed_tokens.weight", (s.vocab_size, s.hidden_size)))
    for i in range(s.num_layers):
        at, hub = f"text.{i}.", f"layers.{i}."
        yield _text_norm(s, at + "attn_norm", hub + "input_layernorm", s.hidden_size)
        mixer, below = _MIXERS[s.mixer(i)]
        yield from mixer(s, at, hub + below)
        yield _text_norm(s, at + "mlp_norm", hub + "post_attention_layernorm", s.hidden_size)
        moe = s.experts(i)
        if moe is None:
            yield from _mlp(at, hub + "mlp.", s.intermediate_size, s.hidden_size)
        else:
            yield from _experts(moe, at, hub + "mlp.", s.hidden_size)
    yield _text_norm(s, "text.norm", "norm", s.hidden_size)
    if not s.tied_head:
        yield _spec("text.head", "root", ("lm_head.weight", (s.vocab_size, s.hidden_size)))
    if s.draft_head:
        yield from map(_at_the_root, _draft_head(s))


def _draft_head(s: TextShape) -> Iterator[TensorSpec]:
    """The head that drafts tokens: two norms, one product, and a layer that attends. Embedding and
    output projection are the decoder's."""
    at, hub, hidden = "text.mtp.", "mtp.", s.hidden_size
    yield _text_norm(s, at + "norm_embedding", hub + "pre_fc_norm_embedding", hidden)
    yield _text_norm(s, at + "norm_hidden", hub + "pre_fc_norm_hidden", hidden)
    yield _spec(at + "fc", "text", (hub + "fc.weight", (hidden, 2 * hidden)))
    layer = hub + "layers.0."
    yield _text_norm(s, at + "attn_norm", layer + "input_layernorm", hidden)
    yield from _attention(s, at, layer + "self_attn.")
    yield _text_norm(s, at + "mlp_norm", layer + "post_attention_layernorm", hidden)
    if s.moe is None:
        yield from _mlp(at, layer + "mlp.", s.intermediate_size, hidden)
    else:
        moe = replace(s.moe, apart=s.moe.apart_in_head)
        yield from _experts(moe, at, layer + "mlp.", hidden)
    yield _text_norm(s, at + "norm", hub + "norm", hidden)


def _at_the_root(spec: TensorSpec) -> TensorSpec:
    """The tensor, its parts beside the decoder's in the state dict, not among them."""
    parts = tuple(replace(part, section="root") for part in spec.parts)
    return replace(spec, parts=parts)


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


TensorShapes = Mapping[str, tuple[int, ...]]
_LEFT_AS_THEY_ARE = (
    "embed_tokens.weight",
    "in_proj_a.weight",
    "in_proj_b.weight",
    ".mlp.gate.weight",
    "shared_expert_gate.weight",
    # Small beside the output projection, which each draft reads too.
    "mtp.fc.weight",
)

_ONE_EXPERT = re.compile(r"\.mlp\.experts\.(\d+)\.")
_OF_ALL_EXPERTS = (".mlp.gate.weight", ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")
HEAD, EMBEDDING = "lm_head.weight", "embed_tokens.weight"
DRAFT_HEAD = "mtp."


@functools.lru_cache(maxsize=1)  # every estimate of one model asks for them again
def expected_tensors(shape: ModelShape) -> TensorShapes:
    """Name -> shape of every parameter; a tied `lm_head` is not listed, it is not stored."""
    parts = (part for spec in specs(shape) for part in spec.parts)
    return MappingProxyType({part_name(part, shape): part.shape for part in parts})


def part_name(part: Part, shape: ModelShape) -> str:
    """Name of a part in the state dict."""
    return _prefix(part.section, shape) + part.name


def embedding_name(shape: ModelShape) -> str:
    return _prefix("text", shape) + EMBEDDING


def _prefix(section: Section, shape: ModelShape) -> str:
    if section == "text":
        return "model.language_model." if shape.vision else "model."
    return "model.visual." if section == "vision" else ""


def parameter_count(shape: ModelShape) -> int:
    """Number of parameters, tied weights counted once."""
    return sum(prod(size) for size in expected_tensors(shape).values())


def renamings(shape: ModelShape) -> dict[str, str]:
    """Pattern of what a name begins with in a file -> what it begins with in the state dict.

    At most one changes a name, and none changes a name of the state dict.
    """
    return {
        "^" + pattern: _prefix(section, shape)
        for section, pattern in PREFIXES.items()
        if section != "vision" or shape.vision is not None
    }


def canonical_name(name: str, shape: ModelShape) -> str:
    """The state-dict name of a tensor that a file calls `name`."""
    for pattern, prefix in renamings(shape).items():
        renamed, count = re.subn(pattern, prefix, name, count=1)
        if count:
            return renamed
    return name


def canonical_tensors(
    stored: Mapping[str, StoredTensor], shape: ModelShape
) -> dict[str, StoredTensor]:
    """A checkpoint's tensors by their names in the state dict.

    Of two that would have one name, the one that is called so keeps it; the other stays as it is.
    Where the one of an embedding and a head that are tied is stored, it is found as the embedding.
    """
    names = {name: canonical_name(name, shape) for name in stored}
    found = {name: stored[name] for name, known in names.items() if name == known}
    for name, known in names.items():
        if name != known:
            found[name if known in found else known] = stored[name]
    if shape.text.tied_head and HEAD in found:
        found.setdefault(embedding_name(shape), found[HEAD])
        if found[embedding_name(shape)] is found[HEAD]:
            del found[HEAD]
    return found


def with_experts_as_stored(shape: ModelShape, names: Iterable[str]) -> ModelShape:
    """The shape, its experts apart where tensors of these names are those of one expert each."""
    moe = shape.text.moe
    if moe is None:
        return shape
    apart = [name for name in names if _ONE_EXPERT.search(name)]
    moe = replace(
        moe,
        apart=any(_in_decoder(name, shape) for name in apart),
        apart_in_head=any(in_draft_head(name) for name in apart),
    )
    return replace(shape, text=replace(shape.text, moe=moe))


def in_draft_head(name: str) -> bool:
    """Whether a checkpoint's tensor belongs to a head that drafts tokens."""
    return name.startswith(DRAFT_HEAD)


def _in_decoder(name: str, shape: ModelShape) -> bool:
    """Whether a file's tensor is the decoder's: heads that draft tokens have experts too."""
    return canonical_name(name, shape).startswith(_prefix("text", shape))


def count_experts(stored: Mapping[str, StoredTensor], shape: ModelShape) -> set[int]:
    """How many experts layers have in the weights, by the tensors of the experts and routers."""
    apart: dict[str, set[int]] = {}
    counts: set[int] = set()
    for name, tensor in stored.items():
        one = _ONE_EXPERT.search(name)
        if not _in_decoder(name, shape):
            continue
        if one is not None:
            apart.setdefault(name[: one.start()], set()).add(int(one[1]))
        elif name.endswith(_OF_ALL_EXPERTS) and tensor.shape:
            counts.add(tensor.shape[0])
    return counts | {max(numbers) + 1 for numbers in apart.values()}


def is_quantizable(name: str, size: tuple[int, ...]) -> bool:
    """Whether bitsandbytes replaces this tensor: the weight of a linear layer, not `lm_head`.

    Source: `replace_with_bnb_linear` and `get_modules_to_not_convert` of transformers, which
    convert every `nn.Linear` but the output embedding. Embeddings and routers are two-dimensional
    as well; experts are no such layers, and stay as they are.
    """
    return len(size) == 2 and not name.endswith(
        ("embed_tokens.weight", "pos_embed.weight", "lm_head.weight", ".mlp.gate.weight")
    )


def is_decoder_matrix(name: str, size: tuple[int, ...]) -> bool:
    """Whether the native engine quantizes this tensor: a large matrix of the decoder or the head.

    The two of a gated delta net that make one number a head are not, nor are routers: they are
    small, and what they make is exponentiated.
    """
    if ".mlp.experts." in name:
        return True
    return len(size) == 2 and ".visual." not in name and not name.endswith(_LEFT_AS_THEY_ARE)


def matrix_size(size: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a matrix, or of those of all experts in one."""
    return math.prod(size[:-1]), size[-1]
