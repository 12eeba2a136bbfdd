"""The registry answers without the heavy libraries."""

from __future__ import annotations

import subprocess
import sys

HEAVY = ("torch", "transformers", "huggingface_hub", "pandas", "scipy", "rich")


def test_importing_the_registry_loads_nothing_heavy():
    code = (
        "import sys; import qwencli.models.listing, qwencli.models.resolve, qwencli.models.folder;"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
