"""What the inputs of a node ask for: its pictures, its prompt, its engine and how it answers.

Inputs are options of the command line under other names; errors of those name inputs here.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, TypeVar

from qwencli.comfyui import comfy_host
from qwencli.comfyui.engine_keeper import EngineKey, log
from qwencli.comfyui.pictures import Batch, video_part
from qwencli.comfyui.schemas import AUTO, NO_PRESET, BatchMode, Input, Kind, RunsWhere
from qwencli.config import (
    SAMPLING_BOUNDS,
    Attention,
    Cache,
    EngineConfig,
    EngineName,
    ModelSpec,
    Quantization,
    SamplingOptions,
    check_sampling,
    check_thinking_budget,
)
from qwencli.engine.machine.device import why_no_graphs
from qwencli.errors import QwenCliError, UsageError
from qwencli.messages import VisualPart, prompt_text

Values = Mapping[str, Any]
Mode = TypeVar("Mode", bound=StrEnum)
# What the values of widgets are, and in words.
_VALUES: Mapping[Kind, tuple[tuple[type, ...], str]] = {
    Kind.STRING: ((str,), "text"),
    Kind.COMBO: ((str,), "text"),
    Kind.INT: ((int,), "a whole number"),
    Kind.FLOAT: ((int, float), "a number"),
    Kind.BOOLEAN: ((bool,), "true or false"),
}
# Options whose input here has another name: `model` is a list without a server's models, and a
# resident process runs whatever keep_loaded says.
_INPUT_NAMES: Mapping[str, str] = {
    "--keep-loaded 0": "runs: in-process",
    "--model": "custom_model",
    "--api-key": "api_key_variable",
}
_OF_MODES = ("engine", "quantization", "attention", "cache", "kernels", "kv_dtype")


@dataclass(frozen=True)
class EngineChoice:
    """What a Qwen Engine node gives the others: where the model runs.

    Args:
        key_variable: the environment variable with a server's API key.
        max_pixels, max_seq_len: see `EngineConfig`.
    """

    runs: RunsWhere = RunsWhere.IN_PROCESS
    endpoint: str = ""
    key_variable: str = ""
    device: str = AUTO
    max_pixels: int | None = None
    max_seq_len: int | None = None


def node_text(error: QwenCliError) -> str:
    """An error as a node shows it, in one line: options are inputs there."""
    return with_input_names(f"{error.message}; {error.hint}" if error.hint else error.message)


def with_input_names(text: str) -> str:
    return re.sub(
        r"--keep-loaded 0|--[a-z][a-z-]*",
        lambda flag: _INPUT_NAMES.get(flag[0], flag[0][2:].replace("-", "_")),
        text,
    )


def check_value(place: Input, value: Any) -> None:
    """Raise UsageError for a value that a widget could not have."""
    types, wanted = _VALUES[place.kind]
    # True is an int to Python, and no number to a person.
    fits = isinstance(value, types) and (bool in types or not isinstance(value, bool))
    if not fits:
        raise UsageError(
            f"{place.id} is {value!r:.60}, not {wanted}", f"connect {wanted}, or nothing"
        )
    low, high = place.low, place.high
    if low is not None and high is not None and not low <= value <= high:
        raise UsageError(
            f"{place.id} {value} is out of range", f"give a value from {low} to {high}"
        )


def prompt_of(values: Values) -> str:
    """The text of prompt, else of preset."""
    prompt, preset = values["prompt"].strip(), values["preset"]
    if prompt:
        return str(prompt)
    return prompt_text(None, None if preset == NO_PRESET else preset)


# The pictures of one request.
Shown = Callable[[], tuple[VisualPart, ...]]


def pictures_of(values: Values) -> list[Shown]:
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
    images, mode = Batch(values["images"], "images"), choice_of(values, "batch_mode", BatchMode)
    if mode is BatchMode.VIDEO:
        return [lambda: (*shared, images.as_video(values["fps"], frames))]
    if mode is BatchMode.TOGETHER:
        return [lambda: (*shared, *map(images.part, range(len(images))))]
    return [
        functools.partial(lambda index: (*shared, images.part(index)), index)
        for index in range(len(images))
    ]


def engine_key(values: Values) -> EngineKey:
    """The engine that a node's inputs ask for."""
    from qwencli.models.user_config import model_settings, user_config_folder

    choice = values["engine"] or EngineChoice()
    if not isinstance(choice, EngineChoice):
        raise UsageError(
            f"engine is {choice!r:.60}, no engine", "connect the output of a Qwen Engine node"
        )
    modes: dict[str, Any] = {
        "quantization": choice_of(values, "quantization", Quantization),
        "attention": choice_of(values, "attention", Attention),
        "cache": None if values["cache"] == AUTO else choice_of(values, "cache", Cache),
    }
    name = values["custom_model"].strip() or values["model"]
    own: dict[str, Any] = {"device": choice.device}
    own |= {"max_pixels": choice.max_pixels} if choice.max_pixels else {}
    own |= {"max_seq_len": choice.max_seq_len} if choice.max_seq_len else {}
    if choice.runs is RunsWhere.REMOTE:
        from qwencli.engine.remote import remote_model

        named = None if name == AUTO else name
        spec = remote_model([choice.endpoint], named, key_variable=choice.key_variable)
        own |= {"engine": EngineName.REMOTE, "endpoints": (choice.endpoint,)}
        return EngineKey(EngineConfig(spec, **modes, **own), choice.runs, choice.key_variable)
    spec = resolved_model(name)
    # As on the command line: modes of config.toml fit each other, and one that is said undoes all.
    settings = model_settings(user_config_folder(), spec.name)
    plain = EngineConfig(spec)
    if choice.device != AUTO or any(modes[each] != getattr(plain, each) for each in modes):
        settings = {key: value for key, value in settings.items() if key not in _OF_MODES}
        settings |= modes
    config = EngineConfig(spec, **settings | own)
    return EngineKey(config, where_it_runs(choice.runs, config))


def where_it_runs(asked: RunsWhere, config: EngineConfig) -> RunsWhere:
    """Where a model runs that was asked for in one place: not in this process where that cannot
    capture graphs, without which a step is thousands of launches."""
    if asked is not RunsWhere.IN_PROCESS or config.cache not in (None, Cache.STATIC_GRAPH):
        return asked
    why = why_no_graphs()
    if why is None or config.device == "cpu":
        return asked
    log.info("qwencli: %s; the model runs in a process of its own (resident)", why)
    return RunsWhere.RESIDENT


def resolved_model(name: str) -> ModelSpec:
    from qwencli.models.resolve import resolve_model

    if name != AUTO:
        return resolve_model(name)
    return resolve_model(None, free_bytes=comfy_host.model_bytes())


def sampling_options(values: Values) -> SamplingOptions:
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


def thinking_budget(values: Values) -> int | None:
    """Raises UsageError: it leaves nothing for an answer."""
    budget: int | None = None if values["thinking_budget"] < 0 else values["thinking_budget"]
    check_thinking_budget(budget, values["max_new_tokens"])
    return budget


def choice_of(values: Values, name: str, modes: type[Mode]) -> Mode:
    try:
        return modes(values[name])
    except ValueError as error:
        raise UsageError(
            f"{name} {values[name]!r} is unknown", f"use one of: {', '.join(modes)}"
        ) from error
