"""llama.cpp's own benchmark, `llama-bench`: decoding alone, without a prompt or a picture.

python benchmarks/side_by_side/llama_bench.py --gguf model.gguf --name qwen3-vl-4b \\
    --quantization q8_0 --out campaigns/llama
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.side_by_side.foreign import Run, main, measure, options, work_of
from qwencli.errors import BenchError, MissingDependencyError


def script(arguments: Sequence[str]) -> None:
    parser = options(__doc__ or "", image=False)
    parser.add_argument("--gguf", type=Path, required=True)
    parser.add_argument("--program", default="llama-bench")
    said = parser.parse_args(arguments)
    program = shutil.which(said.program)
    if program is None:
        raise MissingDependencyError(
            f"{said.program} is not installed", "build llama.cpp, or give its path as --program"
        )
    if not said.gguf.is_file():
        raise BenchError(f"{said.gguf}: no such file", "check --gguf")
    command = [
        program, "-m", str(said.gguf), "-p", "0", "-n", str(said.max_new_tokens),
        "-r", str(said.runs), "-fa", "1", "-o", "json",
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise BenchError(f"{said.program} ended with {done.returncode}: {last}")
    measure(said.out, work_of("llama.cpp", said), lambda: read_runs(done.stdout))


def read_runs(text: str) -> Iterator[Run]:
    """From `llama-bench -o json`. It warms up by itself and does not report that run, so the
    warm-up here has no figures.

    Raises:
        BenchError: there is no generation test in it.
    """
    try:
        tests: list[dict[str, Any]] = json.loads(text)
        found = [test for test in tests if test["n_gen"] and not test["n_prompt"]]
        test = found[0]
        samples = [int(ns) for ns in test["samples_ns"]]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise BenchError(
            f"llama-bench gave another answer than expected: {type(error).__name__}: {error}",
            "run it by hand with -o json",
        ) from error
    tokens = int(test["n_gen"])
    yield Run(num_new_tokens=tokens)
    for ns in samples:
        # Its time covers every token, ours the gaps between them.
        yield Run(num_new_tokens=tokens, decode_s=ns / 1e9 * (tokens - 1) / tokens)


if __name__ == "__main__":
    raise SystemExit(main(script))
