from __future__ import annotations

import pytest
import torch

if not torch.cuda.is_available():
    pytest.exit("tests/gpu need a CUDA device", returncode=5)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Notes of libraries that only the GPU path meets: inductor's own imports, and bitsandbytes on
    # models as small as the tests'.
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore:TensorFloat32 tensor:UserWarning"))
        item.add_marker(pytest.mark.filterwarnings("ignore:.torch.jit.*:DeprecationWarning"))
        item.add_marker(pytest.mark.filterwarnings("ignore:inner dimension:UserWarning"))
