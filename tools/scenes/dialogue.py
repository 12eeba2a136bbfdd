"""Turns scenes into token ids with Qwen's chat layout, answer masks and 3-axis rope positions."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from random import Random

from tokenizers import Tokenizer

from tools.scenes.captions import CAPTIONS, long_caption, short_caption
from tools.scenes.prompts import (
    CAPTION_PROMPTS,
    NO_IMAGE_ANSWER,
    NO_IMAGE_PROMPTS,
    SYSTEM_PROMPTS,
    TWO_IMAGE_PROMPTS,
    unknown_prompt,
    vary,
)
from tools.scenes.questions import Turn, sample_questions
from tools.scenes.scene import Scene

TEXT_BUDGET = 150


@dataclass
class Dialogue:
    """`positions` holds (t, h, w) a token; `answer` marks the tokens that the loss counts."""

    ids: list[int] = field(default_factory=list)
    answer: list[bool] = field(default_factory=list)
    positions: list[tuple[int, int, int]] = field(default_factory=list)
    image_tokens: list[int] = field(default_factory=list)
    next_position: int = 0

    def add_text(self, ids: tuple[int, ...], *, answer: bool = False) -> None:
        self.ids += ids
        self.answer += [answer] * len(ids)
        start = self.next_position
        self.positions += [(p, p, p) for p in range(start, start + len(ids))]
        self.next_position += len(ids)

    def add_image(self, image_pad: int, rows: int, columns: int) -> None:
        """Rows x columns visual tokens; text goes on after the longer edge (Qwen3-VL)."""
        start = self.next_position
        count = rows * columns
        self.image_tokens += range(len(self.ids), len(self.ids) + count)
        self.ids += [image_pad] * count
        self.answer += [False] * count
        self.positions += [
            (start, start + row, start + column) for row in range(rows) for column in range(columns)
        ]
        self.next_position += max(rows, columns)


class Encoder:
    """Text to ids with a cache, and dialogues in the chat template's layout."""

    def __init__(self, folder: Path) -> None:
        self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.encode = lru_cache(maxsize=50_000)(self._encode)
        self.image_pad = self.tokenizer.token_to_id("<|image_pad|>")
        self.eos = self.tokenizer.token_to_id("<|im_end|>")

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text).ids)

    def open(self, grids: list[tuple[int, int]], prompt: str, system: str = "") -> Dialogue:
        """System message, pictures and the first request, up to where the answer begins."""
        dialogue = Dialogue()
        if system:
            dialogue.add_text(self.encode(f"<|im_start|>system\n{system}<|im_end|>\n"))
        dialogue.add_text(self.encode("<|im_start|>user\n"))
        for rows, columns in grids:
            dialogue.add_text(self.encode("<|vision_start|>"))
            dialogue.add_image(self.image_pad, rows, columns)
            dialogue.add_text(self.encode("<|vision_end|>"))
        dialogue.add_text(self.encode(f"{prompt}<|im_end|>\n<|im_start|>assistant\n"))
        return dialogue

    def ask(self, dialogue: Dialogue, prompt: str) -> None:
        text = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
        dialogue.add_text(self.encode(text))

    def answer(self, dialogue: Dialogue, text: str) -> None:
        dialogue.add_text(self.encode(f"{text}<|im_end|>"), answer=True)
        dialogue.add_text(self.encode("\n"))


def _caption_turn(rng: Random, scene: Scene, style: str) -> Turn:
    if style == "long" and rng.random() < 0.08:
        return ("" if rng.random() < 0.3 else unknown_prompt(rng)), long_caption(scene)
    return vary(rng, rng.choice(CAPTION_PROMPTS[style])), CAPTIONS[style](scene)


def _one_image_turns(rng: Random, scene: Scene) -> list[Turn]:
    first = rng.choices(("long", "short", "tags", ""), (5, 1.5, 1.5, 2.5))[0]
    turns = [_caption_turn(rng, scene, first)] if first else []
    others = sample_questions(rng, scene, rng.randint(1, 4))
    left = [style for style in CAPTIONS if style != first]
    others.insert(rng.randrange(len(others) + 1), _caption_turn(rng, scene, rng.choice(left)))
    return turns + others


def _caption_turns(rng: Random, scene: Scene) -> list[Turn]:
    styles = rng.choices((("long", "short"), ("long", "tags"), ("short", "tags")), (4, 4, 1))[0]
    return [_caption_turn(rng, scene, style) for style in rng.sample(styles, 2)]


def _two_image_turns(rng: Random, scenes: list[Scene]) -> list[Turn]:
    first, second = scenes
    same = first.background == second.background
    answers = {
        "both": f"Image 1: {short_caption(first)} Image 2: {short_caption(second)}",
        "first": long_caption(first),
        "second": long_caption(second),
        "same_color": "Yes." if same else "No.",
    }
    names = rng.sample(list(answers), 2)
    if rng.random() < 0.4 and "both" not in names:
        names[0] = "both"
    return [(vary(rng, rng.choice(TWO_IMAGE_PROMPTS[name])), answers[name]) for name in names]


def _no_image_turns(rng: Random) -> list[Turn]:
    tables = (*CAPTION_PROMPTS.values(), NO_IMAGE_PROMPTS)
    prompt = (
        unknown_prompt(rng) if rng.random() < 0.4 else vary(rng, rng.choice(rng.choice(tables)))
    )
    return [(prompt, NO_IMAGE_ANSWER)]


def sample_dialogue(
    rng: Random,
    encoder: Encoder,
    scenes: list[Scene],
    grids: list[tuple[int, int]],
    captions_only: bool = False,
) -> Dialogue:
    """Several requests and answers about zero, one or two pictures, within the text budget."""
    if captions_only:
        turns = _caption_turns(rng, scenes[0])
    elif len(scenes) == 1:
        turns = _one_image_turns(rng, scenes[0])
    else:
        turns = _two_image_turns(rng, scenes) if scenes else _no_image_turns(rng)
    system = ""
    if rng.random() < 0.12:
        system = unknown_prompt(rng) if rng.random() < 0.3 else rng.choice(SYSTEM_PROMPTS)
    dialogue = encoder.open(grids, turns[0][0], system)
    encoder.answer(dialogue, turns[0][1])
    for prompt, answer in turns[1:]:
        if len(dialogue.ids) - len(dialogue.image_tokens) > TEXT_BUDGET - 40:
            break
        encoder.ask(dialogue, prompt)
        encoder.answer(dialogue, answer)
    return dialogue
