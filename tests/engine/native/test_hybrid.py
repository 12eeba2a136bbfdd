"""Models with gated delta nets: the decoder over rows against transformers, and its states."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.config import Attention, SamplingParams
from qwencli.engine.cache.paged_kv import DecodePages, pages_for
from qwencli.engine.cache.prefix_cache import VisionCache
from qwencli.engine.native.generate import row_logits
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt, lay_out
from qwencli.engine.request import PromptChunk, Sequence
from qwencli.engine.runner import ModelRunner
from qwencli.engine.runner_prompt import RunnerPrompt
from tests.engine.native.reference import native_model

MOST_TOKENS = 400
VOCAB = 97


@st.composite
def text_models(draw: st.DrawFn) -> dict[str, Any]:
    """Sizes of a text decoder, and what mixes the tokens of each layer."""
    kv_heads, groups = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 3)))
    k_heads, each = draw(st.sampled_from((1, 2))), draw(st.sampled_from((1, 2, 3)))
    head_dim, factor = draw(st.sampled_from(((32, 0.5), (64, 0.25), (256, 0.25), (16, 1.0))))
    half = int(head_dim * factor) // 2
    kinds = draw(st.lists(st.sampled_from(("linear_attention", "full_attention")), max_size=3))
    return {
        "vocab_size": VOCAB,
        "hidden_size": draw(st.sampled_from((48, 80))),
        "intermediate_size": 56,
        "num_hidden_layers": len(kinds) + 2,
        "layer_types": ["linear_attention", "full_attention", *kinds],
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "linear_num_key_heads": k_heads,
        "linear_num_value_heads": k_heads * each,
        "linear_key_head_dim": draw(st.sampled_from((8, 32))),
        "linear_value_head_dim": draw(st.sampled_from((8, 16))),
        "rms_norm_eps": draw(st.sampled_from((1e-6, 1e-5))),
        "max_position_embeddings": 1024,
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": 1e4,
            "mrope_section": [half - 2 * (half // 3), half // 3, half // 3],
            "mrope_interleaved": True,
            "partial_rotary_factor": factor,
        },
    }


@st.composite
def sparse_models(draw: st.DrawFn) -> dict[str, Any]:
    """The same with experts."""
    count = draw(st.sampled_from((1, 5)))
    return draw(text_models()) | {
        "num_experts": count,
        "num_experts_per_tok": min(count, draw(st.sampled_from((1, 2, 4)))),
        "moe_intermediate_size": draw(st.sampled_from((24, 48))),
        "shared_expert_intermediate_size": draw(st.sampled_from((16, 56))),
    }


def reference_model(text: dict[str, Any]) -> Any:
    import transformers

    vision = {
        "depth": 1, "hidden_size": 16, "num_heads": 1, "intermediate_size": 16, "patch_size": 4,
        "out_hidden_size": text["hidden_size"], "num_position_embeddings": 4,
    }  # fmt: skip
    tokens = {"image_token_id": 90, "video_token_id": 91}
    tokens |= {"vision_start_token_id": 92, "vision_end_token_id": 93}
    family = "Qwen3_5Moe" if "num_experts" in text else "Qwen3_5"
    config = getattr(transformers, f"{family}Config")(
        text_config=text,
        vision_config=vision,
        tie_word_embeddings=text["tie_word_embeddings"],
        **tokens,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config).eval().float()
    for name, parameter in model.named_parameters():
        # Zero-centred norms but for one, and rates of decay as models are begun with.
        if not name.endswith(("A_log", "dt_bias")):
            parameter.data.normal_(1.0 if "linear_attn.norm" in name else 0.0, 0.08)
    return model


def runner_of(model: QwenModel) -> ModelRunner:
    return ModelRunner(model, 40, 3, MOST_TOKENS, False, VisionCache(), num_states=6)


def prompt_of(model: QwenModel, ids: list[int]) -> RunnerPrompt:
    layout = lay_out(model.shape, ModelPrompt(ids))
    return RunnerPrompt(torch.tensor(ids), layout, (), SamplingParams(do_sample=False), ())


def sequences_of(lengths: list[int]) -> list[Sequence]:
    first, made = 1, []
    for number, length in enumerate(lengths):
        count = pages_for(length + 8)
        pages = list(range(first, first + count))
        made.append(Sequence(number, length, 8, row=number, pages=pages, state=number + 1))
        first += count
    return made


@given(text_models() | sparse_models(), st.data())
@settings(max_examples=6)
@torch.inference_mode()
def test_logits_are_those_of_transformers_behind_any_cut(
    tmp_path_factory: pytest.TempPathFactory, text: dict[str, Any], data: st.DataObject
) -> None:
    """Prompts of several lengths side by side, cut anywhere, and then a step a token."""
    lengths = data.draw(st.lists(st.integers(1, 150), min_size=1, max_size=3))
    cuts = [data.draw(st.integers(0, length - 1)) for length in lengths]
    reference = reference_model(text)
    model = native_model(reference, tmp_path_factory.mktemp("hybrid"), MOST_TOKENS, Attention.SDPA)
    generator = torch.Generator().manual_seed(len(lengths))
    texts = [
        torch.randint(0, 90, (length + 4,), generator=generator).tolist() for length in lengths
    ]
    expected = [reference(torch.tensor([text])).logits[0] for text in texts]
    runner, sequences = runner_of(model), sequences_of(lengths)
    prompts = [prompt_of(model, text[:length]) for text, length in zip(texts, lengths, strict=True)]
    first = [
        (PromptChunk(sequence, 0, cut), prompt)
        for sequence, cut, prompt in zip(sequences, cuts, prompts, strict=True)
        if cut
    ]
    if first:
        runner.prompts.run([chunk for chunk, _ in first], [prompt for _, prompt in first])
    rest = [
        PromptChunk(sequence, cut, sequence.num_prompt_tokens)
        for sequence, cut in zip(sequences, cuts, strict=True)
    ]
    logits = runner.prompts.run(rest, prompts).logits
    for line, (length, wanted) in enumerate(zip(lengths, expected, strict=True)):
        torch.testing.assert_close(logits[line], wanted[length - 1], rtol=1e-4, atol=1e-4)
    tables = torch.zeros(len(lengths), 8, dtype=torch.int32)
    for line, sequence in enumerate(sequences):
        tables[line, : len(sequence.pages)] = torch.tensor(sequence.pages)
    states = torch.tensor([sequence.state for sequence in sequences])
    idle = torch.zeros(len(lengths), dtype=torch.bool)
    for ahead in range(4):
        at = torch.tensor(lengths) + ahead
        fed = torch.tensor([text[place] for text, place in zip(texts, at.tolist(), strict=True)])
        pages = DecodePages(tables, at, max(lengths) + ahead + 1, states, idle)
        hidden = model.decode_rows(fed, at, runner.cache, pages, runner.states)
        logits = model.decoder.logits(hidden, model.row_ops(len(lengths)))
        wanted = torch.stack(
            [each[place] for each, place in zip(expected, at.tolist(), strict=True)]
        )
        torch.testing.assert_close(logits, wanted, rtol=1e-4, atol=1e-4)
    # One after the other from the first token on, as texts are scored.
    stepped = torch.stack(list(row_logits(model, texts[0][:20])))
    torch.testing.assert_close(stepped, expected[0][:20], rtol=1e-4, atol=1e-4)
    assert runner.states is not None
    again = runner_of(model)
    assert again.states is not None
    whole = [prompt_of(model, text) for text in texts]
    again.prompts.run(
        [PromptChunk(each, 0, len(text)) for each, text in zip(sequences, texts, strict=True)],
        whole,
    )
    used = slice(1, len(lengths) + 1)
    torch.testing.assert_close(
        runner.states.recurrent[:, used], again.states.recurrent[:, used], rtol=1e-4, atol=1e-4
    )
