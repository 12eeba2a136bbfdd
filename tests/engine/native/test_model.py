"""The model's own promises: pieces equal a whole, rewinding, types, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qwencli.engine.cache.kv_cache import KVCache
from qwencli.engine.frontend.preprocess import Visual
from qwencli.engine.layers.vision_tower import join_features
from qwencli.engine.loading import weights
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt, PromptInputs
from qwencli.engine.ops.attention import AttentionPlan, decode_mask
from qwencli.errors import InputError
from qwencli.models.shape_reader import read_shape
from tests.engine.native.decoding import decode
from tests.models.test_shape_reader import TEXT, qwen2_5_vl, qwen3_vl

CPU = torch.device("cpu")
IMAGE = 290
GRIDS = [(1, 4, 6), (1, 2, 2)]
IDS = [5, *[IMAGE] * 6, 6, 7, IMAGE, 8, 9]


def model_of(config: dict[str, Any], dtype: torch.dtype = torch.float32) -> QwenModel:
    shape = read_shape(config)
    loaded = weights.dummy(shape, torch.float32, CPU)
    # Values of a size that makes attention and activations far from linear.
    scaled = {
        name: (t * 5 if t.std() > 0 and t.dim() > 1 else t).to(dtype)
        for name, t in loaded.tensors.items()
    }
    return QwenModel(shape, weights.LoadedWeights(scaled, ()), max_seq_len=96)


def prompt(model: QwenModel) -> PromptInputs:
    assert model.vision is not None
    torch.manual_seed(0)
    parts = [
        model.encode_images(torch.randn(t * h * w, model.vision.shape.patch_elements), [(t, h, w)])
        for t, h, w in GRIDS
    ]
    return model.prepare([ModelPrompt(IDS, [Visual(grid) for grid in GRIDS])], join_features(parts))


@pytest.fixture(scope="module", params=[qwen3_vl(), qwen2_5_vl()], ids=["qwen3_vl", "qwen2_5_vl"])
def model(request: pytest.FixtureRequest) -> QwenModel:
    return model_of(request.param)


@pytest.fixture(params=["static", "dynamic"])
def cache(request: pytest.FixtureRequest, model: QwenModel) -> KVCache:
    return model.static_cache() if request.param == "static" else model.dynamic_cache()


@pytest.mark.parametrize("cut", [1, 3, 7, 9, 11])
@torch.inference_mode()
def test_two_pieces_equal_one_prefill(model: QwenModel, cache: KVCache, cut: int) -> None:
    # The cuts fall before, inside, between and after the images.
    inputs = prompt(model)
    whole = model.prefill(inputs, model.static_cache())
    model.prefill(inputs, cache, 0, cut)
    pieces = model.prefill(inputs, cache, cut)
    torch.testing.assert_close(pieces, whole, atol=1e-4, rtol=0)
    assert cache.length == len(IDS)


@torch.inference_mode()
def test_a_step_equals_the_prompt_that_holds_its_token(model: QwenModel, cache: KVCache) -> None:
    inputs = prompt(model)
    step = decode(model, inputs, cache, torch.tensor([[42, 0]]))[1]
    features = inputs.features
    longer = model.prepare([ModelPrompt([*IDS, 42], [Visual(grid) for grid in GRIDS])], features)
    whole = model.prefill(longer, model.static_cache())
    torch.testing.assert_close(step, whole, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_a_cache_is_usable_after_rewinding(model: QwenModel, cache: KVCache) -> None:
    inputs = prompt(model)
    tokens = torch.tensor([[3, 1, 4, 1, 5, 9]])
    first = decode(model, inputs, cache, tokens)
    cache.truncate(8)
    rest = model.prefill(inputs, cache, 8)
    torch.testing.assert_close(rest, first[0], atol=1e-4, rtol=0)
    cache.truncate(0)
    for again, before in zip(decode(model, inputs, cache, tokens), first, strict=True):
        torch.testing.assert_close(again, before, atol=1e-6, rtol=1e-6)


@torch.inference_mode()
def test_a_bucket_with_a_mask_equals_the_exact_length(model: QwenModel) -> None:
    inputs = prompt(model)
    exact, bucket = model.static_cache(), model.static_cache()
    for layer in bucket.layers:
        layer.fill_(9.0)  # what another request left behind
    model.prefill(inputs, exact)
    model.prefill(inputs, bucket)
    token, slot = torch.tensor([7]), torch.tensor([len(IDS)])
    mask = decode_mask(torch.arange(64), slot, None, model.dtype)
    wide = model.decode_step(token, inputs.next_positions, slot, bucket, AttentionPlan(64, mask))
    plan = AttentionPlan(len(IDS) + 1, None)
    narrow = model.decode_step(token, inputs.next_positions, slot, exact, plan)
    torch.testing.assert_close(wide, narrow, atol=1e-4, rtol=0)


@torch.inference_mode()
def test_padded_rows_answer_as_they_do_alone(model: QwenModel) -> None:
    prompts = [ModelPrompt([1, 2, 3]), ModelPrompt([4, 5, 6, 7, 8, 9, 10]), ModelPrompt([11])]
    tokens = torch.tensor([[3, 1, 4, 1], [5, 9, 2, 6], [5, 3, 5, 8]])
    together = decode(model, model.prepare(prompts), model.static_cache(3), tokens)
    for row, alone in enumerate(prompts):
        single = decode(model, model.prepare([alone]), model.static_cache(), tokens[row : row + 1])
        for batched, own in zip(together, single, strict=True):
            torch.testing.assert_close(batched[row], own[0], atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_half_types_stay_near_float32(dtype: torch.dtype) -> None:
    full, half = model_of(qwen3_vl()), model_of(qwen3_vl(), dtype)
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    expected = decode(full, prompt(full), full.static_cache(), tokens)
    got = decode(half, prompt(half), half.static_cache(), tokens)
    for mine, exact in zip(got, expected, strict=True):
        assert mine.dtype == dtype
        difference = torch.nn.functional.kl_div(
            mine.float().log_softmax(-1), exact.log_softmax(-1), log_target=True, reduction="sum"
        )
        assert difference < 5e-3


@torch.inference_mode()
def test_decoding_allocates_no_cache_and_leaves_the_inputs_alone(model: QwenModel) -> None:
    inputs = prompt(model)
    cache = model.static_cache()
    model.prefill(inputs, cache)
    address = [layer.data_ptr() for layer in cache.layers]
    token, positions, slot = (
        torch.tensor([7]),
        inputs.next_positions.clone(),
        torch.tensor([len(IDS)]),
    )
    for _ in range(3):
        model.decode_step(token, positions, slot, cache, AttentionPlan(len(IDS) + 1, None))
    assert [layer.data_ptr() for layer in cache.layers] == address
    assert (token.item(), slot.item()) == (7, len(IDS))
    assert torch.equal(positions, inputs.next_positions)


@pytest.mark.parametrize(
    ("prompts", "said"),
    [
        ([ModelPrompt([])], "prompt is empty"),
        ([ModelPrompt([1]), ModelPrompt([])], "prompt is empty"),
        ([ModelPrompt([1, 300])], "outside the vocabulary"),
        ([ModelPrompt([-1])], "outside the vocabulary"),
        ([ModelPrompt([1] * 96)], "has 96 tokens, the cache holds 96"),
        ([ModelPrompt([1, IMAGE])], "has 1 image tokens"),
        ([ModelPrompt([1, IMAGE], [Visual((1, 2, 2))])], "images were encoded to 0"),
    ],
)
def test_prompts_that_cannot_run_are_refused(
    model: QwenModel, prompts: list[ModelPrompt], said: str
) -> None:
    with pytest.raises(InputError, match=said):
        model.prepare(prompts)


@pytest.mark.parametrize(
    ("patches", "grids", "said"),
    [
        ((8, 0), [(1, 2, 4)], "does not match its grids"),
        ((7, None), [(1, 2, 4)], "does not match its grids"),
        ((6, None), [(1, 2, 3)], "does not divide"),
        ((0, None), [(0, 2, 2)], "does not divide"),
        ((0, None), [], "does not match its grids"),
    ],
)
def test_images_that_cannot_be_encoded_are_refused(
    model: QwenModel, patches: tuple[int, int | None], grids: list[Any], said: str
) -> None:
    assert model.vision is not None
    count, width = patches
    width = model.vision.shape.patch_elements if width is None else width
    with pytest.raises(InputError, match=said):
        model.encode_images(torch.zeros(count, width), grids)


def test_a_text_model_encodes_no_images() -> None:
    text = model_of({"model_type": "qwen3", **TEXT})
    with pytest.raises(InputError, match="text model"):
        text.encode_images(torch.zeros(1, 1), [(1, 2, 2)])
