from __future__ import annotations

import threading
import time
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from qwencli.comfyui import comfy_host
from qwencli.comfyui.engine_keeper import EngineKeeper, EngineKey, StoppableEngine
from qwencli.comfyui.schemas import RunsWhere
from qwencli.config import EngineConfig, ModelSource, ModelSpec
from qwencli.engine.abilities import Abilities
from qwencli.engine.protocol import stream_alone
from qwencli.errors import (
    EngineError,
    InputError,
    OutOfMemoryError,
    OutputError,
    UnsupportedModeError,
)
from qwencli.messages import GenerationRequest
from qwencli.server import resident
from tests.comfyui.comfy_stub import InterruptProcessingException, Management
from tests.dataset.fake_engine import FakeEngine

TEXT = Abilities()


class Made:
    """Makes engines, and tells what became of them."""

    def __init__(self, management: Management) -> None:
        self.management = management
        self.trimmed = self.batch_bytes = 0
        self.loaded: list[str] = []
        self.closed: list[str] = []
        self.refuse: Callable[[], None] = lambda: None
        self.keeper = EngineKeeper(self._create)

    def _create(self, wanted: EngineKey, keep_s: float, abilities: Abilities) -> Any:
        made = self

        class Engine(FakeEngine):
            def load(self) -> None:
                made.refuse()
                made.loaded.append(wanted.config.model.name)

            def drop_queue(self) -> None:
                made.trimmed += 1
                management = made.management
                management.free_bytes += made.batch_bytes

            def close(self) -> None:
                made.closed.append(wanted.config.model.name)

        return Engine(wanted.config)


def wanted(name: str = "a", runs: RunsWhere = RunsWhere.IN_PROCESS) -> EngineKey:
    return EngineKey(EngineConfig(ModelSpec(name, ModelSource.BUILTIN)), runs)


@pytest.fixture
def made(management: Management) -> Made:
    return Made(management)


def use(made: Made, name: str = "a", keep_s: float = 60) -> None:
    with made.keeper.using(wanted(name), keep_s, TEXT):
        pass


def test_it_is_kept_and_swapped(made: Made) -> None:
    use(made)
    use(made)
    assert (made.loaded, made.closed) == (["a"], [])
    use(made, "b")
    assert (made.loaded, made.closed) == (["a", "b"], ["a"])
    made.keeper.close()
    assert made.closed == ["a", "b"] and not made.keeper.is_loaded


