"""vLLM's own benchmark, `vllm bench latency`, for one token and for many: what they differ by is
decoding.

python benchmarks/side_by_side/vllm_latency.py --model Qwen/Qwen3-VL-4B-Instruct \\
    --name qwen3-vl-4b --out campaigns/vllm [--load-format dummy]
"""

from __future__ import annotations

import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.side_by_side.foreign import Run, main, measure, options, work_of
from qwencli.errors import BenchError, MissingDependencyError


def script(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "", image=False)
    parser.add_argument("--model", required=True)
    parser.add_argument("--input-len", type=int, default=512)
    parser.add_argument("--load-format", choices=("auto", "dummy"), default="auto")
    said = parser.parse_args(arguments)
    program = shutil.which("vllm")
    if program is None:
        raise MissingDependencyError("vllm is not installed", "pip install vllm")

    def latencies(tokens: int) -> list[float]:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "latency.json"
            command = [
                program, "bench", "latency", "--model", said.model, "--batch-size", "1",
                "--input-len", str(said.input_len), "--output-len", str(tokens),
                "--num-iters-warmup", "3", "--num-iters", str(said.runs),
                "--load-format", said.load_format, "--output-json", str(file),
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode or not file.is_file():
                last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
                raise BenchError(f"vllm bench ended with {done.returncode}: {last}")
            return read_latencies(file.read_text(encoding="utf-8"))

    one, many = latencies(1), latencies(said.max_new_tokens)
    work = work_of("vllm", said, load_format=said.load_format)
    measure(said.out, work, lambda: runs_of(one, many, said.input_len, said.max_new_tokens))


def read_latencies(text: str) -> list[float]:
    """Seconds of each iteration, from the file that --output-json writes.

    Raises:
        BenchError: it holds something else.
    """
    try:
        found = [float(value) for value in json.loads(text)["latencies"]]
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(
            f"vllm bench gave another answer than expected: {type(error).__name__}: {error}",
            "run it by hand with --output-json",
        ) from error
    if not found:
        raise BenchError("vllm bench reports no iteration", "raise --runs")
    return found


def runs_of(
    one: Sequence[float], many: Sequence[float], prompt_tokens: int, new_tokens: int
) -> Iterator[Run]:
    """Its warm-up is not reported: ours has no figures. Prefill is the median of `one`."""
    ttft_s = statistics.median(one)
    yield Run(num_new_tokens=new_tokens, num_prompt_tokens=prompt_tokens)
    for whole in many:
        yield Run(new_tokens, prompt_tokens, ttft_s=ttft_s, decode_s=whole - ttft_s)


if __name__ == "__main__":
    raise SystemExit(main(script))
