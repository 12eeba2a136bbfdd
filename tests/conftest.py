from __future__ import annotations

import gc
import importlib.util
import itertools
import os
import shutil
import signal
import sys
import weakref
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from tests import interpreter

# Machines that run the tests are shared: how long an example takes says nothing about the code.
# Those of `tests/gpu` do without hypothesis.
if importlib.util.find_spec("hypothesis"):
    from hypothesis import HealthCheck, settings

    slow = [HealthCheck.too_slow]
    # CI judges a change, so it tries the same examples before and after; everywhere else each run
    # tries others.
    same = bool(os.environ.get("CI"))
    settings.register_profile("shared", deadline=None, suppress_health_check=slow, derandomize=same)
    settings.load_profile("shared")

# Our kernels run on the CPU here, in Triton's interpreter; it looks once, when it is imported.
os.environ["TRITON_INTERPRET"] = "1"
# No test leaves an engine behind; those of the resident one ask for it.
os.environ["QWENCLI_KEEP_LOADED"] = "0"
# Of tests that run beside others: threads that wait for each other's turn take many times as long.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")


# A shell has what it starts in the background ignore Ctrl-C, and so would programs of the tests.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# Those compile our modules once, not each of them again.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)


def _has_room(folder: Path) -> bool:
    """Whether it is there, is ours to write to, and has a few gigabytes."""
    return os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > 4 << 30


# Manifests and rows are on disk before a program goes on. Where others keep that disk busy, tests
# that write much take twice as long (31 s and 17 s for three files of them); memory is never busy.
IN_MEMORY = Path("/dev/shm")
if IN_MEMORY.is_dir() and _has_room(IN_MEMORY):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(IN_MEMORY))


# An engine that loads or closes collects what is garbage, among all objects of torch, transformers
# and pytest: up to a second each time. What there is when a module's tests begin, and after a test
# that has imported libraries, is left out, and stays so when an engine closes. What an engine
# freezes itself is frozen with `freezing` alone.
FREEZE, UNFREEZE = gc.freeze, gc.unfreeze
gc.freeze = gc.unfreeze = lambda: None
MANY_MODULES = 100

NUMBERS = itertools.count()
# Tests that are not collected unless their folder is named.
OUTSIDE = frozenset({"gpu", "reference_layout"})


def leave_out_what_there_is() -> int:
    """Returns how many modules are imported."""
    gc.collect()
    FREEZE()
    return len(sys.modules)


@pytest.fixture(autouse=True, scope="module")
def num_modules() -> list[int]:
    """How many were imported when what there was last was left out."""
    return [leave_out_what_there_is()]


@pytest.fixture(autouse=True)
def libraries_are_no_garbage(num_modules: list[int]) -> None:
    if len(sys.modules) > num_modules[0] + MANY_MODULES:
        num_modules[0] = leave_out_what_there_is()


@pytest.fixture
def freezing(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`gc` as it is outside of tests, where no engine is loaded yet."""
    monkeypatch.setattr("qwencli.engine.machine.python_runtime._frozen_for", weakref.WeakSet())
    monkeypatch.setattr(gc, "freeze", FREEZE)
    monkeypatch.setattr(gc, "unfreeze", UNFREEZE)
    yield
    leave_out_what_there_is()


@pytest.hookimpl(wrapper=True)
def pytest_collection(session: pytest.Session) -> Generator[None, object, object]:
    """Without a look for garbage: what is imported and collected stays, and would be looked through
    again and again."""
    gc.disable()
    try:
        import_from_the_other_end(session)
        return (yield)
    finally:
        gc.enable()


def import_from_the_other_end(session: pytest.Session) -> None:
    """Two workers import the same modules, and compile those that nobody has compiled: the second
    begins with the last, and each finds compiled what the other has come to first."""
    if os.environ.get("PYTEST_XDIST_WORKER") != "gw1":
        return
    named = [Path(each.partition("::")[0]).absolute() for each in session.config.args]
    files = [file for path in named for file in (path.rglob("test_*.py") if path.is_dir() else [])]
    root = Path(__file__).parents[1]
    for file in sorted(set(files), reverse=True):
        parts = file.with_suffix("").relative_to(root).parts
        if not OUTSIDE.intersection(parts):
            # What is wrong with a module, or has it skipped, is said when it is collected.
            with suppress(Exception, pytest.skip.Exception):
                importlib.import_module(".".join(parts))


def pytest_collection_finish() -> None:
    interpreter.speed_up()


def pytest_sessionfinish() -> None:
    UNFREEZE()  # or libraries take what is left at the end for leaks


@pytest.fixture
def own_folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`tmp_path` of tests that use it; of the thousands of others a folder that is not made."""
    if "tmp_path" in request.fixturenames:
        found: Path = request.getfixturevalue("tmp_path")
        return found
    return tmp_path_factory.getbasetemp() / f"of-test-{next(NUMBERS)}"


@pytest.fixture(autouse=True)
def no_user_config(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    """Whoever runs the tests may have a config.toml of their own."""
    from qwencli.models import user_config

    folder = own_folder / "user-config"
    monkeypatch.setattr(user_config, "user_config_folder", lambda: folder)


@pytest.fixture(autouse=True)
def no_user_cache(monkeypatch: pytest.MonkeyPatch, own_folder: Path) -> None:
    """Tests leave nothing in the user's cache, and find nothing there."""
    from qwencli.models import quantized_cache

    folder = own_folder / "user-cache"
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
