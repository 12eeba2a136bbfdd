"""What compiled kernels need, found out without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

from tests.engine.native.test_ready_made import TEXT

# Heads as large as published models have, six queries a key.
WIDE = TEXT | {
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 1,
    "num_attention_heads": 12,
    "head_dim": 128,
}
MOST_SPILLED = 1024


def test_no_kernel_keeps_kilobytes_in_memory_that_belong_in_registers(tmp_path: Path) -> None:
    """Attention in float32 once kept five, and with heads of 128 gave wrong results on a GPU."""
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.engine.kernels.compile_steps", json.dumps(WIDE)]
    root = Path(__file__).parents[3]
    ran = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    found = [json.loads(line) for line in ran.stdout.splitlines()]
    assert {"decode_attention_kernel", "gemv_kernel", "gemm_kernel", "accept_kernel"} <= {
        kernel["kernel"] for kernel in found
    }
    assert [kernel for kernel in found if kernel["spilled"] > MOST_SPILLED] == []
