"""From a folder of weights to the first token: whole processes, beside transformers on one folder.

    python benchmarks/load_time.py OUT.json [--model qwen3-vl-4b] [--device cuda] [--limit-s 540]

Writes random weights of the model's shape to a temporary folder (or uses `--folder`), reads them
once into the page cache, and measures fresh processes in turns: the floor (python, torch and a
CUDA context), transformers' `from_pretrained`, and `Engine.load` in each mode, first with an empty
cache folder (nothing compiled, nothing quantized) and then with what that run has left. Of each:
the load, the first token of a picture of 512x512 right after it, the same again, and one of a new
size; and the whole process from outside, with 64 tokens. A process that takes longer than
`--each-s` is ended and is a row that says so; none is started after `--limit-s`. The file is
written anew after each row.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

MODES = ("none", "fp8", "8bit", "4bit")
PREFIXES = {"text": "model.language_model.", "vision": "model.visual.", "root": ""}
SHARD_BYTES = 4 * 10**9


def write_folder(folder: Path, model: str, device: str) -> None:
    """Random weights in the model's shape, with the text side of the bundled model."""
    import torch
    from safetensors.torch import save_file

    from qwencli.models.builtin import bundled_folder
    from qwencli.models.resolve import dummy_config, resolve_model
    from qwencli.models.shape_reader import read_shape
    from qwencli.models.tensors import specs

    folder.mkdir(parents=True, exist_ok=True)
    for file in bundled_folder().glob("*.json*"):
        shutil.copy(file, folder / file.name)
    shutil.copy(bundled_folder() / "chat_template.jinja", folder)
    config = dict(dummy_config(resolve_model(model)))
    # Of the tokenizer that is there.
    own = json.loads((bundled_folder() / "config.json").read_text())
    config |= {key: value for key, value in own.items() if key.endswith("_token_id")}
    (folder / "config.json").write_text(json.dumps(config))
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for spec in specs(read_shape(config)):
        for part in spec.parts:
            values = torch.empty(part.shape, dtype=torch.bfloat16, device=device)
            values = values.fill_(1.0) if spec.fill == "ones" else values.normal_(0.0, 0.02)
            if size + values.nbytes > SHARD_BYTES:
                shards.append({})
                size = 0
            size += values.nbytes
            shards[-1][PREFIXES[part.section] + part.name] = values.cpu()
    names = {}
    for number, shard in enumerate(shards, start=1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        save_file(shard, folder / name, {"format": "pt"})
        names |= dict.fromkeys(shard, name)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def read_once(folder: Path) -> float:
    """Read all weights, so that they are in the page cache; GB/s."""
    started, total = time.perf_counter(), 0
    buffer = bytearray(1 << 24)
    for file in folder.glob("*.safetensors"):
        with file.open("rb", buffering=0) as stream:
            while count := stream.readinto(buffer):
                total += count
    return total / (time.perf_counter() - started) / 1e9


def floor(device: str) -> dict[str, Any]:
    import torch

    torch.zeros(1, device=device)
    return {}


def transformers_load(folder: Path, device: str) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForImageTextToText

    torch.zeros(1, device=device)
    started = time.perf_counter()
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.bfloat16, device_map=device
    )
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    assert all(not value.is_meta for value in model.parameters()), "all weights were found"
    return {"load_s": time.perf_counter() - started}


def native_load(folder: Path, device: str, mode: str) -> dict[str, Any]:
    import resource

    import torch
    from PIL import Image

    from qwencli.config import EngineConfig, EngineName, Quantization, SamplingOptions
    from qwencli.engine.factory import create_engine
    from qwencli.messages import GenerationRequest, ImagePart, user_message
    from qwencli.models.resolve import resolve_model

    def first_token_s(width: int, height: int, tokens: int) -> float:
        picture = Image.effect_mandelbrot((width, height), (-2, -1.5, 1, 1.5), 50).convert("RGB")
        sampling = SamplingOptions(do_sample=False, max_new_tokens=tokens)
        asked = user_message("Describe this image.", (ImagePart(picture, "picture"),))
        begun, first = time.perf_counter(), 0.0
        for _ in engine.stream(GenerationRequest((asked,), sampling, ignore_eos=True)):
            first = first or time.perf_counter() - begun
        return first

    torch.zeros(1, device=device)
    config = EngineConfig(
        resolve_model(str(folder)),
        engine=EngineName.NATIVE,
        quantization=Quantization(mode),
        device=device,
        max_seq_len=4096,
    )
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    engine = create_engine(config)
    started = time.perf_counter()
    engine.load()
    found: dict[str, Any] = {"load_s": time.perf_counter() - started}
    found["host_memory_gb"] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1e6
    found["first_token_s"] = first_token_s(512, 512, 64)
    found["request_over_s"] = time.perf_counter() - started
    found["again_s"] = first_token_s(512, 512, 1)
    found["new_size_s"] = first_token_s(640, 480, 1)
    found["warnings"] = list(engine.load_warnings)
    found["effective"] = str(engine.effective)
    engine.close()
    return found


