"""Sampling settings that are changed in the middle of a chat: `/set NAME=VALUE`."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import fields, replace
from typing import Any

from qwencli.config import SAMPLING_BOUNDS, SamplingOptions, check_sampling
from qwencli.errors import UsageError
from qwencli.output import visible
from qwencli.typed_values import read_number, read_whole

_ON_OFF = {
    **dict.fromkeys(("on", "yes", "true", "1"), True),
    **dict.fromkeys(("off", "no", "false", "0", "default"), False),
}
# Settings that are on or off.
_SWITCHES = ("greedy", "thinking")
# Of these a value asks for sampling; `resolve_sampling` has the rule.
_SAMPLING_SWITCHES = ("temperature", "top_p", "top_k", "min_p")
SETTINGS = (*SAMPLING_BOUNDS, "greedy", "stop", "thinking", "thinking_budget")


def parse_setting(said: str) -> tuple[str, str]:
    """(name, value) of `NAME=VALUE`.

    Raises:
        UsageError: there is no such setting, or no value.
    """
    name, value = (*re.split(r"\s*=\s*|\s+", said.strip(), maxsplit=1), "")[:2]
    name = name.lstrip("-").replace("-", "_").lower()
    if name not in SETTINGS:
        raise UsageError(f"/set knows no {visible(name)}", f"it knows {', '.join(SETTINGS)}")
    if not value:
        example = "on, or off" if name in _SWITCHES else "VALUE, or default"
        raise UsageError(f"/set {name} needs a value", f"/set {name}={example}")
    return name, value


def parse_switch(name: str, value: str) -> bool:
    """Whether a setting of two is on, in any of the words of `_ON_OFF`; "default" is off.

    Raises:
        UsageError: neither.
    """
    if value.lower() not in _ON_OFF:
        raise UsageError(f"{name} is on or off, not {visible(value)}", f"/set {name}=on, or off")
    return _ON_OFF[value.lower()]


def parse_budget(value: str) -> int | None:
    """How many tokens a model may think; "default" is as many as its answer has.

    Raises:
        UsageError: no whole number, or one below 0.
    """
    if value.lower() == "default":
        return None
    budget = read_whole(value)
    if budget is None or budget < 0:
        raise UsageError(
            f"thinking_budget is a whole number from 0 on, not {visible(value)}",
            "/set thinking_budget=VALUE, or default",
        )
    return budget


def with_setting(sampling: SamplingOptions, name: str, value: str) -> SamplingOptions:
    """The options with a value in place; "default" takes one back.

    Raises:
        UsageError: a value that the setting does not take.
    """
    default = value.lower() == "default"
    if name == "stop":
        return replace(sampling, stop=() if default else (value,))
    if name == "greedy":
        return replace(sampling, do_sample=False if parse_switch(name, value) else None)
    is_whole = SAMPLING_BOUNDS[name].integer
    number: Any = None if default else (read_whole if is_whole else read_number)(value)
    if number is None and not default:
        what = "a whole number" if is_whole else "a number"
        raise UsageError(f"{name} is {what}, not {visible(value)}", f"/set {name}=VALUE")
    changed = replace(sampling, **{name: number})
    try:
        check_sampling(changed)
    except UsageError as error:
        raise UsageError(f"{name} {visible(value)} is out of range", error.hint) from None
    if name in _SAMPLING_SWITCHES and not default and sampling.do_sample is False:
        return replace(changed, do_sample=None)
    return changed


def describe_settings(sampling: SamplingOptions) -> Iterator[str]:
    """Each setting as `NAME=VALUE`."""
    for name in SAMPLING_BOUNDS:
        value = getattr(sampling, name)
        yield f"{name}={'default' if value is None else f'{value:g}'}"
    yield f"greedy={'on' if sampling.do_sample is False else 'default'}"
    yield f"stop={', '.join(map(repr, sampling.stop)) or 'default'}"


def override_saved(saved: SamplingOptions, said: SamplingOptions) -> SamplingOptions:
    """What was saved, and over it what this run was told."""
    default = SamplingOptions()
    told = {
        f.name: value
        for f in fields(SamplingOptions)
        if (value := getattr(said, f.name)) != getattr(default, f.name)
    }
    return replace(saved, **told)
