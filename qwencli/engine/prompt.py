"""From a conversation to what a model is fed: token ids, patches and their grids.

Both engines that hold a model themselves build their inputs here, so they are equal by
construction. What runs: template -> ids -> pictures -> one pad token a picture becomes as many
as the picture takes.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from qwencli.engine.chat_template import ChatTemplate
from qwencli.engine.preprocess import (
    VISION_FAMILIES,
    GridTHW,
    ImageInputs,
    ImageProcessorConfig,
    preprocess_images,
)
from qwencli.engine.tokenizer import Tokenizer
from qwencli.errors import InputError, ModelFileError
from qwencli.messages import ImagePart, Message, TextPart

# Keys of config.json that give a control token's id to the model.
_VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}


@dataclass(frozen=True)
class Prompt:
    """One request, ready for a model. No batch dimension.

    Args:
        pixel_values: float32 [num_patches, C * T * P * P]; None without pictures.
        grid_thw: by picture: frames, rows and columns of patches.
        preprocess_s: seconds that building this took.
        image_token_id: the id a model replaces by a picture's embeddings; None for text models.
    """

    input_ids: list[int]
    pixel_values: npt.NDArray[np.float32] | None
    grid_thw: tuple[GridTHW, ...]
    num_image_tokens: int
    preprocess_s: float
    image_token_id: int | None

    @property
    def mm_token_type_ids(self) -> list[int]:
        """By token: 1 where a picture goes, 0 for text."""
        return [int(id_ == self.image_token_id) for id_ in self.input_ids]


@dataclass(frozen=True)
class PromptBuilder:
    """Everything between a conversation and one model's inputs; holds no state.

    Args:
        processor: how the model wants pictures; None for a text model.
        model_ids: ids the model expects where they are not the tokenizer's own.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    processor: ImageProcessorConfig | None
    model_ids: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def from_folder(
        cls, folder: Path, *, family: str, min_pixels: int | None, max_pixels: int | None
    ) -> PromptBuilder:
        """The builder of the model in `folder`.

        Args:
            family: config.json's model_type.
            min_pixels, max_pixels: the user's bounds; None keeps the model's own.

        Raises:
            ModelFileError: tokenizer, template or processor files are missing or broken.
            UsageError: bounds that no picture can meet.
        """
        processor = None
        if family in VISION_FAMILIES:
            processor = ImageProcessorConfig.from_files(folder, family)
            processor = processor.with_pixels(min_pixels, max_pixels)
        return cls(Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder), processor)

    @classmethod
    def dummy(
        cls,
        folder: Path,
        *,
        hub_config: Mapping[str, Any],
        min_pixels: int | None,
        max_pixels: int | None,
    ) -> PromptBuilder:
        """For random weights of any model: its own pictures, the text side of another model.

        The picture tokens get the ids that `hub_config` (the model's config.json) expects; all
        other ids are those of `folder`, whose vocabulary must be the smaller one.

        Args:
            folder: a complete small model, such as the bundled one.
        """
        tokenizer = Tokenizer.from_folder(folder)
        family = hub_config["model_type"]
        processor = None
        model_ids: dict[int, int] = {}
        if family in VISION_FAMILIES:
            processor = ImageProcessorConfig.for_family(family).with_pixels(min_pixels, max_pixels)
            model_ids = {
                tokenizer.token_id(token): hub_config[key]
                for key, token in _VISION_TOKENS.items()
                if key in hub_config
            }
        return cls(tokenizer, ChatTemplate.from_folder(folder), processor, model_ids)

    def build(self, messages: tuple[Message, ...], *, thinking: bool = False) -> Prompt:
        """The model's inputs for the answer that follows `messages`.

        Raises:
            InputError: no messages, pictures for a text model, a picture no model takes, text
                that is not Unicode, or a conversation the template refuses.
            ModelFileError: the template does not give every picture its place.
        """
        start = time.perf_counter()
        parts = [part for message in messages for part in message.parts]
        pictures = [part for part in parts if isinstance(part, ImagePart)]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        if not messages:
            raise InputError("there is no message to answer", "give a prompt or a picture")
        if pictures and self.processor is None:
            raise InputError(
                f"this model reads text only, it cannot look at {pictures[0].name}",
                "choose a vision-language model with --model",
            )
        for text in texts:
            _check_unicode(text)

        ids = self._ids(messages, texts, thinking)
        if self.processor is None:
            return Prompt(ids, None, (), 0, time.perf_counter() - start, None)
        pad = self.tokenizer.token_id("<|image_pad|>")
        if ids.count(pad) != len(pictures):
            raise ModelFileError(
                f"{self.template.source} makes {ids.count(pad)} places "
                f"for {len(pictures)} pictures",
                "download the model's files again",
            )
        inputs = preprocess_images(pictures, self.processor) if pictures else None
        ids = self._expand(ids, pad, inputs)
        return Prompt(
            input_ids=ids,
            pixel_values=inputs.pixel_values if inputs else None,
            grid_thw=inputs.grid_thw if inputs else (),
            num_image_tokens=sum(inputs.num_tokens) if inputs else 0,
            preprocess_s=time.perf_counter() - start,
            image_token_id=self.model_ids.get(pad, pad),
        )

    def _ids(self, messages: tuple[Message, ...], texts: list[str], thinking: bool) -> list[int]:
        guard = self.tokenizer.guard(texts)
        rendered = self.template.render(
            messages,
            as_parts=self.processor is not None,
            thinking=thinking,
            protect=guard.protect,
        )
        return self.tokenizer.encode(rendered, guard)

    def _expand(self, ids: list[int], pad: int, inputs: ImageInputs | None) -> list[int]:
        """Repeat each picture's pad token as often as the picture has tokens."""
        counts = iter(inputs.num_tokens if inputs else ())
        expanded: list[int] = []
        for id_ in ids:
            times = next(counts) if id_ == pad else 1
            expanded.extend([self.model_ids.get(id_, id_)] * times)
        return expanded


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode at character {error.start + 1}",
            "give it in UTF-8",
        ) from error
