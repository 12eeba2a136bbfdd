"""Thoughts that are cut off on a GPU: graphs alone and in rows, with drafts, beside free rows."""

from __future__ import annotations

import shutil

import pytest

from qwencli.config import DType, EngineName, SamplingOptions, Speculate
from qwencli.engine.client import generate_many
from qwencli.engine.frontend.tokenizer import Tokenizer
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.native.engine import NativeEngine
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import engine_config, picture
from tests.engine.test_thinking_budget import CLOSING, TEMPLATE, few_words  # noqa: F401


def requests():
    asked = [
        ("hello", 9, ()),
        ("Describe this.", 14, (picture(),)),
        ("free", None, ()),
        ("B", 1, ()),
    ]
    settings = SamplingOptions(do_sample=False, max_new_tokens=60)
    return [
        GenerationRequest(
            (user_message(text, images),), settings, thinking=True, thinking_budget=budget
        )
        for text, budget, images in asked
    ]


@pytest.mark.parametrize("speculate", [Speculate.OFF, Speculate.THREE], ids=str)
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen3_5"])
def test_thoughts_end_where_they_do_in_transformers(checkpoint, tmp_path, family, speculate):
    if family == "qwen3_5" and speculate is not Speculate.OFF:
        pytest.skip("without a head nothing drafts for it")
    folder = tmp_path / family
    shutil.copytree(checkpoint(family), folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    closing = tuple(Tokenizer.from_folder(folder).encode(f"{CLOSING}</think>\n\n"))
    settings = {"device": "cuda", "dtype": DType.FLOAT32}
    with TransformersEngine(engine_config(folder, **settings)) as reference:
        expected = [reference.generate(request).token_ids for request in requests()]
    settings |= {"engine": EngineName.NATIVE, "speculate": speculate}
    with NativeEngine(engine_config(folder, **settings)) as engine:
        alone = [engine.generate(request) for request in requests()]
        assert [each.token_ids for each in alone] == expected
        assert alone[0].token_ids[9 : 9 + len(closing)] == closing
        for _ in range(2):
            together = list(generate_many(engine, requests() * 4))
            assert [each.token_ids for each in together] == expected * 4
