"""What our recorder adds to `generate()`: the same call with and without it, in turns.

python benchmarks/recorder_overhead.py --model qwen3-vl-4b --load-format dummy > recorder.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time

import torch

from qwencli.config import Cache, EngineConfig, EngineName, LoadFormat, SamplingOptions
from qwencli.engine.hf.engine import TransformersEngine
from qwencli.messages import GenerationRequest, user_message
from qwencli.models.resolve import resolve_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--load-format", type=LoadFormat, default=LoadFormat.AUTO)
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    config = EngineConfig(
        resolve_model(options.model),
        engine=EngineName.TRANSFORMERS,
        cache=Cache.DYNAMIC,
        load_format=options.load_format,
    )
    sampling = SamplingOptions(do_sample=False, max_new_tokens=options.tokens)
    request = GenerationRequest((user_message("Describe a harbour."),), sampling, ignore_eos=True)
    plain: list[float] = []
    recorded: list[float] = []
    with TransformersEngine(config) as engine:
        prompt = engine.files.prompts.build(request.messages)
        ids = torch.tensor([prompt.input_ids], device=engine.effective.device)

        def bare() -> float:
            start = time.perf_counter()
            with torch.inference_mode():
                engine._model.generate(
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=options.tokens,
                    do_sample=False,
                    disable_compile=True,
                    pad_token_id=engine.files.pad_token_id,
                ).tolist()
            return time.perf_counter() - start

        bare()
        engine.generate(request)
        for _ in range(options.runs):
            plain.append(bare())
            start = time.perf_counter()
            engine.generate(request)
            recorded.append(time.perf_counter() - start)
        ran = engine.effective
    overhead = 100 * (statistics.median(recorded) / statistics.median(plain) - 1)
    print(
        json.dumps(
            {
                "model": config.model.name,
                "device": ran.device,
                "tokens": options.tokens,
                "plain_s": plain,
                "recorded_s": recorded,
                "overhead_percent": overhead,
            },
            indent=1,
        )
    )


if __name__ == "__main__":
    main()
