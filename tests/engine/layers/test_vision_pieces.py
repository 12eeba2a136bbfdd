"""Large pictures and long prompts run in pieces, and give what they give whole."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwencli.config import Cache, EngineName, KVDType, SamplingOptions
from qwencli.engine.client import generate_many
from qwencli.engine.layers import vision_tower
from qwencli.engine.native import model as native_model
from qwencli.engine.native.engine import NativeEngine
from qwencli.errors import InputError
from qwencli.messages import GenerationRequest, user_message
from tests.checkpoints import engine_config, film, picture


@torch.inference_mode()
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen2_vl"])
def test_pictures_in_pieces_have_the_features_of_whole_ones(checkpoint, monkeypatch, family):
    message = user_message("Look.", (picture(160, 96), film(), picture(64, 96)))
    request = GenerationRequest((message,), SamplingOptions(max_new_tokens=2))
    with NativeEngine(engine_config(checkpoint(family), engine=EngineName.NATIVE)) as engine:
        prompt, *_ = engine._prepared(request)
        tower = engine._model.vision
        patches = torch.cat([torch.as_tensor(each) for each in prompt.inputs.patches])
        whole = tower.encode(patches, prompt.grid_thw)
        # Cuts segments apart, and takes several whole ones at a time.
        for piece in (8, 24):
            monkeypatch.setattr(vision_tower, "PIECE", piece)
            monkeypatch.setattr(vision_tower, "UNDIVIDED", piece)
            tower._prepared.clear()
            tower._latest = None
            cut = tower.encode(patches, prompt.grid_thw)
            assert all(each.patches <= piece for each in tower._prepared.values())
            for one, other in zip(
                (cut.embeds, *cut.deepstack), (whole.embeds, *whole.deepstack), strict=True
            ):
                torch.testing.assert_close(one, other, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", [{}, {"kv_dtype": KVDType.INT8}, {"cache": Cache.DYNAMIC}])
def test_a_prompt_in_chunks_is_answered_as_a_whole_one(checkpoint, monkeypatch, settings):
    message = user_message("How many are there? " * 9, (picture(160, 96), picture(64, 96)))
    request = GenerationRequest(
        (message,), SamplingOptions(do_sample=False, max_new_tokens=8), ignore_eos=True
    )
    config = engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE, **settings)
    with NativeEngine(config) as engine:
        whole = engine.generate(request).token_ids
        ran: list[int] = []
        of_model = native_model.QwenModel._prefill_chunk

        def counted(self, inputs, cache, start, stop):
            ran.append(stop - start)
            return of_model(self, inputs, cache, start, stop)

        monkeypatch.setattr(native_model.QwenModel, "_prefill_chunk", counted)
        for chunk in (1, 23, 64):
            monkeypatch.setattr(native_model, "PREFILL_CHUNK", chunk)
            engine._forget()
            ran.clear()
            assert engine.generate(request).token_ids == whole
            assert len(ran) > 1 and max(ran) <= native_model.longest_chunk()
        # What is left over goes with the last chunk, where it is little.
        tokens = sum(ran)
        monkeypatch.setattr(native_model, "PREFILL_CHUNK", tokens - tokens // 10)
        engine._forget()
        ran.clear()
        assert engine.generate(request).token_ids == whole
        assert ran == [tokens]


def test_pictures_are_made_as_large_as_fits_and_it_is_said(checkpoint):
    pictures = (picture(640, 480), picture(64, 64), picture(320, 320))
    request = GenerationRequest(
        (user_message("Look.", pictures),),
        SamplingOptions(do_sample=False, max_new_tokens=8),
        ignore_eos=True,
    )
    common = {"engine": EngineName.NATIVE, "max_seq_len": 128}
    with NativeEngine(engine_config(checkpoint("qwen3_vl"), **common)) as engine:
        alone = engine.generate(request)
        (together,) = generate_many(engine, [request])
        small = engine.generate(replace(request, messages=(user_message("Look.", pictures[1:2]),)))
    assert alone.num_prompt_tokens + 8 <= 128 and alone.token_ids == together.token_ids
    assert len(alone.notes) == 2 and alone.notes == together.notes and not small.notes
    assert "a picture of 640x480 is shown as" in alone.notes[0]
    assert alone.resized_sizes[1] == small.resized_sizes[0]
    # A size that was asked for is kept.
    config = engine_config(checkpoint("qwen3_vl"), **common, max_pixels=640 * 480)
    with NativeEngine(config) as engine, pytest.raises(InputError, match="tokens"):
        engine.generate(request)
