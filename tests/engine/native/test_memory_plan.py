from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from qwencli.config import DType, Quantization
from qwencli.engine.cache.prefix_cache import VISION_CACHE_BYTES
from qwencli.engine.native.batch_plan import (
    BATCH_LIMITS,
    captions_that_fit,
    limits_within,
    pages_for_captions,
    plan_pages,
)
from qwencli.engine.native.memory_plan import (
    DEFAULT_MAX_SEQ_LEN,
    SIZES,
    SMALL_SIZES,
    TEXT_TOKENS,
    head_input_bytes,
    plan_memory,
)
from qwencli.engine.spec_decode.mtp import HeadInputs
from qwencli.errors import OutOfMemoryError
from qwencli.models.builtin import hub_config
from qwencli.models.shape_reader import read_shape

GIB = 2**30
OWN_PIXELS = 16384 * 32 * 32  # of Qwen3-VL


def plan(free_gib, wanted=None, name="qwen3-vl-4b", dtype=DType.BFLOAT16, **weights):
    return plan_memory(
        hub_config(name),
        name,
        dtype=dtype,
        model_limit=262144,
        wanted=wanted,
        free_bytes=None if free_gib is None else int(free_gib * GIB),
        **weights,
    )


def test_plenty_of_memory_gives_the_default_or_what_was_wanted():
    assert plan(80).max_seq_len == DEFAULT_MAX_SEQ_LEN
    assert plan(80, wanted=40_000).max_seq_len == 40_000
    assert plan(None).max_seq_len == DEFAULT_MAX_SEQ_LEN


def test_auto_means_the_models_limit_or_what_fits_of_it():
    assert plan(80, wanted="auto").max_seq_len == 262144
    tight = plan(20, wanted="auto")
    assert DEFAULT_MAX_SEQ_LEN < tight.max_seq_len < 262144
    assert tight.total <= 20 * GIB < plan_of(tight.max_seq_len + 256)


def plan_of(tokens):
    return plan(None, wanted=tokens).total


def test_features_of_kept_pictures_are_counted():
    vision, text = plan(None), plan(None, name="qwen3-4b")
    # Four megapixels: the embedding and three DeepStack layers.
    assert 4096 * 2560 * 4 * 2 < VISION_CACHE_BYTES < vision.kept_images
    assert text.kept_images == 0
    assert sum(vision.parts.values()) == vision.total


@pytest.mark.parametrize("dtype", [DType.BFLOAT16, DType.FLOAT32])
@pytest.mark.parametrize("name", ["qwen3-4b", "qwen3-vl-4b"])
def test_the_largest_matrix_that_a_prompt_reads_back_is_counted(name, dtype):
    size = {"name": name, "dtype": dtype, "max_pixels": 512 * 512}
    plain = plan(None, **size).activations
    gate_up = 2 * 9728 * 2560 * (2 if dtype is DType.BFLOAT16 else 4)
    for weights in (
        {"quantization": Quantization.INT4},
        {"quantization": Quantization.FP8},
        {"checkpoint_weights": 3 * GIB},
    ):
        assert plan(None, **size, **weights).activations == plain + gate_up


def test_little_memory_shortens_the_sequences_until_they_fit():
    tight = plan(10.5)
    assert 1024 <= tight.max_seq_len < DEFAULT_MAX_SEQ_LEN
    assert tight.total <= 10.5 * GIB
    assert tight.max_seq_len % 256 == 0


@pytest.mark.parametrize(
    ("free", "mode"), [(11, Quantization.NONE), (8, Quantization.INT8), (6.5, Quantization.INT4)]
)
def test_a_picture_of_8160_tokens_fits_beside_its_weights(free, mode):
    fitted = plan(free, quantization=mode, own_pixels=OWN_PIXELS, prompt_graphs=True)
    # And an answer of 256 tokens.
    assert fitted.max_image_tokens >= 8160 and fitted.max_seq_len >= 8160 + 64 + 256
    assert fitted.total <= free * GIB


def test_long_prompts_are_graphs_where_there_is_room_for_those():
    ample, tight = plan(80, prompt_graphs=True), plan(11, prompt_graphs=True)
    assert (ample.graph_sizes, tight.graph_sizes) == (SIZES, SMALL_SIZES)
    assert SIZES.tokens >= 2055 and SIZES.patches >= 8160  # of 1920x1080
    assert 200 * 2**20 < ample.graphs - tight.graphs < 350 * 2**20


@pytest.mark.parametrize(("free", "longer"), [(100, True), (24, True), (2, False)])
def test_passes_over_prompts_are_longer_where_rows_do_not_need_the_memory(free, longer):
    shape, limits = read_shape(hub_config("qwen3-vl-4b")), BATCH_LIMITS["cuda"]
    found = limits_within(limits, lambda each: plan_pages(shape, each, 16384, 2, free * GIB))
    assert (found == limits) is longer
    assert found.max_prefill_tokens == limits.max_prefill_tokens


