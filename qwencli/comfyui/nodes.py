"""What each node of `schemas` does with its inputs: values of widgets and sockets to outputs.

All of them ask the one engine of `engine_keeper`. Pictures are converted when it is their turn.
"""

from __future__ import annotations

import functools
import json
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from qwencli.answer_report import shortfall, stats_line
from qwencli.capabilities import check_thinking
from qwencli.comfyui import comfy_host
from qwencli.comfyui.engine_keeper import KEEPER, Wanted
from qwencli.comfyui.pictures import Batch, video_part
from qwencli.comfyui.schemas import AUTO, NO_PRESET, BatchMode, Node, Runs
from qwencli.config import (
    SAMPLING_BOUNDS,
    Attention,
    Cache,
    EngineConfig,
    EngineName,
    Existing,
    ModelSource,
    ModelSpec,
    Quantization,
    SamplingOptions,
    check_pixels,
    check_sampling,
    check_thinking_budget,
    parse_duration,
)
from qwencli.errors import InputError, OutOfMemoryError, QwenCliError, UsageError
from qwencli.messages import GenerationRequest, VisualPart, text_message, user_message
from qwencli.output import counted
from qwencli.presets import prompt_text

if TYPE_CHECKING:
    from qwencli.dataset.asking import Manner
    from qwencli.engine.protocol import Engine
    from qwencli.engine.request import RequestSource
    from qwencli.results import GenerationResult

Values = Mapping[str, Any]
Mode = TypeVar("Mode", bound=StrEnum)
# Pictures that are named in a summary.
_MOST_NAMED = 20
_OF_MODES = ("engine", "quantization", "attention", "cache", "kernels", "kv_dtype")


@dataclass(frozen=True)
class EngineChoice:
    """What a Qwen Engine node gives the others: where the model runs.

    Args:
        key_variable: the environment variable with a server's API key.
        max_pixels, max_seq_len: see `EngineConfig`.
    """

    runs: Runs = Runs.IN_PROCESS
    endpoint: str = ""
    key_variable: str = ""
    device: str = AUTO
    max_pixels: int | None = None
    max_seq_len: int | None = None


class NodeError(Exception):
    """What ComfyUI shows of a node that failed: what is wrong, and what to do, in one line."""


def run(node: Node, given: Values) -> tuple[Any, ...]:
    """The outputs of a node.

    Args:
        given: inputs by id; those left out have their defaults.

    Raises:
        QwenCliError: what is wrong, and what to do.
    """
    said = {name: value for name, value in given.items() if value is not None}
    return _RUNS[node.id]({**node.defaults(), **said})


def node_text(error: QwenCliError) -> str:
    """An error as a node shows it, in one line: options are inputs there."""
    return _inputs_named(f"{error.message}; {error.hint}" if error.hint else error.message)


def _inputs_named(text: str) -> str:
    return re.sub(r"--([a-z][a-z-]*)", lambda flag: flag[1].replace("-", "_"), text)


def refusal(node: Node, given: Values) -> str | None:
    """What is wrong with widgets that ComfyUI's own checks do not see, as they fit each other or
    are text; None where nothing is. Loads and downloads nothing."""
    values = {**node.defaults(), **given}
    for each in node.widgets:
        value = values[each.id]
        if each.low is not None and each.high is not None and not each.low <= value <= each.high:
            return f"{each.id} {value} is out of range; give a value from {each.low} to {each.high}"
    try:
        parse_duration(values["keep_loaded"], "keep_loaded")
        _thinking_budget(values)
        if not values["custom_model"].strip():
            _resolved(values["model"])
    except QwenCliError as error:
        return node_text(error)
    return None


def changes(node: Node, given: Values) -> Any:
    """What tells two runs with the same inputs apart, for ComfyUI's cache of outputs."""
    values = {**node.defaults(), **given}
    draws = values.get("do_sample") and values.get("temperature") != 0
    if node.runs_alone or (draws and values.get("seed") == -1):
        return float("nan")  # unlike itself
    return 0


