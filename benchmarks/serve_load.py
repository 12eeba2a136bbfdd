"""`qwencli serve` under load: speed by number of clients, and what a rough crowd leaves behind.

python benchmarks/serve_load.py --model qwen3-vl-4b --load-format dummy --device cuda --out FOLDER
    [--clients 1,8,32,128] [--tokens 128] [--requests-a-client 4] [--picture 512]
    [--rough 1000] [--rough-clients 64] [--soak-minutes 0]
    [--endpoint URL --served-model NAME]

With `--endpoint` a server is asked that runs already, such as vLLM's, and nothing else is measured.

Speed: each client sends its requests one after the other, streams the answers and notes when each
event came; all answers have equal length. Clients run in processes of their own, so that the server
has its interpreter for itself; they are connected before the time begins. `cpu_us_a_token` is what
the server took of a processor: its engine's thread and those that prepare share one interpreter,
`event loop` is the process that speaks HTTP.
Beside them the same requests through `generate_many`, as many at
once, and one after the other through `Engine.generate`. Tokens that come together are one
event (`events_a_token`), so gaps between events are at least what ITL is. Goodput counts tokens of
answers whose first token came within --ttft-s and whose mean time a token was within --tpot-ms.

Rough: requests of which some are cut off by their client, read slowly, malformed or dropped before
their body is complete. After each round nothing may run, no page be in use, and file handles,
threads and memory be level, in both processes; what is held is told on stderr. Prints one JSON
object, and writes it to OUT/serve_load.json.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import gc
import io
import json
import multiprocessing
import os
import random
import statistics
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks.served import Served, serving
from qwencli.config import EngineConfig, LoadFormat, Quantization, SamplingOptions
from qwencli.engine.client import generate_many
from qwencli.engine.factory import create_engine
from qwencli.messages import GenerationRequest, ImagePart, user_message
from qwencli.models.resolve import resolve_model
from qwencli.results import GenerationResult
from qwencli.server.settings import ServerSettings

CHAT = "/v1/chat/completions"
QUESTION = "Describe this image."
# Clients that are answered at one moment ask again one after the other where they share a process.
MOST_PROCESSES = 12
# Longer than the server takes to give an answer up.
PATIENCE_S = 1000.0


# By part of a server, seconds of a processor that it has taken.
CpuSeconds = Callable[[], dict[str, float]]


def picture(side: int, number: int) -> Image.Image:
    return Image.new("RGB", (side, side), (number * 37 % 256, number * 91 % 256, 128))


def body_of(options: argparse.Namespace, number: int, **more: Any) -> dict[str, Any]:
    parts: list[dict[str, Any]] = [{"type": "text", "text": f"{QUESTION} {number}"}]
    if options.picture:
        data = io.BytesIO()
        picture(options.picture, number).save(data, "PNG")
        url = "data:image/png;base64," + base64.b64encode(data.getvalue()).decode()
        parts.insert(0, {"type": "image_url", "image_url": {"url": url}})
    return {
        "messages": [{"role": "user", "content": parts}],
        "max_tokens": options.tokens,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"model": options.served_model} if options.served_model else {}),
    } | more


def request_of(options: argparse.Namespace, number: int) -> GenerationRequest:
    shown: tuple[ImagePart, ...] = ()
    if options.picture:
        shown = (ImagePart(picture(options.picture, number), f"{number}.png"),)
    sampling = SamplingOptions(temperature=0, max_new_tokens=options.tokens)
    return GenerationRequest((user_message(f"{QUESTION} {number}", shown),), sampling, True)


async def streamed(client: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """One answer: its tokens, when its first event came and the gaps behind it."""
    start = last = time.perf_counter()
    ttft, times, new = None, [], 0
    async with client.stream("POST", CHAT, json=body) as reply:
        reply.raise_for_status()
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event = json.loads(line[6:])
            if event.get("usage"):
                new = event["usage"]["completion_tokens"]
            if event["choices"] and event["choices"][0]["delta"].get("content"):
                now = time.perf_counter()
                if ttft is None:
                    ttft = now - start
                else:
                    times.append(now - last)
                last = now
    return {"ttft_s": ttft or last - start, "gaps_s": times, "tokens": new, "e2e_s": last - start}


def percentile(values: list[float], percent: float) -> float | None:
    ranked = sorted(values)
    return ranked[min(len(ranked) - 1, int(len(ranked) * percent / 100))] if ranked else None


async def asked_by(
    address: str, options: argparse.Namespace, numbers: Sequence[int], start: Any
) -> tuple[float, float, list[dict[str, Any]]]:
    """What these clients were answered, each asking one request after the other; when they began
    and when they ended."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(base_url=address, timeout=None, limits=limits) as client:
        await asyncio.gather(*(client.get("/health") for _ in numbers))

        async def one(number: int) -> list[dict[str, Any]]:
            first = number * options.requests_a_client
            return [
                await streamed(client, body_of(options, first + index))
                for index in range(options.requests_a_client)
            ]

        start.wait()
        began_s = time.time()
        found = await asyncio.gather(*map(one, numbers))
        return began_s, time.time(), [each for some in found for each in some]


