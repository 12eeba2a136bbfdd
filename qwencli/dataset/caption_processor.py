"""Makes requests of tasks and captions of their answers: prompts, guards and format together.

The pipeline calls it for each task. Between a request and its answer it remembers what is known of
the picture, and what was wrong with the answer before.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from qwencli.config import SamplingOptions
from qwencli.dataset import boxes
from qwencli.dataset.caption_format import CaptionFormat, TokenCount
from qwencli.dataset.guards import Answer, Fault, FaultKind, Guards
from qwencli.dataset.hints import picture_fields, read_hints
from qwencli.dataset.languages import language_wanted
from qwencli.dataset.pipeline import Stages, Task
from qwencli.dataset.prompting import PromptSet, Question, Template
from qwencli.dataset.retries import CHANGES, DEFAULT_RETRIES, retry_of
from qwencli.dataset.sources import Item, Listing, Slot
from qwencli.engine.abilities import Abilities
from qwencli.errors import CaptionError, InputError
from qwencli.messages import GenerationRequest, Message, VisualPart, user_message
from qwencli.results import GenerationResult


@dataclass(frozen=True)
class CaptionConfig:
    """What a run wants of every answer.

    Args:
        starts_with: a template of what every answer begins with.
        retries: how often a picture is asked again whose answer has a fault.
        schema: JSON text that answers are held to; `guards.invalid` goes with it.
        boxes: answers are boxes; captions have them in the picture's own pixels.
        thinking_budget: most tokens of the thoughts in front of answers; None or 0 = none.
    """

    prompts: PromptSet
    format: CaptionFormat = field(default_factory=CaptionFormat)
    guards: Guards = field(default_factory=Guards)
    starts_with: Template | None = None
    retries: int = DEFAULT_RETRIES
    schema: str | None = None
    boxes: bool = False
    thinking_budget: int | None = None

    @property
    def wanted(self) -> Abilities:
        """Of the model."""
        return Abilities(pictures=True, thoughts=bool(self.thinking_budget))

    def settings(self) -> dict[str, Any]:
        """What decides over captions, for the manifest and for telling runs apart."""
        caption_format = self.format
        said = {
            "prompts": self.prompts.settings(),
            "starts_with": self.starts_with and self.starts_with.text,
            "prefix": caption_format.prefix and caption_format.prefix.text,
            "suffix": caption_format.suffix and caption_format.suffix.text,
            "replace": list(caption_format.replace),
            "ban": list(caption_format.ban),
            "max_sentences": caption_format.max_sentences,
            "max_caption_tokens": caption_format.max_tokens,
            "language": self.guards.language,
            "schema": self.schema,
            "thinking_budget": self.thinking_budget,
            "without_guards": sorted(set(FaultKind) - self.guards.kinds),
        }
        return {name: value for name, value in said.items() if value}


# Tokens that a reminder may add to a prompt.
_REMINDER_TOKENS = 64


@dataclass
class _PendingCaption:
    """One task between its request and its caption."""

    question: Question
    known: Mapping[str, str]
    starts_with: str
    num_prompt_tokens: int = 0


class CaptionProcessor:
    """The stages of a run. Before its first request it can be pickled, for other processes.

    Args:
        listing: tells where pictures lie; which there are is not asked.
        open_item: the picture or video of an item.
        system: messages in front of each question.
        caption_extension: of the files that are read as hints.
    """

    def __init__(
        self,
        caption_config: CaptionConfig,
        listing: Listing,
        sampling: SamplingOptions,
        open_item: Callable[[Item], VisualPart],
        *,
        system: Sequence[Message] = (),
        caption_extension: str = ".txt",
    ) -> None:
        self.config, self._listing, self._sampling = caption_config, listing, sampling
        self._open_item, self._system = open_item, tuple(system)
        self._extension = caption_extension
        self._asked: dict[Slot, _PendingCaption] = {}
        self._faults: dict[Slot, Fault] = {}
        self._captions: dict[Slot, str] = {}
        # Of a request, where an engine has said it: no retry asks for more.
        self.max_seq_len: int | None = None
        self._box_grid: int | None = None

    def count_tokens_with(self, count: TokenCount) -> None:
        """Count the tokens of `--max-caption-tokens` so, from now on."""
        caption_format = replace(self.config.format, count_tokens=count)
        self.config = replace(self.config, format=caption_format)

    def count_boxes_in(self, grid: int | None) -> None:
        """Take boxes for what this model means by them, from now on; see `Family.box_grid`."""
        self._box_grid = grid
        self.config = replace(self.config, schema=boxes.schema(grid))

    def stages(self) -> Stages:
        return Stages(
            open=self._open_item,
            name=self._listing.name,
            ask=self.request,
            fault=self.fault,
            format=self.caption,
            attempts=1 + self.config.retries,
        )

    def check_fields(self, items: Iterable[Item]) -> None:
        """Raise UsageError for a field of a template that nothing knows; needs no model."""
        self.config.prompts.check_fields(self._all_hints(items))

    def _all_hints(self, items: Iterable[Item]) -> Iterator[Mapping[str, str]]:
        for item in items:
            try:
                yield read_hints(self._listing.path(item), self._extension, item.part)
            except InputError:
                continue  # its own failure, when it is asked about

    def questions(self, item: Item) -> tuple[Question, ...]:
        """Raises InputError where what lies beside the picture cannot be read."""
        return self.config.prompts.questions(item.key, self._known_fields(item))

    def _known_fields(self, item: Item) -> dict[str, str]:
        path = self._listing.path(item)
        if not self.config.prompts.needs_hints:
            return picture_fields(item.key, path)
        return picture_fields(item.key, path, read_hints(path, self._extension, item.part))

    def request(self, task: Task, visual: VisualPart) -> GenerationRequest:
        """What is sent; after a fault with other settings.

        Raises:
            InputError: what lies beside the picture cannot be read.
        """
        slot = task.slot
        asked = self._asked.get(slot)
        if asked is None:
            known = self._known_fields(task.item)
            questions = self.config.prompts.questions(task.item.key, known)
            begin = self.config.starts_with
            asked = _PendingCaption(
                next(question for question in questions if question.field == task.field),
                known,
                begin.filled(known) if begin else "",
            )
            self._asked[slot] = asked
        text, sampling = asked.question.text, _seeded(self._sampling, task)
        fault = self._faults.get(slot)
        if fault is not None:
            retry = retry_of(
                fault,
                task.attempt,
                sampling,
                seed=_seed_of(sampling, slot),
                ban=self.config.format.ban,
                language=self.config.guards.language or language_wanted(asked.question.template),
            )
            text, sampling = retry.with_reminder(text), self._within_length(retry.sampling, asked)
        messages = (*self._system, user_message(text, (visual,)))
        return GenerationRequest(
            messages,
            sampling,
            starts_with=asked.starts_with,
            schema=self.config.schema,
            thinking=bool(self.config.thinking_budget),
            thinking_budget=self.config.thinking_budget,
        )

    def _within_length(self, sampling: SamplingOptions, asked: _PendingCaption) -> SamplingOptions:
        longer = sampling.max_new_tokens
        if self.max_seq_len is None or longer is None:
            return sampling
        room = self.max_seq_len - asked.num_prompt_tokens - _REMINDER_TOKENS
        return replace(sampling, max_new_tokens=max(1, min(longer, room)))

    def fault(self, task: Task, result: GenerationResult) -> CaptionError | None:
        """What is wrong with an answer; None where `caption` has one to write."""
        slot = task.slot
        asked = self._asked[slot]
        asked.num_prompt_tokens = result.num_prompt_tokens or 0
        if result.thoughts is not None and not result.text.strip():
            found: str | Fault = Fault(FaultKind.THINKING, "thought, and gave no answer")
        else:
            answer = Answer(
                asked.starts_with.rstrip() + result.text if asked.starts_with else result.text,
                result.finish_reason,
                prompt=asked.question.template,
                starts_with=asked.starts_with,
            )
            found = self.config.guards.caption(answer, self.config.format)
        if isinstance(found, Fault):
            self._faults[slot] = found
            if task.attempt >= self.config.retries:
                self._forget(slot)
            advice = CHANGES[found.kind].advice
            if found.kind is FaultKind.TRUNCATED and self.config.schema is not None:
                advice += " or a schema with bounds"
            return CaptionError(f"{self._listing.name(task.item)}: {found}", f"try {advice}")
        if self.config.boxes:
            size, resized = result.image_sizes[0], result.resized_sizes[0]
            found = boxes.in_pixels(found, size, resized, self._box_grid)
        self._captions[slot] = found
        return None

    def caption(self, task: Task, text: str) -> str:
        slot = task.slot
        asked, caption = self._asked[slot], self._captions.pop(slot)
        self._forget(slot)
        return self.config.format.with_frame(caption, asked.known)

    def _forget(self, slot: Slot) -> None:
        self._asked.pop(slot, None)
        self._faults.pop(slot, None)


def _seeded(sampling: SamplingOptions, task: Task) -> SamplingOptions:
    """Other samples have other seeds, and each is known; none where no token is drawn."""
    if sampling.do_sample is False:
        return sampling
    seed = sampling.seed
    if seed is None or seed < 0:
        seed = random.getrandbits(31)
    return replace(sampling, seed=(seed + task.sample) % 2**32)


def _seed_of(sampling: SamplingOptions, slot: Slot) -> int:
    """A seed of a caption's own, where the user has said none: retries can be told again."""
    if sampling.seed is not None and sampling.seed >= 0:
        return sampling.seed
    text = f"{slot.key}\0{slot.field}\0{slot.sample}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(text).digest()[:4], "big")
