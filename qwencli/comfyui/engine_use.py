"""One node using the engine: loaded, asked about its pictures, and what there is to say of it."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from qwencli.answer_report import shortfall, stats_line
from qwencli.comfyui import comfy_host
from qwencli.comfyui.engine_keeper import KEEPER
from qwencli.comfyui.node_inputs import Values, engine_key, with_input_names
from qwencli.config import ModelSource, ModelSpec
from qwencli.errors import OutOfMemoryError, QwenCliError
from qwencli.output import counted
from qwencli.typed_values import parse_duration

if TYPE_CHECKING:
    from qwencli.engine.abilities import Abilities
    from qwencli.engine.protocol import Engine
    from qwencli.engine.request import RequestSource
    from qwencli.results import GenerationResult

# Pictures that are named in a summary.
_MOST_NAMED = 20


class EngineUse:
    """The engine that a node's inputs ask for, loaded, inside the block.

    Args:
        wanted: of its model; refused before the load where that can be told.
    """

    engine: Engine

    def __init__(self, values: Values, wanted: Abilities) -> None:
        self._key = engine_key(values)
        self._keep_s = parse_duration(values["keep_loaded"], "keep_loaded")
        self._wanted = wanted

    def __enter__(self) -> EngineUse:
        self._using = KEEPER.using(self._key, self._keep_s, self._wanted)
        self.engine = self._using.__enter__()
        self._began_s = time.perf_counter()
        return self

    def __exit__(self, *exc: Any) -> bool | None:
        return self._using.__exit__(*exc)

    @property
    def model(self) -> ModelSpec:
        return self._key.config.model

    def statistics(self, results: Sequence[GenerationResult]) -> str:
        """Lines of figures, of the modes that ran, and of what else there is to say. Short ones: a
        node is narrow, and may show few of them."""
        seconds = time.perf_counter() - self._began_s
        figures = [stats_line(result).split(" | ") for result in results]
        lines = [f"{self.model.name}: {each[0]}" for each in figures]
        if len(results) > 1:
            tokens = sum(result.num_new_tokens for result in results)
            lines = [
                f"{len(results)} answers, {counted(tokens, 'token')} in {seconds:.2f} s: "
                f"{len(results) / seconds:.1f} answers/s, {tokens / seconds:.0f} tok/s together",
                *first_lines([f"{n}: {each[0]}" for n, each in enumerate(figures, start=1)]),
                f"the last one, of {self.model.name}:",
            ]
        lines += figures[-1][1:]
        lines += [f"note: {warning}" for warning in self.engine.load_warnings]
        said = [note for result in results for note in (*result.notes, shortfall(result)) if note]
        lines += [f"note: {with_input_names(note)}" for note in dict.fromkeys(said)]
        if self.model.source is ModelSource.BUNDLED:
            lines.append(
                "note: the bundled model knows drawn scenes only; choose qwen3-vl-4b or another "
                "model for photographs"
            )
        return "\n".join(lines)


def first_lines(lines: Sequence[str]) -> list[str]:
    """As many of the lines as a node has room for, and how many more there are."""
    more = len(lines) - _MOST_NAMED
    return [*lines[:_MOST_NAMED], *([f"and {more} more"] if more > 0 else [])]


def generate_all(engine: Engine, requests: Sequence[RequestSource]) -> list[GenerationResult]:
    """The answers, made together where there are several.

    What runs out of memory is asked once more when ComfyUI has given up that of its models.

    Raises:
        QwenCliError: the first request that has no answer.
    """
    from qwencli.engine.client import generate_many
    from qwencli.engine.request import request_of

    if len(requests) == 1:
        try:
            return [engine.generate(request_of(requests[0]))]
        except OutOfMemoryError:
            pass
        comfy_host.free_models()
        return [engine.generate(request_of(requests[0]))]
    expected = expected_requests(engine, len(requests))
    made: dict[int, GenerationResult | QwenCliError] = {}
    waiting, tell = list(range(len(requests))), comfy_host.progress(len(requests))
    for last_try in (False, True):
        sources = (requests[index] for index in waiting)
        results = generate_many(engine, sources, expected=expected)
        for index, result in zip(waiting, results, strict=True):
            made[index] = result
            tell(sum(not isinstance(each, QwenCliError) for each in made.values()))
        waiting = [index for index in waiting if isinstance(made[index], OutOfMemoryError)]
        if last_try or not waiting:
            break
        comfy_host.free_models()
    answers = []
    for index in range(len(requests)):
        result = made[index]
        if isinstance(result, QwenCliError):
            raise result
        answers.append(result)
    return answers


def expected_requests(engine: Engine, count: int) -> int | None:
    """What to tell `engine.client` of so many requests.

    On a GPU the graphs of a batch are made once and kept with the engine, so that a few pictures
    pay for them too. On a CPU a few are answered sooner one after the other.
    """
    return count if engine.effective.device == "cpu" or count == 1 else None
