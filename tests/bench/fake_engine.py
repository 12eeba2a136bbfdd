"""An engine without a model: the name of the model says how it behaves.

Run as a script it is a worker process that measures this engine instead of a real one.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Self

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))

from qwencli.bench.run import worker
from qwencli.config import EngineConfig
from qwencli.engine.protocol import drain
from qwencli.errors import ModelFileError, OutOfMemoryError, UnsupportedModeError
from qwencli.messages import GenerationRequest
from qwencli.results import EffectiveConfig, GenerationChunk, GenerationResult, Timings


class FakeEngine:
    """`TOKEN_S` between tokens; loads and runs are counted in `loads` and `runs`."""

    TOKEN_S = 0.001

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.behaviour = config.model.name.partition("-")[0]
        self.loads = 0
        self.closes = 0
        self.runs = 0
        self.load_s = 0.25

    @property
    def effective(self) -> EffectiveConfig:
        config = self.config
        attention = "eager" if self.behaviour == "fallback" else str(config.attention)
        return EffectiveConfig(
            "transformers", str(config.quantization), attention, str(config.cache), "cpu", "float32"
        )

    def load(self) -> None:
        self.loads += 1
        print("fake engine loads")  # libraries print; it must land in the log, not among the rows
        if self.behaviour == "unsupported":
            raise UnsupportedModeError("this mode cannot run here", nearest="sdpa")
        if self.behaviour == "oom":
            raise OutOfMemoryError("the GPU has no memory left", "use --quantization 4bit")
        if self.behaviour == "foreign":
            raise ModelFileError("no engine of ours has this", "use another version of the model")
        if self.behaviour == "broken":
            raise ZeroDivisionError("a bug in the engine")

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        assert request.ignore_eos
        count = request.sampling.max_new_tokens
        assert count is not None
        if self.behaviour == "hang" and self.runs == 2:
            time.sleep(600)
        if self.behaviour == "killed" and self.runs == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        start = time.perf_counter()
        times = []
        for _ in range(count):
            time.sleep(self.TOKEN_S)
            times.append(time.perf_counter())
        text = f"run {self.runs}" if self.behaviour == "changing" else "always the same"
        decode_s = times[-1] - times[0]
        timings = Timings(
            load_s=self.load_s,
            preprocess_s=0.0,
            vision_encode_s=None,
            prefill_s=times[0] - start,
            ttft_s=times[0] - start,
            decode_s=decode_s,
            e2e_s=times[-1] - start,
            decode_tok_per_s=(count - 1) / decode_s if count > 1 else None,
        )
        tokens = tuple(hashlib.sha256(text.encode()).digest()[:1] * count)
        self.runs += 1
        yield GenerationChunk(
            text,
            tokens,
            GenerationResult(
                text, tokens, "length", 7, 0, timings, self.effective, tuple(times), None
            ),
        )

    def generate(self, request: GenerationRequest) -> GenerationResult:
        return drain(self.stream(request))

    def close(self) -> None:
        self.closes += 1

    def __enter__(self) -> Self:
        self.load()
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def fake_beside(engine, spec, request, last):
    """What would be measured after the runs; a real engine's needs torch."""
    if spec.purpose == "reference":
        assert engine.behaviour != "odd", "no reference of this one"
        row = {"model": spec.config.model.name, "passage": 0, "position": 0}
        yield {
            "type": "rows",
            "file": "reference",
            "rows": [{**row, "token_id": 1, "log_prob": -0.5}],
        }
        return
    if engine.behaviour == "slain" and not Path("slain-once").exists():
        Path("slain-once").touch()
        os.kill(os.getpid(), signal.SIGKILL)
    if spec.reference is not None:
        row = {"sample": "passage-0", "positions": 2, "mean_kl": 0.25}
        yield {"type": "rows", "file": "quality", "rows": [row]}
    if engine.behaviour == "late":
        raise ZeroDivisionError("after the runs")
    row = {"read_bandwidth_bytes_per_s": 1e9, "bytes_per_token": 1e6, "context_tokens": 9.5}
    if spec.quality_samples:
        right = [{"sample": "a", "exact": 1}, {"sample": "b", "exact": 0}]
        yield {"type": "rows", "file": "quality", "rows": right}
    if spec.roofline:
        yield {"type": "rows", "file": "roofline", "rows": [row]}


if __name__ == "__main__":
    sys.exit(worker.main(FakeEngine, fake_beside))
