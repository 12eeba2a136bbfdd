"""A model with gated delta nets in the engine: requests that run in rows, whatever is asked."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from qwencli.config import (
    Attention,
    Cache,
    EngineName,
    KVDType,
    Quantization,
    SamplingOptions,
    Speculate,
)
from qwencli.engine.cache.paged_kv import PAGE_SIZE
from qwencli.engine.client import generate_many
from qwencli.engine.graphs import GraphRunner
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.engine.native import engine as native_engine
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.native.model import QwenModel
from qwencli.engine.request import Limits
from qwencli.engine.response import ResponseBuilder
from qwencli.engine.spec_decode import mtp, ngram
from qwencli.engine.spec_decode.policy import BatchDraftPolicy
from qwencli.errors import UnsupportedModeError
from qwencli.messages import GenerationRequest, text_message, user_message
from tests.checkpoints import engine_config, film, hub_config, picture
from tests.engine.native.host_graphs import run_graphs_on_the_host
from tests.engine.native.mtp_reference import MtpReference, with_head

# Few rows and tokens, so that requests wait, prompts are cut and rows are used again.
NARROW = Limits(max_rows=3, max_prefill_tokens=24, max_prompts=2)


def ask(text="Describe this.", images=(), **sampling):
    settings = SamplingOptions(**{"do_sample": False, "max_new_tokens": 64, **sampling})
    return GenerationRequest((user_message(text, tuple(images)),), settings, ignore_eos=True)


def requests():
    return [
        ask("hello"),
        ask("What? " * 30, max_new_tokens=9),
        ask(images=[picture()], max_new_tokens=20),
        ask(images=[picture(96, 64), picture(64, 64)], max_new_tokens=3),
        ask(images=[film()], max_new_tokens=5),
        ask("B", repetition_penalty=1.4, max_new_tokens=12),
    ]


def native_config(checkpoint, **settings):
    return engine_config(checkpoint("qwen3_5"), engine=EngineName.NATIVE, **settings)


@pytest.fixture(scope="module")
def narrow():
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(native_engine.BATCH_LIMITS, "cpu", NARROW)
        yield


@pytest.fixture(scope="module")
def engine(checkpoint, narrow):
    with NativeEngine(native_config(checkpoint)) as loaded:
        yield loaded


def test_alone_and_together_it_says_what_transformers_does(checkpoint, engine):
    with TransformersEngine(engine_config(checkpoint("qwen3_5"))) as reference:
        expected = [reference.generate(request) for request in requests()]
        scored = list(reference.log_probs("Some text to score.", 12))
    alone = [engine.generate(request) for request in requests()]
    assert [each.token_ids for each in alone] == [each.token_ids for each in expected]
    assert [each.num_image_tokens for each in alone] == [each.num_image_tokens for each in expected]
    together = list(generate_many(engine, requests() * 2))
    assert [each.token_ids for each in together] == [each.token_ids for each in alone] * 2
    assert alone[0].effective.cache == "static" and alone[0].effective.attention == "sdpa"
    queue = engine._queue._scheduler
    assert queue.pool.num_free == queue.pool.capacity
    assert not engine.has_unfinished and queue.states.num_free == queue.limits.max_rows + 8
    for one, other in zip(engine.log_probs("Some text to score.", 12), scored, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


def test_a_stream_that_is_dropped_gives_its_state_back(engine):
    chunks = engine.stream(ask())
    next(chunks)
    chunks.close()
    assert not engine.has_unfinished
    states = engine._queue._scheduler.states
    assert states.num_free == engine._queue._scheduler.limits.max_rows + 8


def test_what_is_aborted_gives_nothing_that_a_stream_beside_it_was_given(engine):
    number = engine.add(ask("Beside", max_new_tokens=20))
    chunks = engine.stream(ask(max_new_tokens=9))
    assert len(list(chunks)) >= 9
    engine.abort(number)
    assert not engine.has_unfinished and engine.step() == []


@pytest.mark.parametrize(
    ("settings", "nearest"),
    [
        ({"cache": Cache.DYNAMIC}, "static"),
        ({"cache": Cache.STATIC_COMPILE}, "static"),
        ({"attention": Attention.EAGER}, "sdpa"),
        ({"batch_invariant": True}, "model"),
    ],
    ids=str,
)
def test_a_mode_that_rows_do_not_have_is_refused(checkpoint, settings, nearest):
    with pytest.raises(UnsupportedModeError) as caught:
        NativeEngine(native_config(checkpoint, **settings)).load()
    assert caught.value.nearest == nearest
    assert "gated delta nets" in caught.value.message or "compiler" in caught.value.message


@pytest.mark.parametrize("quantization", [Quantization.INT4, Quantization.FP8])
def test_every_large_matrix_is_quantized_and_nothing_that_is_exponentiated(
    checkpoint, narrow, quantization
):
    config = native_config(checkpoint, quantization=quantization, kv_dtype=KVDType.INT8)
    with NativeEngine(config) as loaded:
        result = loaded.generate(ask(max_new_tokens=8))
        decoder = loaded._model.decoder
        assert all(layer.beta_decay.dtype.is_floating_point for layer in decoder.layers[::2])
        assert "none" not in result.effective.quantization
        for layer in decoder.layers:
            assert not any(
                hasattr(matrix, "dim") for matrix in (layer.qkv, layer.o, layer.gate_up, layer.down)
            )
        again = replace(ask(max_new_tokens=8))
        assert next(generate_many(loaded, [again])).token_ids == result.token_ids


def test_the_next_turn_goes_on_from_a_state_that_was_kept(engine):
    """A beginning is only of use where a state was kept: at the end of a prompt, in whole pages."""
    first = ask("Tell me. " * 30, [picture()], max_new_tokens=20)
    answer = engine.generate(first)
    assert answer.num_cached_tokens == 0
    turns = (*first.messages, text_message("assistant", answer.text), user_message("And then?"))
    again = replace(first, messages=turns)
    second = engine.generate(again)
    # Random text is other tokens when it is read again.
    assert second.num_cached_tokens == (answer.num_prompt_tokens - 1) // PAGE_SIZE * PAGE_SIZE > 0
    # Many at once: no ends of prompts are kept, but where beginnings part that came before.
    fresh = engine.generate(replace(again, bypass_caches=True))
    assert fresh.token_ids == second.token_ids and fresh.num_cached_tokens == 0
    short, system = ask(max_new_tokens=6), text_message("system", "Be brief. " * 40)
    others = [replace(short, messages=(system, *ask(f"{n}").messages)) for n in range(6)]
    together = list(generate_many(engine, others * 2))
    alone = [engine.generate(replace(each, bypass_caches=True)) for each in others]
    assert [each.token_ids for each in together] == [each.token_ids for each in alone] * 2
    assert any(each.num_cached_tokens >= PAGE_SIZE for each in together)
    states = engine._queue._scheduler.states
    assert states.num_free == engine._queue._scheduler.limits.max_rows + 8


@pytest.mark.parametrize("drafting", [False, True])
@pytest.mark.parametrize("behind", [3, 0])
def test_the_next_turn_goes_on_from_the_end_of_an_answer(
    engine, speculating, monkeypatch, drafting, behind
):
    """So many tokens behind the border of a page; of an answer that steps of several tokens gave,
    too. Once: then it is the state of the next answer."""
    own, begin = speculating if drafting else engine, NativeEngine._built

    def whole(request):
        """The prompt, and an answer that ends there; None where that takes long, or a random model
        says pictures."""
        length = len(begin(own, request, None).input_ids)
        tokens = 1 + behind + PAGE_SIZE - length % PAGE_SIZE
        asked = replace(request, sampling=replace(request.sampling, max_new_tokens=tokens))
        return asked if tokens < 16 else None

    shape = own._model.shape
    pictures = {shape.image_token_id, shape.video_token_id}
    asked = filter(None, (whole(ask("Tell me. " * n)) for n in range(1, 60)))
    answers = ((each, own.generate(each)) for each in asked)
    first, answer = next(each for each in answers if not pictures & set(each[1].token_ids))
    more = (*answer.token_ids, 7, 8, 9)
    monkeypatch.setattr(
        NativeEngine, "_built", lambda self, *rest: begin(self, first, None).with_forced(more)
    )
    again = replace(first, sampling=replace(first.sampling, max_new_tokens=9))
    second, third = own.generate(again), own.generate(again)
    fed = answer.num_prompt_tokens + len(answer.token_ids) - 1
    assert fed % PAGE_SIZE == behind and second.num_cached_tokens == fed
    assert third.num_cached_tokens in (0, fed // PAGE_SIZE * PAGE_SIZE)
    fresh = own.generate(replace(again, bypass_caches=True))
    assert fresh.num_cached_tokens == 0
    assert second.token_ids == third.token_ids == fresh.token_ids
    states, pool = own._queue._scheduler.states, own._queue._scheduler.pool
    assert states.num_free == own._queue._scheduler.limits.max_rows + 8
    assert pool.num_free == pool.capacity


class Oracle:
    """Drafts what a plain engine answered, but for some tokens, which are wrong.

    Args:
        texts: prompts and their answers. right: how often a draft is, of 1.
    """

    def __init__(self, texts, right, seed):
        self._texts, self._right, self.drafted = list(map(list, texts)), right, 0
        self._random = random.Random(seed)

    def draft(self, rows, drafts, kv_len):
        drafts.input_ids[:, 0] = rows.token
        for row, slot in enumerate(rows.slot.tolist()):
            known = drafts.ids[row, : slot + 1].tolist()
            for text in self._texts:
                if text[: slot + 1] == known and not rows.done[row]:
                    ahead = text[slot + 1 : slot + 1 + 8]
                    ahead = [each if self._random.random() < self._right else 5 for each in ahead]
                    self.drafted += len(ahead)
                    drafts.input_ids[row, 1 : 1 + len(ahead)] = torch.tensor(
                        ahead, dtype=torch.int64
                    )


def end_with(monkeypatch, token):
    """Make a token one that ends answers."""
    begin = ResponseBuilder.__post_init__

    def begin_so(self):
        begin(self)
        if not self.sampling.ignore_eos:
            self.stop_ids |= {token}

    monkeypatch.setattr(ResponseBuilder, "__post_init__", begin_so)


@pytest.fixture(scope="module")
def speculating(checkpoint, narrow):
    with NativeEngine(native_config(checkpoint, speculate=Speculate.AUTO)) as loaded:
        assert loaded.max_rows == 3
        yield loaded


@pytest.fixture(scope="module")
def headed(checkpoint, tmp_path_factory):
    return with_head(checkpoint("qwen3_5"), tmp_path_factory.mktemp("headed") / "model")


@pytest.fixture(scope="module")
def by_head(headed, narrow):
    config = engine_config(headed, engine=EngineName.NATIVE, speculate=Speculate.AUTO)
    with NativeEngine(config) as loaded:
        assert loaded.max_rows == 3
        yield loaded


@pytest.mark.parametrize("right", [None, 0.7])
def test_drafts_of_the_model_s_own_head_change_nothing(engine, by_head, monkeypatch, right):
    """Whatever it guesses; `right` stands in for a head that has learned something."""
    asked = [ask("hello", max_new_tokens=24), ask("What? " * 30, max_new_tokens=20)]
    asked += [ask(images=[picture()], max_new_tokens=12), ask("B " * 70, max_new_tokens=7)]
    expected = [engine.generate(each) for each in asked]
    texts = [
        (*engine._built(each, None).input_ids, *answer.token_ids)
        for each, answer in zip(asked, expected, strict=True)
    ]
    if right is not None:
        oracle, drafting = Oracle(texts, right, seed=3), mtp.HeadInputs.draft

        def draft(self, model, cache, rows, drafts, *rest):
            drafting(self, model, cache, rows, drafts, *rest)
            oracle.draft(rows, drafts, 0)

        monkeypatch.setattr(mtp.HeadInputs, "draft", draft)
    sizes = random.Random(4)
    monkeypatch.setattr(BatchDraftPolicy, "next", lambda *rest: sizes.choice((0, 1, 2, 4, 6)))
    monkeypatch.setattr(BatchDraftPolicy, "learn", lambda *rest: None)
    found = list(generate_many(by_head, asked))
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert right is None or sum(each.speculation.num_accepted for each in found) > 8
    assert found[0].effective.speculate == "mtp"


def steps_of(monkeypatch, *sizes):
    """Steps check so many tokens, in an order that is the same each time."""
    drawn = random.Random(6)
    monkeypatch.setattr(BatchDraftPolicy, "next", lambda *rest: drawn.choice(sizes))
    monkeypatch.setattr(BatchDraftPolicy, "learn", lambda *rest: None)


def test_a_head_drafts_beside_penalties_and_draws(engine, by_head, monkeypatch):
    """Greedy tokens, and those of a seed, are the ones of plain steps, whatever is drawn beside."""
    seeded = ask("Why? ", do_sample=True, temperature=0.7, seed=5, max_new_tokens=30)
    asked = [ask("hello", max_new_tokens=24), ask("B " * 40, repetition_penalty=1.4), seeded]
    expected = [engine.generate(each).token_ids for each in asked]
    asked += [replace(seeded, sampling=replace(seeded.sampling, seed=-1))]
    steps_of(monkeypatch, 1, 2, 4, 6)
    found = list(generate_many(by_head, asked))
    assert [each.token_ids for each in found[:3]] == expected
    assert len(found[3].token_ids) == 30 and found[3].token_ids != expected[2]
    assert all(each.effective.speculate == "mtp" for each in found)
    assert all(each.speculation.num_drafted for each in found)


def test_the_head_reads_pictures_as_the_model_does(by_head, monkeypatch):
    """Beside each token's hidden state stands what the model was fed for the token behind it: of a
    picture its features. Prompts are cut, so that some chunks end inside one."""
    fed, compared, inside = [], 0, 0
    running, reading = QwenModel.prefill_packed, QwenModel.draft_head_packed

    def prefill_packed(self, hidden, *rest):
        fed.append(hidden.clone())
        return running(self, hidden, *rest)

    def draft_head_packed(self, embeds, hidden, positions, slots, cache, packed):
        nonlocal compared, inside
        last = packed.starts[1:] - 1
        within = torch.ones(len(embeds), dtype=torch.bool)
        within[last.long()] = False
        assert torch.equal(embeds[within], fed[-1].roll(-1, 0)[within])
        compared += int(within.sum())
        inside += bool((embeds[~within] == self.decoder.embed(image)).all(1).any())
        reading(self, embeds, hidden, positions, slots, cache, packed)

    monkeypatch.setattr(QwenModel, "prefill_packed", prefill_packed)
    monkeypatch.setattr(QwenModel, "draft_head_packed", draft_head_packed)
    image = torch.tensor([by_head._model.shape.image_token_id])
    asked = [ask(images=[picture(200, 200)], max_new_tokens=2), ask("hello", max_new_tokens=2)]
    list(generate_many(by_head, [replace(each, bypass_caches=True) for each in asked]))
    assert compared > 30 and inside


def test_a_head_that_is_not_there_is_one_line(checkpoint):
    config = engine_config(checkpoint("qwen3"), engine=EngineName.NATIVE, speculate=Speculate.MTP)
    known = replace(config, model=replace(config.model, hub_config=hub_config("qwen3")))
    assert_no_head(config, known, "no head that drafts tokens")


def test_a_head_of_several_layers_is_no_head_of_one(headed, tmp_path):
    """config.json says so, whatever the weights have: the first of them would draft alone."""
    folder = tmp_path / "two"
    shutil.copytree(headed, folder)
    said = json.loads((folder / "config.json").read_text())
    said["text_config"]["mtp_num_hidden_layers"] = 2
    (folder / "config.json").write_text(json.dumps(said))
    config = engine_config(folder, engine=EngineName.NATIVE, speculate=Speculate.MTP)
    known = replace(config, model=replace(config.model, hub_config=said))
    assert_no_head(config, known, "a head that drafts tokens .MTP. of 2 layers, and those of one")


def assert_no_head(config, known, said):
    for asked, begin in ((config, NativeEngine.load), (known, NativeEngine.warm_kernels)):
        with pytest.raises(UnsupportedModeError, match=said) as caught:
            begin(NativeEngine(asked))
        assert caught.value.nearest == "auto"


def test_the_head_has_seen_every_token_however_many_steps_took(headed, by_head, monkeypatch):
    """Prompts in chunks, plain steps, and steps of which some tokens were wrong: what it drafts is
    what its reference does with the whole text."""
    import transformers

    model = transformers.Qwen3_5ForConditionalGeneration.from_pretrained(headed)
    model = model.to(torch.float32).eval().model.language_model
    weights = {n: t.float() for n, t in load_file(headed / "model.safetensors").items()}
    reference = MtpReference(
        json.loads((headed / "config.json").read_text())["text_config"], weights
    )
    drafting, checked = mtp.HeadInputs.draft, []

    def draft(self, native, cache, rows, drafts, tables, longest, count, choose):
        drafting(self, native, cache, rows, drafts, tables, longest, count, choose)
        for row, slot in enumerate(rows.slot.tolist()):
            if rows.done[row]:
                continue
            ids = drafts.ids[row, : slot + 1].tolist()
            hidden = model(torch.tensor([ids[:-1]])).last_hidden_state[0]
            positions = torch.arange(slot).expand(3, -1)
            checked.append(reference.drafts(ids, hidden, positions, count))
            assert drafts.input_ids[row, 1 : 1 + count].tolist() == checked[-1]

    monkeypatch.setattr(mtp.HeadInputs, "draft", draft)
    sizes = random.Random(5)
    monkeypatch.setattr(BatchDraftPolicy, "next", lambda *rest: sizes.choice((0, 1, 2, 4)))
    monkeypatch.setattr(BatchDraftPolicy, "learn", lambda *rest: None)
    asked = [ask("What now? " * 9, max_new_tokens=16), ask("C", max_new_tokens=9)]
    list(generate_many(by_head, [replace(each, bypass_caches=True) for each in asked]))
    assert len(checked) > 6


@pytest.mark.parametrize("right", [0.0, 0.9])
def test_steps_that_check_drafts_give_what_plain_ones_do(engine, speculating, monkeypatch, right):
    """Of rows that join and leave, whatever sizes steps have; answers end within what a step
    accepts, by a stop token or by their limit."""
    asked = [ask("hello", max_new_tokens=40), ask("What? " * 30, max_new_tokens=33)]
    asked += [ask(images=[picture()], max_new_tokens=20), ask("B " * 70, max_new_tokens=7)]
    expected = [engine.generate(each) for each in asked]
    end_with(monkeypatch, expected[0].token_ids[17])
    asked += [replace(asked[0], ignore_eos=False)]
    expected += [engine.generate(asked[-1])]
    assert expected[-1].finish_reason == "stop" and len(expected[-1].token_ids) <= 18
    texts = [
        (*engine._built(each, None).input_ids, *answer.token_ids)
        for each, answer in zip(asked, expected, strict=True)
    ]
    oracle = Oracle(texts, right, seed=3)
    monkeypatch.setattr(ngram, "draft", oracle.draft)
    sizes = random.Random(4)
    monkeypatch.setattr(BatchDraftPolicy, "next", lambda *rest: sizes.choice((0, 1, 2, 4, 8)))
    monkeypatch.setattr(BatchDraftPolicy, "learn", lambda *rest: None)
    found = list(generate_many(speculating, asked))
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert [each.finish_reason for each in found] == [each.finish_reason for each in expected]
    accepted = sum(each.speculation.num_accepted for each in found)
    assert oracle.drafted and (accepted > 12 if right else accepted < 10)


def test_a_graph_that_is_captured_amid_an_answer_changes_nothing(engine, by_head, monkeypatch):
    """A graph runs what it captures: states, what the head has seen, and texts must not take that
    step twice."""
    run_graphs_on_the_host(monkeypatch)
    asked = [ask("hello", max_new_tokens=24), ask("What? " * 30, max_new_tokens=20)]
    expected = [engine.generate(each) for each in asked]
    by_head.generate(asked[0])  # makes the rows
    step_runner = by_head._queue._runner
    monkeypatch.setattr(step_runner, "_graphs", GraphRunner(torch.device("cpu")))
    monkeypatch.setattr(step_runner, "_captured", [])
    sizes = random.Random(6)
    monkeypatch.setattr(BatchDraftPolicy, "next", lambda *rest: sizes.choice((0, 1, 2, 4, 6)))
    monkeypatch.setattr(BatchDraftPolicy, "learn", lambda *rest: None)
    found = list(generate_many(by_head, asked))
    assert [each.token_ids for each in found] == [each.token_ids for each in expected]
    assert len(step_runner._captured) > 4


def test_longer_passes_cost_no_rows(checkpoint, monkeypatch):
    """Where memory is short, rows are as many as beside passes of ordinary length."""
    short, rows = Limits(16, 64, 8), []
    with NativeEngine(native_config(checkpoint)) as loaded:
        plan = loaded._plan
        free = plan.activations + plan.kept_images + plan.graphs + 40 * 2**20
        monkeypatch.setattr(native_engine, "_free_bytes", lambda device: free)
        for limits in (short, replace(short, unstreamed_prefill_tokens=200_000)):
            monkeypatch.setitem(native_engine.BATCH_LIMITS, "cpu", limits)
            loaded._close_queue()
            list(generate_many(loaded, [ask("A", max_new_tokens=2)]))
            rows.append(loaded._queue._scheduler.limits.max_rows)
    assert rows[0] == rows[1] > 1
