"""What a streamed request costs the threads of a server, beside a model that costs nothing.

python benchmarks/request_cost.py [--clients 128] [--requests-a-client 4] [--tokens 128]
    [--rounds 3] [--step-ms 5] [--out FILE]

Needs no GPU: files of the bundled model, scheduler and preparing threads are the real ones, and in
place of the model steps sleep for as long as a GPU takes for 128 rows and hand out tokens of a
script. Clients run in a process of their own and do not count. Processor time, not the clock's, so
a busy machine shows less; it is not without effect, as threads that are moved between cores find
their caches cold. Prints one JSON object: for each round microseconds of a request by thread.
`event loop` reads requests and writes events, `prepare` makes prompts of them, and `engine` plans
steps and makes text of tokens.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.served import Served, serving
from qwencli.config import EngineConfig
from qwencli.engine.cache.paged_kv import PagePool
from qwencli.engine.engine_core import EngineCore
from qwencli.engine.native.engine import NativeEngine
from qwencli.engine.protocol import RequestQueue
from qwencli.engine.request import StepOutput
from qwencli.engine.runner import TokenCopy
from qwencli.engine.scheduler import Limits, Scheduler
from qwencli.models.resolve import SearchPaths, bundled_spec
from qwencli.server.settings import ServerSettings

ROWS, PAGES = 128, 4096
# As the native engine has on an H200.
PREFILL_TOKENS, PROMPTS = 8192, 64
# What an answer ends with, and the body it is in.
LAST = b"data: [DONE]\n\n\r\n0\r\n\r\n"


@dataclass
class ScriptedCopy(TokenCopy):
    """Tokens that are there at `ready_s`."""

    ready_s: float = 0.0

    def read(self) -> list[int]:
        time.sleep(max(0.0, self.ready_s - time.perf_counter()))
        return super().read()


class ScriptedRunner:
    """In place of `ModelRunner`: each step takes `step_s` and gives every row the next token."""

    def __init__(self, shape: Any, words: Sequence[int], step_s: float) -> None:
        self.model = SimpleNamespace(shape=shape)
        self._words, self._step_s, self._ready_s, self._number = words, step_s, 0.0, 0

    def rearrange(self, moves: Any, released: Any, restored: Any = ()) -> None: ...

    def keep(self, copies: Any) -> None: ...

    def prefill(self, chunks: Any, prompts: Any, clock: Any) -> TokenCopy | None:
        through = [chunk.sequence for chunk in chunks if chunk.is_last]
        return self._copy(through, clock) if through else None

    def decode(self, sequences: Any, prompts: Any, waiting: int, clock: Any) -> TokenCopy:
        return self._copy(sequences, clock)

    def may_draft(self, sampling: Any) -> bool:
        return False

    def _copy(self, sequences: Sequence[Any], clock: Any) -> TokenCopy:
        self._ready_s = max(self._ready_s, time.perf_counter()) + self._step_s
        self._number += 1
        rows = tuple(each.row for each in sequences)
        tokens = [self._words[(self._number + row) % len(self._words)] for row in range(ROWS)]
        return ScriptedCopy(tuple(sequences), rows, tokens, clock.mark(), ready_s=self._ready_s)


class SteadyCore(EngineCore):
    """Tells as many streams a step as beside a GPU, however long this machine took for it."""

    step_s = 0.005

    def _pieces(self) -> list[StepOutput]:
        self._told_s = time.perf_counter() - self.step_s
        return super()._pieces()


class FreeEngine(NativeEngine):
    """The native engine, of whose batches no model runs."""

    step_s = 0.005

    def _make_queue(self) -> RequestQueue:
        words = self.files.prompts.tokenizer.encode("a small red circle left of two large squares")
        assert self._model is not None, "load() comes first"
        core = SteadyCore(
            self.files,
            ScriptedRunner(self._model.shape, words, self.step_s),  # type: ignore[arg-type]
            Scheduler(Limits(ROWS, PREFILL_TOKENS, PROMPTS), PagePool(PAGES)),
            self.effective,
            self.load_s,
            self._prepared,
        )
        core.step_s = self.step_s
        return core


class Client(asyncio.Protocol):
    """Asks one request after the other over one connection and counts the events of the answers.
    It does no more than that: libraries take longer to read an event than the server to write it.
    """

    def __init__(self, requests: Iterator[bytes]) -> None:
        self._requests, self.num_events, self._end = requests, 0, b""
        self.over: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport), "of a socket"
        self._transport = transport

    def ask(self) -> None:
        request = next(self._requests, None)
        if request is None:
            self._transport.close()
        else:
            self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self.num_events += data.count(b"data: {")
        self._end = (self._end + data)[-len(LAST) :]
        if self._end == LAST:
            self.ask()

    def connection_lost(self, exc: Exception | None) -> None:
        self.over.set_result(None)


def request_of(number: int, tokens: int, port: int) -> bytes:
    """As httpx and most other libraries send it."""
    body = json.dumps(
        {
            "model": "scenes",
            "messages": [{"role": "user", "content": f"Describe this image. {number}"}],
            "max_tokens": tokens,
            "temperature": 0,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ).encode()
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: */*\r\n"
        "Accept-Encoding: gzip, deflate\r\nConnection: keep-alive\r\n"
        "User-Agent: python-httpx/0.28.1\r\n"
        f"Content-Length: {len(body)}\r\nContent-Type: application/json\r\n\r\n"
    )
    return head.encode() + body


async def asked(port: int, options: argparse.Namespace, first: int) -> int:
    """Events that all clients were sent."""
    loop, each = asyncio.get_running_loop(), options.requests_a_client

    async def client(number: int) -> Client:
        numbers = range(first + number * each, first + (number + 1) * each)
        requests = (request_of(one, options.tokens, port) for one in numbers)
        _, made = await loop.create_connection(lambda: Client(requests), "127.0.0.1", port)
        return made

    clients = await asyncio.gather(*map(client, range(options.clients)))
    for one in clients:
        one.ask()
    await asyncio.gather(*(one.over for one in clients))
    return sum(one.num_events for one in clients)


def clients_of(port: int, options: argparse.Namespace, orders: Connection) -> None:
    """A process of clients: a round for each number that is ordered."""
    while (first := orders.recv()) is not None:
        orders.send(asyncio.run(asked(port, options, first)))


def measured(running: Served, options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Rounds; the first of them, which warms up, is left out."""
    port = int(running.address.rpartition(":")[2])
    orders, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(
        target=clients_of, args=(port, options, theirs), daemon=True
    )
    process.start()
    count = options.clients * options.requests_a_client
    for number in range(options.rounds + 1):
        before, start = running.cpu_s(), time.perf_counter()
        orders.send(number * count)
        num_events = orders.recv()
        wall_s, after = time.perf_counter() - start, running.cpu_s()
        if number:
            yield {
                "us_a_request": {
                    name: round((after[name] - before[name]) / count * 1e6) for name in after
                },
                "events_a_request": round(num_events / count, 1),
                "wall_s": round(wall_s, 2),
            }
    orders.send(None)
    process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--clients", type=int, default=128)
    parser.add_argument("--requests-a-client", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step-ms", type=float, default=5.0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    engine = FreeEngine(EngineConfig(bundled_spec(SearchPaths()), device="cpu"))
    engine.step_s = options.step_ms / 1e3
    rounds = []
    with serving(engine, ServerSettings("scenes")) as running:
        for found in measured(running, options):
            print(json.dumps(found), file=sys.stderr, flush=True)
            rounds.append(found)
    told = {"options": {key: str(value) for key, value in vars(options).items()}, "rounds": rounds}
    text = json.dumps(told, indent=1)
    print(text)
    if options.out is not None:
        options.out.write_text(text + os.linesep, encoding="utf-8")


if __name__ == "__main__":
    main()
