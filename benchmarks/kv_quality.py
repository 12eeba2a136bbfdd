"""What storing keys and values at one byte each does to the bundled model's captions.

python -m benchmarks.kv_quality OUT.json [--scenes 300] [--dtype float32]

Each held-out scene's right caption is fed token by token to the same weights over each kind of
cache. The caption is exact where every token is the likeliest one: what greedy decoding would say.
The divergence is KL(unquantized || quantized) of each next token. `fp8-unscaled` is not an option
of the tool; it is here because it would be simpler.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from qwencli.config import Attention, EngineConfig
from qwencli.engine.cache import kv_cache
from qwencli.engine.frontend.model_files import ModelFiles, open_model
from qwencli.engine.loading import weights
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.quant.quantized_tensor import LARGEST, Scheme, quantize_rows
from qwencli.messages import ImagePart, user_message
from qwencli.models.resolve import resolve_model
from qwencli.models.shape_reader import read_shape
from tools.scenes.heldout import PROMPT, HeldOutItem, heldout

Tensor = torch.Tensor
MAX_SEQ_LEN = 1024


def unscaled(w: Tensor, scheme: Scheme) -> tuple[Tensor, Tensor]:
    """`quantize_rows` for fp8 as it would be without scales."""
    return w.clamp(-LARGEST[scheme], LARGEST[scheme]).to(torch.float8_e4m3fn), torch.ones_like(
        w[..., 0]
    )


# Kind of cache -> its scheme, and how rows are cut down.
KINDS: dict[str, tuple[Scheme | None, Callable[[Tensor, Scheme], tuple[Tensor, Tensor]]]] = {
    "as computed": (None, quantize_rows),
    "int8": (Scheme.INT8, quantize_rows),
    "fp8-e4m3": (Scheme.FP8, quantize_rows),
    "fp8-unscaled": (Scheme.FP8, unscaled),
}


@torch.inference_mode()
def caption_logits(model: QwenModel, files: ModelFiles, item: HeldOutItem) -> Tensor:
    """Log-probabilities [T, V] before each token of the right caption and of its end."""
    prompt = files.prompts.build((user_message(PROMPT, (ImagePart(item.image, str(item.index)),)),))
    assert prompt.inputs is not None, "there is a picture"
    patches = torch.as_tensor(prompt.inputs.patches[0]).to(model.dtype)
    features = model.encode_images(patches, prompt.grid_thw)
    inputs = model.prepare([ModelPrompt(prompt.input_ids, prompt.visuals)], features)
    cache = model.static_cache()
    rows = [model.prefill(inputs, cache)[0]]
    for step, token in enumerate(files.prompts.tokenizer.encode(item.caption)):
        slot = inputs.length + step
        one, at = torch.tensor([token]), torch.tensor([slot])
        plan = AttentionPlan(slot + 1, None)
        rows.append(model.decode_step(one, inputs.next_positions + step, at, cache, plan)[0])
    return torch.stack(rows).float().log_softmax(-1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=300)
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    options = parser.parse_args()
    files = open_model(EngineConfig(resolve_model("scenes")))
    assert files.folder is not None, "the bundled model is a folder"
    shape, dtype = read_shape(files.hub_config), getattr(torch, options.dtype)
    models = {}
    for kind, (scheme, _) in KINDS.items():
        loaded = weights.load(files.folder, shape, dtype, torch.device("cpu"))
        models[kind] = QwenModel(shape, loaded, MAX_SEQ_LEN, Attention.SDPA, kv=scheme)
    found: dict[str, dict[str, Any]] = {kind: {"wrong": [], "kl": []} for kind in KINDS}
    for item in heldout(options.scenes):
        exact: Tensor | None = None
        wanted = torch.tensor(files.prompts.tokenizer.encode(item.caption))
        for kind, (_, cut) in KINDS.items():
            kv_cache.quantize_rows = cut
            rows = caption_logits(models[kind], files, item)
            exact = rows if exact is None else exact
            chosen = rows.argmax(-1)
            ended = int(chosen[-1]) in files.stop_token_ids
            if not ended or not torch.equal(chosen[:-1], wanted):
                found[kind]["wrong"].append(item.index)
            found[kind]["kl"] += (exact.exp() * (exact - rows)).sum(-1).tolist()
    report = {"model": "scenes", "dtype": options.dtype, "scenes": options.scenes, "kinds": {}}
    for kind, rows in found.items():
        kl = torch.tensor(rows["kl"], dtype=torch.float64)
        report["kinds"][kind] = {
            "exact_caption_percent": round(100 * (1 - len(rows["wrong"]) / options.scenes), 2),
            "wrong_scenes": rows["wrong"],
            "tokens": len(kl),
            "mean_kl": float(kl.mean()),
            "p99_kl": float(kl.quantile(0.99)),
            "max_kl": float(kl.max()),
        }
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    for kind, row in report["kinds"].items():
        print(f"{kind}: {row['exact_caption_percent']} % exact, mean KL {row['mean_kl']:.2e}")


if __name__ == "__main__":
    main()
