"""A batch of prompts as tensors on the device: ids, positions, padding, image features.

Everything the host has to know about a prompt (where its pictures are, how long it is, how far
rotary positions have run ahead) is worked out here once, before the device is given any work.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from qwencli.engine.frontend.preprocess import Visual
from qwencli.engine.layers.decoder import DeepStack
from qwencli.engine.layers.positions import PromptPositions, prompt_positions
from qwencli.engine.layers.vision_tower import VisionFeatures
from qwencli.engine.loading.upload import upload
from qwencli.errors import InputError
from qwencli.models.shapes import ModelShape


@dataclass(frozen=True)
class Prompt:
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


def join_features(parts: Sequence[VisionFeatures]) -> VisionFeatures:
    """Put the features of several images in a row, in the order given."""
    if len(parts) == 1:
        return parts[0]
    stacked = zip(*(part.deepstack for part in parts), strict=True)
    return VisionFeatures(
        torch.cat([part.embeds for part in parts]), tuple(torch.cat(layer) for layer in stacked)
    )


def lay_out(shape: ModelShape, prompt: Prompt) -> PromptPositions:
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
    prompts: Sequence[Prompt],
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
