"""What a model's files say: which tokens end an answer, and byte order marks in front of them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qwencli.engine.sources import MAX_STOP_TOKENS, ModelFiles, open_model
from qwencli.errors import ModelFileError
from qwencli.messages import text_message
from tests.checkpoints import engine_config
from tests.engine.tiny_folder import tiny_tokenizer

IM_END, END_OF_TEXT = (tiny_tokenizer().token_to_id(t) for t in ("<|im_end|>", "<|endoftext|>"))
Opened = Callable[[dict[str, Any] | None], ModelFiles]


@pytest.fixture
def opened(checkpoint: Callable[[str], Path], tmp_path: Path) -> Opened:
    """Opens a model whose generation_config.json is as given; None = without one."""
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3_vl"), folder)

    def open_with(defaults: dict[str, Any] | None) -> ModelFiles:
        path = folder / "generation_config.json"
        path.unlink(missing_ok=True)
        if defaults is not None:
            path.write_text(json.dumps(defaults), encoding="utf-8")
        return open_model(engine_config(folder))

    return open_with


@pytest.mark.parametrize(
    ("named", "stop_ids"),
    [
        (END_OF_TEXT, {END_OF_TEXT, IM_END}),
        ([END_OF_TEXT], {END_OF_TEXT, IM_END}),
        ([IM_END, END_OF_TEXT], {END_OF_TEXT, IM_END}),
        (IM_END, {IM_END}),
        ([], {IM_END}),
        (None, {IM_END}),
    ],
)
def test_the_end_of_a_turn_always_stops(opened: Opened, named: Any, stop_ids: set[int]) -> None:
    files = opened({"eos_token_id": named})
    assert set(files.stop_token_ids) == stop_ids
    assert len(files.stop_token_ids) == len(stop_ids)


def test_without_generation_config(opened: Opened) -> None:
    files = opened(None)
    assert files.stop_token_ids == (IM_END,)
    assert files.pad_token_id == END_OF_TEXT


@pytest.mark.parametrize("key", ["eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", ["<|im_end|>", 1.5, True, -1, 2**64, {"id": 1}, [1, "2"], [[1]]])
def test_a_token_id_of_a_wrong_type(opened: Opened, key: str, value: Any) -> None:
    with pytest.raises(ModelFileError, match=f"generation_config.json: {key} is no token id"):
        opened({key: value})


def test_more_stop_tokens_than_there_is_room_for(opened: Opened) -> None:
    others = [id_ for id_ in range(IM_END + 2 * MAX_STOP_TOKENS) if id_ != IM_END]
    assert len(opened({"eos_token_id": others[: MAX_STOP_TOKENS - 1]}).stop_token_ids) == 8
    with pytest.raises(ModelFileError, match="9 tokens would end an answer"):
        opened({"eos_token_id": others[:MAX_STOP_TOKENS]})


def test_a_vocabulary_without_the_end_of_a_turn(opened: Opened, tmp_path: Path) -> None:
    for path in (tmp_path / "model").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("<|im_end|>", "<|turn_end|>"), encoding="utf-8")
    assert opened({"eos_token_id": END_OF_TEXT}).stop_token_ids == (END_OF_TEXT,)
    with pytest.raises(ModelFileError, match=r"has no token <\|im_end\|>"):
        opened({})


def test_byte_order_marks_change_nothing(checkpoint: Callable[[str], Path], tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3_vl"), folder)
    template = "{% for message in messages %}{{ message.content }}<|im_end|>{% endfor %}"
    (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    before = open_model(engine_config(folder))
    marked = [*folder.glob("*.json"), *folder.glob("*.jinja")]
    assert len(marked) >= 5
    for path in marked:
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    after = open_model(engine_config(folder))
    assert after.hub_config == before.hub_config
    assert after.generation_defaults == before.generation_defaults
    messages = (text_message("user", "A red circle."),)
    ids = [files.prompts.build(messages).input_ids for files in (before, after)]
    assert list(ids[0]) == list(ids[1])