def crowd(
    address: str, options: argparse.Namespace, numbers: Sequence[int], start: Any
) -> tuple[float, float, list[dict[str, Any]]]:
    """`asked_by`, in a process of its own."""
    return asyncio.run(asked_by(address, options, numbers, start))


def level(
    address: str, options: argparse.Namespace, clients: int, cpu_s: CpuSeconds
) -> dict[str, Any]:
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    count = min(clients, MOST_PROCESSES, max(1, own - 4))
    context = multiprocessing.get_context("spawn")
    with context.Manager() as manager, context.Pool(count) as pool:
        start = manager.Barrier(count)
        numbers = [range(clients)[part::count] for part in range(count)]
        before = cpu_s()
        parts = pool.starmap(crowd, [(address, options, part, start) for part in numbers], 1)
        after = cpu_s()
    wall_s = max(ended for _, ended, _ in parts) - min(began for began, _, _ in parts)
    found = [each for _, _, some in parts for each in some]
    tokens = sum(each["tokens"] for each in found)
    gaps = [gap * 1e3 for each in found for gap in each["gaps_s"]]
    ttfts = [each["ttft_s"] for each in found]

    def is_good(each: dict[str, Any]) -> bool:
        tpot_ms = (each["e2e_s"] - each["ttft_s"]) / max(each["tokens"] - 1, 1) * 1e3
        return each["ttft_s"] <= options.ttft_s and tpot_ms <= options.tpot_ms

    good = sum(each["tokens"] for each in found if is_good(each))
    decode_s = [each["e2e_s"] - each["ttft_s"] for each in found if each["tokens"] > 1]
    return {
        "clients": clients,
        "requests": len(found),
        "tok_per_s": tokens / wall_s,
        "goodput_tok_per_s": good / wall_s,
        "decode_tok_per_s_a_stream": statistics.median(
            (each["tokens"] - 1) / seconds for each, seconds in zip(found, decode_s, strict=False)
        ),
        "ttft_s_p50": percentile(ttfts, 50),
        "ttft_s_p99": percentile(ttfts, 99),
        "event_gap_ms_p50": percentile(gaps, 50),
        "event_gap_ms_p99": percentile(gaps, 99),
        "events_a_token": (len(gaps) + len(found)) / max(tokens, 1),
        "cpu_us_a_token": {
            name: (seconds - before.get(name, 0.0)) / max(tokens, 1) * 1e6
            for name, seconds in after.items()
        },
    }


