"""The ordinary worker around an engine that is a known share slower: does `bench compare` see it?

    python -m qwencli.bench.inject.slowdown_worker PERCENT

Each token after the warm-up's costs PERCENT of the warm-up's median time between tokens on top. On
a GPU a kernel that does nothing for so long is put behind the steps already on their way, so that
the first of a run (eight with the native engine) escape it.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterator, Sequence

from qwencli.bench.run import worker
from qwencli.config import EngineConfig
from qwencli.engine.factory import create_engine
from qwencli.engine.instruments import disturbances
from qwencli.engine.instruments.engine_wrapper import EngineWrapper
from qwencli.engine.protocol import Engine
from qwencli.messages import GenerationRequest
from qwencli.results import GenerationChunk


class SlowedEngine(EngineWrapper):
    """An `Engine` whose first request says what a token takes, and whose others are slower."""

    def __init__(self, engine: Engine, percent: float) -> None:
        super().__init__(engine)
        self._percent = percent
        self._wait: disturbances.Wait | None = None

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        for chunk in self._engine.stream(request):
            if self._wait is not None:
                if chunk.token_ids:
                    self._wait()
            elif chunk.result is not None:
                usual_s = statistics.median(chunk.result.itl_ms) / 1e3
                extra_s = usual_s * self._percent / 100
                self._wait = disturbances.waiting(self.effective.device, extra_s)
                print(f"{1e6 * extra_s:.1f} us more for each token of {1e6 * usual_s:.1f} us")
            yield chunk


def main(arguments: Sequence[str], make_engine: worker.MakeEngine = create_engine) -> int:
    (percent,) = arguments

    def make(config: EngineConfig) -> Engine:
        return SlowedEngine(make_engine(config), float(percent))

    return worker.main(make)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
