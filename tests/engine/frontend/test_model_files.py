"""What a model's files say: which tokens end an answer, and byte order marks in front of them."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.config import SamplingOptions, resolve_sampling
from qwencli.engine.frontend.model_files import MAX_STOP_TOKENS, ModelFiles, open_model
from qwencli.errors import ModelFileError, QwenCliError
from qwencli.messages import text_message
from tests.checkpoints import engine_config
from tests.engine.frontend.tiny_folder import tiny_tokenizer

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
    assert len(opened({"eos_token_id": others[: MAX_STOP_TOKENS - 2]}).stop_token_ids) == 7
    with pytest.raises(ModelFileError, match="8 tokens would end an answer"):
        opened({"eos_token_id": others[: MAX_STOP_TOKENS - 1]})


def test_a_vocabulary_without_the_end_of_a_turn(opened: Opened, tmp_path: Path) -> None:
    for path in (tmp_path / "model").glob("*.json"):
        text = path.read_text(encoding="utf-8")
        path.write_text(text.replace("<|im_end|>", "<|turn_end|>"), encoding="utf-8")
    change(tmp_path / "model", "tokenizer_config.json", eos_token="<|endoftext|>")
    change(tmp_path / "model", "config.json", eos_token_id=None)
    assert opened({"eos_token_id": END_OF_TEXT}).stop_token_ids == (END_OF_TEXT,)
    change(tmp_path / "model", "tokenizer_config.json", eos_token=None)
    with pytest.raises(ModelFileError, match=r"has no token <\|im_end\|>"):
        opened({})


CHATML = (
    "{%- for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content if message.content is string else message.content[0].text }}"
    "END{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKS = CHATML.replace("{{ message.content", "<think>\n\n</think>\n\n{{ message.content")


@pytest.mark.parametrize(
    ("template", "ends_with"),
    [
        (CHATML.replace("END", "<|vision_end|>\n"), {"<|vision_end|>"}),
        (CHATML.replace("END", "\n <|vision_pad|>"), {"<|vision_pad|>"}),
        (CHATML.replace("END", "<tool_call>\n"), {"<tool_call>"}),
        (CHATML.replace("END", "{{ eos_token }}"), set()),
        (CHATML.replace("END", "\n"), {"<|im_start|>"}),
        (THINKS.replace("END", "<|vision_end|>\n"), {"<|vision_end|>"}),
        (CHATML.replace("END", "</s>"), set()),
        (CHATML.replace("END", "{{ raise_exception('one turn alone') }}"), set()),
        ("{% for message in messages %}{{ message.role }}: {% endfor %}<|vision_end|>", set()),
        ("", set()),
    ],
)
def test_what_the_template_ends_a_turn_with_stops(
    opened: Opened, tmp_path: Path, template: str, ends_with: set[str]
) -> None:
    (tmp_path / "model" / "chat_template.jinja").write_text(template, encoding="utf-8")
    wanted = {tiny_tokenizer().token_to_id(token) for token in ends_with}
    for named in (END_OF_TEXT, [END_OF_TEXT, 10**6], [END_OF_TEXT, *range(10**6, 10**6 + 9)]):
        files = opened({"eos_token_id": named})
        assert set(files.stop_token_ids) == {END_OF_TEXT, IM_END, *wanted}


def test_the_ends_that_other_files_name(opened: Opened, tmp_path: Path) -> None:
    model = tmp_path / "model"
    pad = tiny_tokenizer().token_to_id("<|vision_pad|>")
    change(model, "tokenizer_config.json", eos_token={"content": "<|vision_pad|>"})
    assert set(opened({"eos_token_id": END_OF_TEXT}).stop_token_ids) == {END_OF_TEXT, IM_END, pad}
    change(model, "tokenizer_config.json", eos_token="A")  # a word, and no control token
    change(model, "config.json", eos_token_id=END_OF_TEXT)
    for defaults in (None, {}, {"eos_token_id": None}, {"eos_token_id": []}):
        assert set(opened(defaults).stop_token_ids) == {END_OF_TEXT, IM_END}
    change(model, "config.json", eos_token_id="</s>")
    with pytest.raises(ModelFileError, match=r"config\.json: eos_token_id is no token id"):
        opened(None)


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


def change(folder: Path, name: str, **values: Any) -> None:
    path = folder / name
    content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    path.write_text(json.dumps({**content, **values}), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("preprocessor_config.json", {"merge_size": 10**12}, "merge_size is 1000000000000"),
        ("preprocessor_config.json", {"merge_size": 4}, "merge_size is 4 in preprocessor_config"),
        ("preprocessor_config.json", {"patch_size": 14}, "patch_size is 14 in preprocessor"),
        ("preprocessor_config.json", {"temporal_patch_size": 1}, "temporal_patch_size is 1"),
        ("preprocessor_config.json", {"patch_size": True}, "patch_size is True"),
        ("preprocessor_config.json", {"min_pixels": 10**12, "max_pixels": 10**13}, "min_pixels"),
        ("preprocessor_config.json", {"max_pixels": 10**400}, "max_pixels is 1000"),
        ("preprocessor_config.json", {"image_mean": [10**400, 0, 0]}, "image_mean"),
        ("preprocessor_config.json", {"image_std": [1e-300] * 3}, "image_std"),
        ("preprocessor_config.json", {"rescale_factor": 1e300}, "rescale_factor"),
        ("config.json", {"model_type": ["qwen3_vl"]}, "model_type"),
        ("config.json", {"model_type": 5}, "model_type"),
        ("config.json", {"model_type": {"a": 1}}, "model_type"),
        ("config.json", {"image_token_id": 1}, "image_token_id is 1 in config.json"),
        ("config.json", {"text_config": "x"}, "text_config"),
        ("config.json", {"vision_config": []}, "vision_config"),
    ],
)
def test_values_that_cannot_be_are_one_short_line(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, values: dict[str, Any], said: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3_vl"), folder)
    change(folder, name, **values)
    with pytest.raises(ModelFileError) as caught:
        open_model(engine_config(folder))
    assert said in caught.value.message and name in caught.value.message
    assert "\n" not in caught.value.message and len(caught.value.message) < 500


@pytest.mark.parametrize(
    "values", [{"rms_norm_eps": 10**400}, {"rope_theta": 10**400}, {"rms_norm_eps": float("nan")}]
)
def test_numbers_that_no_float_holds(
    checkpoint: Callable[[str], Path], tmp_path: Path, values: dict[str, Any]
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3"), folder)
    change(folder, "config.json", **values)
    with pytest.raises(ModelFileError, match=next(iter(values))):
        open_model(engine_config(folder))


def test_a_length_that_is_left_out_is_the_usual_one(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3"), folder)
    change(folder, "config.json", max_position_embeddings=None)
    assert open_model(engine_config(folder)).max_seq_len == 32768


@pytest.mark.parametrize("name", ["config.json", "generation_config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, '{"a": ' + "1" * 5000 + "}"])
def test_json_that_nests_or_counts_too_far(
    checkpoint: Callable[[str], Path], tmp_path: Path, name: str, text: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3"), folder)
    (folder / name).write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match=f"{name}: .*is not JSON"):
        open_model(engine_config(folder))


def test_a_configuration_of_gigabytes_is_not_read(
    checkpoint: Callable[[str], Path], tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(checkpoint("qwen3"), folder)
    with (folder / "config.json").open("wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(ModelFileError, match="too large for a configuration"):
        open_model(engine_config(folder))


FILES = ("config.json", "preprocessor_config.json", "generation_config.json", "chat_template.json")
STRANGE = st.sampled_from(
    [None, True, 0, -1, 1.5, 10**12, 10**400, float("nan"), float("inf"), "", "x", [], [[1]], {}]
)


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (object or list, key) within a JSON value."""
    pairs = list(value.items()) if isinstance(value, dict) else list(enumerate(value))
    nested = [each for _, each in pairs if isinstance(each, dict | list)]
    return [(value, key) for key, _ in pairs] + [p for each in nested for p in places(each)]


@given(st.data())
@settings(max_examples=40)
def test_whatever_stands_in_a_models_json_is_read_or_refused(
    checkpoint: Callable[[str], Path], data: st.DataObject
) -> None:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        shutil.copytree(checkpoint("qwen3_vl"), folder)
        path = folder / data.draw(st.sampled_from(FILES))
        content: dict[str, Any] = {"do_sample": True, "top_k": 5, "chat_template": "x"}
        if path.exists():
            content |= json.loads(path.read_text(encoding="utf-8"))
        place, key = data.draw(st.sampled_from(places(content)))
        place[key] = data.draw(STRANGE)
        path.write_text(json.dumps(content), encoding="utf-8")
        try:
            files = open_model(engine_config(folder))
            resolve_sampling(SamplingOptions(), files.generation_defaults)
        except QwenCliError as error:
            assert "\n" not in error.message and len(error.message) < 700
