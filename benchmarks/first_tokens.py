"""What the first token of a picture takes, by its size: vision, prompt and all.

    python benchmarks/first_tokens.py [--model qwen3-vl-4b] [--quantization none]
                                      [--sizes 512x512,1024x1024,1920x1080,3840x2160]
                                      [--repeats 7] [--label text] > first-tokens.jsonl

Shapes with random weights where the model is not here. Every picture is another one, so nothing is
kept from the one before; two of each size come first, which make the graphs. A line of JSON with
medians in milliseconds.
"""

from __future__ import annotations

import argparse
import json
from statistics import median

import numpy as np
from PIL import Image

from qwencli.config import EngineConfig, EngineName, LoadFormat, Quantization, SamplingOptions
from qwencli.engine.factory import create_engine
from qwencli.messages import GenerationRequest, ImagePart, user_message
from qwencli.models.resolve import resolve_model

UNMEASURED = 2


def request(width: int, height: int, seed: int) -> GenerationRequest:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    message = user_message("Look.", (ImagePart(Image.fromarray(pixels), "noise.png"),))
    sampling = SamplingOptions(do_sample=False, max_new_tokens=1)
    return GenerationRequest((message,), sampling, ignore_eos=True, bypass_caches=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--quantization", default="none", type=Quantization)
    parser.add_argument("--sizes", default="512x512,1024x1024,1920x1080,3840x2160")
    parser.add_argument("--repeats", default=7, type=int)
    parser.add_argument("--label", default="")
    said = parser.parse_args()
    spec = resolve_model(said.model)
    config = EngineConfig(
        spec,
        engine=EngineName.NATIVE,
        device=said.device,
        quantization=said.quantization,
        load_format=LoadFormat.AUTO if spec.path is not None else LoadFormat.DUMMY,
    )
    with create_engine(config) as engine:
        for size in said.sizes.split(","):
            width, height = map(int, size.split("x"))
            asked = [request(width, height, seed) for seed in range(said.repeats + UNMEASURED)]
            results = [engine.generate(each) for each in asked][UNMEASURED:]
            facts = {
                "label": said.label,
                "model": said.model,
                "quantization": said.quantization.value,
                "size": size,
                "prompt_tokens": results[0].num_prompt_tokens,
                "repeats": said.repeats,
            }
            for name in ("ttft_s", "preprocess_s", "vision_encode_s", "prefill_s"):
                times = [getattr(each.timings, name) for each in results]
                facts[f"{name.removesuffix('_s')}_ms"] = round(median(times) * 1e3, 2)
            print(json.dumps(facts), flush=True)


if __name__ == "__main__":
    main()
