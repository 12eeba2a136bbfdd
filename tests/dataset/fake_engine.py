"""An engine that answers at once, many rows at a time; and a process that captions a set with it.

    python tests/dataset/fake_engine.py FOLDER [--existing MODE] ...

runs `qwencli caption FOLDER ...` on it.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import MappingProxyType
from typing import Any, Self

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from qwencli.config import EngineConfig
from qwencli.engine.request import StepOutput, request_of
from qwencli.errors import QwenCliError
from qwencli.messages import GenerationRequest, ImagePart, TextPart, VideoPart
from qwencli.results import EffectiveConfig, GenerationChunk, GenerationResult, Timings

TIMINGS = Timings(0.1, 0.0, None, 0.0, 0.0, 0.0, 0.01, None)
RAN = EffectiveConfig("native", "none", "sdpa", "static", "cpu", "float32")


def said(request: GenerationRequest) -> str:
    """A caption that tells the picture and the question."""
    parts = request.messages[-1].parts
    digest = hashlib.sha256(str(request.sampling.seed).encode())
    for part in parts:
        if isinstance(part, ImagePart):
            digest.update(part.image.tobytes())
        elif isinstance(part, TextPart):
            digest.update(part.text.encode("utf-8", "surrogatepass"))
    return f"A picture {digest.hexdigest()[:12]}."


class FakeEngine:
    """`answer(request)` gives the text, or raises; each takes a few steps, of `step_s` seconds."""

    load_s = 0.1
    batch_from = 16
    max_seq_len = 4096
    model_type = "qwen3_vl"
    can_think = True
    memory_plan: MappingProxyType[str, int] = MappingProxyType({})
    load_warnings = ()
    effective = RAN

    def __init__(
        self,
        config: EngineConfig | None = None,
        answer: Callable[[GenerationRequest], str] = said,
        *,
        max_rows: int = 8,
        step_s: float = 0.0,
    ) -> None:
        self.config = config
        self.answer, self.max_rows, self.step_s = answer, max_rows, step_s
        self.answered = 0
        self.finish_reason: Any = "stop"
        self.most_held = 0
        self._ids = itertools.count()
        self._requests: dict[int, tuple[Any, int]] = {}

    def load(self) -> None: ...

    def close(self) -> None: ...

    @property
    def has_unfinished(self) -> bool:
        return bool(self._requests)

    def add(self, request: Any, *, stream: bool = True) -> int:
        number = next(self._ids)
        self._requests[number] = (request, number % 3 + 1)
        self.most_held = max(self.most_held, len(self._requests))
        return number

    def step(self) -> list[StepOutput]:
        time.sleep(self.step_s)
        outputs = []
        for number, (request, left) in list(self._requests.items())[: self.max_rows]:
            if left > 1:
                self._requests[number] = (request, left - 1)
                outputs.append(StepOutput(number, GenerationChunk("", (1,))))
                continue
            del self._requests[number]
            try:
                outputs.append(StepOutput(number, self._chunk(request_of(request))))
            except QwenCliError as error:
                outputs.append(StepOutput(number, error=error))
        return outputs

    def abort(self, request: int) -> None:
        self._requests.pop(request, None)

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        time.sleep(self.step_s)
        yield self._chunk(request)

    def generate(self, request: GenerationRequest) -> GenerationResult:
        return self._chunk(request).result  # type: ignore[return-value]

    def _chunk(self, request: GenerationRequest) -> GenerationChunk:
        text = self.answer(request)
        self.answered += 1
        size: list[tuple[int, int]] = []
        for part in request.messages[-1].parts:
            if isinstance(part, ImagePart):
                size.append(part.image.size)
            elif isinstance(part, VideoPart):
                size += [frame.size for frame in part.frames]
        result = GenerationResult(
            text, (1, 2, 3), self.finish_reason, 7, 4, TIMINGS, RAN, (0.0, 0.1, 0.2), None,
            image_sizes=tuple(size), resized_sizes=tuple(size),
        )  # fmt: skip
        return GenerationChunk(text, (1, 2, 3), result)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


# Answers of the others for one of the slow process; and how many are enough for all of its own. Of
# 240 pictures the others get there whatever the slow one holds meanwhile, which is 56 at most.
SLOWER, ENOUGH = 8, 160


def wait_for_others(log: Path) -> None:
    """Until the other processes are as far as the next answer of the slow one asks for."""
    own = log / f"{os.getpid()}.log"
    made = own.stat().st_size if own.exists() else 0
    end = time.monotonic() + 100
    while sum(p.stat().st_size for p in log.iterdir() if p != own) < min(SLOWER * made, ENOUGH):
        assert time.monotonic() < end, "the others wait for the slow process"
        time.sleep(0.005)


def install() -> None:
    """What `qwencli caption` finds in place of a model, in this process."""
    from qwencli.engine import factory, resolve

    def create(config: EngineConfig) -> FakeEngine:
        """`FAKE_STEP_S` is the time of a step; `FAKE_LOG` is a folder where each process keeps
        count of its answers; the process that finds the file `FAKE_SLOW` not there makes one for
        every `SLOWER` of the others, however fast they are."""
        step_s = float(os.environ.get("FAKE_STEP_S", "0"))
        is_slow = False
        if slow := os.environ.get("FAKE_SLOW"):
            with contextlib.suppress(FileExistsError):
                Path(slow).touch(exist_ok=False)
                is_slow = True
        answer = said
        if death := os.environ.get("FAKE_DEATH"):

            def answer(request: GenerationRequest) -> str:
                """Pictures of 13 pixels end the process."""
                [visual] = [p for p in request.messages[-1].parts if isinstance(p, ImagePart)]
                if visual.image.width == 13:
                    os.kill(os.getpid(), int(death))
                return said(request)

        if log := os.environ.get("FAKE_LOG"):

            def answer(request: GenerationRequest) -> str:
                if is_slow:
                    wait_for_others(Path(log))
                with (Path(log) / f"{os.getpid()}.log").open("a") as file:
                    file.write(".")
                return said(request)

        return FakeEngine(config, answer, step_s=step_s)

    factory.create_engine = create  # type: ignore
    resolve.resolve_device = lambda device: "cpu"  # it would load torch


def main() -> int:
    from qwencli.cli import run

    named = () if "--devices" in sys.argv else ("--device", "cpu")
    return run(["caption", "--model", "scenes", *named, *sys.argv[1:]])


if __name__ in ("__main__", "__mp_main__"):  # a worker process imports it by the second name
    install()
if __name__ == "__main__":
    code = main()
    assert "torch" not in sys.modules, "a process without an engine of its own needs no torch"
    sys.exit(code)
