"""Ten thousand requests through one engine: memory, pages and graphs stay level.

    python benchmarks/many_requests.py [--requests 10000] [--model scenes] [--device auto]

Requests of mixed lengths, some with a picture, some that share a beginning, some that fail, some
that are aborted. A line of JSON for every tenth of them: memory of the host and of the device,
pages in use, keys of pages, graphs, and requests a second. Ends with 1 where the last tenth holds
more pages, graphs or (by 3%) memory than the fifth: in the first half graphs of all numbers of rows
are made, and memory of the host becomes what pictures of these sizes need.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import sys
import time
from pathlib import Path
from typing import Any

from PIL import Image

from qwencli.config import EngineConfig, EngineName, LoadFormat, SamplingOptions
from qwencli.engine.native.engine import NativeEngine
from qwencli.messages import GenerationRequest, ImagePart, user_message
from qwencli.models.resolve import resolve_model


def request(number: int, drawn: random.Random) -> GenerationRequest:
    pictures: tuple[ImagePart, ...] = ()
    if number % 3 == 0:
        colour = (number * 7 % 256, number * 13 % 256, number * 31 % 256)
        side = 64 * drawn.randint(1, 3)
        pictures = (ImagePart(Image.new("RGB", (side, 64), colour), f"{number}.png"),)
    # Every twentieth asks for more than any sequence may have.
    new_tokens = 10**6 if number % 20 == 7 else drawn.randint(1, 8)
    text = "What do you see? " * drawn.choice((1, 1, 6, 12)) + str(number % 50)
    sampling = SamplingOptions(do_sample=False, max_new_tokens=new_tokens)
    return GenerationRequest((user_message(text, pictures),), sampling, ignore_eos=True)


def level(engine: NativeEngine) -> dict[str, Any]:
    queue: Any = engine._queue
    pool, runner = queue._scheduler.pool, queue._runner
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    found = {
        "host_bytes": resident,
        "pages_in_use": pool.capacity - pool.num_free,
        "page_keys": len(pool._keys),
        "graphs": len(runner._captured),
    }
    if engine.effective.device.startswith("cuda"):
        import torch

        found["device_bytes"] = torch.cuda.memory_allocated(engine.effective.device)
    return found


def run(engine: NativeEngine, count: int) -> list[dict[str, Any]]:
    """Levels after each tenth of the requests, with nothing running."""
    drawn, levels = random.Random(0), []
    each = max(1, count // 10)
    for tenth in range(10):
        started, ended = time.perf_counter(), 0
        for start in range(tenth * each, (tenth + 1) * each, 64):
            numbers = range(start, min(start + 64, (tenth + 1) * each))
            added = [engine.add(request(number, drawn)) for number in numbers]
            for number in added[5::16]:
                engine.abort(number)
            while engine.has_unfinished:
                ended += sum(output.finished for output in engine.step())
        engine.step()
        seconds = time.perf_counter() - started
        levels.append({"ended": ended, "requests_per_s": ended / seconds, **level(engine)})
    return levels


def is_level(levels: list[dict[str, Any]]) -> bool:
    early, late = levels[4], levels[-1]
    kept = all(late[key] <= early[key] for key in ("pages_in_use", "graphs"))
    memory = [key for key in ("host_bytes", "device_bytes") if key in early]
    return (
        kept and late["pages_in_use"] == 0 and all(late[key] <= 1.03 * early[key] for key in memory)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", default=10_000, type=int)
    parser.add_argument("--model", default="scenes")
    parser.add_argument("--device", default="auto")
    said = parser.parse_args()
    spec = resolve_model(said.model)
    config = EngineConfig(
        spec,
        engine=EngineName.NATIVE,
        device=said.device,
        load_format=LoadFormat.AUTO if spec.path is not None else LoadFormat.DUMMY,
    )
    with NativeEngine(config) as engine:
        levels = run(engine, said.requests)
    for each in levels:
        print(json.dumps(each))
    sys.exit(0 if is_level(levels) else 1)


if __name__ == "__main__":
    main()
