"""What fewer bits cost the small trained Qwen3.5, and how many drafts of its own head are taken.

    python benchmarks/small_hybrid.py OUT.json [--scenes 100] [--device cpu]
        [--quantization none,8bit,fp8,4bit] [--folder tests/hybrid_scenes]

Greedy captions of held-out scenes that training never saw (`tools.scenes.heldout`), with the head's
drafts. Of each mode: exact captions in percent, drafts made, and the share that was taken. The
answers do not depend on drafts, so the captions are those of plain steps.
"""

from __future__ import annotations

import argparse
import json
import platform
from pathlib import Path
from typing import Any

import torch

from qwencli.config import (
    EngineConfig,
    EngineName,
    ModelSource,
    ModelSpec,
    Quantization,
    SamplingOptions,
    Speculate,
)
from qwencli.engine.native.engine import NativeEngine
from qwencli.messages import GenerationRequest, ImagePart, user_message
from qwencli.models.folder import read_config
from tools.scenes.heldout import PROMPT, heldout

FOLDER = Path(__file__).parents[1] / "tests" / "hybrid_scenes"


def measure(folder: Path, quantization: Quantization, device: str, scenes: int) -> dict[str, Any]:
    spec = ModelSpec("hybrid", ModelSource.LOCAL, path=folder, hub_config=read_config(folder))
    config = EngineConfig(
        spec,
        engine=EngineName.NATIVE,
        device=device,
        quantization=quantization,
        speculate=Speculate.MTP,
    )
    sampling = SamplingOptions(do_sample=False, max_new_tokens=96)
    exact = drafted = accepted = 0
    with NativeEngine(config) as engine:
        for item in heldout(scenes):
            picture = ImagePart(item.image.convert("RGB"), f"scene {item.index}")
            asked = GenerationRequest((user_message(PROMPT, (picture,)),), sampling)
            result = engine.generate(asked)
            exact += result.text.strip() == item.caption
            if result.speculation is not None:
                drafted += result.speculation.num_drafted
                accepted += result.speculation.num_accepted
        scheme = engine.effective.quantization
    return {
        "quantization": quantization.value,
        "scheme": scheme,
        "scenes": scenes,
        "exact_percent": 100 * exact / scenes,
        "num_drafted": drafted,
        "accepted_percent": 100 * accepted / drafted if drafted else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--quantization", default="none,8bit,fp8,4bit", help="comma list")
    parser.add_argument("--folder", type=Path, default=FOLDER)
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    about = {
        "device": options.device,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    for mode in options.quantization.split(","):
        rows.append(measure(options.folder, Quantization(mode), options.device, options.scenes))
        print(json.dumps(rows[-1]), flush=True)
        text = json.dumps({**about, "rows": rows}, indent=1)
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
