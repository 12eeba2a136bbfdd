"""Where a template is found, how it renders, and how a broken one is reported."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from qwencli.engine.frontend.chat_template import ChatTemplate
from qwencli.errors import InputError, ModelFileError
from qwencli.messages import ImagePart, Message, text_message, user_message

PICTURE = ImagePart(Image.new("RGB", (8, 8)), "p.png")
HELLO = (text_message("user", "hello"),)


def from_text(folder: Path, text: str) -> ChatTemplate:
    (folder / "chat_template.jinja").write_text(text, encoding="utf-8")
    return ChatTemplate.from_folder(folder)


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value), encoding="utf-8")


# --- the built-in template --------------------------------------------------------------------


def test_without_a_file_chatml_is_spoken(tmp_path: Path) -> None:
    messages = (
        text_message("system", "Be brief."),
        user_message("What is it?", (PICTURE, PICTURE)),
        text_message("assistant", "A cat."),
        text_message("user", "Sure?"),
    )
    picture = "<|vision_start|><|image_pad|><|vision_end|>"
    assert ChatTemplate.from_folder(tmp_path).render(messages, as_parts=True) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        f"<|im_start|>user\n{picture}{picture}What is it?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n"
        "<|im_start|>user\nSure?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_chatml_takes_strings_too(tmp_path: Path) -> None:
    template = ChatTemplate.from_folder(tmp_path)
    parts, string = (template.render(HELLO, as_parts=flag) for flag in (True, False))
    assert parts == string


# --- where it is found ------------------------------------------------------------------------


def test_the_order_of_the_files(tmp_path: Path) -> None:
    def rendered() -> str:
        return ChatTemplate.from_folder(tmp_path).render(HELLO, as_parts=False)

    write_json(tmp_path / "tokenizer_config.json", {"chat_template": "config"})
    assert rendered() == "config"
    write_json(tmp_path / "chat_template.json", {"chat_template": "json"})
    assert rendered() == "json"
    (tmp_path / "chat_template.jinja").write_text("jinja", encoding="utf-8")
    assert rendered() == "jinja"


def test_of_several_templates_the_default_is_taken(tmp_path: Path) -> None:
    named = [{"name": "tool_use", "template": "tools"}, {"name": "default", "template": "plain"}]
    write_json(tmp_path / "tokenizer_config.json", {"chat_template": named})
    assert ChatTemplate.from_folder(tmp_path).render(HELLO, as_parts=False) == "plain"


@pytest.mark.parametrize("value", [7, [], ["x"], [{"name": "default"}], {"default": "x"}])
def test_a_template_of_the_wrong_kind(value: object, tmp_path: Path) -> None:
    write_json(tmp_path / "chat_template.json", {"chat_template": value})
    with pytest.raises(ModelFileError, match=r"chat_template\.json: broken chat template"):
        ChatTemplate.from_folder(tmp_path)


def test_a_template_that_is_not_text(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(ModelFileError, match=r"chat_template\.jinja: broken"):
        ChatTemplate.from_folder(tmp_path)


# --- what templates may use -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{% if true %}\n  a\n{% endif %}\nb", "  a\nb"),  # trim_blocks
        ("   {% if true %}x{% endif %}", "x"),  # lstrip_blocks
        ("{{ {'a': '<é>', 'b': [1]} | tojson }}", '{"a": "<é>", "b": [1]}'),
        ("{{ [1, 2] | tojson(indent=1) }}", "[\n 1,\n 2\n]"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("a{% generation %}b{{ 1 + 1 }}{% endgeneration %}c", "ab2c"),
        ("{{ eos_token }}{{ bos_token is defined }}", "<|im_end|>False"),
        ("{{ tools is none }}{{ add_generation_prompt }}", "TrueTrue"),
        ("{{ messages[0].content }}{{ messages[0]['role'] }}", "hellouser"),
    ],
)
def test_the_references_environment(text: str, expected: str, tmp_path: Path) -> None:
    tokens = {"eos_token": {"content": "<|im_end|>"}, "bos_token": None}
    write_json(tmp_path / "tokenizer_config.json", tokens)
    assert from_text(tmp_path, text).render(HELLO, as_parts=False) == expected


def test_the_date(tmp_path: Path) -> None:
    rendered = from_text(tmp_path, "{{ strftime_now('%Y') }}").render(HELLO, as_parts=False)
    assert abs(int(rendered) - datetime.now().year) <= 1


def test_thinking_is_off_unless_asked_for(tmp_path: Path) -> None:
    text = (
        "{% if enable_thinking is defined and enable_thinking is false %}no{% else %}yes{% endif %}"
    )
    template = from_text(tmp_path, text)
    assert template.render(HELLO, as_parts=False) == "no"
    assert template.render(HELLO, as_parts=False, thinking=True) == "yes"


def test_content_is_parts_or_a_string(tmp_path: Path) -> None:
    template = from_text(tmp_path, "{{ messages | tojson }}")
    seen: Any = json.loads(template.render((user_message("t", (PICTURE,)),), as_parts=True))
    assert seen == [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "t"}]}]
    seen = json.loads(template.render((text_message("user", "t"),), as_parts=False))
    assert seen == [{"role": "user", "content": "t"}]


def test_every_text_from_outside_is_protected(tmp_path: Path) -> None:
    template = ChatTemplate.from_folder(tmp_path)
    for as_parts in (True, False):
        rendered = template.render(
            (text_message("system", "one"), text_message("user", "two")),
            as_parts=as_parts,
            protect=str.upper,
        )
        assert "ONE" in rendered
        assert "TWO" in rendered
        assert "<|im_start|>user" in rendered


# --- what goes wrong --------------------------------------------------------------------------


def test_a_syntax_error_names_file_and_line(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError) as caught:
        from_text(tmp_path, "fine\n{% if %}")
    assert "chat_template.jinja: broken chat template (line 2" in caught.value.message
    assert "\n" not in caught.value.message
    assert caught.value.hint


@pytest.mark.parametrize(
    "text",
    [
        "{{ messages[9].content }}",
        "{{ 'a' + 1 }}",
        "{{ 1 / 0 }}",
        "{{ undefined.x.y }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(1000000000) %}{% endfor %}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    ],
)
def test_a_template_that_fails_or_breaks_out(text: str, tmp_path: Path) -> None:
    template = from_text(tmp_path, text)
    with pytest.raises(ModelFileError, match="broken chat template"):
        template.render(HELLO, as_parts=False)


def test_a_conversation_the_template_refuses_is_the_users_error(tmp_path: Path) -> None:
    template = from_text(tmp_path, "{{ raise_exception('No user query found.') }}")
    with pytest.raises(InputError, match="refuses this conversation: No user query found"):
        template.render((Message("assistant", ()),), as_parts=False)


def test_the_same_words_are_rendered_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    template = from_text(tmp_path, "{{ messages | length }}{{ messages[0]['content'] }}")
    chats = [(text_message("user", text),) for text in ("one", "two", "one", "two")]
    found = [template.render(chat, as_parts=False) for chat in chats[:2]]
    monkeypatch.setattr(type(template), "_render", None)
    assert (
        found == [template.render(chat, as_parts=False) for chat in chats[2:]] == ["1one", "1two"]
    )


def test_a_template_that_tells_the_time_is_rendered_each_time(tmp_path: Path) -> None:
    template = from_text(tmp_path, "{{ strftime_now('%f') }}{{ messages | length }}")
    chat = (text_message("user", "When?"),)
    assert len({template.render(chat, as_parts=False) for _ in range(20)}) > 1
