"""What fewer bits cost: each scheme against unquantized weights, on the bundled model.

    python benchmarks/quality.py OUT [--scenes 400] [--kl-scenes 100] [--device cpu] [--modes A,B]
                                 [--round-prompts]

Exact captions of held-out scenes that training never saw (`tools.scenes.heldout`); the mean
Kullback-Leibler divergence from the native engine without quantization at every token of their
right captions, picture included, over the whole vocabulary; and how far the decoder's matrices are
from the unquantized ones. Modes are ENGINE:QUANTIZATION; native:nf4 reads a checkpoint that is
written here with bitsandbytes, as transformers saves them. On the CPU, whose operators read every
matrix back at every step, each is read back once. Kernels of a GPU round activations too:
`--round-prompts` rounds those of prompts, on the CPU, as `row_quant` does for int8 weights (127
steps to the largest of a row), in front of each product of the decoder in the native engine's 8bit.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from qwencli.config import EngineConfig, EngineName, ModelSource, ModelSpec, Quantization
from qwencli.engine.base_engine import BaseEngine
from qwencli.engine.factory import create_engine
from qwencli.engine.frontend.prompt import Prompt
from qwencli.engine.loading import weights
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.native.prompt_inputs import ModelPrompt
from qwencli.engine.ops.attention import AttentionPlan
from qwencli.engine.ops.decoder_ops import Matrix
from qwencli.engine.quant.quantized_tensor import QuantizedTensor
from qwencli.engine.response import ResponseBuilder
from qwencli.messages import GenerationRequest, ImagePart, SamplingOptions, user_message
from qwencli.models.builtin import bundled_folder
from qwencli.models.folder import read_config
from qwencli.models.quant_formats import packed_format
from qwencli.models.resolve import resolve_model
from qwencli.models.shape_reader import read_shape
from qwencli.models.tensors import specs
from tools.scenes.heldout import PROMPT, HeldOutItem, heldout

MODES = (
    "native:none", "native:8bit", "native:fp8", "native:4bit", "native:nf4",
    "transformers:none", "transformers:8bit", "transformers:4bit",
)  # fmt: skip
MOST_NEW_TOKENS = 96
BLOCK = 64
FIELDS = (
    "engine", "quantization", "scheme", "scenes", "exact_percent", "lost_points", "kl_scenes",
    "kl_tokens", "mean_kl", "max_kl", "same_token_percent", "weight_error_percent",
)  # fmt: skip


def request(item: HeldOutItem) -> GenerationRequest:
    picture = ImagePart(item.image.convert("RGB"), f"scene {item.index}")
    sampling = SamplingOptions(do_sample=False, max_new_tokens=MOST_NEW_TOKENS)
    return GenerationRequest((user_message(PROMPT, (picture,)),), sampling)


def caption_log_probs(engine: BaseEngine, item: HeldOutItem) -> torch.Tensor:
    """Log-probabilities [tokens, V] of every token of the right caption, and of its end."""
    prompt = engine._prompt(request(item), None)
    caption = engine.files.prompts.tokenizer.encode(item.caption)
    read = _native_logits if isinstance(engine, NativeEngine) else _transformers_logits
    with torch.inference_mode():
        return read(engine, prompt, caption).float().log_softmax(-1).cpu()


def _native_logits(engine: Any, prompt: Prompt, caption: list[int]) -> torch.Tensor:
    """The caption token by token, as the engine decodes."""
    model = engine._generation._model
    assert prompt.inputs is not None, "scenes are pictures"
    patches = torch.as_tensor(prompt.inputs.patches[0]).to(model.device, model.dtype)
    features = model.encode_images(patches, [prompt.grid_thw[0]])
    inputs = model.prepare([ModelPrompt(prompt.input_ids, prompt.visuals)], features)
    cache = model.static_cache(1, inputs.length + len(caption))
    rows = [model.prefill(inputs, cache).clone()]
    position = inputs.next_positions.clone()
    for slot, token in enumerate(caption, start=inputs.length):
        fed, at = (torch.tensor([value], device=model.device) for value in (token, slot))
        rows.append(
            model.decode_step(fed, position, at, cache, AttentionPlan(slot + 1, None)).clone()
        )
        position += 1
    return torch.cat([row.float() for row in rows])


def _transformers_logits(engine: Any, prompt: Prompt, caption: list[int]) -> torch.Tensor:
    from qwencli.config import resolve_sampling
    from qwencli.engine.hf.generate import Generation

    sampling = resolve_sampling(SamplingOptions(), engine.files.generation_defaults)
    whole = replace(prompt, input_ids=[*prompt.input_ids, *caption])
    answer = ResponseBuilder(engine.files, whole, sampling, 0.0)
    inputs = Generation(engine._model, answer, engine.effective)._inputs()
    logits: torch.Tensor = engine._model(**inputs, use_cache=False).logits[0]
    return logits[len(prompt.input_ids) - 1 :]


def write_nf4(folder: Path) -> ModelSpec:
    """The bundled model with the matrices of its decoder as bitsandbytes' nf4."""
    from bitsandbytes.functional import quantize_4bit
    from safetensors.torch import load_file, save_file

    shutil.copytree(bundled_folder(), folder)
    tensors = load_file(folder / "model.safetensors")
    for name in [n for n in tensors if ".language_model.layers." in n and tensors[n].dim() == 2]:
        packed, state = quantize_4bit(tensors[name], blocksize=BLOCK, quant_type="nf4")
        tensors[name] = packed
        tensors |= {f"{name}.{key}": value for key, value in state.as_dict(packed=True).items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = read_config(folder)
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return ModelSpec("scenes-nf4", ModelSource.LOCAL, path=folder, hub_config=config)


def weight_error(spec: ModelSpec, quantization: Quantization) -> float | None:
    """Percent: norm of the difference of all the decoder's matrices over their norm."""
    assert spec.path is not None and spec.hub_config is not None, "these models are here"
    cpu = torch.device("cpu")
    shape = read_shape(spec.hub_config)
    plain = weights.load(bundled_folder(), shape, torch.float32, cpu).tensors
    packed = packed_format(spec.hub_config)
    matrices = weights.load(spec.path, shape, torch.float32, cpu, quantization, packed).matrices
    off = whole = 0.0
    for name in (spec.name for spec in specs(shape) if weights.is_decoder_matrix(spec.name)):
        matrix: QuantizedTensor | None = matrices.get(name)
        if matrix is None:
            return None
        off += float((matrix.dequantize(torch.float32) - plain[name]).double().square().sum())
        whole += float(plain[name].double().square().sum())
    return 100 * math.sqrt(off / whole)


def read_back_once(engine: Any) -> None:
    """Put plain matrices in the place of the native engine's quantized ones, equal in value."""
    model = engine._generation._model
    decoder, dtype = model.decoder, model.dtype

    def plain(matrix: Matrix) -> Matrix:
        return matrix.dequantize(dtype).t() if isinstance(matrix, QuantizedTensor) else matrix

    decoder.head = plain(decoder.head)
    decoder.layers = [
        replace(
            layer,
            qkv=plain(layer.qkv),
            o=plain(layer.o),
            gate_up=plain(layer.gate_up),
            down=plain(layer.down),
        )
        for layer in decoder.layers
    ]


class RoundedPrompts(TorchFunctionMode):
    """Rounds the rows that are multiplied by a matrix of the decoder; steps on a CPU are no
    operators of torch."""

    def __init__(self, engine: Any) -> None:
        super().__init__()
        decoder = engine._generation._model.decoder
        matrices = [decoder.head]
        for layer in decoder.layers:
            matrices += [layer.qkv, layer.o, layer.gate_up, layer.down]
        self._places = {matrix.data_ptr() for matrix in matrices}
        self.products = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (torch.mm, torch.addmm, torch.Tensor.addmm_):
            *before, rows, matrix = args
            if matrix.data_ptr() in self._places:
                self.products += 1
                step = rows.abs().amax(1, keepdim=True).clamp(min=1e-30) / 127
                args = (*before, (rows / step).round() * step, matrix)
        return func(*args, **(kwargs or {}))


def measure(
    mode: str,
    spec: ModelSpec,
    items: list[HeldOutItem],
    kl_items: list[HeldOutItem],
    reference: list[torch.Tensor],
    device: str,
    round_prompts: bool,
) -> tuple[dict[str, Any], list[dict[str, Any]], list[torch.Tensor]]:
    """The mode's row, its wrong captions, and its log-probabilities of the right ones."""
    engine_name, _, bits = mode.partition(":")
    quantization = Quantization.NONE if bits == "nf4" else Quantization(bits)
    config = EngineConfig(
        spec, engine=EngineName(engine_name), quantization=quantization, device=device
    )
    wrong, said = [], []
    with create_engine(config) as engine:
        assert isinstance(engine, BaseEngine), "both engines hold the model here"
        if engine_name == EngineName.NATIVE and engine.effective.device == "cpu":
            read_back_once(engine)
        scheme = engine.effective.quantization
        rounding = RoundedPrompts(engine) if round_prompts and mode == "native:8bit" else None
        with rounding or nullcontext():
            for item in items:
                answer = engine.generate(request(item)).text.strip()
                if answer != item.caption:
                    wrong.append({"mode": mode, "scene": item.index, "answer": answer})
            for item in kl_items:
                said.append(caption_log_probs(engine, item))
        if rounding is not None:
            assert rounding.products, "prompts multiply by the decoder's matrices"
            scheme += ", prompts rounded"
    row: dict[str, Any] = {"engine": engine_name, "quantization": bits, "scheme": scheme}
    row |= {"scenes": len(items), "exact_percent": 100 * (1 - len(wrong) / len(items))}
    row |= _divergence(reference or said, said)
    native = engine_name == EngineName.NATIVE
    if native and mode != MODES[0]:
        row["weight_error_percent"] = weight_error(spec, quantization)
    return row, wrong, said


def _divergence(reference: list[torch.Tensor], said: list[torch.Tensor]) -> dict[str, Any]:
    p, q = torch.cat(reference).double(), torch.cat(said).double()
    kl = (p.exp() * (p - q)).sum(-1)
    same = (p.argmax(-1) == q.argmax(-1)).double().mean()
    return {
        "kl_scenes": len(said),
        "kl_tokens": len(kl),
        "mean_kl": float(kl.mean()),
        "max_kl": float(kl.max()),
        "same_token_percent": 100 * float(same),
    }


def write_rows(path: Path, fields: tuple[str, ...], rows: Iterator[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        for row in rows:
            known = {k: f"{v:.6g}" if isinstance(v, float) else v for k, v in row.items()}
            writer.writerow(known)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=400)
    parser.add_argument("--kl-scenes", type=int, default=100)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--modes", default=",".join(MODES))
    parser.add_argument("--round-prompts", action="store_true")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    items = list(heldout(options.scenes))
    rows: list[dict[str, Any]] = []
    wrong: list[dict[str, Any]] = []
    reference: list[torch.Tensor] = []
    bundled = resolve_model("scenes")
    modes = [MODES[0], *(mode for mode in options.modes.split(",") if mode != MODES[0])]
    with tempfile.TemporaryDirectory() as temporary:
        for mode in modes:
            spec = bundled
            if mode == "native:nf4":
                spec = write_nf4(Path(temporary) / "nf4")
            row, missed, said = measure(
                mode,
                spec,
                items,
                items[: options.kl_scenes],
                reference,
                options.device,
                options.round_prompts,
            )
            reference = reference or said
            row["lost_points"] = rows[0]["exact_percent"] - row["exact_percent"] if rows else 0.0
            rows.append(row)
            wrong += missed
            print(json.dumps(row), file=sys.stderr)
            write_rows(options.out / "quality.csv", FIELDS, iter(rows))
            write_rows(options.out / "wrong.csv", ("mode", "scene", "answer"), iter(wrong))
    about = {
        "command_line": sys.argv[1:],
        "device": options.device,
        "processor": platform.processor() or platform.machine(),
        "torch": torch.__version__,
    }
    (options.out / "environment.json").write_text(json.dumps(about, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
