"""The head that drafts tokens: its readable reference, and the engine's over pages against it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from qwencli.config import Quantization
from qwencli.engine.cache.paged_kv import DecodePages
from qwencli.engine.layers.draft_head import draft_projection
from qwencli.engine.loading import weights
from qwencli.engine.native.model import QwenModel
from qwencli.engine.prompt_batch import pack_prompts
from qwencli.engine.quant.quantized_tensor import QuantizedTensor, Scheme, quantize
from qwencli.engine.request import PromptChunk
from qwencli.engine.spec_decode.mtp import ChosenTokens, draft, likeliest
from qwencli.models.memory import draft_projection_bytes, native_matrix_bytes, native_weight_bytes
from qwencli.models.shape_reader import read_shape
from tests.checkpoints import hub_config
from tests.engine.native.mtp_reference import MtpReference, head_weights
from tests.engine.native.reference import CPU
from tests.engine.native.test_hybrid import (
    MOST_TOKENS,
    prompt_of,
    runner_of,
    sequences_of,
    text_models,
)

EXPERTS = {
    "num_experts": 5,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
}


def reference_model(text: dict[str, Any], sparse: bool) -> Any:
    """A model of transformers, its norms zero-centred and none of them in silence."""
    import transformers

    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "patch_size": 4,
        "out_hidden_size": text["hidden_size"], "num_position_embeddings": 4,
    }  # fmt: skip
    tokens = {"image_token_id": 90, "video_token_id": 91}
    tokens |= {"vision_start_token_id": 92, "vision_end_token_id": 93}
    name = "Qwen3_5Moe" if sparse else "Qwen3_5"
    config = getattr(transformers, name + "Config")(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **tokens,
    )
    torch.manual_seed(0)
    model = getattr(transformers, name + "ForConditionalGeneration")(config).eval().float()
    for name, parameter in model.named_parameters():
        if not name.endswith(("A_log", "dt_bias")):
            parameter.data.normal_(1.0 if "linear_attn.norm" in name else 0.0, 0.08)
    return model


@st.composite
def models(draw: st.DrawFn) -> tuple[dict[str, Any], bool, bool]:
    """Sizes, whether it has experts, and whether the head's are a tensor each."""
    text = draw(text_models())
    sparse = draw(st.booleans())
    return (text | EXPERTS if sparse else text), sparse, draw(st.booleans())


@given(models(), st.integers(1, 40))
@settings(max_examples=3)
@torch.inference_mode()
def test_the_layer_of_the_readable_head_is_that_of_transformers(
    model: tuple[dict[str, Any], bool, bool], length: int
) -> None:
    text, sparse, _ = model
    reference = reference_model(text, sparse)
    decoder = reference.model.language_model
    place = text["layer_types"].index("full_attention")
    layer, at = decoder.layers[place], f"model.language_model.layers.{place}."
    weights = {
        "mtp.layers.0." + name.removeprefix(at): tensor
        for name, tensor in reference.state_dict().items()
        if name.startswith(at)
    }
    hidden = text["hidden_size"]
    # A product and norms that change nothing.
    nothing = torch.zeros(hidden)
    weights["mtp.fc.weight"] = torch.cat((torch.zeros(hidden, hidden), torch.eye(hidden)), 1)
    for name in ("norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding"):
        weights[f"mtp.{name}.weight"] = nothing
    weights["embed_tokens.weight"] = decoder.embed_tokens.weight
    generator = torch.Generator().manual_seed(length)
    x = torch.randn(length, hidden, generator=generator)
    positions = torch.randint(0, 300, (3, length), generator=generator)
    positions = positions.cumsum(1)
    head = MtpReference(text, weights)
    made = head.forward(torch.zeros_like(x), x, positions)
    rope = decoder.rotary_emb(x[None], positions[:, None])
    mask = torch.full((length, length), float("-inf")).triu(1)[None, None]
    normed = head._norm("mtp.norm", x)
    expected = layer(normed[None], position_embeddings=rope, attention_mask=mask)
    expected = expected[0] if isinstance(expected, tuple) else expected
    expected = head._norm("mtp.norm", expected.view(length, hidden))
    torch.testing.assert_close(made, expected, rtol=1e-4, atol=1e-4)


