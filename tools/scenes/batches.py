"""Training batches by index: scenes, dialogues, PIL pictures and labels as tensors on the CPU.

Batch `index` depends on (seed, index) alone, so any number of workers gives the same stream. All
pictures of a group share one canvas; pictures that PIL did not draw are drawn later, on the device,
from their object rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from tools.scenes.dialogue import Dialogue, Encoder, sample_dialogue
from tools.scenes.draw_pil import draw_at_random
from tools.scenes.draw_sdf import NUMBER_COLUMNS, OBJECT_COLUMNS
from tools.scenes.grid import merged_grid, target_size
from tools.scenes.scene import Scene, cell_of, sample_canvas, sample_scene
from tools.scenes.words import COLORS, SHAPES, SIZES

COLOR_NAMES = tuple(COLORS)
MAX_OBJECTS = 4
# Columns of an object label: visual token, colour, shape, size, place (0..8). -100: no object.
# Columns of a number label: visual token, hundreds, tens, ones (10: blank), place.
LABEL_COLUMNS = 5
IGNORED = -100


@dataclass
class Pictures:
    """One picture a sample; the first ones are drawn by PIL (`drawn` [P, h, w, 3] uint8)."""

    canvas: tuple[int, int]
    target: tuple[int, int]
    drawn: Tensor
    background: Tensor
    objects: Tensor
    numbers: Tensor
    softness: Tensor
    digit_style: Tensor
    digit_weight: Tensor
    noise: Tensor
    object_labels: Tensor
    number_labels: Tensor


@dataclass
class Batch:
    """`picked` are flat positions [T] whose next token is `wanted` [T], of an answer."""

    pictures: list[Pictures]
    ids: Tensor
    positions: Tensor
    image_index: Tensor
    picked: Tensor
    wanted: Tensor


@dataclass(frozen=True)
class DataPlan:
    """What a stream of batches is made of. `easy_batches` hold one or two objects;
    `captions_only` leaves out questions, pairs of pictures and requests without one."""

    tokenizer: Path
    seed: int = 0
    samples: int = 256
    pil_share: float = 0.4
    easy_batches: int = 400
    captions_only: bool = False
    fonts: tuple[str, ...] = ("",)


class Batches(Dataset[Batch]):
    def __init__(self, plan: DataPlan, length: int) -> None:
        self.plan = plan
        self.length = length
        self.encoder = Encoder(plan.tokenizer)

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Batch:
        plan = self.plan
        rng = Random(f"train/{plan.seed}/{index}")
        easy = index < plan.easy_batches
        one = easy or plan.captions_only
        images = 1 if one else rng.choices((0, 1, 2), (0.02, 0.90, 0.08))[0]
        samples = plan.samples // max(1, images)
        canvases = [sample_canvas(rng) for _ in range(images)]
        scenes = [
            [
                sample_scene(rng, canvas, max_objects=2 if easy else MAX_OBJECTS)
                for _ in range(samples)
            ]
            for canvas in canvases
        ]
        grids = [merged_grid(target_size(*canvas)) for canvas in canvases]
        dialogues = [
            sample_dialogue(
                rng, self.encoder, [group[i] for group in scenes], grids, plan.captions_only
            )
            for i in range(samples)
        ]
        drawn = round(plan.pil_share * samples)
        pictures = [draw_pictures(rng, group, drawn, plan.fonts) for group in scenes]
        return collate(dialogues, pictures, self.encoder.eos)


def collate(dialogues: list[Dialogue], pictures: list[Pictures], pad: int) -> Batch:
    """Pads on the right; causal attention makes the padding harmless."""
    count, length = len(dialogues), max(len(dialogue.ids) for dialogue in dialogues)
    ids = np.full((count, length), pad, dtype=np.int64)
    positions = np.zeros((count, length, 3), dtype=np.int64)
    answer = np.zeros((count, length), dtype=bool)
    for row, dialogue in enumerate(dialogues):
        size = len(dialogue.ids)
        ids[row, :size] = dialogue.ids
        positions[row, :size] = dialogue.positions
        answer[row, :size] = dialogue.answer
    flat = np.flatnonzero(answer)
    image_index = np.array([d.image_tokens for d in dialogues], dtype=np.int64).reshape(count, -1)
    return Batch(
        pictures,
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(image_index),
        torch.from_numpy(flat - 1),
        torch.from_numpy(ids.reshape(-1)[flat]),
    )


def draw_pictures(rng: Random, scenes: list[Scene], drawn: int, fonts: tuple[str, ...]) -> Pictures:
    """Draws the first `drawn` scenes with PIL, resized as the processor does; rows for the rest."""
    from PIL import Image

    canvas = (scenes[0].width, scenes[0].height)
    target = target_size(*canvas)
    pixels = np.empty((drawn, target[1], target[0], 3), dtype=np.uint8)
    for row, scene in enumerate(scenes[:drawn]):
        image = draw_at_random(rng, scene, fonts)
        pixels[row] = np.asarray(image.resize(target, Image.Resampling.BICUBIC))
    rest = scenes[drawn:]
    labels = [_labels(scene, merged_grid(target)) for scene in scenes]
    return Pictures(
        canvas,
        target,
        torch.from_numpy(pixels),
        torch.tensor([scene.background_rgb for scene in rest], dtype=torch.float32).reshape(-1, 3),
        *scene_rows(rest),
        softness=torch.tensor([rng.choice((0.0, 1.0, 1.0, 1.5)) for _ in rest]),
        digit_style=torch.tensor([int(rng.random() < 0.3) for _ in rest]),
        digit_weight=torch.tensor([rng.uniform(0.07, 0.17) for _ in rest]),
        noise=torch.tensor([rng.choice((0.0, 0.0, 0.0, 1.0, 4.0)) for _ in scenes]),
        object_labels=torch.tensor([objects for objects, _ in labels]),
        number_labels=torch.tensor([number for _, number in labels]),
    )


def scene_rows(scenes: list[Scene]) -> tuple[Tensor, Tensor]:
    """Object rows [B, 4, 9] and number rows [B, 7], as `draw_sdf` reads them."""
    objects = np.zeros((len(scenes), MAX_OBJECTS, OBJECT_COLUMNS), dtype=np.float32)
    objects[..., 0] = -1
    numbers = np.zeros((len(scenes), NUMBER_COLUMNS), dtype=np.float32)
    numbers[:, 0] = -1
    for row, scene in enumerate(scenes):
        for slot, item in enumerate(scene.objects):
            place = (item.x, item.y, item.diameter, item.rotation_deg)
            objects[row, slot] = (SHAPES.index(item.shape), *place, *item.rgb, item.detail)
        if scene.number:
            number = scene.number
            numbers[row] = (number.value, number.x, number.y, number.height, *number.rgb)
    return torch.from_numpy(objects), torch.from_numpy(numbers)


def _labels(scene: Scene, grid: tuple[int, int]) -> tuple[list[list[int]], list[int]]:
    objects = [[IGNORED] * LABEL_COLUMNS for _ in range(MAX_OBJECTS)]
    for slot, item in enumerate(scene.objects):
        objects[slot] = [
            _token_at(scene, grid, item.x, item.y),
            COLOR_NAMES.index(item.color),
            SHAPES.index(item.shape),
            SIZES.index(item.size),
            _place_at(scene, item.x, item.y),
        ]
    if not scene.number:
        return objects, [IGNORED] * LABEL_COLUMNS
    number = scene.number
    digits = [10 if char == " " else int(char) for char in f"{number.value:3d}"]
    token = _token_at(scene, grid, number.x, number.y)
    return objects, [token, *digits, _place_at(scene, number.x, number.y)]


def _token_at(scene: Scene, grid: tuple[int, int], x: float, y: float) -> int:
    return int(y / scene.height * grid[0]) * grid[1] + int(x / scene.width * grid[1])


def _place_at(scene: Scene, x: float, y: float) -> int:
    row, column = cell_of(scene, x, y)
    return 3 * row + column
