"""Greedy answers on held-out scenes of all renderers, and what was wrong with the wrong ones."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from random import Random

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from tools.scenes.batches import Batch, collate, draw_pictures, scene_rows
from tools.scenes.captions import CAPTIONS, short_caption
from tools.scenes.dialogue import Dialogue, Encoder
from tools.scenes.draw_pil import draw, through_jpeg
from tools.scenes.draw_sdf import draw_batch
from tools.scenes.grid import merged_grid
from tools.scenes.model import Qwen3VL
from tools.scenes.prompts import CAPTION_PROMPTS
from tools.scenes.questions import QUESTIONS
from tools.scenes.scene import Scene, sample_canvas, sample_scene
from tools.scenes.words import COLORS, SHAPES

MODES = tuple(
    (kind, file) for kind in ("pil-smooth", "pil-hard", "sdf") for file in ("png", "jpeg")
)
MAX_NEW_TOKENS = 80
_OBJECT = re.compile(
    rf"(small|large) ({'|'.join(COLORS)}) ({'|'.join(SHAPES)}) ([a-z ]+?)(?:,| and |$)"
)


@dataclass
class HeldOut:
    scenes: list[Scene]
    batch: Batch


class HeldOutBatches(Dataset[HeldOut]):
    """Batch `index`: one canvas, scene i drawn in mode i % 6. Never shares a seed with training."""

    def __init__(self, encoder: Encoder, batches: int, samples: int = 72, seed: int = 0) -> None:
        self.encoder, self.batches, self.samples, self.seed = encoder, batches, samples, seed

    def __len__(self) -> int:
        return self.batches

    def __getitem__(self, index: int) -> HeldOut:
        rng = Random(f"heldout-batch/{self.seed}/{index}")
        canvas = sample_canvas(rng)
        scenes = [sample_scene(rng, canvas) for _ in range(self.samples)]
        pictures = draw_pictures(rng, scenes, 0, ("",))
        drawn = [_draw(rng, scene, *MODES[i % len(MODES)]) for i, scene in enumerate(scenes)]
        resized = [image.resize(pictures.target, 3) for image in drawn]
        stacked = torch.stack(
            [torch.frombuffer(bytearray(i.tobytes()), dtype=torch.uint8) for i in resized]
        )
        pictures.drawn = stacked.view(len(scenes), pictures.target[1], pictures.target[0], 3)
        pictures.background = pictures.background[:0]
        grid = merged_grid(pictures.target)
        dialogues = [self.encoder.open([grid], CAPTION_PROMPTS["long"][0]) for _ in scenes]
        for dialogue, scene in zip(dialogues, scenes, strict=True):
            self.encoder.answer(dialogue, CAPTIONS["long"](scene))
        return HeldOut(scenes, collate(dialogues, [pictures], self.encoder.eos))


def _draw(rng: Random, scene: Scene, kind: str, file: str) -> Image.Image:
    if kind == "sdf":
        pixels = draw_batch(
            (scene.width, scene.height),
            torch.tensor([scene.background_rgb], dtype=torch.float32),
            *scene_rows([scene]),
            torch.tensor([float(rng.random() < 0.5)]),
            torch.tensor([int(rng.random() < 0.3)]),
            torch.tensor([rng.uniform(0.08, 0.16)]),
            torch.device("cpu"),
        )
        image = Image.fromarray(pixels[0].byte().permute(1, 2, 0).contiguous().numpy())
    else:
        image = draw(scene, antialias=kind == "pil-smooth")
    return through_jpeg(image, 85) if file == "jpeg" else image


@torch.no_grad()
def greedy(
    model: Qwen3VL,
    encoder: Encoder,
    dialogues: list[Dialogue],
    seen: tuple[Tensor | None, list[Tensor]],
) -> list[str]:
    """Answers without a cache: the whole (short) sequence runs again for each token."""
    device = next(model.parameters()).device
    lengths = torch.tensor([len(dialogue.ids) for dialogue in dialogues], device=device)
    batch = collate(dialogues, [], encoder.eos)
    room = (0, MAX_NEW_TOKENS)
    ids = torch.nn.functional.pad(batch.ids, room, value=encoder.eos).to(device)
    positions = torch.nn.functional.pad(batch.positions, (0, 0, *room)).to(device)
    after = torch.tensor([dialogue.next_position for dialogue in dialogues], device=device)
    image_index = batch.image_index.to(device)
    rows = torch.arange(len(dialogues), device=device)
    done = torch.zeros_like(rows, dtype=torch.bool)
    longest = int(lengths.max())
    for step in range(MAX_NEW_TOKENS):
        used = longest + step
        hidden = model.hidden(ids[:, :used], positions[:, :used], image_index, *seen)
        token = model.logits(hidden[rows, lengths + step - 1]).argmax(-1)
        ids[rows, lengths + step] = torch.where(done, encoder.eos, token)
        positions[rows, lengths + step] = (after + step)[:, None].expand(-1, 3)
        done |= token == encoder.eos
        if step % 8 == 7 and bool(done.all()):
            break
    answers = []
    for row, dialogue in zip(ids.tolist(), dialogues, strict=True):
        new = row[len(dialogue.ids) :]
        answers.append(
            encoder.tokenizer.decode(new[: new.index(encoder.eos)] if encoder.eos in new else new)
        )
    return answers


def caption_errors(wanted: str, got: str) -> Counter[str]:
    """What differs between two long captions, counted by attribute (no key: all right)."""
    errors: Counter[str] = Counter()
    if wanted == got:
        return errors
    truth, answer = (_OBJECT.findall(text.lower().rstrip(".")) for text in (wanted, got))
    if len(truth) != len(answer):
        errors["count"] += 1
        missing = Counter(t[1:3] for t in truth) - Counter(a[1:3] for a in answer)
        errors["phrase"] += missing.total()
    else:
        for a, b in zip(truth, answer, strict=True):
            for name, left, right in zip(("size", "color", "shape", "place"), a, b, strict=True):
                errors[name] += left != right
            errors["phrase"] += a[1:3] != b[1:3]
    numbers = [re.search(r"the number (\d+)( [a-z ]+)?", text) for text in (wanted, got)]
    digits, places = ([m.group(g) if m else "" for m in numbers] for g in (1, 2))
    errors["number"] += digits[0] != digits[1]
    errors["number_place"] += digits[0] == digits[1] and places[0] != places[1]
    grounds = [re.search(r"an? ([a-z ]+) background", text) for text in (wanted, got)]
    names = [match.group(1) if match else "" for match in grounds]
    errors["background"] += names[0] != names[1]
    return +errors


@dataclass
class Tally:
    """What `evaluate` counts. Keys of the counters: `NAME right` and `NAME total`."""

    captions: Counter[str] = field(default_factory=Counter)
    modes: Counter[str] = field(default_factory=Counter)
    questions: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    objects: int = 0
    phrase_scenes: int = 0
    examples: list[dict[str, str]] = field(default_factory=list)

    def add_long(self, scene: Scene, mode: str, answer: str) -> None:
        wanted = CAPTIONS["long"](scene)
        _count(self.modes, mode, answer == wanted)
        wrong = caption_errors(wanted, answer)
        self.errors += wrong
        self.objects += len(scene.objects)
        self.phrase_scenes += wrong["phrase"] == 0
        if wrong and len(self.examples) < 40:
            canvas = f"{scene.width}x{scene.height}"
            row = {"mode": mode, "canvas": canvas, "wanted": wanted, "got": answer}
            self.examples.append(row)

    def report(self) -> dict[str, object]:
        scenes = self.captions["long total"]
        return {
            "scenes": scenes,
            "exact_caption_percent": _percent(self.captions),
            "phrase_percent_of_objects": 100 * (1 - self.errors["phrase"] / self.objects),
            "phrase_percent_of_scenes": 100 * self.phrase_scenes / scenes,
            "objects": self.objects,
            "errors": dict(self.errors),
            "exact_by_mode_percent": _percent(self.modes),
            "questions_percent": _percent(self.questions),
            "two_images_percent": _percent(self.pairs),
            "examples": self.examples,
        }


@torch.no_grad()
def evaluate(
    model: Qwen3VL, encoder: Encoder, data: HeldOutBatches, workers: int, questions: bool = True
) -> dict[str, object]:
    """Greedy captions in three styles; with `questions` those too (half of them second turns), and
    pairs of images."""
    tally = Tally()
    previous: tuple[HeldOut, Tensor, list[Tensor]] | None = None
    for number, item in enumerate(DataLoader(data, batch_size=None, num_workers=workers)):
        seen = _see(model, item)
        grid = [merged_grid(item.batch.pictures[0].target)]
        for style, write in CAPTIONS.items():
            rng = Random(f"prompts/{number}/{style}")
            prompts = CAPTION_PROMPTS[style][:1] if style == "long" else CAPTION_PROMPTS[style]
            asked = [encoder.open(grid, rng.choice(prompts)) for _ in item.scenes]
            answers = greedy(model, encoder, asked, seen)
            for index, (scene, answer) in enumerate(zip(item.scenes, answers, strict=True)):
                _count(tally.captions, style, answer == write(scene))
                if style == "long":
                    tally.add_long(scene, "-".join(MODES[index % len(MODES)]), answer)
        if questions:
            _ask_questions(model, encoder, item, seen, number, tally.questions)
        if questions and number % 4 == 1 and previous:
            _ask_pairs(model, encoder, previous, (item, *seen), tally.pairs)
        previous = (item, *seen)
    return tally.report()


def _count(counts: Counter[str], name: str, right: bool) -> None:
    counts.update({f"{name} right": int(right), f"{name} total": 1})


def _percent(counts: Counter[str]) -> dict[str, float]:
    names = sorted(key.removesuffix(" total") for key in counts if key.endswith(" total"))
    return {name: 100 * counts[f"{name} right"] / counts[f"{name} total"] for name in names}


def _see(model: Qwen3VL, item: HeldOut) -> tuple[Tensor | None, list[Tensor]]:
    weight = next(model.parameters())
    drawn = item.batch.pictures[0].drawn.to(weight.device).permute(0, 3, 1, 2).float()
    return model.see([(drawn / 127.5 - 1).to(weight.dtype)])


def _ask_questions(
    model: Qwen3VL,
    encoder: Encoder,
    item: HeldOut,
    seen: tuple[Tensor | None, list[Tensor]],
    number: int,
    counts: Counter[str],
) -> None:
    grid = [merged_grid(item.batch.pictures[0].target)]
    dialogues, wanted = [], []
    rng = Random(f"questions/{number}")
    for index, scene in enumerate(item.scenes):
        turn = None
        while turn is None:
            question = rng.choice(QUESTIONS)
            turn = question(rng, scene)
        if index % 2:
            dialogue = encoder.open(grid, CAPTION_PROMPTS["short"][0])
            encoder.answer(dialogue, short_caption(scene))
            encoder.ask(dialogue, turn[0])
        else:
            dialogue = encoder.open(grid, turn[0])
        dialogues.append(dialogue)
        wanted.append((f"{question.__name__}", f"turn {1 + index % 2}", turn[1]))
    for answer, (name, turn_name, text) in zip(
        greedy(model, encoder, dialogues, seen), wanted, strict=True
    ):
        for key in (name, turn_name):
            _count(counts, key, answer == text)


def _ask_pairs(
    model: Qwen3VL,
    encoder: Encoder,
    first: tuple[HeldOut, Tensor, list[Tensor]],
    second: tuple[HeldOut, Tensor, list[Tensor]],
    counts: Counter[str],
) -> None:
    grids = [merged_grid(side[0].batch.pictures[0].target) for side in (first, second)]
    tokens = torch.cat((first[1], second[1]), 1)
    deep = [torch.cat(parts, 1) for parts in zip(first[2], second[2], strict=True)]
    pairs = list(zip(first[0].scenes, second[0].scenes, strict=True))
    tasks = {
        "both": (
            "Describe these images.",
            lambda a, b: f"Image 1: {short_caption(a)} Image 2: {short_caption(b)}",
        ),
        "second": ("Describe the second image.", lambda a, b: CAPTIONS["long"](b)),
    }
    for name, (prompt, write) in tasks.items():
        answers = greedy(
            model, encoder, [encoder.open(grids, prompt) for _ in pairs], (tokens, deep)
        )
        right = sum(answer == write(*pair) for answer, pair in zip(answers, pairs, strict=True))
        counts.update({f"{name} right": right, f"{name} total": len(pairs)})
