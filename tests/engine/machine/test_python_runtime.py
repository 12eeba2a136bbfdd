"""What Python does while the engine works."""

from __future__ import annotations

import ast
import gc
import importlib.util
import inspect
import pkgutil
import sys
import threading
import weakref
from pathlib import Path

import pytest

from qwencli.config import EngineConfig
from qwencli.engine import kernels
from qwencli.engine.machine.python_runtime import (
    block_of,
    gc_freeze_loaded,
    quick_function_sources,
    undisturbed,
)
from qwencli.engine.native.engine import NativeEngine
from qwencli.models.resolve import resolve_model


class Circle:
    def __init__(self) -> None:
        self.itself = self


@pytest.mark.usefixtures("freezing")
def test_what_a_load_leaves_is_collected_and_what_was_there_is_not_looked_through() -> None:
    gc.unfreeze()
    seen: list[int] = []

    def watch(phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            seen.append(len(gc.get_objects()))

    before = Circle()
    gc.callbacks.append(watch)
    try:
        with gc_freeze_loaded():
            kept, dropped = Circle(), weakref.ref(Circle())
    finally:
        gc.callbacks.remove(watch)
    assert dropped() is None
    assert seen
    assert max(seen) < 2000, "libraries have a hundred times as many"
    assert not any(each in (before, kept) for each in gc.get_objects())


@pytest.mark.usefixtures("freezing")
def test_a_load_that_fails_takes_nothing_out() -> None:
    before = Circle()
    with pytest.raises(ValueError, match="no model"), gc_freeze_loaded():
        raise ValueError("no model")
    assert any(each is before for each in gc.get_objects())
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("freezing")
def test_a_load_that_is_interrupted_at_its_end_takes_nothing_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def interrupted() -> int:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(gc, "collect", interrupted)
        with pytest.raises(KeyboardInterrupt), gc_freeze_loaded():
            pass
    assert gc.get_freeze_count() == 0


def test_turns_at_the_interpreter_lock_are_as_before_in_whatever_order_blocks_end() -> None:
    before = sys.getswitchinterval()
    first, second = undisturbed(0.001), undisturbed(0.0005)
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert sys.getswitchinterval() == pytest.approx(0.0005, rel=0.01)
    second.__exit__(None, None, None)
    assert sys.getswitchinterval() == before


def test_turns_inside_others_are_the_quicker_ones() -> None:
    with undisturbed(0.0005):
        with undisturbed(0.001):
            assert sys.getswitchinterval() == pytest.approx(0.0005, rel=0.01)
        with undisturbed(0.0001):
            assert sys.getswitchinterval() == pytest.approx(0.0001, rel=0.02)
        assert sys.getswitchinterval() == pytest.approx(0.0005, rel=0.01)


PLAIN = inspect.getblock


def functions_in(path: Path) -> list[list[str]]:
    """The lines from each function of a file on."""
    source = path.read_text(encoding="utf-8")
    lines = source.splitlines(keepends=True)
    found = [each for each in ast.walk(ast.parse(source)) if isinstance(each, ast.FunctionDef)]
    starts = [min([each.lineno, *(d.lineno for d in each.decorator_list)]) for each in found]
    return [lines[start - 1 :] for start in starts]


def files() -> list[Path]:
    own = sorted(Path(kernels.__path__[0]).glob("*.py"))
    triton = importlib.util.find_spec("triton")
    if triton is None or triton.submodule_search_locations is None:
        return own
    language = Path(triton.submodule_search_locations[0]) / "language"
    return [*own, *sorted(language.glob("*.py"))]


def test_every_function_of_our_kernels_and_of_tritons_language_is_found_as_inspect_finds_it() -> (
    None
):
    checked = 0
    for path in files():
        for lines in functions_in(path):
            assert block_of(lines) == PLAIN(lines), f"{path}: {lines[0]}"
            checked += 1
    assert checked > 200


def test_kernels_need_no_tokens() -> None:
    """Else importing them takes as long as before."""
    names = [each.name for each in pkgutil.iter_modules(kernels.__path__)]
    slow = []

    def tokens(lines: list[str]) -> list[str]:
        slow.append(lines[0])
        return PLAIN(lines)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwencli.engine.machine.python_runtime._in_tokens", tokens)
        for name in names:
            for lines in functions_in(Path(kernels.__path__[0]) / f"{name}.py"):
                if lines[0].strip().startswith("@triton.jit"):
                    block_of(lines)
    assert slow == []


@pytest.mark.parametrize(
    "source",
    [
        "def f(x): return x\n",
        "def f(x): return x\n    # deeper\ny = 1\n",
        "def f(\na, b\n):\n    return a\nx = 1\n",
        "def f(\n    a,\n):\n    return a\n\n\n@g\ndef h(): pass\n",
        'def f():\n    """Text\nat the margin\n"""\n    return 1\nx = 1\n',
        "def f():\n    '''Text\nat the margin\n'''\n    return 1\nx = 1\n",
        "def f():\n    a = 1 + \\\n2\n    return a\nx = 1\n",
        "def f():\n    a = [\n1,\n]\n    return a\nx = 1\n",
        "def f():\n    return ')'\n\nx = (1)\n",
        "def f():\n    return 1\n    # of the body\n# of nobody\nx = 1\n",
        "def f():\n    return 1\n  # between\nx = 1\n",
        "def f():\n    if x:\n        return 1\n    # of the body\n\nx = 1\n",
        "def f():\n    a = 1\n# at the margin\n    return a\nx = 1\n",
        "@g\n@h(1)\ndef f():\n    return 1\n\nx = 1\n",
        "@h(\n    1,\n)\ndef f():\n    return 1\n\nx = 1\n",
        "    def f(self):\n        return 1\n\n    def g(self):\n        return 2\n",
        "    def f(self):\n        return 1\n\nx = 1\n",
        "class A:\n    def f(self):\n        return 1\n\nx = 1\n",
        "f = lambda x: (\n    x\n)\ny = 1\n",
        "async def f():\n    return 1\nx = 1\n",
        "@g\nasync def f():\n    return 1\n\ndef h():\n    return 2\n",
        "@g\nclass A:\n    x = 1\n\ndef h():\n    return 2\n",
        "def f():\n    return 1",
        "def f():\n\treturn 1\n\n\nx = 1\n",
    ],
)
def test_unusual_functions_are_found_as_inspect_finds_them(source: str) -> None:
    lines = source.splitlines(keepends=True)
    assert block_of(lines) == PLAIN(lines)


def test_inspect_is_as_it_was_when_the_last_block_is_over() -> None:
    entered, leave = threading.Event(), threading.Event()

    def other() -> None:
        with quick_function_sources():
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with quick_function_sources():
        thread.start()
        assert entered.wait(10)
        assert inspect.getsource(files).startswith("def files(")
    assert inspect.getblock is block_of
    leave.set()
    thread.join()
    assert inspect.getblock is PLAIN


def test_a_load_finds_sources_so(monkeypatch: pytest.MonkeyPatch) -> None:
    used = []
    monkeypatch.setattr(
        NativeEngine, "_load_all", lambda engine, files: used.append(inspect.getblock)
    )
    NativeEngine(EngineConfig(resolve_model("scenes")))._load(None)  # type: ignore[arg-type]
    assert used == [block_of]
