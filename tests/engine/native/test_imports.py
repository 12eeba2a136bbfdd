from __future__ import annotations

import subprocess
import sys

PROGRAM = """
import sys
import qwencli.engine.native.engine
import qwencli.engine.frontend.device_patches
import qwencli.engine.frontend.videos
heavy = {"transformers", "torchvision", "torchaudio", "accelerate", "bitsandbytes", "flash_attn"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))
"""


def test_the_native_model_needs_torch_alone() -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.strip() == "[]"
