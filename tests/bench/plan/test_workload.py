from __future__ import annotations

import pytest

from qwencli.bench.plan.matrix_file import EXAMPLE_IMAGE, find_image, prompt_or_default, read_prompt
from qwencli.errors import InputError, UsageError
from qwencli.messages import DEFAULT_PROMPT, PRESETS


def test_pictures_by_name_or_file(tmp_path):
    assert find_image("scene", tmp_path) == EXAMPLE_IMAGE
    mine = tmp_path / "scene"  # a file of that name goes first
    mine.write_bytes(b"")
    assert find_image("scene", tmp_path) == mine
    with pytest.raises(InputError, match=r"gone.png: no such file") as caught:
        find_image("gone.png", tmp_path)
    assert "scene" in caught.value.hint


def test_prompts_by_text_name_or_file(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_text("\n  What is it?\n", encoding="utf-8")
    assert read_prompt() is None
    assert read_prompt(prompt="Hi") == "Hi"
    assert read_prompt(preset="tags") == PRESETS["tags"]
    assert read_prompt(prompt_file=file) == "What is it?"
    assert prompt_or_default(None, None) == DEFAULT_PROMPT
    assert prompt_or_default(None, "a", "b") == "a"


def test_wrong_prompts(tmp_path):
    file = tmp_path / "prompt.txt"
    file.write_bytes(b"\xff")
    with pytest.raises(InputError, match="not UTF-8"):
        read_prompt(prompt_file=file)
    file.write_bytes(b" ")
    for said in ({"prompt_file": file}, {"prompt": ""}):
        with pytest.raises(UsageError, match="is empty"):
            read_prompt(**said)
    with pytest.raises(UsageError, match="--prompt and --prompt-file exclude"):
        read_prompt(prompt="a", prompt_file=file)
