"""Packages that a mode needs and an installation may lack or have broken."""

from __future__ import annotations

import importlib
import importlib.util

from qwencli.errors import MissingDependencyError


def require(module: str, needed_by: str, install: str, instead: str) -> None:
    """Raise MissingDependencyError unless `module` imports.

    Args:
        needed_by: the option that needs it, as the user wrote it.
        install: what puts it right. instead: what works without it.
    """
    if importlib.util.find_spec(module) is None:
        raise MissingDependencyError(
            f"{needed_by}: the package {module.replace('_', '-')} is not installed",
            f"{install}, or {instead}",
        )
    try:
        importlib.import_module(module)
    except (ImportError, OSError, RuntimeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise MissingDependencyError(
            f"{needed_by}: {module.replace('_', '-')} does not load: {reason}",
            f"reinstall it for this torch build ({install}), or {instead}",
        ) from error
