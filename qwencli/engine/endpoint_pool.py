"""Shares requests among servers, and tries again what failed.

Each request goes to the server that has the fewest of ours at the moment. One that cannot be
reached, or whose answer breaks off, is left alone for a while that grows each time, and what it
held goes to the others; where there are none it is asked again. Connections live in the event loop
of one thread of their own.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from typing import Any, TypeVar

from qwencli.config import EngineConfig, ModelSource, ModelSpec
from qwencli.engine.abilities import Abilities, check_loaded
from qwencli.engine.openai_client import (
    CONNECT_S,
    ROWS,
    TRY_AGAIN,
    Endpoint,
    OpenAIClient,
    RetryableError,
)
from qwencli.engine.openai_format import (
    AnswerReader,
    EncodedRequest,
    MalformedAnswerError,
    encode_request,
)
from qwencli.engine.request import RequestSource, request_of
from qwencli.errors import AnswerError, EndpointError, InputError
from qwencli.results import GenerationChunk

# How often a request is tried; the pauses between double from the first on.
ATTEMPTS, FIRST_PAUSE_S, LONGEST_PAUSE_S = 5, 0.5, 30.0
# Pictures that are opened and encoded at once.
_OPENERS = 4
T = TypeVar("T")


class _Member:
    """One server of the pool: its client, and how it does."""

    def __init__(self, client: OpenAIClient) -> None:
        self.client, self.endpoint = client, client.endpoint
        self.num_running = 0
        self.num_failures = 0
        self.rests_until_s = 0.0
        # Why it is not asked any more.
        self.refusal: EndpointError | None = None
        # Why its last answer failed; None where that came.
        self.failure: EndpointError | None = None
        # The user knows that it does not answer.
        self.told_gone = False

    @property
    def is_ready(self) -> bool:
        return self.refusal is None and self.rests_until_s <= time.monotonic()

    def failed(self, error: AnswerError) -> None:
        """What runs there fails together, and counts once."""
        self.failure = EndpointError(error.message, error.hint)
        if self.rests_until_s <= time.monotonic():
            self.num_failures += 1
            self.rest(_pause_s(self.num_failures))

    def rest(self, seconds: float) -> None:
        self.rests_until_s = max(self.rests_until_s, time.monotonic() + seconds)


def _pause_s(failures: int) -> float:
    return float(min(FIRST_PAUSE_S * 2 ** min(failures - 1, 16), LONGEST_PAUSE_S))


class EndpointPool:
    """Servers that answer the same requests, and the thread that asks them.

    Args:
        warn: takes a line about a server that answers no more, or again; in that thread.

    Raises:
        UsageError: the API key cannot be sent, on creation.
    """

    def __init__(
        self, endpoints: Sequence[Endpoint], key_variable: str, warn: Callable[[str], None]
    ) -> None:
        self._warn = warn
        self._members = [_Member(OpenAIClient(each, key_variable)) for each in endpoints]
        self._openers = concurrent.futures.ThreadPoolExecutor(_OPENERS, "open pictures")
        self._loop = asyncio.new_event_loop()
        self._freed = asyncio.Event()
        self._thread = threading.Thread(target=self._loop.run_forever, name="remote", daemon=True)
        self._thread.start()

    @property
    def max_rows(self) -> int:
        return ROWS * sum(each.refusal is None for each in self._members)

    def begin(self, task: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        return asyncio.run_coroutine_threadsafe(task, self._loop)

    def wait(self, task: Coroutine[Any, Any, T]) -> T:
        return self.begin(task).result()

    def close(self) -> None:
        self._openers.shutdown(wait=False, cancel_futures=True)
        with contextlib.suppress(concurrent.futures.TimeoutError):
            self.begin(self._end_all()).result(CONNECT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _end_all(self) -> None:
        tasks = [task for task in asyncio.all_tasks() if task is not asyncio.current_task()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for member in self._members:
            await member.client.close()
        # What reads an answer and is left is closed by the loop, in tasks of its own.
        await asyncio.sleep(0)
        await self._loop.shutdown_asyncgens()
        while closing := asyncio.all_tasks() - {asyncio.current_task()}:
            await asyncio.wait(closing)

    async def learn_models(self, model: ModelSpec) -> list[EndpointError]:
        """Learn what each server has; why some of them are of no use.

        Raises:
            EndpointError: all of them.
        """
        refusals = await asyncio.gather(*(self._learn_model(each, model) for each in self._members))
        found = [error for error in refusals if error is not None]
        if len(found) == len(self._members):
            raise self._all_failed()
        for member in self._members:
            member.told_gone = member.failure is not None
        return found

    async def _learn_model(self, member: _Member, model: ModelSpec) -> EndpointError | None:
        try:
            await member.client.learn_model(model)
        except RetryableError as failure:
            member.failed(failure.error)
            return member.failure
        except EndpointError as error:
            member.refusal = error
            return error
        except InputError as error:
            member.refusal = EndpointError(error.message, "check the address of --endpoint")
            return member.refusal
        return None

    @property
    def first_model(self) -> str:
        """The model of the first server that has named one; empty where none has."""
        return next((each.endpoint.model for each in self._members if each.endpoint.model), "")

    async def answer(
        self,
        source: RequestSource,
        config: EngineConfig,
        tell: Callable[[GenerationChunk], None],
        *,
        live: bool,
    ) -> None:
        """Have one request answered, by whichever server can.

        Args:
            live: somebody reads the pieces, so that an answer that breaks off cannot begin anew.

        Raises:
            InputError, AnswerError: this request has no answer.
            UnsupportedModeError: the server's model cannot do what it asks for.
            EndpointError: no server is left.
        """
        sent, started_s = await self._loop.run_in_executor(self._openers, _prepare, source, config)
        del source  # pictures are held no longer than needed
        try:
            await self._answer_prepared(sent, started_s, tell, live=live)
        except (InputError, AnswerError) as error:
            names = ", ".join(sent.names)
            if not names:
                raise
            raise type(error)(f"{names}: {error.message}", error.hint) from error

    async def _answer_prepared(
        self,
        sent: EncodedRequest,
        started_s: float,
        tell: Callable[[GenerationChunk], None],
        *,
        live: bool,
    ) -> None:
        for attempt in itertools.count(1):
            member = await self._free_member()
            member.num_running += 1
            try:
                await self._answer_from(member, sent, started_s, tell, live=live)
                self._answered(member)
                return
            except RetryableError as failure:
                wanted_s = min(failure.pause_s, LONGEST_PAUSE_S)
                if failure.unreachable:
                    member.failed(failure.error)
                    await self._tell_gone(member)
                elif wanted_s:
                    member.rest(wanted_s)
                if attempt >= ATTEMPTS:
                    if failure.unreachable and not await self._any_lives():
                        raise self._all_failed() from None
                    raise failure.error from None
                pause = max(wanted_s, _pause_s(attempt))
            except EndpointError as error:
                if isinstance(error, AnswerError):
                    raise
                if member.refusal is None:
                    self._warn(self._without(member, error.message))
                member.refusal, pause = error, 0.0
            finally:
                member.num_running -= 1
                self._freed.set()
            if not any(each.is_ready for each in self._members if each is not member):
                await asyncio.sleep(pause)

    async def _free_member(self) -> _Member:
        """The server that has the fewest requests, once one has room.

        Raises:
            EndpointError: none is left.
        """
        while True:
            able = [each for each in self._members if each.refusal is None]
            if not able:
                raise self._all_failed()
            ready = [each for each in able if each.is_ready]
            # One that rests is asked all the same where there is no other: `answer` has waited.
            ready = ready or [min(able, key=lambda each: each.rests_until_s)]
            best = min(ready, key=lambda each: each.num_running)
            if best.num_running < ROWS:
                return best
            self._freed.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._freed.wait(), 1.0)

    async def _tell_gone(self, member: _Member) -> None:
        """Say it where a server that failed is gone, and did not only break an answer off."""
        if member.told_gone or await member.client.is_alive():
            return
        if not member.told_gone:  # what ran there fails together
            member.told_gone = True
            name = member.endpoint.name
            self._warn(self._without(member, f"{name} does not answer any more"))

    def _without(self, member: _Member, why: str) -> str:
        others = any(
            each.refusal is None and not each.told_gone
            for each in self._members
            if each is not member
        )
        return f"{why}; the others are asked meanwhile" if others else why

    def _answered(self, member: _Member) -> None:
        member.num_failures, member.failure = 0, None
        if member.told_gone:
            member.told_gone = False
            self._warn(f"{member.endpoint.name} answers now")

    def _all_failed(self) -> EndpointError:
        """Why each server is of no use."""
        errors = []
        for member in self._members:
            gone = EndpointError(f"{member.endpoint.name} does not answer", TRY_AGAIN)
            errors.append(member.refusal or member.failure or gone)
        hints = dict.fromkeys(error.hint for error in errors if error.hint)
        return EndpointError("; ".join(error.message for error in errors), "; ".join(hints))

    async def _any_lives(self) -> bool:
        for member in self._members:
            if member.refusal is None and await member.client.is_alive():
                return True
        return False

    async def _answer_from(
        self,
        member: _Member,
        sent: EncodedRequest,
        started_s: float,
        tell: Callable[[GenerationChunk], None],
        *,
        live: bool,
    ) -> None:
        client, endpoint = member.client, member.endpoint
        if not endpoint.model:  # it did not answer before
            await client.learn_model(ModelSpec(self.first_model, ModelSource.REMOTE))
        wanted = Abilities(pictures=bool(sent.names), thoughts=sent.wants_thoughts)
        check_loaded(endpoint.model, endpoint, wanted)
        reader = AnswerReader(sent, started_s, endpoint.name)
        told = False
        try:
            body = sent.json_for(endpoint.model, endpoint.owner)
            async with contextlib.aclosing(client.chat(body)) as events:
                async for event in events:
                    piece = reader.read(event)
                    if piece.text or piece.thoughts:
                        tell(GenerationChunk(piece.text, (), thoughts=piece.thoughts))
                        told = True
            if reader.finish_reason is None:
                raise client.connection_lost()
        except (MalformedAnswerError, RetryableError) as error:
            failure = (
                client.malformed_answer(error) if isinstance(error, MalformedAnswerError) else error
            )
            if told and live:  # what is shown to a reader already cannot be begun anew
                raise failure.error from error
            raise failure from None
        last = reader.finish()
        tell(GenerationChunk(last.text, (), reader.result(), last.thoughts))


def _prepare(source: RequestSource, config: EngineConfig) -> tuple[EncodedRequest, float]:
    """A request ready to be sent, and when it began: its pictures were open by then, and what
    opening the first one imports was there."""
    request = request_of(source)
    started_s = time.perf_counter()
    return encode_request(request, config), started_s
