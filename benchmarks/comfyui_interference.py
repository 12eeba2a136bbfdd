"""What a ComfyUI beside it does to a node: the engine in its process, and the resident one.

    python benchmarks/comfyui_interference.py --model qwen3-vl-4b --load-format dummy --out FOLDER

This process stands for ComfyUI. A node's requests (one picture, equal work: greedy, end tokens
ignored, no caches) run in it and in the resident process, in turns. While every second one runs,
another thread of this process is busy: `gpu`, with the many small operations of a sampler on the
same device, which allocate as they go; `prompt`, with JSON and graphs in plain Python, as when a
prompt is queued; `idle` ones lie between. `--allocator cudaMallocAsync` is what ComfyUI asks of
torch on NVIDIA GPUs.

FOLDER gets `executions.csv`, a row each, and `summary.json` with the run max/min of each place and
disturbance. The token times of a resident engine are that process's own.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import platform
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

COLUMNS = (
    "execution", "place", "disturbed_by", "decode_tok_per_s", "ttft_s", "decode_s", "node_s",
    "num_new_tokens", "itl_max_ms", "turns_of_other",
)  # fmt: skip


class Other:
    """The second thread: works while it is let, and counts its turns."""

    def __init__(self, device: str, side: int) -> None:
        self.turns = 0
        self._work: dict[str, Callable[[], None]] = {
            "gpu": self._sampler(device, side),
            "prompt": self._prompt(),
        }
        self._doing: str | None = None
        self._let = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @contextmanager
    def busy(self, kind: str) -> Iterator[None]:
        self.turns = 0
        if kind == "idle":
            yield
            return
        self._doing = kind
        self._let.set()
        try:
            yield
        finally:
            self._let.clear()
            while self._doing is not None:
                time.sleep(0.001)

    def _run(self) -> None:
        while True:
            self._let.wait()
            kind = self._doing
            while self._let.is_set() and kind is not None:
                self._work[kind]()
                self.turns += 1
            self._doing = None

    @staticmethod
    def _sampler(device: str, side: int) -> Callable[[], None]:
        import torch

        generator = torch.Generator(device).manual_seed(0)
        dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
        weight = torch.randn(side, side, generator=generator, device=device, dtype=dtype)

        def step() -> None:
            """A hundred launches, then the wait that a sampler's own step ends with."""
            latent = torch.ones(side, side, device=device, dtype=dtype)
            for _ in range(16):
                latent = latent @ weight
                latent = torch.nn.functional.silu(latent / latent.abs().max().clamp(min=1e-3))
            float(latent.sum())

        return step

    @staticmethod
    def _prompt() -> Callable[[], None]:
        graph = {
            str(n): {"class_type": "Node", "inputs": {"a": [str(n - 1), 0], "b": n, "c": "x" * 80}}
            for n in range(200)
        }
        text = json.dumps(graph)

        def step() -> None:
            queued = json.loads(text)
            order = sorted(queued, key=lambda n: (int(queued[n]["inputs"]["a"][0]), n))
            json.dumps({n: queued[n] for n in order})

        return step


def node_request(max_new_tokens: int, side: int) -> Any:
    """A node's request about one picture of noise, converted as ComfyUI's pictures are."""
    import torch

    from qwencli.comfyui.pictures import Batch
    from qwencli.config import SamplingOptions
    from qwencli.messages import GenerationRequest, user_message

    noise = torch.rand(1, side, side, 3, generator=torch.Generator().manual_seed(0))
    sampling = SamplingOptions(do_sample=False, max_new_tokens=max_new_tokens)

    def request() -> GenerationRequest:
        part = Batch(noise, "images").part(0)
        messages = (user_message("Describe this image in detail.", (part,)),)
        return GenerationRequest(messages, sampling, ignore_eos=True, bypass_caches=True)

    return request


