"""Many sequences at once: this engine beside vLLM and transformers, the same work in turns.

    python benchmarks/side_by_side/batches.py --model FOLDER --out batches.json \\
        [--engines native,vllm,transformers] [--rounds 2] [--pictures 500]

FOLDER holds a Qwen3-VL model's config, tokenizer and processor; weights are random, or those of the
folder for this engine where it has any, in bf16 but for those of `native-fp8`, `native-8bit` and
`native-4bit`. Each round starts a process of every engine, one after the other. Measured in each:

- `captions_per_s`: pictures of 512x512, 64 new tokens each, opening and preparing included. No
  engine may know a picture from before: prefix caches are off.
- `rows`: decode tok/s of so many sequences with 300 tokens in front, from the time that 128 new
  tokens take more than one.
- `first_token_s`: the first token of one picture, median of seven, and the slowest.

transformers takes batches of 32 pictures, padded on the left: nothing else it offers is faster.
"""

from __future__ import annotations

import argparse
import functools
import io
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))

PROMPT, NEW_TOKENS, CONTEXT, STEPS = "Describe this image in detail.", 64, 300, 128
TRANSFORMERS_BATCH = 32
# Pictures in bytes, as a folder has them, and how many tokens -> seconds.
Caption = Callable[[Sequence[bytes], int], float]
# Prompts of equal length, and how many tokens -> seconds.
Continue = Callable[[Sequence[Sequence[int]], int], float]


def pictures(count: int, seed: int) -> list[bytes]:
    """JPEG files of 512x512, all different."""
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        blocks = random.integers(0, 255, (32, 32, 3), dtype=np.uint8)
        file = io.BytesIO()
        Image.fromarray(blocks).resize((512, 512), Image.Resampling.NEAREST).save(file, "JPEG")
        made.append(file.getvalue())
    return made


def prompts(rows: int, seed: int) -> list[list[int]]:
    return np.random.default_rng(seed).integers(1000, 2000, (rows, CONTEXT)).tolist()


def opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def native(folder: str, quantization: str = "none") -> tuple[Caption, Continue]:
    from qwencli.config import (
        EngineConfig,
        EngineName,
        LoadFormat,
        Quantization,
        SamplingOptions,
    )
    from qwencli.engine.client import generate_many
    from qwencli.engine.factory import create_engine
    from qwencli.messages import GenerationRequest, ImagePart, user_message
    from qwencli.models.resolve import resolve_model

    has_weights = any(Path(folder).glob("*.safetensors"))
    engine = create_engine(
        EngineConfig(
            resolve_model(folder, offline=True),
            engine=EngineName.NATIVE,
            load_format=LoadFormat.AUTO if has_weights else LoadFormat.DUMMY,
            quantization=Quantization(quantization),
        )
    )
    engine.load()

    def ask(text: str, images: Sequence[ImagePart], tokens: int) -> GenerationRequest:
        sampling = SamplingOptions(do_sample=False, max_new_tokens=tokens)
        message = user_message(text, tuple(images))
        return GenerationRequest((message,), sampling, ignore_eos=True, bypass_caches=True)

    prompt_tokens: list[int] = []

    def seconds(requests: Sequence[Callable[[], GenerationRequest]]) -> float:
        start = time.perf_counter()
        for result in generate_many(engine, iter(requests)):
            if isinstance(result, Exception):
                raise result
            prompt_tokens.append(result.num_prompt_tokens)
        return time.perf_counter() - start

    def caption(files: Sequence[bytes], tokens: int) -> float:
        def one(file: bytes) -> GenerationRequest:
            return ask(PROMPT, [ImagePart(opened(file), "picture")], tokens)

        return seconds([lambda file=file: one(file) for file in files])  # type: ignore[misc]

    def go_on(rows: Sequence[Sequence[int]], tokens: int) -> float:
        texts = [f"{row[0]}" + " word" * words for row in rows]
        return seconds([lambda text=text: ask(text, [], tokens) for text in texts])  # type: ignore[misc]

    # As many words as make the prompts that the others are given: without weights in the folder the
    # tokenizer is the bundled model's, to which a word is two tokens.
    words = 32
    go_on([[1000]], 1)
    words = 96
    go_on([[1000]], 1)
    few, many = prompt_tokens
    words += round((CONTEXT - many) * 64 / (many - few))

    return caption, go_on


def vllm(folder: str) -> tuple[Caption, Continue]:
    from vllm import LLM, SamplingParams

    llm: Any = LLM(
        model=folder,
        load_format="dummy",
        dtype="bfloat16",
        max_model_len=4096,
        max_num_seqs=256,
        gpu_memory_utilization=0.85,
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": 1},
    )
    template = (
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>" + PROMPT + "<|im_end|>\n"
        "<|im_start|>assistant\n"
    )

    def seconds(given: Callable[[], list[dict[str, Any]]], tokens: int) -> float:
        sampling = SamplingParams(temperature=0.0, max_tokens=tokens, ignore_eos=True)
        start = time.perf_counter()
        llm.generate(given(), sampling, use_tqdm=False)
        return time.perf_counter() - start

    def caption(files: Sequence[bytes], tokens: int) -> float:
        return seconds(
            lambda: [
                {"prompt": template, "multi_modal_data": {"image": opened(file)}} for file in files
            ],
            tokens,
        )

    def go_on(rows: Sequence[Sequence[int]], tokens: int) -> float:
        return seconds(lambda: [{"prompt_token_ids": list(row)} for row in rows], tokens)

    return caption, go_on


