"""The worker of a study: the ordinary one around an engine whose runs are made under conditions.

    python -m qwencli.bench.studies.study_worker FOLDER

FOLDER/schedule.json names the condition of each run from run 1 on, and variables to set before
anything else is imported. What conditions observe goes to FOLDER/conditions.csv after each run.

A condition that fails must not take the runs of all others with it: its runs are made plain, carry
the observation FAILED, and count for no arm.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from qwencli.bench.inject.contention import PeakMemory
from qwencli.bench.run import worker
from qwencli.bench.storage.row_file import RowFile
from qwencli.bench.studies.conditions import CONDITIONS, PLAIN, ConditionContext, Load
from qwencli.config import EngineConfig
from qwencli.engine.factory import create_engine
from qwencli.engine.instruments.engine_wrapper import EngineWrapper
from qwencli.engine.protocol import Engine
from qwencli.messages import GenerationRequest
from qwencli.results import GenerationChunk

SCHEDULE, OBSERVED = "schedule.json", "conditions.csv"
COLUMNS = ("run", "condition", "observation", "value")
FAILED = "failed"


class StudiedEngine(EngineWrapper):
    """An `Engine` that `prepare` puts under the condition of each run before it is measured."""

    def __init__(self, engine: Engine, schedule: Sequence[str], rows: RowFile) -> None:
        super().__init__(engine)
        self._schedule, self._rows = schedule, rows
        self._loaded_for: str | None = PLAIN
        self._request: GenerationRequest | None = None
        self._held = ExitStack()
        self._run: tuple[int, str] | None = None
        self._condition = PLAIN
        self._observed: dict[str, Any] = {}
        self._seen: dict[str, Any] = {}
        self._failed: dict[str, str] = {}

    def prepare(self, run: int) -> bool:
        """End the condition of the run before and begin this one's; whether the model was loaded
        anew for it. What this takes is no part of the run."""
        self._leave()
        name = self._schedule[run - 1] if run <= len(self._schedule) else PLAIN
        self._run = (run, name)
        if name in self._failed:
            self._observed[FAILED] = self._failed[name]
            name = PLAIN
        try:
            return self._enter(name)
        except Exception as error:  # noqa: BLE001 - recorded, raised again for PLAIN
            self._give_up(name, error)
        return self._enter(PLAIN)

    def _enter(self, name: str) -> bool:
        condition = CONDITIONS[name]
        loaded = name if condition.alters else PLAIN
        fresh = condition.load is Load.EACH or loaded != self._loaded_for
        if fresh:
            self._loaded_for = None  # until it is
            with condition.loading(self._engine):
                self._engine.close()
                with PeakMemory() as peak:
                    self._engine.load()
            self._observed["load_peak_growth_bytes"] = peak.growth_bytes
            self._loaded_for = loaded
        assert self._request is not None, "the warm-up comes first"
        at = ConditionContext(self._engine, self._request, self._observed, self._seen)
        self._held.enter_context(condition.around(at))
        self._condition = name
        return fresh

    def _give_up(self, name: str, error: Exception) -> None:
        """Note that a condition cannot be made here; raises where that is the engine as it is."""
        if name == PLAIN:
            raise error
        line = (str(error).strip() or type(error).__name__).splitlines()[0]
        self._failed[name] = self._observed[FAILED] = line[:200]

    def _leave(self) -> None:
        self._held.close()
        if self._run is not None:
            run, name = self._run
            seen = [{"observation": key, "value": value} for key, value in self._observed.items()]
            self._rows.append({"run": run, "condition": name, **row} for row in seen or [{}])
        self._run, self._observed = None, {}

    def stream(self, request: GenerationRequest) -> Iterator[GenerationChunk]:
        self._request = request
        begun = False
        try:
            for chunk in self._engine.stream(request):
                begun = True
                yield chunk
        except Exception as error:
            if begun:
                raise
            self._give_up(self._condition, error)
        else:
            return
        self._held.close()
        if self._loaded_for != PLAIN:
            self._engine.close()
            self._engine.load()
            self._loaded_for = PLAIN
        yield from self._engine.stream(request)

    def close(self) -> None:
        self._leave()
        super().close()


def main(arguments: Sequence[str], make_engine: worker.MakeEngine = create_engine) -> int:
    folder = Path(arguments[0])
    plan = json.loads((folder / SCHEDULE).read_text(encoding="utf-8"))
    os.environ.update(plan["environment"])
    engines: list[StudiedEngine] = []
    with RowFile(folder / OBSERVED, COLUMNS) as rows:

        def make(config: EngineConfig) -> Engine:
            engines.append(StudiedEngine(make_engine(config), plan["runs"], rows))
            return engines[-1]

        return worker.main(make, prepare=lambda run: engines[-1].prepare(run))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