def in_process(
    engine: Any, options: argparse.Namespace, count: int, at_once: int
) -> dict[str, Any]:
    """So many requests, as many at once as there are clients: all answers have equal length."""
    results = []
    start = time.perf_counter()
    for first in range(0, count, at_once):
        numbers = range(first, min(first + at_once, count))
        results += generate_many(engine, [request_of(options, number) for number in numbers])
    wall_s = time.perf_counter() - start
    done = [each for each in results if isinstance(each, GenerationResult)]
    assert len(done) == count, results
    return {"requests": count, "tok_per_s": sum(each.num_new_tokens for each in done) / wall_s}


def lone(engine: Any, options: argparse.Namespace) -> dict[str, Any]:
    speeds = []
    for number in range(options.requests_a_client):
        timings = engine.generate(request_of(options, number)).timings
        speeds.append((timings.decode_tok_per_s, timings.ttft_s))
    return {
        "decode_tok_per_s": statistics.median(speed for speed, _ in speeds),
        "ttft_s_p50": statistics.median(ttft for _, ttft in speeds),
    }


def open_handles(process: psutil.Process) -> int:
    return int(process.num_fds() if hasattr(process, "num_fds") else process.num_handles())


def held(running: Served) -> dict[str, Any]:
    """What the server holds: the engine's process, and `http_...` of the one that speaks HTTP."""
    gc.collect()
    thread, own = running.thread, psutil.Process()
    found = {
        "unfinished": thread.num_unfinished,
        "kv_pages": thread.engine.kv_pages[0] if thread.engine.kv_pages else None,
        "handles": open_handles(own),
        "threads": threading.active_count(),
        "host_bytes": own.memory_info().rss,
    }
    if running.http is not None:
        other = psutil.Process(running.http.pid)
        found |= {
            "http_handles": open_handles(other),
            "http_threads": other.num_threads(),
            "http_host_bytes": other.memory_info().rss,
        }
    return found