def _caption(values: Values) -> tuple[Any, ...]:
    prompt, preset = values["prompt"].strip(), values["preset"]
    if not prompt and preset == NO_PRESET:
        raise UsageError("prompt is empty and preset is none", "write a prompt or choose a preset")
    shown = _shown(values)
    if not shown:
        raise InputError(
            "no picture is connected",
            "connect images, image_1 or video; Qwen Chat answers without a picture",
        )
    return _answer(values, shown, _asked(values))


def _chat(values: Values) -> tuple[Any, ...]:
    prompt = values["prompt"].strip()
    if not prompt:
        raise UsageError("prompt is empty", "write what to ask")
    return _answer(values, _shown(values) or [tuple], prompt)


def _asked(values: Values) -> str:
    """The text of prompt, else of preset."""
    prompt, preset = values["prompt"].strip(), values["preset"]
    if prompt:
        return str(prompt)
    return prompt_text(None, None if preset == NO_PRESET else preset)


# The pictures of one request.
Shown = Callable[[], tuple[VisualPart, ...]]


def _shown(values: Values) -> list[Shown]:
    """What each request shows, made when it is its turn; [] without any picture."""
    shared: list[VisualPart] = []
    for name in ("image_1", "image_2", "image_3", "image_4"):
        if values[name] is not None:
            batch = Batch(values[name], name)
            shared += [batch.part(index) for index in range(len(batch))]
    frames = values["frames"] or None
    if values["video"] is not None:
        shared.append(video_part(values["video"], frames))
    if values["images"] is None:
        return [lambda: tuple(shared)] if shared else []
    images, mode = Batch(values["images"], "images"), _mode(values, "batch_mode", BatchMode)
    if mode is BatchMode.VIDEO:
        return [lambda: (*shared, images.as_video(values["fps"], frames))]
    if mode is BatchMode.TOGETHER:
        return [lambda: (*shared, *map(images.part, range(len(images))))]
    return [
        functools.partial(lambda index: (*shared, images.part(index)), index)
        for index in range(len(images))
    ]


def _answer(values: Values, shown: Sequence[Shown], text: str) -> tuple[Any, ...]:
    """text, texts, statistics"""
    sampling, budget = _sampling(values), _thinking_budget(values)
    # As on the command line: who bounds thoughts wants some, and 0 means none.
    thinking = bool(values["think"]) if budget is None else budget > 0
    before = (text_message("system", system),) if (system := values["system"].strip()) else ()

    def request(show: Shown) -> GenerationRequest:
        messages = (*before, user_message(text, show()))
        return GenerationRequest(messages, sampling, thinking=thinking, thinking_budget=budget)

    with _Use(values) as use:
        check_thinking(use.model.name, can_think=use.engine.can_think, wanted=thinking)
        results = answered(use.engine, [functools.partial(request, show) for show in shown])
        texts = [result.text.strip() for result in results]
        return "\n".join(texts), texts, use.statistics(results)


def answered(engine: Engine, requests: Sequence[RequestSource]) -> list[GenerationResult]:
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
    expected = _expected(engine, len(requests))
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


def _expected(engine: Engine, count: int) -> int | None:
    """What to tell `engine.client` of so many requests.

    On a GPU the graphs of a batch are made once and kept with the engine, so that a few pictures
    pay for them too. On a CPU a few are answered sooner one after the other.
    """
    return count if engine.effective.device == "cpu" or count == 1 else None


class _Use:
    """The engine that a node's inputs ask for, loaded, inside the block."""

    engine: Engine

    def __init__(self, values: Values) -> None:
        self._wanted = _wanted(values)
        self._keep_s = parse_duration(values["keep_loaded"], "keep_loaded")

    def __enter__(self) -> _Use:
        self._using = KEEPER.using(self._wanted, self._keep_s)
        self.engine = self._using.__enter__()
        self._began_s = time.perf_counter()
        return self

    def __exit__(self, *exc: Any) -> bool | None:
        return self._using.__exit__(*exc)

    @property
    def model(self) -> ModelSpec:
        return self._wanted.config.model

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
                *_first_lines([f"{n}: {each[0]}" for n, each in enumerate(figures, start=1)]),
                f"the last one, of {self.model.name}:",
            ]
        lines += figures[-1][1:]
        lines += [f"note: {warning}" for warning in self.engine.load_warnings]
        said = [note for result in results for note in (*result.notes, shortfall(result)) if note]
        lines += [f"note: {_inputs_named(note)}" for note in dict.fromkeys(said)]
        if self.model.source is ModelSource.BUNDLED:
            lines.append(
                "note: the bundled model knows drawn scenes only; choose qwen3-vl-4b or another "
                "model for photographs"
            )
        return "\n".join(lines)


