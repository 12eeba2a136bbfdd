"""What long prompts take with each attention of the native engine, in turns.

    python benchmarks/long_prompts.py [--model qwen3-vl-4b] [--device auto]
                                      [--attention auto,sdpa,flash_attention_2]
                                      [--tokens 4096,16384] [--repeats 7] [--new-tokens 32]

Shapes with random weights where the model is not here (the bundled one is: `--model scenes`). All
engines are loaded at once and take turns, so that what slows one slows the others too. A line of
JSON for each number of tokens and attention: medians of the prompt's and a decode step's time, the
prompt's relative to that of the first attention named, and on a GPU its arithmetic as a share of
the rate at which torch multiplies bfloat16 matrices there, measured first.
"""

from __future__ import annotations

import argparse
import json
import sys
from contextlib import ExitStack
from math import prod
from pathlib import Path
from statistics import median

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.gated_delta import matrix_rate
from qwencli.config import Attention, EngineConfig, EngineName, LoadFormat, SamplingOptions
from qwencli.engine import factory
from qwencli.engine.protocol import Engine
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import expected_tensors, is_decoder_matrix
from qwencli.results import GenerationResult


def answer(engine: Engine, words: int, new_tokens: int) -> GenerationResult:
    sampling = SamplingOptions(do_sample=False, max_new_tokens=new_tokens)
    message = user_message("word " * words, ())
    asked = GenerationRequest((message,), sampling, bypass_caches=True, ignore_eos=True)
    return engine.generate(asked)


def words_for(engine: Engine, tokens: int) -> int:
    """So many words that a prompt has about as many tokens: tokenizers differ in what a word is."""
    few, many = (answer(engine, words, 1).num_prompt_tokens for words in (32, 96))
    each = (many - few) / 64
    return max(1, round((tokens - few) / each) + 32)


def flops_of(shape: ModelShape, tokens: int) -> float:
    """Of a prompt: two a value of every matrix a token passes, the output head aside, and two
    products of attention over half of all pairs. Those of gated delta nets' states are left out."""
    text = shape.text
    moe = text.moe
    taken = 1.0 if moe is None else moe.top_k / moe.num_experts
    values = 0.0
    for name, size in expected_tensors(shape).items():
        outside = ".visual." in name or name.endswith(("embed_tokens.weight", "lm_head.weight"))
        if is_decoder_matrix(name, size) and not outside:
            values += prod(size) * (taken if ".mlp.experts." in name else 1)
    return 2 * tokens * values + 2 * tokens**2 * text.q_size * len(text.kv_layers)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--attention", default="auto,sdpa,flash_attention_2")
    parser.add_argument("--tokens", default="4096,16384")
    parser.add_argument("--repeats", default=7, type=int)
    parser.add_argument("--new-tokens", default=32, type=int)
    said = parser.parse_args()
    spec = resolve_model(said.model)
    lengths = [int(each) for each in said.tokens.split(",")]
    names = [Attention(each) for each in said.attention.split(",")]
    shape = read_shape(spec.hub_config) if spec.hub_config is not None else None
    on_gpu = torch.cuda.is_available() and said.device != "cpu"
    rate = matrix_rate(torch.device("cuda")) if on_gpu else None
    with ExitStack() as stack:
        engines = {}
        for name in names:
            config = EngineConfig(
                spec,
                engine=EngineName.NATIVE,
                device=said.device,
                attention=name,
                max_seq_len=max(lengths) + said.new_tokens + 256,
                load_format=LoadFormat.AUTO if spec.path is not None else LoadFormat.DUMMY,
            )
            engines[name] = stack.enter_context(factory.create_engine(config))
        for tokens in lengths:
            words = words_for(engines[names[0]], tokens)
            results: dict[Attention, list[GenerationResult]] = {name: [] for name in names}
            for repeat in range(-1, said.repeats):
                for name in names if repeat % 2 else reversed(names):
                    result = answer(engines[name], words, said.new_tokens)
                    if repeat >= 0:  # the first round makes the graphs
                        results[name].append(result)
            prompt = {name: median(r.timings.prefill_s for r in results[name]) for name in names}
            for name in names:
                steps = [r.timings.decode_s / (r.num_new_tokens - 1) for r in results[name]]
                facts = {
                    "attention": name.value,
                    "decodes_with": results[name][0].effective.attention,
                    "device": results[name][0].effective.device,
                    "prompt_tokens": results[name][0].num_prompt_tokens,
                    "repeats": said.repeats,
                    "prompt_ms": round(prompt[name] * 1e3, 3),
                    "prompt_ms_each": [round(r.timings.prefill_s * 1e3, 3) for r in results[name]],
                    "step_ms": round(median(steps) * 1e3, 4),
                    "prompt_against_first": round(prompt[name] / prompt[names[0]], 4),
                }
                if shape is not None and rate is not None:
                    flops = flops_of(shape, results[name][0].num_prompt_tokens)
                    facts["flops"], facts["matrix_flops_per_s"] = flops, rate
                    facts["share_of_matrix_rate"] = round(flops / prompt[name] / rate, 4)
                print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
