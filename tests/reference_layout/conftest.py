"""A published model's own files (config.json, tokenizer, chat template, processor; no weights) with
random weights of true width, through both engines, in about 8 GB of memory:

    QWENCLI_REFERENCE_LAYOUT=FOLDER python -m pytest tests/reference_layout
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

VARIABLE = "QWENCLI_REFERENCE_LAYOUT"

if not (Path(os.environ.get(VARIABLE, "")) / "config.json").is_file():
    pytest.exit(f"set {VARIABLE} to a folder with a published model's small files", returncode=5)


@pytest.fixture(scope="session")
def published() -> Path:
    """config.json, tokenizer, chat template and processor files of a published model."""
    return Path(os.environ[VARIABLE])