def _first_lines(lines: Sequence[str]) -> list[str]:
    """As many of the lines as a node has room for, and how many more there are."""
    more = len(lines) - _MOST_NAMED
    return [*lines[:_MOST_NAMED], *([f"and {more} more"] if more > 0 else [])]


def _structured(values: Values) -> tuple[Any, ...]:
    from qwencli.dataset.asking import Manner
    from qwencli.dataset.guards import Guards
    from qwencli.dataset.prompting import asks_for
    from qwencli.engine.constrained import SchemaCheck, read_schema

    schema = read_schema(values["schema"], "schema")
    prompt = _escaped(values["prompt"]) or asks_for(schema)
    manner = Manner(
        _prompts(prompt),
        guards=Guards(invalid=SchemaCheck(schema)),
        schema=schema,
        thinking_budget=_thinking_budget(values),
    )
    texts, statistics = _shaped(values, Batch(values["images"], "images"), manner)
    one = texts[0] if len(texts) == 1 else f"[{', '.join(texts)}]"
    return one, texts, statistics


def _boxes(values: Values) -> tuple[Any, ...]:
    from qwencli.dataset import boxes
    from qwencli.dataset.asking import Manner
    from qwencli.dataset.guards import Guards
    from qwencli.engine.constrained import SchemaCheck, read_schema

    schema = read_schema(boxes.schema(), "the schema of boxes")
    manner = Manner(
        _prompts(_escaped(values["prompt"]) or boxes.PROMPT),
        guards=Guards(invalid=SchemaCheck(schema)),
        schema=schema,
        boxes=True,
        thinking_budget=_thinking_budget(values),
    )
    batch = Batch(values["images"], "images")
    texts, statistics = _shaped({"system": "", **values}, batch, manner)
    found = [json.loads(text) for text in texts]
    drawn = [boxes.draw(batch.image(index), each, None) for index, each in enumerate(found)]
    mask = batch.masks_like([[box["bbox_2d"] for box in each] for each in found])
    return batch.pictures_like(drawn), texts, mask, statistics


def _escaped(prompt: str) -> str:
    """A prompt in which braces mean themselves."""
    return prompt.strip().replace("{", "{{").replace("}", "}}")


def _prompts(prompt: str) -> Any:
    from qwencli.dataset.prompting import prompt_set

    return prompt_set(prompt=prompt, default="")


def _shaped(values: Values, batch: Batch, manner: Manner) -> tuple[list[str], str]:
    """An answer about each picture in the form that `manner` wants, and statistics.

    Raises:
        QwenCliError: the first picture that has no such answer.
    """
    from qwencli.dataset.asking import Asking
    from qwencli.dataset.pipeline import Failed, Outcome, Task, outcomes
    from qwencli.dataset.sources import Item, Listing
    from qwencli.dataset.worker import make_ready

    parts = {batch.name_of(index): index for index in range(len(batch))}
    tasks = [Task(Item(name)) for name in parts]
    system = values["system"].strip()
    asking = Asking(
        manner,
        Listing(Path()),
        _sampling(values),
        lambda item: batch.part(parts[item.key]),
        system=(text_message("system", system),) if system else (),
    )
    with _Use(values) as use:
        make_ready(use.engine, asking)
        made: dict[str, Outcome] = {}
        tell, waiting = comfy_host.progress(len(tasks)), tasks
        for last_try in (False, True):
            left, expected = iter(waiting), _expected(use.engine, len(waiting))
            take = functools.partial(next, left, None)
            for outcome in outcomes(use.engine, take, asking.stages(), expected=expected):
                made[outcome.task.item.key] = outcome
                tell(len(made))
            waiting = [task for task in tasks if _ran_out(made[task.item.key])]
            if last_try or not waiting:
                break
            comfy_host.free_models()
        texts, results = [], []
        for name in parts:
            outcome = made[name]
            if isinstance(outcome, Failed):
                raise outcome.error
            texts.append(outcome.caption)
            results.append(outcome.result)
        return texts, use.statistics(results)


