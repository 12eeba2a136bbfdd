"""The vision tower of every family: patches in, text-sized embeddings out.

Families differ by `VisionShape` only: norm, MLP, activation, learned positions, windows, and
DeepStack mergers. The patch convolution is a matrix product, because its stride is its size.

Attention: every patch of a segment sees its whole segment, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from qwencli.config import Attention
from qwencli.engine.device_memory import upload
from qwencli.engine.layers.vision_layout import (
    EqualSegments,
    Grid,
    VisionLayout,
    join_segments,
    layout,
)
from qwencli.engine.loading.weights import Tensors
from qwencli.engine.ops.attention import can_flash_decode, flash_segments
from qwencli.engine.ops.decoder_ops import AddNormFn, VarlenAttentionFn, add_norm
from qwencli.engine.ops.rope import ApplyRopeFn, CosSin, apply_rope
from qwencli.errors import InputError
from qwencli.models.shapes import VisionShape

Tensor = torch.Tensor
# q, k, v [segments, length, H, D] -> [segments, length, H, D]
SegmentAttention = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Offsets:
    """Segments of which the host knows no more than that none has over `longest` patches.

    Args:
        starts: int32 [segments + 1] on the device, the last is the number of patches.
    """

    starts: Tensor
    longest: int


def attend(
    qkv: Tensor,
    segments: Sequence[EqualSegments] | Offsets,
    attention: SegmentAttention,
    varlen: VarlenAttentionFn | None = None,
) -> Tensor:
    """Attend inside each segment: heads of q, k and v [N, 3 * H, D] -> [N, H * D].

    Args:
        attention: of segments of few lengths. varlen: of others, in place of torch's; of equal
            ones the library that torch calls is as fast.
    """
    if not isinstance(segments, Offsets):
        return attend_segments(qkv, segments, attention)
    if varlen is None:
        return flash_segments(qkv, segments.starts, segments.longest)
    q, k, v = qkv.view(len(qkv), 3, -1, qkv.shape[2]).unbind(1)
    return varlen(q, k, v, segments.longest, segments.starts, segments.starts)


def attend_segments(
    qkv: Tensor, groups: Sequence[EqualSegments], attention: SegmentAttention
) -> Tensor:
    """Segments of equal length that follow each other are one batch, so one image is one call
    without a mask.

    Of more than `UNDIVIDED` patches the result takes the place of the queries, some of which attend
    at a time.
    """
    heads, dim = qkv.shape[1] // 3, qkv.shape[2]
    sizes = [group.count * group.length for group in groups]
    pieces = []
    for group, piece in zip(groups, qkv.split_with_sizes(sizes), strict=True):
        q, k, v = piece.view(group.count, group.length, 3, heads, dim).unbind(2)
        if len(qkv) <= UNDIVIDED:
            pieces.append(attention(q, k, v).reshape(-1, heads * dim))
            continue
        each = max(1, PIECE // group.length)  # whole segments, or parts of a long one's queries
        for segments in zip(
            torch.split(q, each), torch.split(k, each), torch.split(v, each), strict=True
        ):
            for queries in torch.split(segments[0], PIECE, dim=1):
                queries.copy_(attention(queries, *segments[1:]))
    if not pieces:
        return qkv[:, :heads].flatten(1)
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


def eager(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax(q k^T / sqrt(D)) v in plain operators: the reference of the others."""
    scores = torch.einsum("slhd,smhd->shlm", q, k) * q.shape[-1] ** -0.5
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
    return torch.einsum("shlm,smhd->slhd", weights, v)


def sdpa(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's scaled_dot_product_attention, no mask."""
    return F.scaled_dot_product_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    ).transpose(1, 2)


