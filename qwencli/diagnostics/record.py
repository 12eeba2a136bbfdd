"""A machine written down, and replayed: how a box that is not here can be looked at again."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from qwencli.diagnostics.machine import SECTIONS, Machine, Unreadable
from qwencli.engine.instruments.probes.answers import PROBES, decode, dumps
from qwencli.engine.instruments.probes.ask import Outcome, ProbeAnswer
from qwencli.engine.machine.gpu_sensors import LoadReading

UNREADABLE = "unreadable"
# Without these a replay would not know what its probes were about.
_ALWAYS = ("model", "hub_config")


def record(machine: Machine) -> dict[str, Any]:
    """Everything that checks have read of `machine`, as JSON can hold it.

    Nothing is read for it: sections and probes that no check asked for are not in it. The ids of
    cards, which name an owner, become numbers.
    """
    sections = {name: _section(machine, name) for name in SECTIONS}
    probes = {
        name: {**_plain(answer), "load": _plain(machine.under_load(name))}
        for name in PROBES
        if (answer := machine.answered(name)) is not None
    }
    numbered: dict[str, Any] = _numbered({**sections, "probes": probes}, {})
    return numbered


def _section(machine: Machine, name: str) -> Any:
    if not machine.has_read(name) and name not in _ALWAYS:
        return {UNREADABLE: "not asked"}
    try:
        return _plain(machine.section(name))
    except Exception as error:  # noqa: BLE001 - that it cannot be read is what a replay must show
        return {UNREADABLE: f"{type(error).__name__}: {error}"}


def _plain(value: Any) -> Any:
    return json.loads(dumps(value))


def _numbered(value: Any, cards: dict[str, str]) -> Any:
    """The value with each card's id as "card-N", in both places that name it."""
    if isinstance(value, list):
        return [_numbered(item, cards) for item in value]
    if not isinstance(value, dict):
        return value
    plain = {key: _numbered(item, cards) for key, item in value.items()}
    if plain.get("uuid"):
        plain["uuid"] = cards.setdefault(plain["uuid"], f"card-{len(cards)}")
    return plain


class RecordedMachine(Machine):
    """Replays what `record` returned."""

    def __init__(self, recorded: Mapping[str, Any]) -> None:
        self._recorded = recorded

    def section(self, name: str) -> Any:
        value = self._recorded[name]
        if isinstance(value, dict) and UNREADABLE in value:
            raise Unreadable(value[UNREADABLE])
        return decode(SECTIONS[name], value)

    def has_read(self, name: str) -> bool:
        return name in self._recorded

    def probe(self, name: str) -> ProbeAnswer:
        answer = self.answered(name)
        if answer is None:
            raise Unreadable(f"{name} is not in the record")
        return answer

    def answered(self, name: str) -> ProbeAnswer | None:
        found = self._recorded["probes"].get(name)
        if found is None:
            return None
        answer: ProbeAnswer = decode(ProbeAnswer, {**found, "value": None})
        if answer.outcome is not Outcome.OK:
            return answer
        return ProbeAnswer(
            answer.outcome, answer.seconds, decode(PROBES[name].answer, found["value"])
        )

    def under_load(self, name: str) -> LoadReading | None:
        found = self._recorded["probes"].get(name, {})
        reading: LoadReading | None = decode(LoadReading, found.get("load"))
        return reading