def _ran_out(outcome: Any) -> bool:
    return isinstance(getattr(outcome, "error", None), OutOfMemoryError)


def _folder(values: Values) -> tuple[Any, ...]:
    from qwencli.dataset.asking import Asking, Manner
    from qwencli.dataset.caption_set import open_set, place_of
    from qwencli.dataset.pipeline import Captioned, Outcome
    from qwencli.dataset.progress import duration
    from qwencli.dataset.prompting import Template, prompt_set
    from qwencli.dataset.shape import Shape
    from qwencli.dataset.sources import Listing, Selection, list_inputs
    from qwencli.dataset.worker import Alone
    from qwencli.dataset.worklist import Wish

    path, glob = values["path"].strip(), values["glob"].strip()
    if not path:
        raise UsageError("path is empty", "give the folder with the pictures")
    if not _is_there(path):
        raise InputError(f"{path}: no such folder", "check path, as this machine sees it")
    listing = list_inputs([path], Selection(values["recursive"], (glob,) if glob else ()))
    if not (listing.items or listing.refused):
        raise InputError(
            f"{path}: no picture or video there",
            "check path and glob" if values["recursive"] else "check path and glob, or recursive",
        )
    prefix, suffix = (
        Template(values[name], name) if values[name] else None for name in ("prefix", "suffix")
    )
    prompts = prompt_set(
        prompt=_asked(values),
        default="",
        seed=values["seed"],
        frames=[each for each in (prefix, suffix) if each is not None],
    )
    budget, sampling = _thinking_budget(values), _sampling(values)
    manner = Manner(prompts, Shape(prefix, suffix), thinking_budget=budget)
    extension, output = values["caption_extension"].strip() or ".txt", values["output"].strip()
    place = place_of(listing, Path(output) if output else None, extension)
    system, where = values["system"].strip(), Listing(listing.base)
    asking = Asking(
        manner,
        where,
        sampling,
        where.open,
        system=(text_message("system", system),) if system else (),
        caption_extension=extension,
    )
    asking.check_fields(listing.items)
    wish = Wish(_mode(values, "existing", Existing), retry_failed=values["retry_failed"])
    wanted = _wanted(values)
    settings = {
        "model": wanted.config.model.name,
        **manner.settings(),
        "system": system or None,
        "frames": None,
        "sampling": asdict(sampling),
        "engine": {name: str(values[name]) for name in ("quantization", "attention", "cache")},
    }
    failed: list[str] = []
    last: list[GenerationResult] = []
    with open_set(
        listing, place.root, place.sink, wish, settings, manifest_name=place.manifest
    ) as whole:
        work, done = whole.work, 0
        tell = comfy_host.progress(max(1, len(work.tasks)))

        def report(outcome: Outcome) -> None:
            nonlocal done
            if isinstance(outcome, Captioned):
                last[:] = [outcome.result]
            else:
                failed.append(node_text(outcome.error))
            done += 1
            tell(min(done, len(work.tasks)))

        statistics = "no caption was made in this run, so that there are no figures"
        if work.tasks or work.refused:
            whole.begin(report)
            if work.tasks:
                with _Use(values) as use:
                    whole.caption(Alone(use.engine, asking), report, lambda: False)
                    statistics = use.statistics(last) if last else statistics
            whole.end()
        failures, totals = whole.write_failures(), whole.totals
    lines = [f"{listing.base}: {totals.captioned} captioned, {totals.failed} failed"]
    if totals.captioned:
        rate = totals.captioned / totals.seconds
        tokens = totals.num_new_tokens / totals.seconds
        lines[0] += f" in {duration(totals.seconds)}"
        statistics = f"{rate:.1f} captions/s, {tokens:.0f} tok/s; the last one:\n{statistics}"
    if work.num_existing:
        lines.append(f"{work.num_existing} had a caption already")
    if work.failed_before:
        lines.append(f"{len(work.failed_before)} failed before (retry_failed tries again)")
    lines += _first_lines(failed)
    if failures is not None:
        lines.append(f"what failed, and why: {failures}")
    return "\n".join(lines), totals.captioned, totals.failed, statistics


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:
        return False  # too long a name, or one nobody may look at


