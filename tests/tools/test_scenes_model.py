"""The bundled model: complete files, parity of the training model, and what it answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from tools.scenes.batches import Batches, DataPlan
from tools.scenes.dialogue import Dialogue, Encoder
from tools.scenes.grid import PATCH, merged_grid, target_size
from tools.scenes.heldout import PROMPT, heldout
from tools.scenes.model import ModelShape, Qwen3VL, _patchify, initialize
from tools.scenes.words import COLORS, SHAPES

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "qwencli" / "bundled" / "scenes"
EXAMPLES = ROOT / "examples"
FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "video_preprocessor_config.json",
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """The model is so small that threads cost more than they give."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def encoder() -> Encoder:
    return Encoder(FOLDER)


@pytest.fixture(scope="module")
def bundled() -> Qwen3VL:
    model = Qwen3VL(ModelShape())
    model.load_state_dict(
        {k: v.float() for k, v in load_file(FOLDER / "model.safetensors").items()}
    )
    return model.eval()


def pixels(image: Image.Image) -> Tensor:
    resized = image.resize(target_size(*image.size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float() / 127.5 - 1


@torch.no_grad()
def says(model: Qwen3VL, dialogue: Dialogue, pictures: list[Tensor]) -> bool:
    """Whether greedy decoding would give exactly the dialogue's answers."""
    tokens, deep = model.see(pictures)
    ids, positions = torch.tensor([dialogue.ids]), torch.tensor([dialogue.positions])
    index = torch.tensor([dialogue.image_tokens], dtype=torch.long)
    guess = model.logits(model.hidden(ids, positions, index, tokens, deep)).argmax(-1)[0, :-1]
    counted = torch.tensor(dialogue.answer[1:])
    return bool((guess == ids[0, 1:])[counted].all())


def test_the_folder_is_complete_and_small() -> None:
    assert {path.name for path in FOLDER.iterdir()} == FILES
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 14_000_000


def test_the_configuration_agrees_with_tokenizer_and_weights(encoder: Encoder) -> None:
    config = json.loads((FOLDER / "config.json").read_text(encoding="utf-8"))
    token = encoder.tokenizer.token_to_id
    assert config["image_token_id"] == token("<|image_pad|>")
    assert config["video_token_id"] == token("<|video_pad|>")
    assert config["text_config"]["eos_token_id"] == token("<|im_end|>")
    assert encoder.tokenizer.get_vocab_size() <= config["text_config"]["vocab_size"]
    generation = json.loads((FOLDER / "generation_config.json").read_text(encoding="utf-8"))
    assert generation["do_sample"] is False
    weights = load_file(FOLDER / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.bfloat16}


def test_any_text_survives_the_tokenizer(encoder: Encoder) -> None:
    for text in ("Ünïcode ☃ 漢字 \t\n tabs", "plain words", "<b>1 234</b>"):
        assert encoder.tokenizer.decode(encoder.encode(text)) == text
    assert all(len(encoder.encode(f" {word}")) == 1 for word in (*COLORS, *SHAPES))


def test_the_same_index_gives_the_same_batch() -> None:
    plan = DataPlan(FOLDER, seed=3, samples=3, easy_batches=0)
    first, second = Batches(plan, 100)[17], Batches(plan, 100)[17]
    assert torch.equal(first.ids, second.ids) and torch.equal(first.wanted, second.wanted)
    for a, b in zip(first.pictures, second.pictures, strict=True):
        assert torch.equal(a.drawn, b.drawn) and torch.equal(a.objects, b.objects)
    assert not torch.equal(first.wanted[:9], Batches(plan, 100)[18].wanted[:9])


def test_answers_are_what_the_loss_counts(encoder: Encoder) -> None:
    batch = Batches(DataPlan(FOLDER, samples=2), 10)[0]
    assert torch.equal(batch.ids.flatten()[batch.picked + 1], batch.wanted)
    text = encoder.tokenizer.decode(batch.wanted.tolist(), skip_special_tokens=False)
    assert "user" not in text and text.endswith("<|im_end|>")


def test_held_out_scenes_are_captioned_exactly(encoder: Encoder, bundled: Qwen3VL) -> None:
    right = 0
    for item in heldout(12):
        dialogue = encoder.open([merged_grid(target_size(*item.image.size))], PROMPT)
        encoder.answer(dialogue, item.caption)
        right += says(bundled, dialogue, [pixels(item.image)])
    assert right >= 11


def test_the_example_pictures_are_answered_as_recorded(encoder: Encoder, bundled: Qwen3VL) -> None:
    expected = json.loads((EXAMPLES / "expected.json").read_text(encoding="utf-8"))
    asked = [([name], expected["prompt"], text) for name, text in expected["captions"].items()]
    asked += [(row["images"], row["prompt"], row["answer"]) for row in expected["answers"]]
    assert len(asked) >= 13
    for names, prompt, text in asked:
        images = [Image.open(EXAMPLES / name).convert("RGB") for name in names]
        grids = [merged_grid(target_size(*image.size)) for image in images]
        dialogue = encoder.open(grids, prompt)
        encoder.answer(dialogue, text)
        assert says(bundled, dialogue, [pixels(image) for image in images]), (names, prompt)


def test_without_the_picture_the_caption_is_lost(encoder: Encoder, bundled: Qwen3VL) -> None:
    """The answer comes from the pixels: another picture does not give it."""
    first, second = list(heldout(40))[-2:]
    dialogue = encoder.open([(8, 8)], PROMPT)
    encoder.answer(dialogue, first.caption)
    other = second.image.resize((256, 256))
    assert not says(bundled, dialogue, [pixels(other)])


@pytest.fixture(scope="module")
def reference() -> Any:
    from transformers import Qwen3VLForConditionalGeneration

    return Qwen3VLForConditionalGeneration.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    "sizes", [[(256, 256)], [(608, 128)], [(320, 256), (192, 384)]], ids=["square", "wide", "two"]
)
def test_parity_with_transformers(
    reference: Any, encoder: Encoder, sizes: list[tuple[int, int]]
) -> None:
    """Random weights, so that nothing is small by luck: logits agree within 1e-4."""
    model = Qwen3VL(ModelShape())
    initialize(model, seed=5)
    state = {k: v + 0.01 * torch.randn_like(v) for k, v in model.state_dict().items()}
    model.load_state_dict(state)
    reference.load_state_dict(state, strict=False)
    rng = torch.Generator().manual_seed(1)
    pictures = [torch.rand(1, 3, high, wide, generator=rng) * 2 - 1 for wide, high in sizes]
    dialogue = encoder.open([merged_grid(size) for size in sizes], "Describe it.", "Be brief.")
    encoder.answer(dialogue, Random(0).choice(("A red circle.", "No.")))
    ids = torch.tensor([dialogue.ids])
    grids = [(1, p.shape[2] // PATCH, p.shape[3] // PATCH) for p in pictures]
    flat = [
        _patchify(p, rows, columns)[0]
        for p, (_, rows, columns) in zip(pictures, grids, strict=True)
    ]
    twice = [f.view(-1, 3, 1, PATCH, PATCH).expand(-1, -1, 2, -1, -1).flatten(1) for f in flat]
    with torch.no_grad():
        positions, index = torch.tensor([dialogue.positions]), torch.tensor([dialogue.image_tokens])
        mine = model.logits(model.hidden(ids, positions, index, *model.see(pictures)))
        theirs = reference(
            input_ids=ids,
            pixel_values=torch.cat(twice),
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=(ids == encoder.image_pad).int(),
        ).logits
    assert float(theirs.abs().max()) > 1.0
    assert float((mine - theirs).abs().max()) < 1e-4
