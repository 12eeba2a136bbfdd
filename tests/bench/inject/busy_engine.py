"""An engine that computes for every token and gives it at once.

As a script a worker: with one argument the ordinary one ("plain") or one that is so many percent
slower, with three the one that injects.
"""

from __future__ import annotations

import itertools
import sys
import time
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[3]))

from qwencli.bench.inject import injection_worker as worker
from qwencli.bench.inject import slowdown_worker
from qwencli.bench.run import worker as plain
from qwencli.results import GenerationChunk, GenerationResult, Timings
from tests.bench.fake_engine import FakeEngine


class BusyEngine(FakeEngine):
    TOKEN_S = 0.0015

    def stream(self, request):
        start = time.perf_counter()
        times = []
        for index in range(request.sampling.max_new_tokens):
            end = time.thread_time() + self.TOKEN_S
            while time.thread_time() < end:
                pass
            times.append(time.perf_counter())
            yield GenerationChunk("", (index,))
        steps = [b - a for a, b in itertools.pairwise(times)]
        ttft, decode = times[0] - start, sum(steps)
        timings = Timings(
            self.load_s, 0.0, None, ttft, ttft, decode, times[-1] - start, len(steps) / decode
        )
        tokens = tuple(range(len(times)))
        result = GenerationResult(
            "the same", tokens, "length", 7, 0, timings, self.effective, tuple(times), None
        )
        yield GenerationChunk("", (), result)


if __name__ == "__main__":
    match sys.argv[1:]:
        case ["plain"]:
            sys.exit(plain.main(BusyEngine))
        case [percent]:
            sys.exit(slowdown_worker.main([percent], BusyEngine))
        case arguments:
            sys.exit(worker.main(arguments, BusyEngine))
