"""The worker of a fault-injection campaign: the ordinary one around a disturbed engine.

    python -m qwencli.bench.inject.injection_worker TRUTH.csv SEED CAUSE,none,...

The last argument names the cause of each run from run 1 on; "none" = undisturbed. What was
done, and when, is written to TRUTH.csv after each run.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from qwencli.bench.causes import Cause
from qwencli.bench.inject.confusion import NONE, TRUTH_COLUMNS, rows_of
from qwencli.bench.inject.faults import KINDS, Fault
from qwencli.bench.run import worker
from qwencli.bench.storage.row_file import RowFile
from qwencli.config import EngineConfig
from qwencli.engine.factory import create_engine
from qwencli.engine.instruments.engine_wrapper import EngineWrapper
from qwencli.engine.protocol import Engine
from qwencli.messages import GenerationRequest
from qwencli.results import GenerationChunk


class DisturbedEngine(EngineWrapper):
    """An `Engine` whose runs are disturbed by schedule; run 0 and what follows the last are not."""

    def __init__(self, engine: Engine, schedule: Sequence[str], seed: int, truth: RowFile) -> None:
        super().__init__(engine)
        self._schedule, self._truth = schedule, truth
        self._seed, self._run = seed, 0
        self._faults: dict[str, Fault] = {}

    def load(self) -> None:
        super().load()
        # All at once: starting one later would disturb the runs around it.
        for name in sorted(set(self._schedule) - {NONE, *self._faults}):
            self._faults[name] = KINDS[Cause(name)].make(self.effective.device)

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        run, self._run = self._run, self._run + 1
        if not 1 <= run <= len(self._schedule):
            yield from self._engine.stream(request)
            return
        name = self._schedule[run - 1]
        if name == NONE:
            yield from self._engine.stream(request)
            self._truth.append(rows_of(run, NONE, []))
            return
        fault = self._faults[name]
        tokens = request.sampling.max_new_tokens
        assert tokens is not None
        chance = random.Random(f"{self._seed} {run}")
        yield from fault.disturb(self._engine.stream(request), tokens, chance)
        self._truth.append(rows_of(run, name, fault.spans))

    def end(self) -> None:
        """Close the faults."""
        for fault in self._faults.values():
            fault.close()


def main(arguments: Sequence[str], make_engine: worker.MakeEngine = create_engine) -> int:
    path, seed, schedule = arguments
    engines: list[DisturbedEngine] = []
    with RowFile(Path(path), TRUTH_COLUMNS) as truth:

        def make(config: EngineConfig) -> Engine:
            engine = DisturbedEngine(make_engine(config), schedule.split(","), int(seed), truth)
            engines.append(engine)
            return engine

        try:
            return worker.main(make)
        finally:
            for engine in engines:
                engine.end()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
