"""From claims to processes: which arms can share one, and which run is made under what.

Arms that need the same engine, loaded in the same way, share a process, and arms of equal
condition share their runs: the plain engine is measured once for all claims. Within a process each
round has every condition once, in an order of its own, so that a drift takes all of them alike.
Conditions that need another load for a stretch of runs come last, in stretches with the plain
engine as one of them, there and back.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qwencli.bench.plan.matrix import BenchCell, skip_reason
from qwencli.bench.studies.claim_file import HELD, Arm, Study
from qwencli.bench.studies.conditions import CONDITIONS, PLAIN, Load, blocker, why_not
from qwencli.capabilities import fastest_cache
from qwencli.config import Attention, Cache, EngineName, LoadMode, Quantization
from qwencli.engine.machine.device import DeviceFacts


@dataclass(frozen=True)
class Process:
    """One process of a study.

    Args:
        name: of its folder.
        environment: variables set before anything is imported.
        held: max_new_tokens, images and load_format, where they are not the campaign's.
        runs: condition of each run from run 1 on.
        rounds: the round of each run, from 1; 0 = in a stretch of runs after the rounds.
        claims: those that look at it.
    """

    name: str
    cell: BenchCell
    environment: Mapping[str, str]
    held: Mapping[str, Any]
    runs: tuple[str, ...]
    rounds: tuple[int, ...]
    claims: tuple[str, ...]

    @property
    def loads(self) -> int:
        """How often the model is loaded, the first time included."""
        loads, loaded = 1, PLAIN
        for name in self.runs:
            wanted = name if CONDITIONS[name].alters else PLAIN
            loads += CONDITIONS[name].load is Load.EACH or wanted != loaded
            loaded = wanted
        return loads

    @property
    def weight(self) -> int:
        """About how long it takes, in runs: a load, and with it the start, takes five."""
        return 5 * self.loads + len(self.runs)


@dataclass(frozen=True)
class Place:
    """Where an arm is measured, or why nowhere."""

    process: str
    condition: str
    blocked: str | None


@dataclass(frozen=True)
class Layout:
    """All processes in the order they run, and the place of each arm of each study;
    `blocked` has the claims that cannot run here at all."""

    processes: tuple[Process, ...]
    places: Mapping[tuple[str, str], Place]
    blocked: Mapping[str, str]


def lay_out(
    studies: Sequence[Study], model: str, facts: DeviceFacts, runs: int, seed: int
) -> Layout:
    """Decide what runs where.

    Args:
        model: name of the model for arms that name none.
        runs: of each condition in each process.
    """
    blocked = {s.claim: why for s in studies if (why := blocker(s.needs, facts))}
    places: dict[tuple[str, str], Place] = {}
    found: dict[str, Process] = {}
    for study in studies:
        for name, arm in study.arms.items():
            process = _process_of(arm, model, facts)
            why = blocked.get(study.claim) or process.cell.skip_reason
            why = why or why_not(arm.condition, process.cell.engine, facts)
            places[study.claim, name] = Place(process.name, arm.condition, why)
            if why:
                continue
            known = found.get(process.name, process)
            found[process.name] = replace(
                known,
                runs=tuple(dict.fromkeys((*known.runs, arm.condition))),
                claims=tuple(dict.fromkeys((*known.claims, study.claim))),
            )
    processes = []
    for process in found.values():
        order = _order(process.runs, runs, f"{seed} {process.name}")
        names, numbers = zip(*order, strict=True)
        processes.append(replace(process, runs=names, rounds=numbers))
    random.Random(seed).shuffle(processes)
    processes.sort(key=_place_in_order)  # stable: the shuffle breaks ties
    return Layout(tuple(processes), places, blocked)


def part_of(processes: Sequence[Process], part: int, parts: int) -> list[Process]:
    """Part number `part`, from 1, of all processes dealt out to `parts` GPUs, about equally long.

    In their order; the same processes are dealt out alike everywhere.
    """
    dealt: list[list[str]] = [[] for _ in range(parts)]
    spent = [0] * parts
    for process in sorted(processes, key=lambda process: -process.weight):
        lightest = spent.index(min(spent))
        dealt[lightest].append(process.name)
        spent[lightest] += process.weight
    return [process for process in processes if process.name in dealt[part - 1]]


def _place_in_order(process: Process) -> tuple[int, bool, int]:
    """Most claims first, then the shortest: what --max-time cuts off should settle least.

    What compiles comes last: a model, or all kernels of a process whose variables ask for that.
    """
    compiles = process.cell.cache is Cache.STATIC_COMPILE or bool(process.environment)
    return -len(process.claims), compiles, process.loads + len(process.runs)


def _process_of(arm: Arm, model: str, facts: DeviceFacts) -> Process:
    """The process of one arm, with no runs yet; its cell carries why it cannot run here."""
    held = arm.held
    cell = BenchCell(
        model=held["model"] or model,
        engine=EngineName(held["engine"]),
        quantization=Quantization(held["quantization"]),
        attention=Attention(held["attention"]),
        cache=_nearest_cache(held, facts),
        load_mode=LoadMode.KEEP,
    )
    own = {key: held[key] for key in ("load_format", "max_new_tokens", "images")}
    own = {key: value for key, value in own.items() if value != HELD[key]}
    marks = [f"{key.replace('_', '-')}-{value}" for key, value in own.items()]
    # What names a model of its own names how it is loaded; that alone makes no other process.
    marks = [mark for mark in marks if not mark.startswith("load-format")]
    marks += [name.lower().replace("_", "-") for name in arm.environment]
    name = "-".join([cell.cell_id, *marks])
    cell = replace(cell, skip_reason=skip_reason(cell, facts))
    return Process(name, cell, arm.environment, own, (), (), ())


def _nearest_cache(held: Mapping[str, Any], facts: DeviceFacts) -> Cache:
    """The native engine's own choice of cache on this device, where its fastest is asked for."""
    cache = Cache(held["cache"])
    if held["engine"] == EngineName.NATIVE and cache is Cache.STATIC_GRAPH:
        return fastest_cache(EngineName.NATIVE, facts.lacks)
    return cache


def _order(conditions: Sequence[str], runs: int, seed: str) -> list[tuple[str, int]]:
    """Condition and round of each run."""
    chance = random.Random(seed)
    by_load: dict[Load, list[str]] = {load: [] for load in Load}
    for name in conditions:
        by_load[CONDITIONS[name].load].append(name)
    order: list[tuple[str, int]] = []
    for number in range(1, runs + 1):
        for load in (Load.KEPT, Load.EACH):
            names = list(by_load[load])
            chance.shuffle(names)
            # Those that leave another model first: the load after them is wanted in any case.
            names.sort(key=lambda name: not CONDITIONS[name].alters)
            order += [(name, number) for name in names]
    stretches = list(by_load[Load.ONCE])
    chance.shuffle(stretches)
    if stretches and PLAIN in conditions:
        stretches.append(PLAIN)
    # There and back, so that what drifts evenly weighs on all of them alike.
    first, second = runs - runs // 2, runs // 2
    order += [(name, 0) for name in stretches for _ in range(first)]
    order += [(name, 0) for name in reversed(stretches) for _ in range(second)]
    return order