def drafting_model(
    reference: Any, text: dict[str, Any], apart: bool, folder: Any
) -> tuple[QwenModel, MtpReference]:
    """The same model with a head, as the engine and as its reference have it."""
    reference.save_pretrained(folder)
    file = folder / "model.safetensors"
    weights = load_file(file)
    head = head_weights(text, torch.Generator().manual_seed(1), apart)
    save_file({**weights, **head}, file, {"format": "pt"})
    shape = read_shape(reference.config.to_dict()).with_draft_head()
    model = QwenModel.load(folder, shape, torch.float32, CPU, MOST_TOKENS)
    return model, MtpReference(text, {**weights, **head})


@given(models(), st.data())
@settings(max_examples=4)
@torch.inference_mode()
def test_drafts_over_pages_are_those_of_the_reference(
    tmp_path_factory: pytest.TempPathFactory,
    model: tuple[dict[str, Any], bool, bool],
    data: st.DataObject,
) -> None:
    """Prompts side by side cut anywhere, then a step that took some of what it checked."""
    text, sparse, apart = model
    lengths = data.draw(st.lists(st.integers(2, 90), min_size=1, max_size=3))
    cuts = [data.draw(st.integers(0, length - 1)) for length in lengths]
    size, num_drafts = data.draw(st.integers(1, 4)), data.draw(st.integers(1, 5))
    counts = [data.draw(st.integers(1, size)) for _ in lengths]
    reference = reference_model(text, sparse)
    native, head = drafting_model(reference, text, apart, tmp_path_factory.mktemp("mtp"))
    generator = torch.Generator().manual_seed(size)
    texts = [
        torch.randint(0, 90, (length + size,), generator=generator).tolist() for length in lengths
    ]
    runner, sequences = runner_of(native), sequences_of(lengths)
    prompts = [prompt_of(native, each[:n]) for each, n in zip(texts, lengths, strict=True)]

    def run(chunks: list[PromptChunk], shown: list[Any]) -> torch.Tensor:
        packed = pack_prompts(native, chunks, shown)
        behind = [each.ids[c.start + 1 : c.stop + 1] for c, each in zip(chunks, shown, strict=True)]
        behind = [
            torch.cat((ids, ids.new_zeros(c.stop - c.start - len(ids))))
            for c, ids in zip(chunks, behind, strict=True)
        ]
        hidden = native.prefill_packed(
            native.decoder.embed(packed.ids),
            packed.positions,
            packed.slots,
            runner.cache,
            packed.prompts,
            None,
            runner.states,
        )
        native.draft_head_packed(
            native.decoder.embed(torch.cat(behind)),
            hidden,
            packed.positions,
            packed.slots,
            runner.cache,
            packed.prompts,
        )
        return hidden.index_select(0, packed.last)

    first = [(s, c, p) for s, c, p in zip(sequences, cuts, prompts, strict=True) if c]
    if first:
        run([PromptChunk(s, 0, c) for s, c, _ in first], [p for _, _, p in first])
    last = run(
        [PromptChunk(s, c, s.num_prompt_tokens) for s, c in zip(sequences, cuts, strict=True)],
        prompts,
    )
    tables = torch.zeros(len(lengths), 8, dtype=torch.int32)
    for line, sequence in enumerate(sequences):
        tables[line, : len(sequence.pages)] = torch.tensor(sequence.pages)
    at = torch.tensor(lengths)
    states = [
        reference.model.language_model(torch.tensor([each])).last_hidden_state[0] for each in texts
    ]

    def expected(line: int, known: int) -> list[int]:
        """Drafts behind the first `known` tokens of a text."""
        positions = torch.arange(known - 1).expand(3, -1)
        return head.drafts(texts[line][:known], states[line][: known - 1], positions, num_drafts)

    # Behind the first token of the answer.
    fresh = torch.tensor([each[n] for each, n in zip(texts, lengths, strict=True)])
    begun = ChosenTokens(last, fresh[:, None], torch.ones_like(at), at, at, tables, max(lengths))
    drafted = draft(native, runner.cache, begun, num_drafts, likeliest)
    assert drafted.tolist() == [expected(line, n + 1) for line, n in enumerate(lengths)]
    # A step that fed `size` tokens and took the first of those it chose; the others are wrong.
    fed = torch.tensor([each[n : n + size] for each, n in zip(texts, lengths, strict=True)])
    hidden = torch.cat([each[n : n + size] for each, n in zip(states, lengths, strict=True)])
    chosen, count = fed.roll(-1, 1), torch.tensor(counts)
    chosen[:, -1] = 7
    texts = [
        [*each[: n + taken], *row[taken - 1 : taken]]
        for each, n, taken, row in zip(texts, lengths, counts, chosen.tolist(), strict=True)
    ]
    chosen = chosen.where(torch.arange(size) < count[:, None], 5)
    # `hidden` is normed already: what the model hands over is not.
    native.decoder.norm = lambda each: each
    moved = ChosenTokens(hidden, chosen, count, at + count, at + count, tables, max(lengths) + size)
    drafted = draft(native, runner.cache, moved, num_drafts, likeliest)
    assert drafted.tolist() == [
        expected(line, n + taken + 1)
        for line, (n, taken) in enumerate(zip(lengths, counts, strict=True))
    ]
    _check_one_pass(native, head, runner.cache, tables[:1], states[0], lengths[0], texts[0])


