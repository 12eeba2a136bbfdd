"""Prompts and pictures as graphs give what the model gives operator by operator."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from qwencli.config import EngineName, Quantization, SamplingOptions
from qwencli.engine.graphs import GraphRunner
from qwencli.engine.loading import weights
from qwencli.engine.native import prefill_graphs
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.native.memory_plan import SIZES
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prefill_graphs import BUCKET, PrefillGraphs, Size
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.quant.quantized_tensor import Scheme
from qwencli.errors import RequestError
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.shape_reader import read_shape
from tests.chatting import answers_of_turns
from tests.checkpoints import ALONE, VISION_FAMILIES, engine_config, film, hub_config, picture
from tests.engine.native.host_graphs import run_graphs_on_the_host
from tests.engine.native.test_capture import Calls, Captured, without_values
from tests.engine.quant.test_prequantized import TEXT

CPU = torch.device("cpu")
LONGEST = SIZES.tokens
SLOTS = LONGEST + 200


@pytest.fixture(autouse=True)
def graphs_of_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    run_graphs_on_the_host(monkeypatch)


@pytest.fixture
def captured(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The keys of graphs in the order in which they are captured."""
    keys: list[object] = []
    capture = GraphRunner.capture
    monkeypatch.setattr(
        GraphRunner, "capture", lambda pool, key, work: (keys.append(key), capture(pool, key, work))
    )
    return keys


def ask(*images: object, text: str = "Describe it.", new: int = 24) -> GenerationRequest:
    sampling = SamplingOptions(do_sample=False, max_new_tokens=new)
    return GenerationRequest(
        (user_message(text, images),), sampling, ignore_eos=True, bypass_caches=True
    )


def graphed(engine: NativeEngine) -> PrefillGraphs:
    """Let an engine run its prompts as graphs, as `static-graph` does."""
    engine.load()
    generation = engine._generation
    state = generation._state
    graphs = PrefillGraphs(generation._model, state.cache, len(state.slots))
    generation._prompts = generation._graphs = graphs
    return graphs


@pytest.mark.parametrize("family", ALONE)
def test_requests_in_turns_get_the_same_tokens(checkpoint, family, captured):
    """Longer and shorter ones, so that what an earlier one left lies behind a later one."""
    pictures = family in VISION_FAMILIES
    requests = [
        ask(text="Describe it. " * 30),
        ask(text="Once."),
        *([ask(picture(), picture(96, 64)), ask(picture(64, 96), text="")] if pictures else []),
        *([ask(film())] if pictures else []),
        ask(text="Describe it. " * 30),
    ]
    requests += requests[::-1]
    with NativeEngine(engine_config(checkpoint(family), engine=EngineName.NATIVE)) as engine:
        expected = [engine.generate(request).token_ids for request in requests]
        graphed(engine)
        found = [engine.generate(request).token_ids for request in requests]
    assert found == expected
    assert len(captured) == len(set(captured)) > 1


def test_a_size_is_captured_when_it_comes_the_second_time(checkpoint, captured):
    """Unless the request is measured; before, the same pass runs without being captured."""
    first, second, again = (
        replace(ask(shown, text=text), bypass_caches=False)
        for shown, text in (
            (picture(), "Describe it."),
            (picture(64, 96), "Say more."),
            (picture(64, 96), "Where?"),
        )
    )  # fmt: skip
    with NativeEngine(engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE)) as engine:
        expected = [engine.generate(each).token_ids for each in (first, second, again)]
        engine._forget()
        graphed(engine)
        found = []
        for request, count in ((first, 0), (second, 2)):
            found.append(engine.generate(request).token_ids)
            engine._generation.forget()
            assert len(captured) == count
        engine._vision_cache.clear()
        found.append(engine.generate(again).token_ids)
        assert len(captured) == 2
        assert found == expected
        text = ask(text="Only words. " * 40)
        engine.generate(text)
        assert len(captured) == 3, "it is measured"


def test_a_next_turn_goes_on_from_a_prompt_that_was_a_graph(checkpoint):
    with NativeEngine(engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE)) as engine:
        expected = answers_of_turns(engine, 9, forget=False)
        graphed(engine)
        engine._generation.forget()
        assert answers_of_turns(engine, 9, forget=False) == expected