async def rough(address: str, options: argparse.Namespace, count: int) -> dict[str, Any]:
    """What became of requests, by how their client behaves."""
    chance = random.Random(options.seed)
    plan = [
        chance.choices(
            ("whole", "stream", "cut off", "slow", "malformed", "dropped"), (3, 3, 2, 1, 1, 1)
        )[0]
        for _ in range(count)
    ]
    numbers = iter(enumerate(plan))
    found: Counter[str] = Counter()
    host, port = address.removeprefix("http://").split(":")

    async def drop(body: bytes) -> None:
        _, writer = await asyncio.open_connection(host, int(port))
        head = f"POST {CHAT} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\n"
        writer.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body[: len(body) // 2])
        await writer.drain()
        writer.transport.abort()

    async def ask(client: httpx.AsyncClient, number: int, manner: str) -> str:
        body = body_of(options, number, max_tokens=1 + number % options.tokens)
        if manner == "malformed":
            data = json.dumps(body).encode()
            wrong = data[: number % len(data)] if number % 2 else data.replace(b'"user"', b"7")
            reply = await client.post(
                CHAT, content=wrong, headers={"content-type": "application/json"}
            )
            return str(reply.status_code)
        if manner == "dropped":
            await drop(json.dumps(body).encode())
            return "dropped"
        if manner == "whole":
            reply = await client.post(CHAT, json=body | {"stream": False, "stream_options": None})
            return str(reply.status_code)
        if manner == "stream":
            await streamed(client, body)
            return "200"
        async with client.stream("POST", CHAT, json=body | {"max_tokens": options.tokens}) as reply:
            read = 0
            async for _ in reply.aiter_raw(256):
                read += 1
                if manner == "slow":
                    await asyncio.sleep(0.02)
                elif read > number % 7:
                    break
        return "cut off" if manner == "cut off" else str(reply.status_code)

    async def one() -> None:
        async with httpx.AsyncClient(base_url=address, timeout=PATIENCE_S) as client:
            for number, manner in numbers:
                try:
                    answer = await ask(client, number, manner)
                except httpx.HTTPError as error:
                    answer = type(error).__name__
                found[f"{manner}: {answer}"] += 1

    await asyncio.gather(*(one() for _ in range(options.rough_clients)))
    return dict(sorted(found.items()))


def settled(running: Served) -> dict[str, Any]:
    until = time.monotonic() + 30
    while running.thread.num_unfinished and time.monotonic() < until:
        time.sleep(0.05)
    time.sleep(0.5)  # connections end
    return held(running)


def soaked(running: Served, options: argparse.Namespace) -> dict[str, Any]:
    """What rounds of a rough crowd were answered, and what is held before and after them."""
    asyncio.run(rough(running.address, options, options.rough // 4))
    before = settled(running)
    start = time.perf_counter()
    answers: Counter[str] = Counter()
    rounds: list[dict[str, Any]] = []
    while not rounds or time.perf_counter() - start < 60 * options.soak_minutes:
        answers += Counter(asyncio.run(rough(running.address, options, options.rough)))
        rounds.append({"s": round(time.perf_counter() - start, 1), **settled(running)})
        print(json.dumps(rounds[-1]), file=sys.stderr, flush=True)
    return {
        "seconds": time.perf_counter() - start,
        "answers": dict(answers),
        "rounds": rounds,
        "before": before,
        "after": settled(running),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--model", default=None)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--load-format", default="auto")
    parser.add_argument("--quantization", default="none")
    parser.add_argument("--clients", default="1,8,32,128")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--picture", type=int, default=0, help="side in pixels; 0 = text only")
    parser.add_argument("--requests-a-client", type=int, default=4)
    parser.add_argument("--ttft-s", type=float, default=2.0)
    parser.add_argument("--tpot-ms", type=float, default=50.0)
    parser.add_argument("--rough", type=int, default=1000)
    parser.add_argument("--rough-clients", type=int, default=64)
    parser.add_argument("--soak-minutes", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--endpoint", help="http://HOST:PORT of a server that runs")
    parser.add_argument("--served-model", help="what that server calls its model")
    parser.add_argument("--out", type=Path, default=None)
    options = parser.parse_args()
    levels = [int(each) for each in options.clients.split(",") if each]
    told: dict[str, Any] = {"options": {k: str(v) for k, v in vars(options).items()}}
    if options.endpoint:
        told["served"] = levels_of(options.endpoint, options, levels)
    else:
        measure_own(told, options, levels)
    text = json.dumps(told, indent=1, default=str)
    print(text)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / "serve_load.json").write_text(text + os.linesep, encoding="utf-8")


def levels_of(
    address: str,
    options: argparse.Namespace,
    levels: Sequence[int],
    cpu_s: CpuSeconds = dict,
) -> dict[int, dict[str, Any]]:
    """Each level once for what is made at first, and once that counts."""
    found = {}
    for clients in levels:
        level(address, options, clients, cpu_s)
        found[clients] = level(address, options, clients, cpu_s)
    return found


def measure_own(told: dict[str, Any], options: argparse.Namespace, levels: Sequence[int]) -> None:
    config = EngineConfig(
        resolve_model(options.model, offline=True),
        device=options.device,
        load_format=LoadFormat(options.load_format),
        quantization=Quantization(options.quantization),
    )
    # In turns, in one process: a server's thread owns its engine, so each side loads its own.
    with create_engine(config) as engine:
        told["lone"] = lone(engine, options)
        told["lone"] = lone(engine, options)  # the first one made graphs
        many = {}
        for clients in levels:
            count = clients * options.requests_a_client
            in_process(engine, options, count, clients)
            many[clients] = in_process(engine, options, count, clients)
        told["generate_many"] = many
        told["effective"] = vars(engine.effective)
    with serving(create_engine(config), ServerSettings(config.model.name)) as running:
        told["served"] = levels_of(running.address, options, levels, running.cpu_s)
        if options.rough:
            told["rough"] = soaked(running, options)


if __name__ == "__main__":
    main()
