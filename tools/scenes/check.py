"""Checks an exported folder with transformers: exact-caption rate on the held-out set.

python -m tools.scenes.check qwencli/bundled/scenes --count 150 --dtype float32
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tools.scenes.heldout import PROMPT, heldout

if TYPE_CHECKING:
    from PIL import Image


class Captioner:
    """The folder as any user of transformers loads it; greedy by its own generation config."""

    def __init__(self, folder: Path, dtype: str) -> None:
        import torch
        from transformers import (
            AutoImageProcessor,
            AutoModelForImageTextToText,
            AutoTokenizer,
        )

        self.processor: Any = AutoImageProcessor.from_pretrained(folder)
        self.tokenizer: Any = AutoTokenizer.from_pretrained(folder)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(
            folder, dtype=getattr(torch, dtype)
        ).eval()

    def answer(self, images: list[Image.Image], prompt: str) -> str:
        """One user turn, pictures first."""
        import torch

        content = [*({"type": "image"} for _ in images), {"type": "text", "text": prompt}]
        text = self.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        pixels = self.processor(images=images, return_tensors="pt")
        for grid in pixels["image_grid_thw"]:
            count = int(grid.prod()) // self.processor.merge_size**2
            text = text.replace("<|image_pad|>", "<|pad|>" * count, 1)
        text = text.replace("<|pad|>", "<|image_pad|>")
        inputs = self.tokenizer(text, return_tensors="pt")
        kinds = (inputs["input_ids"] == self.model.config.image_token_id).int()
        with torch.inference_mode():
            out = self.model.generate(**inputs, **pixels, mm_token_type_ids=kinds)
        return self.tokenizer.decode(
            out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )


def check(folder: Path, count: int, dtype: str) -> dict[str, Any]:
    captioner = Captioner(folder, dtype)
    started = time.monotonic()
    wrong = []
    for item in heldout(count):
        got = captioner.answer([item.image], PROMPT)
        if got != item.caption:
            wrong.append({"index": item.index, "wanted": item.caption, "got": got})
    return {
        "dtype": dtype,
        "scenes": count,
        "exact_caption_percent": round(100 * (count - len(wrong)) / count, 2),
        "seconds": round(time.monotonic() - started, 1),
        "wrong": wrong,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--count", type=int, default=150)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    print(json.dumps(check(options.folder, options.count, options.dtype), indent=1))
