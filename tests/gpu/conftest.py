from __future__ import annotations

import os

import pytest
import torch

# The kernels are compiled here.
os.environ.pop("TRITON_INTERPRET", None)

if not torch.cuda.is_available():
    pytest.exit("tests/gpu need a CUDA device", returncode=5)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Notes of libraries that only the GPU path meets: inductor's own imports and its first, empty
    # graph, and bitsandbytes on models as small as the tests'.
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:TensorFloat32 tensor:UserWarning"))
        item.add_marker(pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning"))
        item.add_marker(pytest.mark.filterwarnings("ignore:The CUDA Graph is empty:UserWarning"))
        item.add_marker(pytest.mark.filterwarnings("ignore:inner dimension:UserWarning"))