@torch.inference_mode()
@pytest.mark.parametrize("quantization", Quantization)
@pytest.mark.parametrize("kv", [None, Scheme.INT8])
def test_logits_and_cache_of_every_length(captured, quantization, kv):
    shape = read_shape(TEXT)
    loaded = weights.dummy(shape, torch.float32, CPU, quantization)
    model = QwenModel(shape, loaded, SLOTS, kv=kv)
    cache, plain = model.static_cache(), model.static_cache()
    graphs = PrefillGraphs(model, cache, SLOTS)
    lengths = (BUCKET + 1, 1, BUCKET - 1, BUCKET, LONGEST, LONGEST + 1, 3)
    for length in lengths:
        inputs = model.prepare([ModelPrompt([(7 * i) % 89 for i in range(length)])])
        cache.length = plain.length = 0
        found, expected = graphs.prefill(inputs, cache), model.prefill(inputs, plain)
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
        assert cache.length == length
        for mine, theirs in zip(cache.layers, plain.layers, strict=True):
            close = (mine[:, :, :length].float() - theirs[:, :, :length].float()).abs().max()
            assert close <= (1.0 if kv else 1e-4)  # a value on the edge of two steps
            assert mine.float().isfinite().all()
    classes = [-(-length // BUCKET) * BUCKET for length in lengths if length <= LONGEST]
    assert captured == [(size, False) for size in dict.fromkeys(classes)]


@torch.inference_mode()
def test_rows_behind_a_prompt_do_not_grow_from_one_replay_to_the_next():
    shape = read_shape(TEXT)
    model = QwenModel(shape, weights.dummy(shape, torch.float32, CPU), SLOTS)
    cache = model.static_cache()
    graphs = PrefillGraphs(model, cache, SLOTS)
    inputs = model.prepare([ModelPrompt([3, 5])])
    left = []
    for _ in range(3):
        cache.length = 0
        graphs.prefill(inputs, cache)
        left.append([layer[:, :, :BUCKET].clone() for layer in cache.layers])
    assert all(torch.equal(a, b) for a, b in zip(left[0], left[-1], strict=True))


def sizes_of(captured: list[object]) -> list[Size]:
    return [key for key in captured if isinstance(key, Size)]


@torch.inference_mode()
@pytest.mark.parametrize("family", sorted({*VISION_FAMILIES} & {*ALONE}))
def test_pictures_of_one_class_share_a_graph(checkpoint, family, captured):
    """Also videos and several at once, in turns with smaller ones; features are those of the tower
    itself."""
    asked = [
        [(1, 6, 10)], [(1, 10, 6)], [(1, 2, 2)], [(1, 8, 4), (1, 4, 4)], [(2, 6, 6)],
        [(1, 16, 16)], [(1, 6, 10)], [(3, 2, 2), (1, 10, 8)], [(1, 2, 2)] * 5,
    ]  # fmt: skip
    with NativeEngine(engine_config(checkpoint(family), engine=EngineName.NATIVE)) as engine:
        graphs, model = graphed(engine), engine._generation._model
        for seed, grids in enumerate(asked):
            count = sum(t * h * w for t, h, w in grids)
            torch.manual_seed(seed)
            patches = torch.randn(count, model.vision.shape.patch_elements)
            found, expected = (of.encode_images(patches, grids) for of in (graphs, model))
            for mine, theirs in zip(
                (found.embeds, *found.deepstack), (expected.embeds, *expected.deepstack),
                strict=True,
            ):  # fmt: skip
                torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-4)
    sizes = sizes_of(captured)
    assert len(sizes) == len(set(sizes)) < len(asked)
    assert {size.patches for size in sizes} == {128, 256}


def test_graphs_that_were_not_used_for_long_are_captured_again(checkpoint, captured, monkeypatch):
    monkeypatch.setattr(prefill_graphs, "GRAPHS_KEPT", 2)
    monkeypatch.setattr(prefill_graphs, "PATCH_BUCKET", 16)
    squares = (32, 96, 192, 96, 32)
    requests = [ask(picture(side, side), new=4) for side in squares]
    with NativeEngine(engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE)) as engine:
        expected = [engine.generate(request).token_ids for request in requests]
        graphs = graphed(engine)
        assert [engine.generate(request).token_ids for request in requests] == expected
        kept = list(graphs._pictures._sizes)
    sizes = sizes_of(captured)
    assert len(sizes) == 4
    assert sizes[0] == sizes[-1]
    assert kept == [sizes[1], sizes[0]]
    assert set(graphs._graphs._graphs) >= set(kept)


