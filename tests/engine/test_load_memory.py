"""A load holds one copy of the weights in host memory, never two."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch
from qwencli.config import EngineName, Quantization
from qwencli.engine.factory import create_engine
from tests.checkpoints import engine_config

def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def engine(folder):
    mode = Quantization(sys.argv[4])
    config = engine_config(Path(folder), engine=EngineName(sys.argv[3]), quantization=mode)
    return create_engine(config)

from qwencli.engine.quant import quantized_tensor
quantized_tensor.ROWS_AT_A_TIME = 512  # a part of these matrices, as it is of a published model's
from qwencli.models import quantized_cache
quantized_cache.cache_root = lambda: Path(sys.argv[5])

# A load of another model first: libraries and pools take their own memory once.
engine(sys.argv[2]).load()
peak = before = anonymous_bytes()
running = True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
large = engine(sys.argv[1])
large.load()
running = False
watcher.join()
print(peak - before)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
@pytest.mark.parametrize("engine", ["native", "transformers"])
def test_peak_of_a_load_is_one_copy(tmp_path, checkpoint, engine):
    from tests.checkpoints import write_checkpoint

    large = {"hidden_size": 512, "num_hidden_layers": 6, "intermediate_size": 2048}
    folder = write_checkpoint(tmp_path / "large", "qwen3", overrides=large)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, checkpoint("qwen3"), engine, "none", tmp_path],
        capture_output=True,
        text=True,
        check=True,
    )
    # float32 on the CPU from a bfloat16 file; a second copy would make this 1.5 or more.
    one_copy = 2 * (folder / "model.safetensors").stat().st_size
    assert int(done.stdout.split()[-1]) < 1.25 * one_copy


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_load_that_quantizes_holds_one_matrix_beside_the_small_ones(tmp_path, checkpoint):
    from tests.checkpoints import write_checkpoint

    large = {"hidden_size": 512, "num_hidden_layers": 12, "intermediate_size": 2048}
    folder = write_checkpoint(tmp_path / "large", "qwen3", overrides=large)
    whole = 2 * (folder / "model.safetensors").stat().st_size
    command = [sys.executable, "-c", SCRIPT, folder, checkpoint("qwen3"), "native", "4bit"]
    # Large blocks of their own, or the C library's heap keeps holes that no tensor is in.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"}
    peaks = []
    for _ in ("quantizes and writes", "reads back"):
        done = subprocess.run(
            [*command, tmp_path], capture_output=True, text=True, check=True, env=environment
        )
        peaks.append(int(done.stdout))
    # The first holds a matrix of float32 and what quantizing some rows of it takes.
    assert peaks[0] < 0.4 * whole
    assert peaks[1] < 0.25 * whole