def _engine(values: Values) -> tuple[Any, ...]:
    runs = _mode(values, "runs", Runs)
    if runs is Runs.REMOTE and not values["endpoint"].strip():
        raise UsageError("endpoint is empty", "give the server, as http://127.0.0.1:8000/v1")
    most = values["max_pixels"] or None
    check_pixels(None, most)
    return (
        EngineChoice(
            runs,
            values["endpoint"].strip() if runs is Runs.REMOTE else "",
            values["api_key_variable"].strip() if runs is Runs.REMOTE else "",
            values["device"].strip() or AUTO,
            most,
            values["max_seq_len"] or None,
        ),
    )


def _wanted(values: Values) -> Wanted:
    """The engine that a node's inputs ask for."""
    from qwencli.models.user_config import model_settings, user_config_folder

    choice: EngineChoice = values["engine"] or EngineChoice()
    modes: dict[str, Any] = {
        "quantization": _mode(values, "quantization", Quantization),
        "attention": _mode(values, "attention", Attention),
        "cache": None if values["cache"] == AUTO else _mode(values, "cache", Cache),
    }
    name = values["custom_model"].strip() or values["model"]
    own: dict[str, Any] = {"device": choice.device}
    own |= {"max_pixels": choice.max_pixels} if choice.max_pixels else {}
    own |= {"max_seq_len": choice.max_seq_len} if choice.max_seq_len else {}
    if choice.runs is Runs.REMOTE:
        from qwencli.engine.remote import remote_model

        named = None if name == AUTO else name
        spec = remote_model([choice.endpoint], named, key_variable=choice.key_variable)
        own |= {"engine": EngineName.REMOTE, "endpoints": (choice.endpoint,)}
        return Wanted(EngineConfig(spec, **modes, **own), choice.runs, choice.key_variable)
    spec = _resolved(name)
    # As on the command line: modes of config.toml fit each other, and one that is said undoes all.
    settings = model_settings(user_config_folder(), spec.name)
    plain = EngineConfig(spec)
    if choice.device != AUTO or any(modes[each] != getattr(plain, each) for each in modes):
        settings = {key: value for key, value in settings.items() if key not in _OF_MODES}
        settings |= modes
    return Wanted(EngineConfig(spec, **settings | own), choice.runs)


def _resolved(name: str) -> ModelSpec:
    from qwencli.models.resolve import resolve_model

    if name != AUTO:
        return resolve_model(name)
    return resolve_model(None, free_bytes=comfy_host.model_bytes())


def _sampling(values: Values) -> SamplingOptions:
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    # The widgets go down to -1, which lies below every range.
    said: dict[str, Any] = {
        name: None if values[name] < SAMPLING_BOUNDS[name].low else values[name] for name in names
    }
    options = SamplingOptions(
        do_sample=None if values["do_sample"] else False,
        max_new_tokens=values["max_new_tokens"],
        seed=values["seed"],
        **said,
    )
    check_sampling(options)
    return options


def _thinking_budget(values: Values) -> int | None:
    """Raises UsageError: it leaves nothing for an answer."""
    budget: int | None = None if values["thinking_budget"] < 0 else values["thinking_budget"]
    check_thinking_budget(budget, values["max_new_tokens"])
    return budget


def _mode(values: Values, name: str, modes: type[Mode]) -> Mode:
    try:
        return modes(values[name])
    except ValueError as error:
        raise UsageError(
            f"{name} {values[name]!r} is unknown", f"use one of: {', '.join(modes)}"
        ) from error


_RUNS: Mapping[str, Callable[[Values], tuple[Any, ...]]] = {
    "QwencliCaption": _caption,
    "QwencliChat": _chat,
    "QwencliCaptionFolder": _folder,
    "QwencliStructuredCaption": _structured,
    "QwencliBoxes": _boxes,
    "QwencliEngine": _engine,
}
