"""The head that drafts tokens, in shapes, memory and checkpoints."""

from __future__ import annotations

from math import prod
from pathlib import Path

import pytest

from qwencli.config import Quantization
from qwencli.errors import ModelFileError
from qwencli.models.builtin import hub_config
from qwencli.models.checkpoint import find_sources, has_draft_head
from qwencli.models.memory import draft_projection_bytes, estimate, native_weight_bytes
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import expected_tensors, with_experts_as_stored
from qwencli.models.weight_files import StoredTensor

FOLDER = Path("folder")
NO_DRAFTS = "use --speculate off"
HEADED = ("qwen3.5-0.8b", "qwen3.5-9b", "qwen3.8-27b", "qwen3.5-35b-a3b")


def shape_of(alias: str) -> ModelShape:
    return read_shape(hub_config(alias))


def stored(shape: ModelShape) -> dict[str, StoredTensor]:
    return {
        name: StoredTensor(name, FOLDER / "model.safetensors", "BF16", size, 0)
        for name, size in expected_tensors(shape).items()
    }


@pytest.mark.parametrize("alias", HEADED)
def test_a_head_is_counted_where_it_is_used(alias: str) -> None:
    shape = shape_of(alias)
    text = shape.text
    assert text.mtp_layers == 1 and not has_draft_head(expected_tensors(shape))
    used = shape.with_draft_head()
    own = {n: size for n, size in expected_tensors(used).items() if n.startswith("mtp.")}
    assert own["mtp.fc.weight"] == (text.hidden_size, 2 * text.hidden_size)
    assert own["mtp.layers.0.self_attn.q_proj.weight"] == (2 * text.q_size, text.hidden_size)
    more = sum(map(prod, own.values()))
    projection = draft_projection_bytes(used)
    assert (
        text.vocab_size * text.hidden_size / 2
        < projection
        < 0.54 * prod((text.vocab_size, text.hidden_size))
    )
    whole = native_weight_bytes(used, Quantization.NONE, 2)
    assert whole - native_weight_bytes(shape, Quantization.NONE, 2) == 2 * more + projection
    fewer = native_weight_bytes(used, Quantization.INT4, 2) - projection
    fewer -= native_weight_bytes(shape, Quantization.INT4, 2)
    # All but what joins two vectors, norms and routers: half a byte a weight, and scales.
    kept = prod(own["mtp.fc.weight"])
    assert 2 * kept < fewer < 2 * kept + 0.56 * (more - kept)
    tokens = 4096
    cached = estimate(used).kv_cache - estimate(shape).kv_cache
    assert cached == 2 * text.kv_size * 2 * tokens


@pytest.mark.parametrize("alias", HEADED)
@pytest.mark.parametrize("apart", [False, True])
def test_a_checkpoint_s_head_is_found_or_ignored(alias: str, apart: bool) -> None:
    shape = shape_of(alias)
    used = shape.with_draft_head()
    one = "mtp.layers.0.mlp.experts.0.up_proj.weight"
    if apart:
        used = with_experts_as_stored(used, [one])
    there = stored(used)
    assert (one in there) is (apart and shape.text.moe is not None)
    found = find_sources(shape.with_draft_head(), there, None, FOLDER)
    assert set(found.unused) == set()
    ignored = find_sources(shape, there, None, FOLDER)
    assert set(ignored.unused) == {name for name in there if name.startswith("mtp.")}


@pytest.mark.parametrize(
    ("lost", "more", "message"),
    [
        ("mtp.", (), "folder: the weights have no head that drafts tokens (MTP)"),
        (
            "mtp.fc.",
            (),
            "folder: half of a head that drafts tokens (MTP): 1 tensor missing from the weights: "
            "mtp.fc.weight",
        ),
        (
            "mtp.layers.0.self_attn",
            (),
            "folder: half of a head that drafts tokens (MTP): 6 tensors missing from the weights: ",
        ),
        (
            "none of them",
            ("mtp.embed_tokens.weight",),
            "folder: the head that drafts tokens (MTP) is of another kind, with 1 tensor not "
            "known here: mtp.embed_tokens.weight",
        ),
    ],
)
def test_half_a_head_is_one_line_where_it_is_asked_for(
    lost: str, more: tuple[str, ...], message: str
) -> None:
    shape = shape_of("qwen3.5-0.8b")
    there = stored(shape.with_draft_head())
    there = {name: each for name, each in there.items() if not name.startswith(lost)}
    for name in more:
        there[name] = StoredTensor(name, FOLDER / "model.safetensors", "BF16", (3,), 0)
    with pytest.raises(ModelFileError) as caught:
        find_sources(shape.with_draft_head(), there, None, FOLDER)
    assert caught.value.message.startswith(message) and "\n" not in caught.value.message
    assert caught.value.hint is not None and caught.value.hint.startswith(NO_DRAFTS)
    find_sources(shape, there, None, FOLDER)


@pytest.mark.parametrize("count", [-1, "one", 1001, 1.5])
def test_a_count_of_layers_that_cannot_be_is_refused(count: object) -> None:
    config = hub_config("qwen3.5-0.8b")
    config["text_config"]["mtp_num_hidden_layers"] = count
    with pytest.raises(ModelFileError, match="mtp_num_hidden_layers"):
        read_shape(config)
