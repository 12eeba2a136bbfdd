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
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.config import EngineConfig
from qwencli.engine import kernels
from qwencli.engine.machine.python_runtime import (
    block_of,
    gc_freeze_loaded,
    gc_paused,
    gc_thawed,
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
        with gc_freeze_loaded(before):
            kept, dropped = Circle(), weakref.ref(Circle())
    finally:
        gc.callbacks.remove(watch)
    assert dropped() is None
    assert seen
    assert max(seen) < 2000, "libraries have a hundred times as many"
    assert not any(each in (before, kept) for each in gc.get_objects())
    with gc_thawed(before):
        assert gc.get_freeze_count() == 0
    assert gc.get_freeze_count() == 0


@pytest.mark.usefixtures("freezing")
def test_a_load_that_fails_takes_nothing_out() -> None:
    before = Circle()
    with pytest.raises(ValueError, match="no model"), gc_freeze_loaded(before):
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
        with pytest.raises(KeyboardInterrupt), gc_freeze_loaded(Circle()):
            pass
    assert gc.get_freeze_count() == 0


class Collector:
    """Python's collector, of objects that are named and not let go of by counting references."""

    def __init__(self) -> None:
        self.objects, self.garbage, self.frozen = {"libraries"}, set[str](), set[str]()

    def freeze(self) -> None:
        self.frozen = self.objects.copy()

    def unfreeze(self) -> None:
        self.frozen = set()

    def collect(self) -> None:
        self.objects -= self.garbage - self.frozen


class Load:
    """An engine that makes a model; one whose load fails, and one that is closed, drops it."""

    def __init__(self, name: str, collector: Collector, fails: bool) -> None:
        self.name, self._gc, self.fails = name, collector, fails
        self.is_loading = self.is_loaded = False

    def begin(self) -> None:
        self._block = gc_freeze_loaded(self)
        self._block.__enter__()
        self.is_loading = True
        self._gc.objects.add(self.name)

    def end(self) -> None:
        self.is_loading, self.is_loaded = False, not self.fails
        if self.fails:
            self._gc.garbage.add(self.name)
            self._block.__exit__(ValueError, ValueError("no model"), None)
        else:
            self._block.__exit__(None, None, None)

    def close(self) -> None:
        if self.is_loaded:
            self.is_loaded = False
            self._gc.garbage.add(self.name)
            with gc_thawed(self):
                self._gc.collect()
            assert self.name not in self._gc.objects, "it may be large"


@given(order=st.permutations([*range(4)] * 3), fails=st.sets(st.integers(0, 3)))
def test_engines_load_and_end_in_any_order(order: list[int], fails: set[int]) -> None:
    """Each begins to load, ends that (or fails), and is closed."""
    collector = Collector()
    loads = [Load(str(number), collector, number in fails) for number in range(4)]
    steps = [iter((each.begin, each.end, each.close)) for each in loads]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qwencli.engine.machine.python_runtime.gc", collector)
        patch.setattr("qwencli.engine.machine.python_runtime._frozen_for", weakref.WeakSet())
        for number in order:
            before = collector.frozen
            next(steps[number])()
            if any(each.is_loading for each in loads):
                continue  # the last of them settles what is frozen
            loaded = {each.name for each in loads if each.is_loaded}
            if not loaded:
                assert not collector.frozen
            elif number in fails:
                assert before <= collector.frozen, "what others have frozen stays so"
            else:
                assert {"libraries", *loaded} <= collector.frozen
            collector.collect()
            assert not collector.objects & collector.garbage, "of a load that failed"
    assert collector.objects == {"libraries"} and not collector.frozen


def orders(count: int) -> st.SearchStrategy[list[int]]:
    """Blocks 0 to count - 1 by number: first where one begins, then where it ends."""
    return st.permutations([*range(count)] * 2)


@given(order=orders(4))
def test_blocks_that_pause_collections_end_in_any_order(order: list[int]) -> None:
    blocks: dict[int, Any] = {}
    for number in order:
        if number in blocks:
            blocks.pop(number).__exit__(None, None, None)
        else:
            blocks[number] = gc_paused()
            blocks[number].__enter__()
        assert gc.isenabled() is (not blocks)


@given(order=orders(3), turns_s=st.lists(st.sampled_from([0.001, 0.0005, 0.0002]), min_size=3))
def test_the_quickest_turns_are_those_of_all(order: list[int], turns_s: list[float]) -> None:
    before = sys.getswitchinterval()
    blocks: dict[int, Any] = {}
    for number in order:
        if number in blocks:
            blocks.pop(number).__exit__(None, None, None)
        else:
            blocks[number] = undisturbed(turns_s[number])
            blocks[number].__enter__()
        quickest = min([before, *(turns_s[each] for each in blocks)])
        assert sys.getswitchinterval() == pytest.approx(quickest, rel=0.02)


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
