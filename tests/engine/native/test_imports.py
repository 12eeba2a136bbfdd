from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

PROGRAM = """
import sys
import qwencli.engine.native.engine
import qwencli.engine.frontend.device_patches
import qwencli.engine.frontend.videos
heavy = {"transformers", "torchvision", "torchaudio", "accelerate", "bitsandbytes", "flash_attn"}
print(sorted(heavy & {name.partition(".")[0] for name in sys.modules}))

import torch
from qwencli.engine.kernels.launches import Gpu
from qwencli.engine.native.compile_kernels import without_dynamo
from qwencli.engine.native.kernel_plan import PlannedModel, plan_kernels
from qwencli.models.shape_reader import read_shape
from tests.engine.kernels.test_hybrid_step import CONFIG
with without_dynamo():
    assert plan_kernels(PlannedModel(read_shape(CONFIG), torch.bfloat16), Gpu((9, 0), 132))
print(sorted({"torch._dynamo", "sympy"} & set(sys.modules)))
torch.compile  # whoever wants it later gets it
import torch._dynamo
assert callable(torch._dynamo.reset)
"""


def test_what_takes_long_is_not_imported() -> None:
    """The native model needs torch alone, and its kernels are planned without torch's compiler."""
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert done.stdout.split() == ["[]", "[]"]


# What a caption of one picture on the CPU has no use for: each belongs to an option, to a GPU, to
# batches, or to other models.
OPTIONAL = {
    "qwencli.engine.cache.recurrent_state",
    "qwencli.engine.constrained",
    "qwencli.engine.layers.draft_head",
    "qwencli.engine.loading.weight_cache",
    "qwencli.engine.native.kernel_plan",
    "qwencli.engine.native.warmup",
    "qwencli.engine.scheduler",
    "qwencli.engine.spec_decode.mtp",
    "qwencli.engine.spec_decode.policy",
    "qwencli.engine.spec_decode.verify",
    "qwencli.models.quantized_cache",
    "qwencli.server.resident_engine",
}
CAPTION = f"""
import sys
from qwencli.cli import run
assert not run("caption examples/scene.png --device cpu --max-new-tokens 1".split())
print(sorted({OPTIONAL} & set(sys.modules)))
"""


def test_a_caption_on_the_cpu_imports_nothing_of_what_was_not_asked_for(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CAPTION],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env={**os.environ, "HOME": str(tmp_path), "XDG_STATE_HOME": str(tmp_path)},
    )
    assert done.stdout.splitlines()[-1:] == ["[]"], done.stderr