def test_a_capture_that_failed_is_made_again_and_can_be_dropped(checkpoint, monkeypatch):
    monkeypatch.setattr(prefill_graphs, "GRAPHS_KEPT", 1)
    monkeypatch.setattr(prefill_graphs, "PATCH_BUCKET", 16)
    small, large = ask(picture(32, 32), new=4), ask(picture(96, 96), new=4)
    with NativeEngine(engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE)) as engine:
        expected = [engine.generate(request).token_ids for request in (small, large)]
        graphed(engine)
        for request, answer in zip((small, large), expected, strict=True):
            with monkeypatch.context() as patch:
                patch.setattr(torch.cuda, "graph", lambda *args, **settings: 1 / 0)
                with pytest.raises(RequestError, match="ZeroDivisionError"):
                    engine.generate(request)
            assert engine.generate(request).token_ids == answer
        with monkeypatch.context() as patch:
            patch.setattr(torch.cuda, "graph", lambda *args, **settings: 1 / 0)
            with pytest.raises(RequestError, match="ZeroDivisionError"):
                engine.generate(small)
        assert engine.generate(large).token_ids == expected[1]


def test_features_of_one_picture_stay_when_the_next_is_encoded(checkpoint):
    """They are kept for later turns, and a graph writes to the same place every time."""
    with NativeEngine(engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE)) as engine:
        graphs = graphed(engine)
        model = engine._generation._model
        grid, size = (1, 4, 4), (16, model.shape.vision.patch_elements)
        with torch.inference_mode():
            first = graphs.encode_images(torch.ones(size), [grid])
            before = [t.clone() for t in (first.embeds, *first.deepstack)]
            second = graphs.encode_images(-torch.ones(size), [grid])
            expected = model.encode_images(-torch.ones(size), [grid])
    assert all(
        torch.equal(a, b) for a, b in zip((first.embeds, *first.deepstack), before, strict=True)
    )
    # Another place in memory may round a sum in another order.
    torch.testing.assert_close(second.embeds, expected.embeds)
    assert not torch.equal(first.embeds, second.embeds)


def test_a_layout_that_found_no_memory_is_not_taken_for_the_one_before(checkpoint, monkeypatch):
    with NativeEngine(engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE)) as engine:
        graphs, model = graphed(engine), engine._generation._model

        def encode(*grid: int) -> torch.Tensor:
            patches = torch.ones(grid[1] * grid[2], model.shape.vision.patch_elements)
            with torch.inference_mode():
                return graphs.encode_images(patches, [grid]).embeds

        def no_memory(*_: object) -> None:
            raise torch.OutOfMemoryError("simulated")

        before = encode(1, 4, 4)
        with monkeypatch.context() as patch:
            patch.setattr(prefill_graphs, "upload", no_memory)
            with pytest.raises(torch.OutOfMemoryError):
                encode(1, 8, 2)
        assert torch.equal(encode(1, 4, 4), before)


def test_a_request_that_failed_in_the_middle_of_a_prompt_harms_no_later_one(
    checkpoint, monkeypatch
):
    with NativeEngine(engine_config(checkpoint("qwen3_vl"), engine=EngineName.NATIVE)) as engine:
        expected = engine.generate(ask(picture())).token_ids
        graphs = graphed(engine)
        with monkeypatch.context() as patch:
            patch.setattr(graphs._graphs, "replay", lambda key: 1 / 0)
            with pytest.raises(RequestError, match="ZeroDivisionError"):
                engine.generate(ask(picture()))
        assert engine.generate(ask(picture())).token_ids == expected


@pytest.mark.parametrize("quantization", Quantization)
@pytest.mark.parametrize("family", ALONE)
def test_a_graph_can_hold_the_passes(family, quantization):
    """Not in inference mode: there operators that consist of others are seen as one."""
    shape = read_shape(hub_config(family))
    loaded = without_values(weights.dummy(shape, torch.float16, CPU, quantization))
    with torch.no_grad():
        model = QwenModel(shape, loaded, SLOTS)
        graphs = PrefillGraphs(model, model.static_cache(), SLOTS)
        layers = bool(shape.vision and shape.vision.deepstack_layers)
        with Calls(), Captured():
            graphs._pass(2 * BUCKET, False)
            graphs._pass(2 * BUCKET, layers)
        if model.vision is not None:
            elements = model.vision.shape.patch_elements
            patches = torch.empty(16 + 24, elements, dtype=model.dtype, device="meta")
            grids = [(1, 4, 4), (1, 4, 6)]
            ready = model.vision.prepare(patches, grids)
            pictures = graphs._pictures
            pictures.encode(patches, grids)
            with Calls(), Captured():
                model.vision.run(patches, ready)
                pictures._pass(next(iter(pictures._sizes)))
