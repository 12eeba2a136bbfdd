"""transformers' `generate()` as its documentation has it, with nothing of ours around it.

python benchmarks/side_by_side/transformers_plain.py --model Qwen/Qwen3-VL-4B-Instruct \\
    --name qwen3-vl-4b --out campaigns/plain

A call for one token and one for many: what they differ by is decoding.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.side_by_side.foreign import Run, Work, main, measure, options, work_of
from qwencli.errors import MissingDependencyError, ModelNotFoundError


def script(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "", image=True)
    parser.add_argument("--model", required=True, help="a hub id or a folder")
    said = parser.parse_args(arguments)
    work = work_of("transformers-plain", said)
    measure(said.out, work, lambda: _runs(said.model, work))


def _runs(name: str, work: Work) -> Iterator[Run]:
    try:
        import torch
        from transformers import AutoModelForImageTextToText, AutoProcessor
    except ImportError as error:
        raise MissingDependencyError(
            f"transformers does not load: {error}", "pip install transformers torch"
        ) from error
    from PIL import Image

    device = work.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        processor: Any = AutoProcessor.from_pretrained(name)
        dtype = torch.float32 if device == "cpu" else "auto"
        model: Any = AutoModelForImageTextToText.from_pretrained(name, dtype=dtype).to(device)
    except ImportError as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise MissingDependencyError(
            f"transformers cannot load it: {lines[0]}", "pip install torchvision"
        ) from error
    except (OSError, ValueError) as error:
        first = (str(error).strip().splitlines() or ["no reason given"])[0]
        raise ModelNotFoundError(f"{name}: {first}", "check --model") from error
    content: list[dict[str, Any]] = [
        {"type": "image", "image": Image.open(path).convert("RGB")} for path in work.images
    ]
    content.append({"type": "text", "text": work.prompt})

    def answer(tokens: int) -> tuple[float, Any, int]:
        start = time.perf_counter()
        inputs = processor.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=True,
            add_generation_prompt=True,
            return_dict=True,
            return_tensors="pt",
        ).to(device)
        ids = model.generate(
            **inputs, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
        ).tolist()[0]
        length = inputs["input_ids"].shape[1]
        return time.perf_counter() - start, ids[length:], length

    for _ in range(work.runs + 1):
        first_s, _, _ = answer(1)
        whole_s, ids, length = answer(work.max_new_tokens)
        yield Run(
            num_new_tokens=len(ids),
            num_prompt_tokens=length,
            ttft_s=first_s,
            decode_s=max(whole_s - first_s, 1e-9),
            text=processor.decode(ids),
        )


if __name__ == "__main__":
    raise SystemExit(main(script))
