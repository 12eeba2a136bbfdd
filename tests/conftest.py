from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# Machines that run the tests are shared: how long an example takes says nothing about the code.
# Those of `tests/gpu` do without hypothesis.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow]
    settings.register_profile("shared", deadline=None, suppress_health_check=slow)
    settings.load_profile("shared")

# Our kernels run on the CPU here, in Triton's interpreter; it looks once, when it is imported.
os.environ["TRITON_INTERPRET"] = "1"
# Of tests that run beside others: threads that wait for each other's turn take many times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_collection_finish() -> None:
    """Make Triton's interpreter about twice as fast, where tests have imported it.

    It prepares `triton.language` again at every call of a function inside a kernel, and follows
    each sum and product by two more in 64 bits to look for an overflow. The launch has prepared
    what our functions see; what Triton's own see (`core`) stays prepared once it has been.
    """
    interpreter = sys.modules.get("triton.runtime.interpreter")
    if interpreter is None:
        return
    interpreter.interpreter_builder.options = dataclasses.replace(
        interpreter.interpreter_builder.options, sanitize_overflow=False
    )

    core, prepared = interpreter.tl.core, set()

    def call(function: Any, *args: Any, **kwargs: Any) -> Any:
        names = function.fn.__globals__
        if id(names) not in prepared and any(value is core for value in names.values()):
            interpreter._patch_lang(function.fn)
            prepared.add(id(names))
        try:
            return function.rewrite()(*args, **kwargs)
        except Exception as error:
            raise interpreter.InterpreterError(repr(error)) from error

    interpreter.InterpretedFunction.__call__ = call


@pytest.fixture(autouse=True)
def no_user_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whoever runs the tests may have a config.toml of their own."""
    from qwencli.models import user_config

    folder = tmp_path / "user-config"
    monkeypatch.setattr(user_config, "user_config_folder", lambda: folder)


@pytest.fixture(autouse=True)
def no_user_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Tests leave nothing in the user's cache, and find nothing there."""
    from qwencli.models import quantized_cache

    folder = tmp_path / "user-cache"
    monkeypatch.setattr(quantized_cache, "cache_root", lambda: folder)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`checkpoint(family)` -> folder of a small random model, written once a session."""
    from tests.checkpoints import write_checkpoint

    made: dict[str, Path] = {}

    def get(family: str) -> Path:
        if family not in made:
            made[family] = write_checkpoint(tmp_path_factory.mktemp(family) / "model", family)
        return made[family]

    return get
