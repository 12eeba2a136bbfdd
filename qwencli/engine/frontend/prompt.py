"""From a conversation to what a model is fed: token ids, patches and their grids.

Both engines that hold a model themselves build their inputs here, so they are equal by
construction. What runs: pictures -> template -> timestamps of videos -> ids -> one pad token a
picture becomes as many as the picture takes.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qwencli.engine.frontend.chat_template import VIDEO_PLACEHOLDER, ChatTemplate, texts_in
from qwencli.engine.frontend.preprocess import (
    GridTHW,
    Patchify,
    Visual,
    VisualInputs,
    patchify_on_host,
    preprocess,
)
from qwencli.engine.frontend.processor_config import ImageProcessorConfig
from qwencli.engine.frontend.tokenizer import THOUGHT, THOUGHT_END, ContentGuard, Tokenizer
from qwencli.errors import InputError, ModelFileError, QwenCliError
from qwencli.messages import Message, TextPart, VisualPart, text_message
from qwencli.results import Size

# Keys of config.json that give a control token's id to the model.
_VISION_TOKENS = {
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
}

_VIDEO_PAD = "<|video_pad|>"
# What Qwen's documentation puts behind thoughts that are cut off: models of theirs answer from what
# they have then, where after the bare tag they may go on thinking in the answer.
OUT_OF_THOUGHTS = (
    "\n\nConsidering the limited time by the user, I have to give the solution based on the "
    "thinking directly now.\n"
)
GAP = "\n\n"


@dataclass(frozen=True)
class ThoughtBudget:
    """How many tokens a model may think, and what its thoughts end with.

    Args:
        tokens: at least 1. end_id: the token `</think>`.
        closing_ids: what thoughts that have taken all are ended with, the tag included.
        gap_ids: what stands between the tag and an answer whose beginning is not the model's.
    """

    tokens: int
    end_id: int
    closing_ids: tuple[int, ...]
    gap_ids: tuple[int, ...]


@dataclass(frozen=True)
class Prompt:
    """One request, ready for a model. No batch dimension.

    Args:
        inputs: its pictures and videos in the order of their tokens; None without any.
        preprocess_s: seconds that building this took.
        image_token_id, video_token_id: the ids a model replaces by embeddings; None for text
            models.
        opens_thought: whether it ends in a `<think>`, which the model goes on from.
        patch_size: side of a patch in pixels; None for text models.
        budget: of its thoughts, where they have one; they come first then.
        forced_ids: the answer's first tokens, where they are known: the last of `input_ids`.
        notes: a line for each picture that had to be smaller than the model would have taken it.
    """

    input_ids: list[int]
    inputs: VisualInputs | None
    preprocess_s: float
    image_token_id: int | None
    video_token_id: int | None
    opens_thought: bool = False
    patch_size: int | None = None
    budget: ThoughtBudget | None = None
    forced_ids: Sequence[int] = ()
    notes: tuple[str, ...] = ()

    def with_forced(self, ids: Sequence[int]) -> Prompt:
        """The same, with the first tokens of the answer at its end."""
        return replace(self, input_ids=[*self.input_ids, *ids], forced_ids=tuple(ids))

    @property
    def image_sizes(self) -> tuple[Size, ...]:
        """(width, height) of each picture or video frame before it is resized."""
        return self.inputs.image_sizes if self.inputs else ()

    @property
    def resized_sizes(self) -> tuple[Size, ...]:
        """(width, height) of each picture or video frame as the model sees it."""
        side = self.patch_size or 0
        return tuple((columns * side, rows * side) for _, rows, columns in self.grid_thw)

    @property
    def visuals(self) -> tuple[Visual, ...]:
        return self.inputs.visuals if self.inputs else ()

    @property
    def grid_thw(self) -> tuple[GridTHW, ...]:
        """By picture or video: steps of time, rows and columns of patches."""
        return tuple(visual.grid for visual in self.visuals)

    @property
    def num_image_tokens(self) -> int:
        """Tokens of pictures and videos."""
        return sum(self.inputs.num_tokens) if self.inputs else 0

    @property
    def mm_token_type_ids(self) -> list[int]:
        """By token: 1 where a picture goes, 2 where a video does, 0 for text."""
        kinds = {self.image_token_id: 1, self.video_token_id: 2}
        return [kinds.get(id_, 0) for id_ in self.input_ids]


def can_think(template: ChatTemplate, *, as_parts: bool) -> bool:
    """Whether a chat template has a switch of thoughts that does something, or opens a thought in
    any case. What it says of thoughts of earlier turns is neither.

    Args:
        as_parts: see `ChatTemplate.render`.
    """
    hello = (text_message("user", "Hello."),)
    try:
        off, on = (
            template.render(hello, as_parts=as_parts, thinking=thinking)
            for thinking in (False, True)
        )
    except QwenCliError:  # it may know other conversations
        return template.names_switch
    return on.rstrip().endswith(THOUGHT) or (template.names_switch and on != off)


@dataclass(frozen=True)
class PromptBuilder:
    """Everything between a conversation and one model's inputs; holds no state.

    Args:
        processor: how the model wants pictures; None for a text model.
        model_ids: ids the model expects where they are not the tokenizer's own.
        patchify: what resizes pictures and cuts them into patches.
        own_pixels: what a picture might have but for `within`; None = nothing is cut.
    """

    tokenizer: Tokenizer
    template: ChatTemplate
    processor: ImageProcessorConfig | None
    model_ids: Mapping[int, int] = field(default_factory=dict)
    patchify: Patchify = patchify_on_host
    own_pixels: int | None = None

    @property
    def max_pixels(self) -> int:
        """Height x width of a picture at most; 0 for a text model."""
        return 0 if self.processor is None else self.processor.max_pixels

    def within(self, max_pixels: int) -> PromptBuilder:
        """The same for pictures of at most so many pixels, as far as the lower bound allows; their
        prompts note what that made smaller."""
        if self.processor is None:
            return self
        most = max(max_pixels, self.processor.min_pixels, self.processor.factor**2)
        if most >= self.max_pixels:
            return self
        processor = self.processor.with_pixels(None, most)
        own = self.max_pixels if self.own_pixels is None else self.own_pixels
        return replace(self, processor=processor, own_pixels=own)

    @classmethod
    def from_folder(cls, folder: Path, processor: ImageProcessorConfig | None) -> PromptBuilder:
        """The builder of the model in `folder`.

        Raises:
            ModelFileError: tokenizer or template are missing or broken.
        """
        return cls(Tokenizer.from_folder(folder), ChatTemplate.from_folder(folder), processor)

    @classmethod
    def dummy(
        cls,
        folder: Path,
        processor: ImageProcessorConfig | None,
        hub_config: Mapping[str, Any],
    ) -> PromptBuilder:
        """For random weights of any model: its own pictures, the text side of another model.

        The picture tokens get the ids that `hub_config` (the model's config.json) expects; all
        other ids are those of `folder`, whose vocabulary must be the smaller one.

        Args:
            folder: a complete small model, such as the bundled one.
        """
        builder = cls.from_folder(folder, processor)
        if processor is None:
            return builder
        model_ids = {
            builder.tokenizer.token_id(token): hub_config[key]
            for key, token in _VISION_TOKENS.items()
            if key in hub_config
        }
        return replace(builder, model_ids=model_ids)

    @cached_property
    def can_think(self) -> bool:
        """Whether thoughts can be asked for."""
        return can_think(self.template, as_parts=self.processor is not None)

    def turn_end_ids(self) -> tuple[int, ...]:
        """What this model's turns end with: by its template, and by its tokenizer (`eos_token`)."""
        answer = "An answer."
        question = text_message("user", "A question.")
        chat = (question, text_message("assistant", answer), question)
        try:
            rendered = self.template.render(chat, as_parts=self.processor is not None)
        except QwenCliError:  # it may know other conversations, and is asked for those in time
            rendered = ""
        _, found, after = rendered.rpartition(answer)
        ends = (after.lstrip() if found else "", self.template.named_tokens.get("eos_token", ""))
        tokens = map(self.tokenizer.added_token_at_start, ends)
        return tuple(dict.fromkeys(self.tokenizer.token_id(token) for token in tokens if token))

    def build(
        self,
        messages: tuple[Message, ...],
        *,
        thinking: bool = False,
        thinking_budget: int | None = None,
        tools: Sequence[str] = (),
        starts_with: str = "",
        at_once: bool = False,
        most_tokens: int | None = None,
    ) -> Prompt:
        """The model's inputs for the answer that follows `messages`.

        Args:
            thinking, thinking_budget, tools: see `GenerationRequest`.
            at_once: the answer begins here, and no thoughts in front of it.
            starts_with: the beginning of that answer, behind which the model goes on. Spaces at its
                end are left out, as tokens of words have theirs in front.
            most_tokens: what far longer texts are refused for before they are split to their end.

        Raises:
            PromptTooLongError: a long text has more than `most_tokens`.
            InputError: no messages, pictures for a text model, a picture no model takes, text
                that is not Unicode, or a conversation the template refuses.
            ModelFileError: the template does not give every picture its place.
        """
        start = time.perf_counter()
        parts = [part for message in messages for part in message.parts]
        pictures = [part for part in parts if not isinstance(part, TextPart)]
        texts = [part.text for part in parts if isinstance(part, TextPart)]
        texts += [starts_with] if starts_with else []
        functions = [json.loads(tool) for tool in tools]
        texts += texts_in(functions)
        for call in (call for message in messages for call in message.tool_calls):
            texts += [call.name, *texts_in(json.loads(call.arguments))]
        if not messages:
            raise InputError("there is no message to answer", "give a prompt or a picture")
        if pictures and self.processor is None:
            raise InputError(
                f"this model reads text only, it cannot look at {pictures[0].name}",
                "choose a vision-language model with --model",
            )
        if functions and not self.template.takes_tools:
            raise InputError(
                "this model's chat template has no place for tools",
                "leave them out, or choose another model",
            )
        for text in texts:
            _check_unicode(text)

        inputs = None
        if pictures and self.processor is not None:
            inputs = preprocess(pictures, self.processor, self.patchify)
        guard = self.tokenizer.guard(texts)
        thinking = thinking and thinking_budget != 0
        # What the answer begins with stands behind thoughts; here there are none.
        at_once = at_once or thinking_budget == 0 or bool(starts_with.strip())
        rendered = self._rendered(messages, guard, thinking, functions, inputs)
        opens_thought = rendered.rstrip().endswith(THOUGHT)
        unopened = thinking and not opens_thought and self.can_think
        if thinking_budget and not at_once and unopened:
            # Models whose template leaves it to them begin like this themselves.
            rendered, opens_thought = f"{rendered}{THOUGHT}\n", True
        if opens_thought and at_once:
            rendered += f"\n{THOUGHT_END}\n\n"
            opens_thought = False
        if starts_with.strip():
            rendered += guard.protect(starts_with.rstrip())
        if most_tokens is not None:
            self.tokenizer.check_length(rendered, guard, most_tokens)
        ids = self.tokenizer.encode(rendered, guard)
        budget = None
        if thinking_budget and opens_thought:
            budget = self._budget(thinking_budget)
        if self.processor is None:
            seconds = time.perf_counter() - start
            return Prompt(
                ids,
                None,
                seconds,
                None,
                None,
                opens_thought=opens_thought,
                budget=budget,
            )
        image, video = (self.tokenizer.token_id(token) for token in ("<|image_pad|>", _VIDEO_PAD))
        self._check_places(ids, pictures, inputs, image, video)
        return Prompt(
            input_ids=self._expand(ids, (image, video), inputs),
            inputs=inputs,
            preprocess_s=time.perf_counter() - start,
            image_token_id=self.model_ids.get(image, image),
            video_token_id=self.model_ids.get(video, video),
            opens_thought=opens_thought,
            budget=budget,
            patch_size=self.processor.patch_size,
            notes=self._notes(inputs),
        )

    def _budget(self, tokens: int) -> ThoughtBudget:
        if not self.tokenizer.has_token(THOUGHT_END):
            raise InputError(
                f"this model has no token {THOUGHT_END}, so that its thoughts cannot be ended",
                "leave out --thinking-budget",
            )
        encode = self.tokenizer.encode
        end, gap = self.tokenizer.token_id(THOUGHT_END), encode(GAP)
        return ThoughtBudget(tokens, end, (*encode(OUT_OF_THOUGHTS), end, *gap), tuple(gap))

    def _notes(self, inputs: VisualInputs | None) -> tuple[str, ...]:
        if inputs is None or self.own_pixels is None or self.processor is None:
            return ()
        side = self.processor.patch_size
        return tuple(
            f"a {'video' if visual.video else 'picture'} of {width}x{height} is shown as "
            f"{visual.grid[2] * side}x{visual.grid[1] * side}, which is what fits "
            "(--max-pixels N keeps a size, --quantization or --max-new-tokens make room)"
            for visual, (width, height) in zip(inputs.visuals, inputs.image_sizes, strict=True)
            if min(width * height, self.own_pixels) > self.max_pixels
        )

    def _rendered(
        self,
        messages: tuple[Message, ...],
        guard: ContentGuard,
        thinking: bool,
        tools: Sequence[Any],
        inputs: VisualInputs | None,
    ) -> str:
        rendered = self.template.render(
            messages,
            as_parts=self.processor is not None,
            thinking=thinking,
            tools=tools,
            protect=guard.protect,
        )
        if inputs is not None and self.processor is not None and self.processor.video.timestamps:
            rendered = _with_timestamps(rendered, inputs.visuals)
        return rendered

    def _places(self, visual: Visual, tokens: int) -> list[int]:
        """How many tokens go into each of a visual's places in the prompt."""
        assert self.processor is not None, "only vision models have pictures"
        steps = visual.grid[0] if visual.video and self.processor.video.timestamps else 1
        return [tokens // steps] * steps

    def _check_places(
        self,
        ids: Sequence[int],
        pictures: Sequence[VisualPart],
        inputs: VisualInputs | None,
        image: int,
        video: int,
    ) -> None:
        """Raise ModelFileError unless the template gives each picture its place, in order."""
        visuals = inputs.visuals if inputs else ()
        wanted = [
            video if visual.video else image for visual in visuals for _ in self._places(visual, 0)
        ]
        found = [id_ for id_ in ids if id_ in (image, video)]
        if found != wanted:
            # Timestamps have made a place for each step of a video, where there is a place at all.
            raise ModelFileError(
                f"{self.template.source} makes {len(found)} places for {len(pictures)} pictures"
                if len(found) != len(wanted)
                else f"{self.template.source} mixes up pictures and videos",
                "download the model's files again",
            )

    def _expand(
        self, ids: Sequence[int], pads: tuple[int, int], inputs: VisualInputs | None
    ) -> list[int]:
        """Repeat each place's pad token as often as it has tokens."""
        if inputs is None:
            return [self.model_ids.get(id_, id_) for id_ in ids] if self.model_ids else list(ids)
        shown = zip(inputs.visuals, inputs.num_tokens, strict=True)
        counts = iter([n for visual, tokens in shown for n in self._places(visual, tokens)])
        expanded: list[int] = []
        for id_ in ids:
            times = next(counts) if id_ in pads else 1
            expanded.extend([self.model_ids.get(id_, id_)] * times)
        return expanded


def _with_timestamps(rendered: str, visuals: Sequence[Visual]) -> str:
    """Put in the place of each video one place a step of time, each after the time it is seen.

    That is the layout Qwen3-VL was trained on (its processor's `replace_video_token`).
    """
    videos = iter([visual for visual in visuals if visual.video])

    def steps(match: re.Match[str]) -> str:
        video = next(videos, None)
        if video is None:
            return match[0]
        return "".join(f"<{time_s:.1f} seconds>{VIDEO_PLACEHOLDER}" for time_s in video.times_s)

    return re.sub(re.escape(VIDEO_PLACEHOLDER), steps, rendered)


def _check_unicode(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"the text is not valid Unicode at character {error.start + 1}",
            "give it in UTF-8",
        ) from error
