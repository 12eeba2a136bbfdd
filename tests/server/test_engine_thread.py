"""An engine that fails, and one that is closed: requests are told, others go on."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from qwencli.engine.request import StepOutput
from qwencli.errors import EngineError, LoadStoppedError, ModelFileError
from qwencli.messages import GenerationRequest, text_message
from qwencli.results import GenerationChunk
from qwencli.server import engine_thread
from qwencli.server.answers import Answer, ClientGoneError
from qwencli.server.engine_thread import EngineThread
from tests.dataset.fake_engine import FakeEngine
from tests.server.conftest import serving


class FailingEngine(FakeEngine):
    """Fails while `faults` are left, each time in another way."""

    faults: list[Exception]

    def step(self) -> list[StepOutput]:
        if self.faults:
            raise self.faults.pop()
        return super().step()


def chat(client: httpx.Client, text: str = "Hi") -> httpx.Response:
    body = {"messages": [{"role": "user", "content": text}]}
    return client.post("/v1/chat/completions", json=body)


def test_a_step_that_fails_costs_its_requests_and_a_lost_device_the_server() -> None:
    engine = FailingEngine(SimpleNamespace(batch_invariant=True))
    engine.faults = []
    failed = []
    with serving(engine) as running, httpx.Client(base_url=running.address) as client:
        running.thread.on_failure = lambda: failed.append(True)
        assert chat(client).status_code == 200
        engine.faults = [RuntimeError("a kernel")]
        answer = chat(client)
        assert answer.status_code == 500
        assert answer.json()["error"]["type"] == "server_error"
        assert chat(client).status_code == 200
        engine.faults = [RuntimeError("lost")] * 3
        statuses = [chat(client).status_code for _ in range(3)]
        assert statuses == [500] * 3
        health = client.get("/health")
        assert (health.status_code, health.json()["status"]) == (503, "failed")
        assert chat(client).status_code == 503
    assert failed == [True]


def test_a_template_that_loops_is_the_servers_fault_and_told_in_form() -> None:
    def answer(request):
        raise ModelFileError("chat_template.jinja: broken (it ran for 2 s without an end)", "")

    engine = FakeEngine(SimpleNamespace(batch_invariant=True), answer)
    with serving(engine) as running, httpx.Client(base_url=running.address) as client:
        reply = chat(client)
        assert reply.status_code == 500
        assert "without an end" in reply.json()["error"]["message"]


def test_an_engine_that_does_not_load_is_told_by_start() -> None:
    class Broken(FakeEngine):
        def load(self) -> None:
            raise ModelFileError("no weights", "")

    with pytest.raises(ModelFileError, match="no weights"):
        EngineThread(Broken(SimpleNamespace(batch_invariant=False))).start()


def test_a_load_that_nobody_waits_for_any_more_is_stopped() -> None:
    class Slow(FakeEngine):
        stopped = threading.Event()

        def load(self) -> None:
            assert self.stopped.wait(60)
            raise LoadStoppedError("the load was stopped")

        def stop_load(self) -> None:
            self.stopped.set()

    def gone() -> None:
        raise EngineError("what speaks HTTP has ended")

    engine = Slow(SimpleNamespace(batch_invariant=False))
    thread = EngineThread(engine)
    begun = time.monotonic()
    with pytest.raises(EngineError, match="has ended"):
        thread.start(gone)
    thread.close()
    assert engine.stopped.is_set() and time.monotonic() - begun < 20


def test_closing_tells_those_that_wait() -> None:
    engine = FakeEngine(SimpleNamespace(batch_invariant=True), step_s=0.2)
    thread = EngineThread(engine)
    thread.start()

    async def ask() -> None:
        asked = GenerationRequest((text_message("user", "Hi"),))
        answers = [thread.submit(asked) for _ in range(3)]
        closing = asyncio.get_running_loop().run_in_executor(None, thread.close)
        for each in answers[1:]:  # the first may be through
            with pytest.raises(EngineError, match="stopped"):
                while True:
                    await each.pieces()
        await closing
        with pytest.raises(EngineError, match="stopped"):
            thread.submit(asked)

    asyncio.run(asyncio.wait_for(ask(), 20))


def test_who_asks_for_rows_while_the_engine_closes_is_told() -> None:
    class Blocked(FakeEngine):
        in_step, go_on = threading.Event(), threading.Event()

        def step(self) -> list[StepOutput]:
            self.in_step.set()
            assert self.go_on.wait(20)
            return super().step()

    engine = Blocked(SimpleNamespace(batch_invariant=True))
    thread = EngineThread(engine)
    thread.start()

    async def ask() -> None:
        thread.submit(GenerationRequest((text_message("user", "Hi"),)))
        await asyncio.to_thread(engine.in_step.wait, 20)
        rows = thread.rows()
        closing = threading.Thread(target=thread.close)
        closing.start()
        while not thread._closing:
            await asyncio.sleep(0.01)
        engine.go_on.set()
        with pytest.raises(EngineError, match="has stopped"):
            await asyncio.wait_for(asyncio.wrap_future(rows), 20)
        closing.join()

    asyncio.run(ask())
    with pytest.raises(EngineError, match="has stopped"):
        thread.rows()


def test_a_request_that_comes_as_the_engine_ends_is_refused_and_not_lost() -> None:
    thread = EngineThread(FakeEngine(SimpleNamespace(batch_invariant=True)))
    thread.start()
    ordered, asking = thread._ordered, threading.get_ident()

    class EndsFirst:
        """The lock, before which the engine ends."""

        def __enter__(self) -> Any:
            if threading.get_ident() == asking and thread._ordered is not ordered:
                thread._ordered = ordered
                thread.close()
            return ordered.__enter__()

        def __exit__(self, *exc: object) -> None:
            ordered.__exit__(*exc)

    async def ask() -> None:
        request = GenerationRequest((text_message("user", "Hi"),))
        thread._ordered = EndsFirst()  # type: ignore[assignment]
        with pytest.raises(EngineError, match="has stopped"):
            thread.submit(request)

    asyncio.run(ask())
    assert thread.num_unfinished == 0


def test_lone_requests_run_alone_until_there_is_company(monkeypatch) -> None:
    """Beside a batch each token of a lone stream costs a step of its own."""
    alone = []

    class Watched(FakeEngine):
        def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
            alone.append(request)
            return super().stream(request)

    thread = EngineThread(Watched(SimpleNamespace(batch_invariant=False)))
    thread.start()
    asked = GenerationRequest((text_message("user", "Hi"),))

    async def ask(count: int) -> int:
        """Of so many at once, how many ran alone."""
        before = len(alone)
        for answer in [thread.submit(asked) for _ in range(count)]:
            while (await answer.pieces())[-1].result is None:
                pass
        return len(alone) - before

    async def ask_all() -> None:
        assert await ask(1) == 1 and await ask(1) == 1
        assert await ask(3) <= 1  # the first may begin before the second comes
        assert await ask(1) == 0
        monkeypatch.setattr(engine_thread, "TOGETHER_S", 0.0)
        assert await ask(1) == 1

    asyncio.run(asyncio.wait_for(ask_all(), 20))
    thread.close()


def test_those_that_ask_again_all_at_once_begin_together(monkeypatch) -> None:
    """Where nothing runs, as many as there were are waited for a little."""
    held = []

    class Watched(FakeEngine):
        def add(self, request: Any, *, stream: bool = True) -> int:
            number = super().add(request, stream=stream)
            self._requests[number] = request, 3
            return number

        def step(self) -> list[StepOutput]:
            held.append(len(self._requests))
            return super().step()

    thread = EngineThread(Watched(SimpleNamespace(batch_invariant=False)))
    thread.start()
    asked = GenerationRequest((text_message("user", "Hi"),))

    async def ask(count: int) -> int:
        """Of so many, one a moment behind the other, how many begin together."""
        answers = []
        for _ in range(count):
            answers.append(thread.submit(asked))
            await asyncio.sleep(0.01)
        for answer in answers:
            while (await answer.pieces())[-1].result is None:
                pass
        first = held[0]
        held.clear()
        return first

    async def ask_all() -> None:
        thread.engine.step_s = 0.05
        await ask(4)
        await ask(4)
        monkeypatch.setattr(engine_thread, "GATHER_S", 20.0)
        monkeypatch.setattr(engine_thread, "NEXT_S", 5.0)
        monkeypatch.setattr(engine_thread, "NEXT_S_OF_EACH", 5.0)
        assert await ask(4) == 4
        monkeypatch.setattr(engine_thread, "NEXT_S", 0.0)
        assert await ask(4) < 4

    asyncio.run(asyncio.wait_for(ask_all(), 20))
    thread.close()


def test_an_answer_that_ends_while_a_piece_comes_has_ended() -> None:
    """Its reader ends it in one thread while the engine's looks at a piece in another."""

    async def read() -> None:
        answer = Answer(lambda answer: None, lambda: None, False, False)  # type: ignore[arg-type, return-value]

        class Looked:
            @property
            def result(self) -> None:
                answer.end(ClientGoneError("gone"))

        answer.take(GenerationChunk("first", (1,)))
        answer.take(Looked())  # type: ignore[arg-type]
        assert answer.is_over
        assert [piece.text for piece in await answer.pieces()] == ["first"]
        with pytest.raises(ClientGoneError):
            await answer.pieces()

    asyncio.run(read())


def test_a_server_that_ends_tells_those_that_wait() -> None:
    engine = FakeEngine(SimpleNamespace(batch_invariant=True), step_s=1.0)
    found = []
    with serving(engine) as running:

        def ask() -> None:
            with httpx.Client(base_url=running.address) as client:
                found.append(chat(client))

        asking = threading.Thread(target=ask)
        asking.start()
        while not running.thread.num_unfinished:
            time.sleep(0.01)
        started = time.monotonic()
    asking.join()
    assert found[0].status_code == 503 and "stopped" in found[0].text
    assert time.monotonic() - started < 4
