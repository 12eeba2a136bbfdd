"""A batch of prompts as tensors on the device: ids, rotary positions, padding, image features.

Everything the host has to know about a prompt (where its pictures are, how long it is, how far
rotary positions have run ahead) is worked out here once, before the device is given any work, so
that nothing has to be read back from it.

Positions have one axis for text, three (time, row, column) around pictures. After the prompt all
three advance together from its last token, at the distance `delta` (never above 0) from the place
in the sequence. Source of the scheme: Qwen2-VL (arXiv 2409.12191, section 2.1, M-RoPE) and the
rules that the reference implementation adds: Qwen2.5-VL spaces a video's frames by real time,
Qwen3-VL writes timestamps between frames instead, so that each frame is a picture of its own.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from qwencli.engine.device_memory import upload
from qwencli.engine.frontend.preprocess import Visual
from qwencli.engine.layers.decoder import DeepStack
from qwencli.engine.layers.vision_tower import VisionFeatures
from qwencli.errors import InputError
from qwencli.models.shapes import ModelShape


@dataclass(frozen=True)
class PromptPositions:
    """Positions [3, S] (int64), the distance of later positions to their place in the sequence,
    and the places [N] of image and video tokens in the prompt, in order."""

    positions: torch.Tensor
    delta: int
    visual_places: torch.Tensor


def prompt_positions(
    shape: ModelShape, ids: Sequence[int], visuals: Iterable[Visual]
) -> PromptPositions:
    """Lay out one prompt of at least one token. `visuals` come in the order of their tokens.

    Raises:
        InputError: the image or video tokens in `ids` do not match `visuals`.
    """
    visuals = tuple(visuals)
    if shape.vision is None and visuals:
        raise InputError(f"{shape.model_type} is a text model and takes no images")
    shows = visuals or shape.image_token_id in ids or shape.video_token_id in ids
    if shape.vision is None or not shows:
        places = torch.empty(0, dtype=torch.int64)
        return PromptPositions(torch.arange(len(ids)).expand(3, -1), 0, places)
    tokens = torch.tensor(ids, dtype=torch.int64)
    kinds = torch.tensor([shape.image_token_id, shape.video_token_id])
    places = torch.isin(tokens, kinds).nonzero().view(-1)
    pieces: list[torch.Tensor] = []
    place = position = used = 0
    for visual in _split(shape, visuals):
        count = visual.num_tokens(shape.vision.merge_size)
        token = kinds[1 if visual.video else 0]
        span = places[used : used + count]
        start = int(span[0]) if len(span) else len(ids)
        if (
            len(span) < count
            or int(span[-1]) != start + count - 1
            or bool(tokens[span].ne(token).any())
        ):
            raise _mismatch(shape, tokens, visual, count)
        pieces.append(torch.arange(position, position + start - place).expand(3, -1))
        position += start - place
        pieces.append(_grid(shape, visual) + position)
        position += max(visual.grid[1:]) // shape.vision.merge_size
        place, used = start + count, used + count
    if used != len(places):
        raise InputError(
            f"the prompt has {len(places)} image tokens, its images and videos make {used}",
            "give as many images as the prompt has places for",
        )
    pieces.append(torch.arange(position, position + len(ids) - place).expand(3, -1))
    positions = torch.cat(pieces, dim=1)
    # From the last token on, not from the furthest frame: the reference's generate() does so.
    return PromptPositions(positions, int(positions[:, -1].max()) + 1 - len(ids), places)


def _split(shape: ModelShape, visuals: Iterable[Visual]) -> Iterator[Visual]:
    for visual in visuals:
        if visual.video and shape.split_video_frames:
            frame = replace(visual, grid=(1, *visual.grid[1:]))
            yield from [frame] * visual.grid[0]
        else:
            yield visual


def _grid(shape: ModelShape, visual: Visual) -> torch.Tensor:
    """Positions [3, tokens] of one picture, counted from its first."""
    assert shape.vision is not None, "only models with a vision tower get here"
    t, h, w = visual.grid
    h, w = h // shape.vision.merge_size, w // shape.vision.merge_size
    interval = 1.0
    if visual.video and shape.tokens_per_second is not None:
        interval = shape.tokens_per_second * visual.seconds_per_grid
    # float32 and truncation are the reference's arithmetic; other rounding moves whole frames.
    time = (torch.arange(t) * interval).long()
    axes = torch.meshgrid(time, torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack(axes).view(3, -1)


def _mismatch(shape: ModelShape, tokens: torch.Tensor, visual: Visual, count: int) -> InputError:
    kind, token = (
        ("video", shape.video_token_id) if visual.video else ("image", shape.image_token_id)
    )
    total = int(tokens.eq(token).sum()) if token is not None else 0
    t, h, w = visual.grid
    return InputError(
        f"the {kind} of {t}x{h}x{w} patches needs {count} {kind} tokens in a row; "
        f"the prompt's {total} {kind} tokens do not match",
        "give the images in the order of the prompt, each with the tokens of its own grid",
    )


@dataclass(frozen=True)
class ModelPrompt:
    """One prompt: its token ids, and its images and videos in the order of their tokens."""

    ids: Sequence[int]
    visuals: Sequence[Visual] = ()


@dataclass(frozen=True)
class PromptInputs:
    """A batch of prompts, padded on the left to one length S.

    Args:
        ids: int64 [B, S]. positions: int64 [3, B, S].
        next_positions: int64 [B], rotary position of the first token after the prompt.
        left_pads: int32 [B]; None where no row is padded.
        places: rows of the flattened [B * S] that take image features, ascending; on the host.
        rows: the same on the device, int64.
        features: of all images and videos in the order of `places`; None = no pictures.
    """

    ids: torch.Tensor
    positions: torch.Tensor
    next_positions: torch.Tensor
    left_pads: torch.Tensor | None
    places: tuple[int, ...]
    rows: torch.Tensor
    features: VisionFeatures | None

    @property
    def batch(self) -> int:
        return self.ids.shape[0]

    @property
    def length(self) -> int:
        return self.ids.shape[1]

    def visual_slice(
        self, start: int, stop: int
    ) -> tuple[torch.Tensor, torch.Tensor, DeepStack] | None:
        """Image features of the slots from `start` to `stop`: their rows in the flattened
        [B * (stop - start)] piece (on the device), the embeddings, and the DeepStack features.

        A piece of a batch of one only, unless it is the whole prompt.
        """
        if self.features is None:
            return None
        assert self.batch == 1 or (start == 0 and stop == self.length), (
            "batches are prefilled whole"
        )
        end = stop if self.batch == 1 else self.batch * self.length
        first, last = bisect_left(self.places, start), bisect_left(self.places, end)
        if first == last:
            return None
        embeds = self.features.embeds[first:last]
        places = self.rows[first:last] - start
        deepstack = DeepStack(places, [feature[first:last] for feature in self.features.deepstack])
        return places, embeds, deepstack


def lay_out(shape: ModelShape, prompt: ModelPrompt) -> PromptPositions:
    """Where a prompt's tokens and pictures are.

    Raises:
        InputError: an empty prompt, ids outside the vocabulary, image tokens that do not match the
            images.
    """
    if not prompt.ids:
        raise InputError("the prompt is empty", "give at least one token")
    if not 0 <= min(prompt.ids) <= max(prompt.ids) < shape.text.vocab_size:
        raise InputError(
            f"the prompt has token ids outside the vocabulary of {shape.text.vocab_size}",
            "tokenizer and weights belong to different models",
        )
    return prompt_positions(shape, prompt.ids, prompt.visuals)


def prompt_inputs(
    shape: ModelShape,
    prompts: Sequence[ModelPrompt],
    features: VisionFeatures | None,
    device: torch.device,
) -> PromptInputs:
    """Lay out `prompts` as one batch.

    Raises:
        InputError: an empty prompt, ids outside the vocabulary, image tokens that do not match the
            images, or `features` of another size than the image tokens.
    """
    length = max(len(prompt.ids) for prompt in prompts)
    ids = torch.zeros(len(prompts), length, dtype=torch.int64)
    positions = torch.zeros(3, len(prompts), length, dtype=torch.int64)
    following: list[int] = []
    places: list[int] = []
    for row, prompt in enumerate(prompts):
        laid = lay_out(shape, prompt)
        pad = length - len(prompt.ids)
        ids[row, pad:] = torch.tensor(prompt.ids)
        positions[:, row, pad:] = laid.positions
        following.append(len(prompt.ids) + laid.delta)
        places.extend((laid.visual_places + row * length + pad).tolist())
    given = 0 if features is None else len(features.embeds)
    if given != len(places):
        raise InputError(
            f"the prompt has {len(places)} image tokens, the images were encoded to {given}",
            "give as many images as the prompt has places for",
        )
    pads = [length - len(prompt.ids) for prompt in prompts]
    host = [ids, positions, *(torch.tensor(some) for some in (following, pads))]
    host.append(torch.tensor(places, dtype=torch.int64))
    sent = upload(host, device)
    return PromptInputs(
        ids=sent[0],
        positions=sent[1],
        next_positions=sent[2],
        left_pads=sent[3].to(torch.int32) if any(pads) else None,
        places=tuple(places),
        rows=sent[4],
        features=features,
    )