def flash_attention_2(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The flash-attn package."""
    from flash_attn import flash_attn_func

    out: Tensor = flash_attn_func(q, k, v)
    return out


SEGMENT_ATTENTION: Mapping[Attention, SegmentAttention] = {
    Attention.EAGER: eager,
    Attention.SDPA: sdpa,
    Attention.FLASH: flash_attention_2,
}


EPS = 1e-6
ROPE_THETA = 10_000.0
# Patches of recent grids whose layouts and resampled positions are kept (2.6 KB each). Pictures of
# one size share theirs, whatever they are encoded with. Pictures of more than `UNDIVIDED` patches
# take the room of those kept.
PATCHES_KEPT = 2**15
# Patches of a large picture that are worked on at a time, but for keys and values, of which it
# needs all: what is widest about it, inside a block, is that of a piece.
PIECE = 4096
# Up to so many are worked on whole, as a picture of 1920x1080 (8,160): cutting it would copy every
# block's results and launch twice as much, and save less than the largest pictures need anyway.
UNDIVIDED = 2 * PIECE

# In place: what goes in is the widest thing of a block.
ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "gelu_pytorch_tanh": lambda x: torch.ops.aten.gelu_(x, approximate="tanh"),
    "silu": lambda x: F.silu(x, inplace=True),
    "quick_gelu": lambda x: x.mul_(torch.sigmoid(1.702 * x)),
}


@dataclass(frozen=True)
class VisionFeatures:
    """What the tower says about some images: `embeds` [tokens, hidden of the text decoder], and
    for DeepStack one tensor of the same size for each of the first text layers."""

    embeds: Tensor
    deepstack: tuple[Tensor, ...]


@dataclass(frozen=True)
class PreparedGrids:
    """A layout on the device; see `VisionLayout`.

    Args:
        back: the inverse of `order`.
        packed_frames, packed_windows: the segments for one kernel that takes them all, where there
            is one and their lengths differ.
    """

    frames: tuple[EqualSegments, ...] | Offsets
    windows: tuple[EqualSegments, ...] | Offsets
    rope: CosSin
    positions: Tensor | None
    order: Tensor | None
    back: Tensor | None
    packed_frames: Offsets | None = None
    packed_windows: Offsets | None = None

    @property
    def patches(self) -> int:
        return self.rope[0].shape[1]


class VisionPass:
    """The tower over some patches, as far as it has run.

    `update` is what the last block adds to `hidden`: the norm that reads it next adds it.
    """

    def __init__(self, tower: VisionTower, hidden: Tensor, ready: PreparedGrids) -> None:
        self._tower, self.hidden, self.ready = tower, hidden, ready
        self.update: Tensor | None = None
        self.blocks = 0
        self.deepstack: list[Tensor] = []

    def whole_hidden(self) -> Tensor:
        if self.update is not None:
            self.hidden.add_(self.update)
            self.update = None
        return self.hidden

    def advance(self, blocks: int) -> VisionFeatures | None:
        """Run so many more blocks; the features once all have run."""
        depth = self._tower.shape.depth
        for _ in range(min(blocks, depth - self.blocks)):
            self._tower.run_block(self)
        return self._tower.finish(self) if self.blocks == depth else None


class VisionTower:
    """Weights of one model's tower on one device, and the forward pass over them.

    Matrices may be of a shorter type than the rest: each is converted when it is multiplied by.

    Args:
        turn: turns queries and keys in place.
        add_norm: what a block adds to the hidden states, and the norm that reads them next.
        varlen: attention inside segments of unequal length, in place of torch's.
    """

    def __init__(
        self,
        shape: VisionShape,
        weights: Tensors,
        attention: Attention,
        turn: ApplyRopeFn = apply_rope,
        add_norm: AddNormFn = add_norm,
        varlen: VarlenAttentionFn | None = None,
    ) -> None:
        self.shape = shape
        self._turn, self._add_norm = turn, add_norm
        self._w = {
            name.removeprefix("vision."): t
            for name, t in weights.items()
            if name.startswith("vision.")
        }
        self._dtype = self._w["merger.norm"].dtype
        self.varlen = varlen
        self._attention: SegmentAttention = SEGMENT_ATTENTION[attention]
        self._activation = ACTIVATIONS[shape.activation]
        device, heads = self._w["patch"].device, shape.num_heads
        # As the end of a product; the library's is that form of GELU.
        self._gelu_in_product = (
            device.type == "cuda"
            and shape.activation == "gelu_pytorch_tanh"
            and not shape.gated_mlp
        )
        self._packs_segments = attention is Attention.SDPA and can_flash_decode(
            heads, heads, shape.head_dim, self._dtype, device
        )
        self._prepared: dict[Grid, PreparedGrids] = {}
        self._latest: tuple[tuple[Grid, ...], PreparedGrids] | None = None

    def encode(self, patches: Tensor, grids: Sequence[Grid]) -> VisionFeatures:
        """Encode images and videos.

        Args:
            patches: [N, channels * frames * height * width of a patch], in merge order, on the
                tower's device, any float type.
            grids: patches of each image or video as (time, rows, columns).

        Raises:
            InputError: a grid that does not divide into merged tokens, or does not match `patches`.
        """
        return self.run(patches, self.prepare(patches, grids))

    def prepare(self, patches: Tensor, grids: Sequence[Grid]) -> PreparedGrids:
        """What `run` needs to know of pictures besides their patches. Raises as `encode`."""
        self._check(patches, grids)
        return self._prepare(tuple(grids))

    def run(self, patches: Tensor, ready: PreparedGrids) -> VisionFeatures:
        """The tower itself: asks the host nothing, and can be captured in a CUDA graph."""
        features = self.begin(patches, ready).advance(self.shape.depth)
        assert features is not None, "all blocks have run"
        return features

    def begin(self, patches: Tensor, ready: PreparedGrids) -> VisionPass:
        """`run`, to be taken some blocks at a time."""
        weight = self._w["patch"].to(self._dtype)
        hidden = _by_pieces(
            lambda piece: F.linear(piece.to(self._dtype), weight, self._w.get("patch_bias")),
            patches,
        )
        if ready.positions is not None:
            hidden.add_(ready.positions)
        if ready.order is not None:
            tokens = hidden.view(-1, self.shape.merge_area, hidden.shape[-1])
            hidden = tokens[ready.order].flatten(0, 1)
        return VisionPass(self, hidden, ready)

    def run_block(self, at: VisionPass) -> None:
        """The next block of a pass."""
        at.update = self._block(at.blocks, at.hidden, at.update, at.ready)
        if at.blocks in self.shape.deepstack_layers:
            hidden = at.whole_hidden()
            merger = f"deepstack.{self.shape.deepstack_layers.index(at.blocks)}"
            at.deepstack.append(self._merge(merger, hidden, norm_merged=True))
        at.blocks += 1

    def finish(self, at: VisionPass) -> VisionFeatures:
        embeds = self._merge("merger", at.whole_hidden(), norm_merged=False)
        back = at.ready.back
        return VisionFeatures(embeds if back is None else embeds[back], tuple(at.deepstack))

    def _check(self, patches: Tensor, grids: Sequence[Grid]) -> None:
        merge = self.shape.merge_size
        for t, h, w in grids:
            if min(t, h, w) < 1 or h % merge or w % merge:
                raise InputError(
                    f"an image of {t}x{h}x{w} patches does not divide by {merge}x{merge}",
                    "resize the image with the model's own preprocessing",
                )
        expected = (sum(t * h * w for t, h, w in grids), self.shape.patch_elements)
        if tuple(patches.shape) != expected or not grids:
            raise InputError(
                f"image data of shape {list(patches.shape)} does not match its grids, which need "
                f"{list(expected)}",
                "resize the image with the model's own preprocessing",
            )

    def _prepare(self, grids: tuple[Grid, ...]) -> PreparedGrids:
        if self._latest is None or self._latest[0] != grids:
            pieces = [self._prepare_one(grid) for grid in grids]
            ready = pieces[0] if len(pieces) == 1 else self._side_by_side(pieces)
            ready = self._packed(ready)
            if ready.patches > UNDIVIDED:
                return ready
            self._latest = grids, ready
        return self._latest[1]

    def _prepare_one(self, grid: Grid) -> PreparedGrids:
        found = self._prepared.pop(grid, None)
        if found is None:
            found = self._build(layout(self.shape, [grid]))
        if found.patches > UNDIVIDED:
            # It needs the room.
            self._prepared.clear()
            self._latest = None
            return found
        self._prepared[grid] = found  # last in, so that the first is the one not used for longest
        kept = sum(each.patches for each in self._prepared.values())
        while kept > PATCHES_KEPT and len(self._prepared) > 1:
            kept -= self._prepared.pop(next(iter(self._prepared))).patches
        return found

    def _side_by_side(self, pieces: Sequence[PreparedGrids]) -> PreparedGrids:
        """Layouts of single pictures as that of all: asks the host for nothing but lengths."""
        orders, backs, first = [], [], 0
        for piece in pieces:
            if piece.order is not None and piece.back is not None:
                orders.append(piece.order + first)
                backs.append(piece.back + first)
                first += len(piece.order)
        cos, sin = (torch.cat(part, 1) for part in zip(*(p.rope for p in pieces), strict=True))
        positions = [piece.positions for piece in pieces if piece.positions is not None]
        return PreparedGrids(
            join_segments(_segments_of(piece.frames) for piece in pieces),
            join_segments(_segments_of(piece.windows) for piece in pieces),
            (cos, sin),
            torch.cat(positions) if positions else None,
            torch.cat(orders) if orders else None,
            torch.cat(backs) if backs else None,
        )

    def _packed(self, ready: PreparedGrids) -> PreparedGrids:
        """With segments of unequal length for one kernel, where there is one."""
        if not self._packs_segments:
            return ready
        return replace(
            ready,
            packed_frames=self._offsets(_segments_of(ready.frames)),
            packed_windows=self._offsets(_segments_of(ready.windows)),
        )

    def _offsets(self, segments: Sequence[EqualSegments]) -> Offsets | None:
        if len(segments) < 2:
            return None
        counts, lengths = (
            torch.tensor(part)
            for part in zip(*((s.count, s.length) for s in segments), strict=True)
        )
        ends = lengths.repeat_interleave(counts).cumsum(0).to(torch.int32)
        (starts,) = upload([F.pad(ends, (1, 0))], self._w["patch"].device)
        return Offsets(starts, max(run.length for run in segments))

    def _build(self, plan: VisionLayout) -> PreparedGrids:
        device = self._w["patch"].device
        known = [plan.coordinates, plan.taps, plan.order]
        sent = iter(upload([each for each in known if each is not None], device))
        coordinates, taps, order = (None if each is None else next(sent) for each in known)
        assert coordinates is not None, "every patch lies somewhere"
        positions = None
        if taps is not None and plan.tap_weights is not None:
            table = self._w["positions"]
            (shares,) = upload([plan.tap_weights], device)
            mixed = []
            for some, share in zip(
                torch.split(taps, PIECE), torch.split(shares, PIECE), strict=True
            ):
                rows = F.embedding(some, table)  # [piece, 4, hidden]
                mixed.append((rows * share.unsqueeze(-1)).sum(1).to(rows.dtype))
            positions = mixed[0] if len(mixed) == 1 else torch.cat(mixed)
        back = order.argsort() if order is not None else None
        angles = self._angles(coordinates)
        return PreparedGrids(plan.frames, plan.windows, angles, positions, order, back)

    def _angles(self, coordinates: Tensor) -> CosSin:
        """Cosine and signed sine [1, N, 1, D] in float32; half of a head turns with the row, half
        with the column."""
        half = self.shape.head_dim // 2
        exponent = torch.arange(0, half, 2, dtype=torch.float32, device=coordinates.device) / half
        angles = (coordinates[..., None].float() * (1.0 / ROPE_THETA**exponent)).flatten(
            1
        )  # [N, D/2]
        cos, sin = angles.cos(), angles.sin()
        return torch.cat((cos, cos), -1)[None, :, None], torch.cat((-sin, sin), -1)[None, :, None]

    def _block(
        self, index: int, hidden: Tensor, update: Tensor | None, ready: PreparedGrids
    ) -> Tensor | None:
        """What the block adds to `hidden` once `update` is added, which is done here; None where it
        has added that itself, as it does piece by piece."""
        at = f"{index}."
        full = not ready.windows or index in self.shape.full_attention_layers
        segments = ready.frames if full else ready.windows
        packed = ready.packed_frames if full else ready.packed_windows
        x = _by_pieces(
            lambda piece: self._linear(at + "qkv", self._added(at + "attn_norm", piece, update)),
            hidden,
        )
        heads = self.shape.num_heads
        qkv = x.view(1, -1, 3 * heads, self.shape.head_dim)
        self._turn(qkv, ready.rope, 2 * heads)
        attended = attend(qkv[0], packed or segments, self._attention, self.varlen)
        if len(hidden) <= UNDIVIDED:
            return self._after_attention(at, attended, hidden)
        for some, piece in zip(
            torch.split(attended, PIECE), torch.split(hidden, PIECE), strict=True
        ):
            piece.add_(self._after_attention(at, some, piece))
        return None

    def _after_attention(self, at: str, attended: Tensor, hidden: Tensor) -> Tensor:
        """The rest of a block, in which no patch looks at another."""
        update = self._linear(at + "proj", attended)
        return self._mlp(at, self._added(at + "mlp_norm", hidden, update))

    def _mlp(self, at: str, x: Tensor) -> Tensor:
        if self._gelu_in_product:
            name = at + "mlp_in"
            weight = self._w[name].to(x.dtype).t()
            x = torch._addmm_activation(self._w[name + "_bias"], x, weight, use_gelu=True)
        elif self.shape.gated_mlp:
            gate, up = self._linear(at + "mlp_in", x).chunk(2, dim=-1)
            x = self._activation(gate).mul_(up)
        else:
            x = self._activation(self._linear(at + "mlp_in", x))
        return self._linear(at + "mlp_out", x)

    def _added(self, name: str, hidden: Tensor, update: Tensor | None) -> Tensor:
        """The norm of the hidden states, to which `update` is added first."""
        weight = self._w[name]
        bias = None if self.shape.norm == "rms" else self._w[name + "_bias"]
        return self._add_norm(hidden, update, weight, bias, EPS)

    def _merge(self, at: str, hidden: Tensor, norm_merged: bool) -> Tensor:
        """Join the patches of each merged token: [N, hidden] -> [N / merge area, text hidden]."""
        width = self.shape.hidden_size * self.shape.merge_area
        x = hidden.view(-1, width) if norm_merged else hidden
        x = self._norm(at + ".norm", x).view(-1, width)
        return self._linear(at + ".out", _gelu(self._linear(at + ".in", x)))

    def _linear(self, name: str, x: Tensor) -> Tensor:
        weight = self._w[name]
        if weight.dtype is not x.dtype:
            weight = weight.to(x.dtype)
        return F.linear(x, weight, self._w[name + "_bias"])

    def _norm(self, name: str, x: Tensor) -> Tensor:
        weight = self._w[name]
        if self.shape.norm == "rms":
            return F.rms_norm(x, weight.shape, weight, EPS)
        return F.layer_norm(x, weight.shape, weight, self._w[name + "_bias"], EPS)


def _segments_of(segments: Sequence[EqualSegments] | Offsets) -> Sequence[EqualSegments]:
    assert not isinstance(segments, Offsets), "of a picture's own layout"
    return segments


def _by_pieces(function: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
    """A function of rows, each by itself; of many, over `PIECE` rows at a time."""
    if len(rows) <= UNDIVIDED:
        return function(rows)
    first, *others = torch.split(rows, PIECE)
    made = function(first)
    whole = made.new_empty(len(rows), made.shape[1])
    whole[: len(first)] = made
    del made
    for piece, place in zip(others, torch.split(whole, PIECE)[1:], strict=True):
        place.copy_(function(piece))
    return whole


def _gelu(x: Tensor) -> Tensor:
    """GELU in place, of the transposed view: oneDNN does not take that, and a process that uses it
    for nothing else, as in float32, would need 4 MB more of its code."""
    torch.ops.aten.gelu_(x.t())
    return x


def join_features(parts: Sequence[VisionFeatures]) -> VisionFeatures:
    """Put the features of several images in a row, in the order given."""
    if len(parts) == 1:
        return parts[0]
    stacked = zip(*(part.deepstack for part in parts), strict=True)
    return VisionFeatures(
        torch.cat([part.embeds for part in parts]), tuple(torch.cat(layer) for layer in stacked)
    )