def test_pictures_are_as_large_as_fits_and_as_asked_for():
    ample = plan(80, own_pixels=OWN_PIXELS)
    assert ample.max_image_tokens == DEFAULT_MAX_SEQ_LEN - TEXT_TOKENS
    assert plan(80, own_pixels=OWN_PIXELS, wanted=40_000).max_image_tokens == 16384
    for free in (9.9, 10.2, 12):
        fitted = plan(free, own_pixels=OWN_PIXELS)
        assert 0 < fitted.max_image_tokens < fitted.max_seq_len < DEFAULT_MAX_SEQ_LEN
        assert fitted.total <= free * GIB
    # A length that was asked for stays; pictures give way, down to a megapixel.
    kept = plan(11, own_pixels=OWN_PIXELS, wanted=10_000)
    assert kept.max_seq_len == 10_000 and 1024 <= kept.max_image_tokens < 9000
    # So does a size.
    asked = plan(80, own_pixels=OWN_PIXELS, max_pixels=512 * 512)
    assert asked.max_image_tokens == 256
    assert plan(80, name="qwen3-4b").max_image_tokens == 0


def test_a_pool_has_room_for_what_works_beside_it_and_says_how_many_captions_fit():
    shape, limits = read_shape(hub_config("qwen3-vl-4b")), BATCH_LIMITS["cuda"]
    ample = plan_pages(shape, limits, 16384, 2, 100 * GIB)
    assert captions_that_fit(shape, ample, 256) == (
        "256 of 512x512, 215 of 1024x1024, 31 of 3840x2160 at once"
    )
    tight = plan_pages(shape, limits, 16384, 2, 4 * GIB)
    less = plan_pages(shape, limits, 16384, 2, 4 * GIB, False, 2 * GIB)
    assert less * 64 * 147_456 <= 2 * GIB < tight * 64 * 147_456
    assert plan_pages(shape, limits, 16384, 2, 4 * GIB, True, 2 * GIB) > 1.8 * less
    enough = pages_for_captions(shape, limits)
    assert tight < enough < ample
    assert f"{limits.max_rows} of 512x512" in captions_that_fit(shape, enough, limits.max_rows)
    fewer = captions_that_fit(shape, enough - 1, limits.max_rows)
    assert f"{limits.max_rows} of 512x512" not in fewer
    text = read_shape(hub_config("qwen3-4b"))
    assert captions_that_fit(text, 31, 256) == "10 of 192 tokens at once"


def test_a_wanted_length_that_does_not_fit_names_the_longest_that_does():
    with pytest.raises(OutOfMemoryError, match=r"needs .* GiB \(weights 8\.3.*are free") as caught:
        plan(12, wanted=100_000)
    longest = int(caught.value.hint.split()[1])
    assert plan(12, wanted=longest).max_seq_len == longest
    with pytest.raises(OutOfMemoryError):
        plan(12, wanted=longest + 256)


@pytest.mark.parametrize(("free", "hint"), [(7.5, "8bit"), (5.5, "4bit")])
def test_weights_that_do_not_fit_name_the_mode_that_would(free, hint):
    with pytest.raises(OutOfMemoryError) as caught:
        plan(free)
    assert caught.value.hint == f"--quantization {hint} fits"
    assert plan(free, quantization=Quantization(hint)).total <= free * GIB


@pytest.mark.parametrize(
    ("free", "weights"),
    [
        (1.0, {}),
        (5.5, {"quantization": Quantization.INT4, "name": "qwen3-vl-8b"}),
        (5.5, {"checkpoint_weights": 7 * GIB}),  # quantized already
    ],
)
def test_where_no_mode_helps_a_smaller_model_would(free, weights):
    with pytest.raises(OutOfMemoryError) as caught:
        plan(free, **weights)
    assert "smaller model" in caught.value.hint


def test_graphs_of_prompts_have_memory_of_their_own():
    plain, graphs = plan(80), plan(80, prompt_graphs=True)
    assert plain.graphs == 0
    assert 0.05 * GIB < graphs.graphs < 0.5 * GIB
    assert graphs.total == plain.total + graphs.graphs
    quantized = plan(80, prompt_graphs=True, quantization=Quantization.INT4)
    assert quantized.graphs > graphs.graphs, "a matrix read back is in it"


@pytest.mark.parametrize("name", ["qwen3.5-9b", "qwen3.5-35b-a3b"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_hidden_states_for_drafts_take_what_is_planned(name, dtype):
    plain = read_shape(hub_config(name))
    shape, limits, size = plain.with_draft_head(), BATCH_LIMITS["cuda"], dtype.itemsize
    rows = limits.max_rows
    model = SimpleNamespace(shape=shape, dtype=dtype, device=torch.device("meta"))
    held = HeadInputs(rows, model)
    planned = head_input_bytes(shape, rows, size)
    assert planned == held.hidden.nbytes + held.done.nbytes
    assert head_input_bytes(plain, rows, size) == 0
    whole = [plan(None, name=name, drafting=True, draft_head=head).kv_cache for head in (0, 1)]
    assert whole[1] - whole[0] >= head_input_bytes(shape, 1, 2)
