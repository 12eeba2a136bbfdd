"""How this program starts further processes of itself."""

from __future__ import annotations

import sys
from pathlib import Path


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` with the same interpreter and import path as this process.

    `-P` keeps files of the working folder from shadowing modules, unless this process itself
    was started with the working folder on its path.
    """
    here = Path.cwd()
    on_path = any(Path(entry or ".").resolve() == here for entry in sys.path)
    return [sys.executable, *(() if on_path else ("-P",)), "-m", module, *arguments]