def _check_one_pass(
    native: QwenModel,
    head: MtpReference,
    cache: Any,
    tables: torch.Tensor,
    states: torch.Tensor,
    length: int,
    text: list[int],
) -> None:
    """What the head makes of one item, to 1e-4: likeliest tokens alone could be right by chance."""
    own = states[length - 1 : length]
    at = torch.tensor([length - 1])
    fed = torch.tensor([text[length]])
    made = native.draft_head_rows(fed, own, at, cache, DecodePages(tables, at, length))
    whole = head.forward(
        head._embedding[text[1 : length + 1]], states[:length], torch.arange(length).expand(3, -1)
    )
    assert native.draft_head is not None
    torch.testing.assert_close(native.draft_head.norm(made), whole[-1:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("quantization", [Quantization.INT4, Quantization.FP8, Quantization.INT8])
@pytest.mark.parametrize("family", ["qwen3_5", "qwen3_5_moe"])
def test_the_head_s_matrices_are_quantized_but_for_what_joins_two_vectors(
    family: str, quantization: Quantization
) -> None:
    shape = read_shape(hub_config(family)).with_draft_head()
    loaded = weights.dummy(shape, torch.bfloat16, CPU, quantization)
    model = QwenModel(shape, loaded, 64)
    assert model.draft_head is not None
    own = {name for name in loaded.matrices if name.startswith("text.mtp.")}
    assert own == {f"text.mtp.{name}" for name in ("qkv", "o", "gate_up", "down")}
    assert len(model.draft_head.quantized_matrices) == 4
    assert "text.mtp.fc" in loaded.tensors
    # Each once, though a layer knows the matrix that reads its result.
    known = [*model.decoder.quantized_matrices, *model.draft_head.quantized_matrices]
    assert {id(each) for each in known} == {id(each) for each in loaded.matrices.values()}
    assert len(known) == len(loaded.matrices)
    expected = native_weight_bytes(shape, quantization, 2)
    plain = native_weight_bytes(read_shape(hub_config(family)), quantization, 2)
    kept = [each for name, each in loaded.tensors.items() if name.startswith("text.mtp.")]
    halves = sum(each.numel() * 2 for each in kept)
    stored = sum(
        native_matrix_bytes(quantization, False, m.rows, m.columns)
        for m in (loaded.matrices[name] for name in own)
    )
    assert expected - plain == halves + stored + draft_projection_bytes(shape)
    without = weights.dummy(read_shape(hub_config(family)), torch.bfloat16, CPU)
    assert not any(name.startswith("text.mtp.") for name in without.tensors)


@pytest.mark.parametrize("scheme", [None, Scheme.INT8, Scheme.FP8])
def test_drafts_read_an_output_projection_in_4_bits(scheme: Scheme | None) -> None:
    weight = torch.randn(96, 64, generator=torch.Generator().manual_seed(3))
    head = weight.t() if scheme is None else quantize(weight, scheme)
    made = draft_projection(head)
    assert isinstance(made, QuantizedTensor) and made.scheme is Scheme.INT4
    shape = read_shape(hub_config("qwen3_5")).with_draft_head()
    text = replace(shape.text, vocab_size=96, hidden_size=64)
    assert made.nbytes == draft_projection_bytes(replace(shape, text=text))
    torch.testing.assert_close(made.dequantize(torch.float32), weight, rtol=0, atol=0.4)
    assert draft_projection(made) is made
    narrow = torch.randn(40, 96)
    assert draft_projection(narrow) is narrow, "no group divides its rows"
