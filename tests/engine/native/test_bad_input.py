"""Everything a model folder or a request can have wrong: one typed error each, and then the next
request is served as if nothing had been."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from qwencli.config import EngineName, SamplingOptions
from qwencli.engine.native.engine import NativeEngine
from qwencli.errors import InputError, ModelFileError, UsageError
from qwencli.messages import GenerationRequest, Message, TextPart, user_message
from tests.checkpoints import engine_config, picture

GREEDY = SamplingOptions(do_sample=False, max_new_tokens=8)
UP = "model.language_model.layers.1.mlp.up_proj.weight"
NORM = "model.visual.merger.norm.weight"


def ask(text="Describe this image.", images=1, **sampling):
    options = dataclasses.replace(GREEDY, **sampling)
    return GenerationRequest((user_message(text, (picture(),) * images),), options)


@pytest.fixture(scope="module")
def live(checkpoint):
    config = engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE, max_seq_len=600)
    with NativeEngine(config) as engine:
        yield engine


class Miscounting:
    """A prompt builder whose prompts have `by` image tokens more than their pictures."""

    def __init__(self, prompts, by):
        self._prompts, self._by = prompts, by
        self.tokenizer, self.can_think = prompts.tokenizer, prompts.can_think

    def build(self, messages, **how):
        prompt = self._prompts.build(messages, **how)
        ids = list(prompt.input_ids)
        at = ids.index(prompt.image_token_id)
        ids[at : at + max(0, -self._by)] = [prompt.image_token_id] * max(0, self._by)
        return dataclasses.replace(prompt, input_ids=ids)


NOT_TEXT = GenerationRequest((Message("user", (TextPart("\udcff"),)),), GREEDY)

REQUESTS = {
    "prompt longer than the cache": (ask("word " * 700), InputError, "holds 600"),
    "answer longer than the cache": (ask(max_new_tokens=600), InputError, "holds 600"),
    "300 images": (ask(images=300), InputError, "tokens of images|of images"),
    "zero new tokens": (ask(max_new_tokens=0), UsageError, "--max-new-tokens 0 is out of range"),
    "no message": (GenerationRequest(()), InputError, "no message"),
    "no Unicode": (NOT_TEXT, InputError, "not valid Unicode"),
    "nonsense sampling": (ask(top_p=-1.0), UsageError, "--top-p"),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_bad_request_is_one_error_and_the_next_is_served(live, name):
    request, error, said = REQUESTS[name]
    expected = live.generate(ask()).token_ids
    with pytest.raises(error, match=said) as caught:
        live.generate(request)
    assert caught.value.hint
    assert live.generate(ask()).token_ids == expected


def test_a_request_that_is_too_long_names_what_fits(live):
    with pytest.raises(InputError) as caught:
        live.generate(ask(max_new_tokens=600))
    words = caught.value.hint.split()
    assert (words[0], words[2], words[3], words[5]) == (
        "--max-new-tokens",
        "or",
        "--max-seq-len",
        "fits",
    )
    room, length = int(words[1]), int(words[4])
    assert length == 600 - room + 600
    assert live.generate(ask(max_new_tokens=room)).num_new_tokens <= room
    # One more, and the picture is shown a little smaller.
    (note,) = live.generate(ask(max_new_tokens=room + 1)).notes
    assert "is shown as" in note
    with pytest.raises(InputError, match="holds 600") as caught:
        live.generate(ask("word " * 4000))
    assert "shorten the prompt" in caught.value.hint


@pytest.mark.parametrize("by", [-1, 2])
def test_image_tokens_that_do_not_match_the_pictures(live, monkeypatch, by):
    expected = live.generate(ask()).token_ids
    files = live.files
    monkeypatch.setattr(
        live, "_files", dataclasses.replace(files, prompts=Miscounting(files.prompts, by))
    )
    with pytest.raises(InputError, match="image tokens"):
        live.generate(ask())
    monkeypatch.undo()
    assert live.generate(ask()).token_ids == expected


def test_one_hundred_images_that_fit_are_looked_at(checkpoint):
    with NativeEngine(engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE)) as engine:
        result = engine.generate(ask(images=100))
    assert result.num_image_tokens == 400
    assert result.num_new_tokens >= 1


def change_config(folder, *path, value):
    file = folder / "config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    place = config
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    file.write_text(json.dumps(config), encoding="utf-8")


def change_weights(folder, change):
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


def drop(*names):
    return lambda folder: change_weights(folder, lambda t: [t.pop(name) for name in names])


def put(name, value):
    return lambda folder: change_weights(folder, lambda t: t.update({name: value}))


def fill(name, value):
    return lambda folder: change_weights(folder, lambda t: t[name].view(-1)[3:4].fill_(value))


def text(key, value):
    return lambda folder: change_config(folder, "text_config", key, value=value)


def vision(key, value):
    return lambda folder: change_config(folder, "vision_config", key, value=value)


def top(key, value):
    return lambda folder: change_config(folder, key, value=value)


EXTRA = "model.language_model.layers.2.mlp.up_proj.weight"
SPOILED = {
    "unknown model_type": (top("model_type", "llama"), ["model_type 'llama'", "not supported"]),
    "missing tensors": (drop(UP, NORM), ["2 tensors missing", UP, NORM]),
    "extra tensors": (put(EXTRA, torch.ones(2, 2)), ["1 tensor", EXTRA, "does not describe"]),
    "NaN weights": (fill(UP, float("nan")), ["NaN or infinity", UP]),
    "infinite weights": (fill(NORM, float("inf")), ["NaN or infinity", NORM]),
    "fewer layers than the weights": (text("num_hidden_layers", 1), ["does not describe", UP]),
    "more layers than the weights": (text("num_hidden_layers", 3), ["layers.2.", "missing"]),
    "another width": (
        text("intermediate_size", 128),
        ["6 tensors of the wrong shape", "up_proj.weight is [96, 64]", "[128, 64]"],
    ),
    "heads that do not divide": (text("num_key_value_heads", 3), ["4 attention heads", "by 3"]),
    "position sections": (
        text("rope_scaling", {"mrope_section": [4, 4, 4], "mrope_interleaved": True}),
        ["does not sum"],
    ),
    "a layer that is not there": (vision("deepstack_visual_indexes", [7]), ["deepstack", "[7]"]),
    "an image token beyond the vocabulary": (top("image_token_id", 5000), ["vocab_size"]),
    "another vision width": (vision("out_hidden_size", 32), ["ends in 32 values"]),
}


@pytest.mark.parametrize("name", SPOILED)
def test_a_spoiled_folder_is_one_error_and_loads_once_it_is_whole(checkpoint, live, tmp_path, name):
    spoil, parts = SPOILED[name]
    whole, folder = checkpoint("qwen3_vl"), tmp_path / "model"
    expected = live.generate(ask()).token_ids
    shutil.copytree(whole, folder)
    spoil(folder)
    engine = NativeEngine(engine_config(folder, engine=EngineName.NATIVE))
    with pytest.raises(ModelFileError) as caught:
        engine.load()
    assert all(part in caught.value.message for part in parts), caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint
    # An engine that is running is not touched, and the failed one left nothing half loaded.
    assert live.generate(ask()).token_ids == expected
    shutil.copytree(whole, folder, dirs_exist_ok=True)
    with engine:
        assert engine.generate(ask()).token_ids == expected


def test_settings_that_came_before_are_looked_at_like_new_ones(live):
    """Those of requests are kept for a while: wrong ones never are, and others are others."""
    for _ in range(2):
        with pytest.raises(UsageError, match="--top-k 1000"):
            live.generate(ask(top_k=1000))
    seeds = [live._sampling(ask(images=0, seed=seed)).seed for seed in (*range(200), 7)]
    assert seeds == [*range(200), 7]
    ignoring = dataclasses.replace(ask(images=0), ignore_eos=True)
    assert live._sampling(ignoring).ignore_eos and not live._sampling(ask(images=0)).ignore_eos
    assert len(live._samplings) <= 64
