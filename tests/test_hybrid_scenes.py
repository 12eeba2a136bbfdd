"""The small trained Qwen3.5: captions are right in both engines, drafts of its head are used."""

from __future__ import annotations

from pathlib import Path

import pytest

from qwencli.config import EngineName, SamplingOptions, Speculate
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.spec_decode.policy import BatchDraftPolicy
from qwencli.messages import GenerationRequest, ImagePart, user_message
from tests.checkpoints import engine_config
from tools.scenes.heldout import PROMPT, heldout

FOLDER = Path(__file__).parent / "hybrid_scenes"
COUNT, RIGHT = 8, 7


@pytest.fixture(scope="module")
def asked():
    settings = SamplingOptions(do_sample=False, max_new_tokens=80)
    items = list(heldout(COUNT))
    pictures = [ImagePart(item.image, f"{item.index}.png") for item in items]
    requests = [GenerationRequest((user_message(PROMPT, (each,)),), settings) for each in pictures]
    return requests, [item.caption for item in items]


def test_it_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 4_000_000


def test_held_out_scenes_are_captioned_and_drafted(asked, monkeypatch) -> None:
    requests, wanted = asked
    with NativeEngine(engine_config(FOLDER, engine=EngineName.NATIVE)) as engine:
        plain = [engine.generate(request) for request in requests]
    assert sum(each.text == text for each, text in zip(plain, wanted, strict=True)) >= RIGHT
    # Whatever steps cost on a machine that others use: the head drafts three tokens in each.
    monkeypatch.setattr(BatchDraftPolicy, "next", lambda self, rows, texts: 4)
    monkeypatch.setattr(BatchDraftPolicy, "learn", lambda *arguments: None)
    config = engine_config(FOLDER, engine=EngineName.NATIVE, speculate=Speculate.MTP)
    with NativeEngine(config) as engine:
        drafted = [engine.generate(request) for request in requests]
    assert [each.token_ids for each in drafted] == [each.token_ids for each in plain]
    figures = [each.speculation for each in drafted if each.speculation is not None]
    num_drafted = sum(each.num_drafted for each in figures)
    assert sum(each.num_accepted for each in figures) > 0.5 * num_drafted > 100
    with TransformersEngine(engine_config(FOLDER)) as reference:
        assert [reference.generate(request).token_ids for request in requests[:3]] == [
            each.token_ids for each in plain[:3]
        ]