def child(arguments: argparse.Namespace, kind: str, mode: str, cache: Path) -> dict[str, Any]:
    """Run one measurement in a process of its own."""
    command = [
        sys.executable, __file__, "-", "--kind", kind, "--mode", mode,
        "--folder", str(arguments.folder), "--device", arguments.device,
    ]  # fmt: skip
    environment = os.environ | {"XDG_CACHE_HOME": str(cache)}
    environment.pop("TRITON_CACHE_DIR", None)
    row: dict[str, Any] = {"kind": kind, "mode": mode}
    started = time.perf_counter()
    try:
        ran = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=arguments.each_s
        )
    except subprocess.TimeoutExpired:
        return row | {"failed": f"not over after {arguments.each_s} s"}
    row["process_s"] = time.perf_counter() - started
    lines = ran.stdout.strip().splitlines()
    if ran.returncode or not lines:
        return row | {"failed": (ran.stderr.strip().splitlines() or ["no output"])[-1][:400]}
    return row | json.loads(lines[-1])


def summary(rows: list[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Medians by what was measured."""
    found: dict[str, dict[str, float]] = {}
    for name in dict.fromkeys(row["name"] for row in rows):
        own = [row for row in rows if row["name"] == name and "failed" not in row]
        keys = {key for row in own for key, value in row.items() if isinstance(value, float)}
        found[name] = {key: statistics.median(r[key] for r in own if key in r) for key in keys}
    return found


def measure(arguments: argparse.Namespace) -> None:
    ends = time.monotonic() + arguments.limit_s
    rows: list[dict[str, Any]] = []
    read_gb_s = 0.0

    def write() -> None:
        found = {"read_gb_s": read_gb_s, "summary": summary(rows), "rows": rows}
        arguments.out.write_text(json.dumps(found, indent=1))

    def run(name: str, kind: str, mode: str, cache: Path) -> None:
        if time.monotonic() < ends:
            rows.append({"name": name} | child(arguments, kind, mode, cache))
            print(json.dumps(rows[-1]), flush=True)
            write()

    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        if arguments.folder is None:
            arguments.folder = place / "model"
            write_folder(arguments.folder, arguments.model, arguments.device)
        read_gb_s = read_once(arguments.folder)
        for turn in range(arguments.rounds):
            run("floor", "floor", "none", place)
            run("transformers", "transformers", "none", place)
            for mode in arguments.modes:
                cache = place / f"cache-{mode}-{turn}"
                run(f"{mode}, empty cache", "native", mode, cache)
                run(f"{mode}, filled cache", "native", mode, cache)
                shutil.rmtree(cache, ignore_errors=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--folder", type=Path, help="weights that are there already")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=MODES)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--each-s", type=float, default=90.0)
    parser.add_argument("--limit-s", type=float, default=540.0)
    parser.add_argument("--kind", choices=("floor", "transformers", "native"), help="one alone")
    parser.add_argument("--mode", choices=MODES, default="none")
    arguments = parser.parse_args()
    if arguments.kind == "floor":
        print(json.dumps(floor(arguments.device)))
    elif arguments.kind == "transformers":
        print(json.dumps(transformers_load(arguments.folder, arguments.device)))
    elif arguments.kind == "native":
        print(json.dumps(native_load(arguments.folder, arguments.device, arguments.mode)))
    else:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        measure(arguments)


if __name__ == "__main__":
    main()