def transformers(folder: str) -> tuple[Caption, Continue]:
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

    processor: Any = AutoProcessor.from_pretrained(folder)
    processor.tokenizer.padding_side = "left"
    with torch.device("cuda"):
        model: Any = AutoModelForImageTextToText.from_config(
            AutoConfig.from_pretrained(folder), dtype=torch.bfloat16, attn_implementation="sdpa"
        ).eval()
    model.generation_config.eos_token_id = None

    def generate(tokens: int, **inputs: Any) -> None:
        model.generate(**inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens)
        torch.cuda.synchronize()

    def caption(files: Sequence[bytes], tokens: int) -> float:
        start = time.perf_counter()
        for first in range(0, len(files), TRANSFORMERS_BATCH):
            chats = [
                [
                    {
                        "role": "user",
                        "content": [
                            {"type": "image", "image": opened(file)},
                            {"type": "text", "text": PROMPT},
                        ],
                    }
                ]
                for file in files[first : first + TRANSFORMERS_BATCH]
            ]
            inputs = processor.apply_chat_template(
                chats,
                tokenize=True,
                add_generation_prompt=True,
                return_dict=True,
                return_tensors="pt",
                padding=True,
            ).to("cuda")
            generate(tokens, **inputs)
        return time.perf_counter() - start

    def go_on(rows: Sequence[Sequence[int]], tokens: int) -> float:
        ids = torch.tensor(rows, device="cuda")
        start = time.perf_counter()
        generate(tokens, input_ids=ids, attention_mask=torch.ones_like(ids))
        return time.perf_counter() - start

    return caption, go_on


ENGINES = {
    "native": native,
    **{
        f"native-{mode}": functools.partial(native, quantization=mode)
        for mode in ("fp8", "8bit", "4bit")
    },
    "vllm": vllm,
    "transformers": transformers,
}


def work(engine: str, folder: str, count: int, rows: Sequence[int]) -> dict[str, Any]:
    """Measure one engine in this process."""
    started = time.perf_counter()
    caption, go_on = ENGINES[engine](folder)
    found: dict[str, Any] = {"engine": engine, "load_s": time.perf_counter() - started}
    import torch

    found["gpu"] = torch.cuda.get_device_name()
    packages = {"torch", "transformers", "vllm"}
    found["versions"] = {name: metadata.version(name) for name in packages if find_spec(name)}
    print(f"{engine}: ready after {found['load_s']:.0f} s", file=sys.stderr, flush=True)
    few = engine == "transformers"
    count = count // 4 if few else count
    # What is compiled and captured at first does not count, as with a folder of thousands.
    caption(pictures(min(count, 300 if not few else 32), 1), NEW_TOKENS)
    found["captions_per_s"] = [
        count / caption(pictures(count, 2 + time_), NEW_TOKENS) for time_ in range(2)
    ]
    first = [caption(pictures(1, 10 + number), 1) for number in range(8)][1:]
    found["first_token_s"] = {"median": statistics.median(first), "max": max(first)}
    found["rows"] = {}
    for number in rows:
        speeds = []
        for again in range(3):
            given = prompts(number, 100 * number + again)
            one, many = go_on(given, 1), go_on(given, STEPS + 1)
            speeds.append(number * STEPS / (many - one))
        found["rows"][number] = speeds[1:]
        print(f"{engine}: {number} rows {speeds}", file=sys.stderr, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--engines", default="native,vllm,transformers")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--rows", default="1,8,32,256")
    parser.add_argument("--timeout", type=float, default=400, help="seconds a process may take")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--work", help=argparse.SUPPRESS)
    said = parser.parse_args()
    if said.work:
        rows = [int(each) for each in said.rows.split(",")]
        if said.work == "transformers":
            rows = [each for each in rows if each <= TRANSFORMERS_BATCH]
        print(json.dumps(work(said.work, said.model, said.pictures, rows)))
        return
    if said.out is None:
        parser.error("--out is needed")
    found: list[dict[str, Any]] = []
    for round_ in range(said.rounds):
        engines = said.engines.split(",")
        for engine in engines if round_ % 2 == 0 else engines[::-1]:
            command = [sys.executable, __file__, "--work", engine, "--model", said.model]
            command += ["--pictures", str(said.pictures), "--rows", said.rows]
            try:
                done = subprocess.run(
                    command, stdout=subprocess.PIPE, timeout=said.timeout, env=dict(os.environ)
                )
                lines = done.stdout.decode().splitlines()
                if done.returncode == 0 and lines:
                    found.append({"round": round_, **json.loads(lines[-1])})
                else:
                    print(f"{engine}: ended with {done.returncode}", file=sys.stderr)
            except subprocess.TimeoutExpired:
                print(f"{engine}: took longer than {said.timeout:.0f} s", file=sys.stderr)
            said.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