def measure(said: argparse.Namespace) -> list[dict[str, Any]]:
    from qwencli.comfyui.engine_keeper import EngineKeeper, EngineKey, create
    from qwencli.comfyui.engine_use import generate_all
    from qwencli.comfyui.schemas import RunsWhere
    from qwencli.config import EngineConfig, LoadFormat
    from qwencli.engine.abilities import Abilities
    from qwencli.models.resolve import resolve_model

    config = EngineConfig(
        resolve_model(said.model), device=said.device, load_format=LoadFormat(said.load_format)
    )
    places = {
        runs.value: EngineKey(config, runs) for runs in (RunsWhere.IN_PROCESS, RunsWhere.RESIDENT)
    }
    request = node_request(said.max_new_tokens, said.picture)
    rows: list[dict[str, Any]] = []
    with ExitStack() as stack:
        # One keeper each: one alone would load the model anew for every turn.
        keepers = {place: EngineKeeper(create) for place in places}
        for keeper in keepers.values():
            stack.callback(keeper.close)

        def execute(place: str) -> tuple[Any, float]:
            begun_s = time.perf_counter()
            wanted = Abilities(pictures=True)
            with keepers[place].using(places[place], 600, wanted) as engine:
                (result,) = generate_all(engine, [request])
            return result, time.perf_counter() - begun_s

        for place in places:
            for _ in range(said.warm_up):
                execute(place)
        other = Other(said.device, said.side)
        kinds = ["idle", *said.disturb]
        for number in range(said.executions):
            kind = kinds[number % len(kinds)]
            order = list(places) if number % 2 else list(reversed(places))
            for place in order:
                with other.busy(kind):
                    result, node_s = execute(place)
                row = {
                    "execution": number,
                    "place": place,
                    "disturbed_by": kind,
                    "decode_tok_per_s": result.timings.decode_tok_per_s,
                    "ttft_s": result.timings.ttft_s,
                    "decode_s": result.timings.decode_s,
                    "node_s": node_s,
                    "num_new_tokens": result.num_new_tokens,
                    "itl_max_ms": max(result.itl_ms, default=None),
                    "turns_of_other": other.turns,
                }
                rows.append(row)
                print(*(f"{row[name]:.4g}" if isinstance(row[name], float) else row[name]
                        for name in COLUMNS), flush=True)  # fmt: skip
    return rows


def summary(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each place: all executions, and those of each disturbance."""
    found = []
    for place in dict.fromkeys(row["place"] for row in rows):
        for kind in ("all", *dict.fromkeys(row["disturbed_by"] for row in rows)):
            speeds = [
                row["decode_tok_per_s"]
                for row in rows
                if row["place"] == place and kind in ("all", row["disturbed_by"])
            ]
            found.append(
                {
                    "place": place,
                    "disturbed_by": kind,
                    "executions": len(speeds),
                    "decode_tok_per_s_median": statistics.median(speeds),
                    "decode_tok_per_s_min": min(speeds),
                    "decode_tok_per_s_max": max(speeds),
                    "run_ratio_max_min": max(speeds) / min(speeds),
                }
            )
    return found


def machine(device: str) -> dict[str, Any]:
    import torch

    on_gpu = device.startswith("cuda")
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else platform.processor(),
        "allocator": torch.cuda.get_allocator_backend() if on_gpu else None,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--model", default="qwen3-vl-4b")
    parser.add_argument("--load-format", default="auto", choices=("auto", "dummy"))
    parser.add_argument("--device", default="cuda", help="cuda or cpu")
    parser.add_argument("--executions", type=int, default=50, help="of each place")
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--picture", type=int, default=512, help="pixels of a side")
    parser.add_argument("--side", type=int, default=1024, help="of the other thread's matrices")
    parser.add_argument("--disturb", nargs="+", default=["gpu", "prompt"],
                        choices=("gpu", "prompt"))  # fmt: skip
    parser.add_argument("--warm-up", type=int, default=3)
    parser.add_argument("--allocator", choices=("native", "cudaMallocAsync"), default="native")
    parser.add_argument("--out", type=Path, required=True, help="a folder")
    said = parser.parse_args()
    if said.executions < 1 + len(said.disturb):
        parser.error("--executions: at least one for each disturbance, and one without")
    # Before torch is imported, as ComfyUI does it.
    os.environ["PYTORCH_CUDA_ALLOC_CONF"] = f"backend:{said.allocator}"
    said.out.mkdir(parents=True, exist_ok=True)
    rows = measure(said)
    with (said.out / "executions.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    found = summary(rows)
    about = {"command": sys.argv[1:], "machine": machine(said.device), "summary": found}
    (said.out / "summary.json").write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
    for each in found:
        print(*(f"{value:.3f}" if isinstance(value, float) else value for value in each.values()))


if __name__ == "__main__":
    main()
