"""A load holds one copy of the weights in host memory, never two."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys, threading, time
from pathlib import Path
import torch
from qwencli.config import EngineName
from qwencli.engine.factory import create_engine
from tests.checkpoints import engine_config

def anonymous_bytes():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("RssAnon"):
            return int(line.split()[1]) * 1024

def engine(folder):
    return create_engine(engine_config(Path(folder), engine=EngineName(sys.argv[3])))

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

    large = {"hidden_size": 1024, "num_hidden_layers": 4, "intermediate_size": 4096}
    folder = write_checkpoint(tmp_path / "large", "qwen3", overrides=large)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, folder, checkpoint("qwen3"), engine],
        capture_output=True,
        text=True,
        check=True,
    )
    # float32 on the CPU from a bfloat16 file; a second copy would make this 1.5 or more.
    one_copy = 2 * (folder / "model.safetensors").stat().st_size
    assert int(done.stdout.split()[-1]) < 1.25 * one_copy
