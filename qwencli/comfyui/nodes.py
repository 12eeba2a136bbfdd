"""What each node of `schemas` does with its inputs: values of widgets and sockets to outputs.

All of them ask the one engine of `engine_keeper`. Pictures are converted when it is their turn.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from qwencli.comfyui import dataset_nodes
from qwencli.comfyui.engine_use import EngineUse, generate_all
from qwencli.comfyui.node_inputs import (
    EngineChoice,
    Shown,
    Values,
    check_value,
    choice_of,
    node_text,
    pictures_of,
    prompt_of,
    resolved_model,
    sampling_options,
    thinking_budget,
)
from qwencli.comfyui.schemas import AUTO, NO_PRESET, Node, RunsWhere, fold_seed
from qwencli.config import check_pixels
from qwencli.engine.abilities import Abilities
from qwencli.errors import InputError, QwenCliError, UsageError
from qwencli.messages import GenerationRequest, system_messages, user_message
from qwencli.typed_values import parse_duration


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
    if isinstance(said.get("seed"), int):
        said["seed"] = fold_seed(said["seed"])
    # What came over a link has been checked by nobody; nodes that give any type can give anything.
    for each in node.widgets:
        if each.id in said:
            check_value(each, said[each.id])
    return _RUNS[node.id]({**node.defaults(), **said})


def validation_error(node: Node, given: Values) -> str | None:
    """What is wrong with widgets that ComfyUI's own checks do not see, as they fit each other or
    are text; None where nothing is. Loads and downloads nothing.

    Args:
        given: as ComfyUI tells it before a graph runs: None is what comes over a link.
    """
    values = {**node.defaults(), **given}
    known = {name for name in values if name not in given or given[name] is not None}
    try:
        for each in node.widgets:
            if each.id in known:
                check_value(each, values[each.id])
        if "keep_loaded" in known:
            parse_duration(values["keep_loaded"], "keep_loaded")
        if {"thinking_budget", "max_new_tokens"} <= known:
            thinking_budget(values)
        if {"custom_model", "model"} <= known and not values["custom_model"].strip():
            resolved_model(values["model"])
    except QwenCliError as error:
        return node_text(error)
    return None


def fingerprint(node: Node, given: Values) -> Any:
    """What tells two runs with the same inputs apart, for ComfyUI's cache of outputs."""
    values = {**node.defaults(), **given}
    # What comes over a link is None here; its changes ComfyUI sees itself.
    draws = values.get("do_sample") is not False and values.get("temperature") != 0
    if node.runs_alone or (draws and values.get("seed") == -1):
        return float("nan")  # unlike itself
    return 0


def _caption(values: Values) -> tuple[Any, ...]:
    prompt, preset = values["prompt"].strip(), values["preset"]
    if not prompt and preset == NO_PRESET:
        raise UsageError("prompt is empty and preset is none", "write a prompt or choose a preset")
    shown = pictures_of(values)
    if not shown:
        raise InputError(
            "no picture is connected",
            "connect images, image_1 or video; Qwen Chat answers without a picture",
        )
    return _answer(values, shown, prompt_of(values))


def _chat(values: Values) -> tuple[Any, ...]:
    prompt = values["prompt"].strip()
    if not prompt:
        raise UsageError("prompt is empty", "write what to ask")
    return _answer(values, pictures_of(values), prompt)


def _answer(values: Values, shown: Sequence[Shown], text: str) -> tuple[Any, ...]:
    """text, texts, statistics; of one answer where nothing is shown."""
    sampling, budget = sampling_options(values), thinking_budget(values)
    # As on the command line: who bounds thoughts wants some, and 0 means none.
    thinking = bool(values["think"]) if budget is None else budget > 0
    before = system_messages(values["system"].strip())

    def request(show: Shown) -> GenerationRequest:
        messages = (*before, user_message(text, show()))
        return GenerationRequest(messages, sampling, thinking=thinking, thinking_budget=budget)

    requests = [functools.partial(request, show) for show in shown or [tuple]]
    with EngineUse(values, Abilities(pictures=bool(shown), thoughts=thinking)) as use:
        results = generate_all(use.engine, requests)
        texts = [result.text.strip() for result in results]
        return "\n".join(texts), texts, use.statistics(results)


def _engine(values: Values) -> tuple[Any, ...]:
    runs = choice_of(values, "runs", RunsWhere)
    if runs is RunsWhere.REMOTE and not values["endpoint"].strip():
        raise UsageError("endpoint is empty", "give the server, as http://127.0.0.1:8000/v1")
    most = values["max_pixels"] or None
    check_pixels(None, most)
    return (
        EngineChoice(
            runs,
            values["endpoint"].strip() if runs is RunsWhere.REMOTE else "",
            values["api_key_variable"].strip() if runs is RunsWhere.REMOTE else "",
            values["device"].strip() or AUTO,
            most,
            values["max_seq_len"] or None,
        ),
    )


_RUNS: Mapping[str, Callable[[Values], tuple[Any, ...]]] = {
    "QwencliCaption": _caption,
    "QwencliChat": _chat,
    "QwencliCaptionFolder": dataset_nodes.caption_folder,
    "QwencliStructuredCaption": dataset_nodes.structured_captions,
    "QwencliBoxes": dataset_nodes.find_boxes,
    "QwencliEngine": _engine,
}
