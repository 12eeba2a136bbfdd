"""A load holds one copy of the weights in host memory, never two."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch, transformers
from qwencli.config import EngineConfig, ModelSpec, ModelSource
from qwencli.engine.reference.engine import TransformersEngine
from tests.checkpoints import engine_config

def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

# A load of another model first: libraries and pools take their own memory once.
TransformersEngine(engine_config(Path(sys.argv[2]))).load()
peak = before = anonymous_bytes()
running = True

def watch():
    global peak
    while running:
        peak = max(peak, anonymous_bytes())
        time.sleep(0.001)

watcher = threading.Thread(target=watch)
watcher.start()
engine = TransformersEngine(engine_config(Path(sys.argv[1])))
engine.load()
running = False
watcher.join()
weights = sum(p.numel() * p.element_size() for p in engine._model.parameters())
print((peak - before) / weights)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc/self/status")
def test_peak_of_a_load_is_one_copy(tmp_path, checkpoint):
    from tests.checkpoints import write_checkpoint

    large = {"hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 4096}
    folder = write_checkpoint(tmp_path / "large", "qwen3", overrides=large)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, checkpoint("qwen3")],
        capture_output=True,
        text=True,
        check=True,
    )
    # float32 on the CPU from a bfloat16 file; a second copy would make this 1.5 or more.
    assert float(done.stdout.split()[-1]) < 1.25
