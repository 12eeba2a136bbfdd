from __future__ import annotations

import pytest

from tests.models.tiny import write_model


@pytest.fixture
def model_folder(tmp_path):
    """A complete tiny Qwen3-VL folder."""
    return write_model(tmp_path / "model")
