from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.exit("tests/gpu need a CUDA device", returncode=5)
