"""A load holds one copy of the weights in host memory, never two."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

SCRIPT = """
import gc, sys, threading, time
from pathlib import Path
import torch
from qwencli.config import EngineName, Quantization
from qwencli.engine.factory import create_engine
from tests.checkpoints import engine_config

def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def engine(folder, name):
    mode = Quantization(sys.argv[3])
    config = engine_config(Path(folder), engine=EngineName(name), quantization=mode)
    return create_engine(config)

from qwencli.engine.quant import quantized_tensor
quantized_tensor.ROWS_AT_A_TIME = 256  # a part of these matrices, as it is of a published model's
from qwencli.models import quantized_cache
quantized_cache.cache_root = lambda: Path(sys.argv[4])

def watch():
    global peak
    while running:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.001)

loaded = set()
for name in sys.argv[5:]:
    # A load of another model first: libraries and pools take their own memory once.
    if name not in loaded:
        engine(sys.argv[2], name).load()
    loaded.add(name)
    gc.collect()
    peak = before = anonymous_bytes()
    running = True
    watcher = threading.Thread(target=watch)
    watcher.start()
    large = engine(sys.argv[1], name)
    large.load()
    running = False
    watcher.join()
    print(peak - before)
    large.close()
    del large
"""


def peaks_of(tmp_path, checkpoint, layers, mode, *engines):
    """Bytes of one copy in float32, and bytes that each engine's load took, one after the other."""
    from tests.checkpoints import write_checkpoint

    large = {"hidden_size": 512, "num_hidden_layers": layers, "intermediate_size": 2048}
    folder = write_checkpoint(tmp_path / "large", "qwen3", overrides=large)
    # Large blocks of their own, or the C library's heap keeps holes that no tensor is in.
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, checkpoint("qwen3"), mode, tmp_path, *engines],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000"},
    )
    whole = 2 * (folder / "model.safetensors").stat().st_size  # the file is in bfloat16
    return whole, [int(line) for line in done.stdout.split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_of_a_load_is_one_copy(tmp_path, checkpoint):
    whole, peaks = peaks_of(tmp_path, checkpoint, 6, "none", "native", "transformers")
    # A second copy would make this 1.5 or more; less than one, and the other model was still there.
    assert [peak / whole for peak in peaks] == [pytest.approx(1.05, abs=0.2)] * 2


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_a_load_that_quantizes_holds_one_matrix_beside_the_small_ones(tmp_path, checkpoint):
    whole, (writes, reads) = peaks_of(tmp_path, checkpoint, 8, "4bit", "native", "native")
    # The first quantizes and keeps what it made: it holds a matrix of float32 and what quantizing
    # some rows of it takes. The second reads that back.
    assert writes < 0.4 * whole
    assert reads < 0.25 * whole