def test_what_is_refused_without_a_load_leaves_what_is_loaded(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    use(made)

    def refuse(*_: Any) -> Any:
        raise UnsupportedModeError("b reads text only")

    monkeypatch.setattr(made.keeper, "_create", refuse)
    with pytest.raises(UnsupportedModeError):
        use(made, "b")
    use(made)
    assert (made.loaded, made.closed) == (["a"], [])


def test_what_is_loaded_is_asked_what_it_can(made: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    use(made)
    monkeypatch.setattr(FakeEngine, "model_type", "qwen3")
    with (
        pytest.raises(UnsupportedModeError, match="a reads text only"),
        made.keeper.using(wanted(), 60, Abilities(pictures=True)),
    ):
        pytest.fail("it is asked")
    use(made)
    assert (made.loaded, made.closed) == (["a"], [])


def test_a_node_that_keeps_nothing_leaves_nothing(made: Made) -> None:
    use(made, keep_s=0)
    assert made.closed == ["a"]


def test_it_goes_when_it_is_idle(made: Made) -> None:
    use(made, keep_s=0.05)
    until_s = time.monotonic() + 60
    while made.keeper.is_loaded and time.monotonic() < until_s:
        time.sleep(0.01)
    assert made.closed == ["a"]
    use(made, keep_s=0.5)
    with made.keeper.using(wanted(), 60, TEXT):
        time.sleep(0.7)  # that of the use before does not end this one
    assert made.keeper.is_loaded and made.loaded == ["a", "a"]


def test_comfyui_gets_the_memory_when_it_wants_it(made: Made, management: Management) -> None:
    use(made)
    hooked = management.free_memory
    management.free_memory(2**30, "cpu")
    assert made.closed == []  # there is room
    management.free_memory(2**40, "cuda:0")
    assert made.closed == []  # not ours
    management.free_memory(2**40, "cpu", keep_loaded=[])
    assert made.closed == ["a"]
    use(made)
    assert management.free_memory is hooked  # wrapped once
    management.unload_all_models()
    assert made.closed == ["a", "a"]
    use(made)
    # Newer versions name no device where they want memory of all.
    management.free_memory(2**40, None, for_dynamic=True)
    assert made.closed == ["a"] * 3
    management.unload_all_models()  # nothing is there
    with made.keeper.using(wanted(), 60, TEXT):
        management.unload_all_models()
        thread = threading.Thread(target=management.unload_all_models)
        thread.start()
        thread.join(5)
        assert not thread.is_alive() and made.keeper.is_loaded
    made.keeper.close()


def test_a_resident_process_that_does_not_end_is_no_fault_of_comfyuis_model(
    made: Made, management: Management, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop() -> None:
        raise OutputError("process 7 does not end")

    monkeypatch.setattr(resident, "status", lambda: SimpleNamespace(running=0))
    monkeypatch.setattr(resident, "stop", stop)
    with made.keeper.using(wanted(runs=RunsWhere.RESIDENT), 60, TEXT):
        pass
    assert management.free_memory(2**40, "cpu") == []
    assert made.closed == ["a"] and not made.keeper.is_loaded


def test_batches_go_before_the_model(made: Made, management: Management) -> None:
    use(made)
    made.batch_bytes = 2**33
    management.free_memory(2**33 + 1, "cpu")
    assert (made.trimmed, made.closed) == (1, [])
    made.batch_bytes = 0
    management.free_memory(2**40, "cpu")
    assert (made.trimmed, made.closed) == (2, ["a"])


def test_out_of_memory_while_loading_asks_comfyui_once(made: Made, management: Management) -> None:
    def refuse() -> None:
        if not management.unloaded:
            raise OutOfMemoryError("out of memory", "use 4bit")

    made.refuse = refuse
    use(made)
    assert management.unloaded == 1 and made.loaded == ["a"]
    made.keeper.close()

    def always() -> None:
        raise OutOfMemoryError("out of memory", "use 4bit")

    made.refuse = always
    with pytest.raises(OutOfMemoryError):
        use(made)
    assert management.unloaded == 2 and not made.keeper.is_loaded


def test_what_nobody_foresaw_takes_the_engine_along(made: Made) -> None:
    for known in (InputError("a wrong picture"), InterruptProcessingException()):
        with pytest.raises(type(known)), made.keeper.using(wanted(), 60, TEXT):
            raise known
        assert made.closed == []
    with pytest.raises(RuntimeError), made.keeper.using(wanted(), 60, TEXT):
        raise RuntimeError("the device is lost")
    assert made.closed == ["a"]


def test_one_node_after_the_other_has_it(made: Made) -> None:
    inside, order = threading.Event(), []

    def second() -> None:
        inside.wait(5)
        with made.keeper.using(wanted("b"), 60, TEXT):
            order.append("second")

    thread = threading.Thread(target=second)
    thread.start()
    with made.keeper.using(wanted(), 60, TEXT):
        inside.set()
        time.sleep(0.05)
        order.append("first")
    thread.join(5)
    assert order == ["first", "second"] and made.closed == ["a"]
    with made.keeper.using(wanted("b"), 60, TEXT), pytest.raises(EngineError):
        use(made, "b")
    made.keeper.close()


class Silent:
    """Requests to a process that never answers: each step waits a little, and gives nothing."""

    max_rows, has_unfinished = 1, True

    def __init__(self) -> None:
        self.closed = False

    def add(self, request: Any, *, stream: bool = True) -> int:
        return 0

    def step(self) -> list[Any]:
        return []

    def close(self) -> None:
        self.closed = True


def test_a_stop_is_heard_while_another_process_says_nothing() -> None:
    silent, polls = Silent(), 0

    class Engine(FakeEngine):
        def stream(self, request: Any) -> Any:
            return stream_alone(silent, request)  # type: ignore[arg-type]

    def check() -> None:
        nonlocal polls
        polls += 1
        if polls == 5:
            raise InterruptProcessingException

    engine = StoppableEngine(Engine(), check)  # type: ignore[arg-type]
    with pytest.raises(InterruptProcessingException):
        engine.generate(GenerationRequest(()))
    assert silent.closed


def test_outside_of_comfyui_nothing_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(comfy_host, "_management", lambda: None)
    comfy_host.check_interrupted()
    comfy_host.free_models()
    comfy_host.when_memory_is_wanted(lambda device: None)
    assert comfy_host.model_bytes() is None
    assert not comfy_host.is_interruption(RuntimeError())
