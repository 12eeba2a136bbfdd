"""Which captions of a set are to be made: listed, counted and checked before a model is loaded."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from qwencli.config import Existing
from qwencli.dataset.manifest import State
from qwencli.dataset.pipeline import Failed, Task
from qwencli.dataset.sources import CAPTION, Item, Listing, Slot
from qwencli.errors import InputError

if TYPE_CHECKING:
    from qwencli.dataset.manifest import Manifest


# Elsewhere it only costs time.
_normcase = os.path.normcase if os.name == "nt" else str


class SinkPaths(Protocol):
    """What a sink knows of where captions go."""

    def name(self, slot: Slot) -> str: ...

    def existing(self, slots: Iterable[Slot]) -> set[Slot]: ...


@dataclass(frozen=True)
class WorklistOptions:
    """What the user wants done.

    Args:
        fields, samples: captions of each picture.
        redo: slots whose captions are made again, whatever there is.
        retry_failed: those that failed before too.
    """

    existing: Existing = Existing.SKIP
    fields: tuple[str, ...] = (CAPTION,)
    samples: int = 1
    redo: frozenset[Slot] = frozenset()
    retry_failed: bool = False


@dataclass
class Worklist:
    """What is to be done, and what is not.

    Args:
        tasks: in the order of the listing.
        going_on: the unfinished run of the same job that this one goes on with.
        refused: tasks that cannot be done, and why.
        num_existing: captions that are there and stay.
        failed_before: slots that failed in an earlier run and are not tried again.
        num_changed: captions that stay although their picture has changed since.
    """

    tasks: list[Task] = field(default_factory=list)
    going_on: int | None = None
    refused: list[Failed] = field(default_factory=list)
    num_existing: int = 0
    failed_before: list[tuple[Slot, str]] = field(default_factory=list)
    num_changed: int = 0


def plan_work(
    listing: Listing,
    options: WorklistOptions,
    paths: SinkPaths,
    manifest: Manifest | None,
    job: str,
) -> Worklist:
    """Decide about every caption of the set.

    Args:
        manifest: None where the set has none yet.
        job: see `manifest.job_hash`.
    """
    states = manifest.states() if manifest else {}
    work = Worklist(going_on=manifest.unfinished_run(job) if manifest else None)
    slots = _with_a_place_of_their_own(listing, options, paths, work)
    there = paths.existing(slot for _, slot in slots)
    for item, slot in slots:
        state = states.get(slot)
        changed = state is not None and _has_changed(item, state)
        if slot in options.redo:
            work.tasks.append(Task(item, slot.field, slot.sample))
        elif state is not None and _is_known_failure(state, options, job, work.going_on, changed):
            work.failed_before.append((slot, state.reason or ""))
        elif _stays(state, slot in there, options.existing, job, work.going_on):
            work.num_existing += 1
            work.num_changed += changed
        else:
            work.tasks.append(Task(item, slot.field, slot.sample))
    return work


def _slots(item: Item, options: WorklistOptions) -> list[Slot]:
    return [
        Slot(item.key, name, sample) for name in options.fields for sample in range(options.samples)
    ]


def _with_a_place_of_their_own(
    listing: Listing, options: WorklistOptions, paths: SinkPaths, work: Worklist
) -> list[tuple[Item, Slot]]:
    """What can be captioned; of items that want one place the first is among them."""
    for item, error in listing.refused:
        work.refused.append(Failed(Task(item, options.fields[0]), error))
    owners: dict[str, Item] = {}
    slots: list[tuple[Item, Slot]] = []
    for item in listing.items:
        own = [(_normcase(paths.name(slot)), slot) for slot in _slots(item, options)]
        taken = [(owners[name], slot) for name, slot in own if name in owners]
        if taken:
            owner, slot = taken[0]
            error = InputError(
                f"{listing.path(item)} and {owner.key} want the same file, {paths.name(slot)}",
                "rename one of them, or write one file with --output captions.jsonl",
            )
            work.refused.append(Failed(Task(item, options.fields[0]), error))
            continue
        for name, slot in own:
            owners[name] = item
            slots.append((item, slot))
    return slots


def _has_changed(item: Item, state: State) -> bool:
    return (item.size, item.mtime_ns) != (state.size, state.mtime_ns)


def _is_known_failure(
    state: State, options: WorklistOptions, job: str, going_on: int | None, changed: bool
) -> bool:
    """Whether trying again would fail again, as far as one can tell."""
    if state.status != "failed" or options.retry_failed or changed or state.job != job:
        return False
    return options.existing is not Existing.OVERWRITE or state.run == going_on


def _stays(
    state: State | None, there: bool, existing: Existing, job: str, going_on: int | None
) -> bool:
    """Whether a caption that is there is the one that is wanted."""
    if existing is Existing.SKIP or not there:
        return there
    if state is None or state.status != "done":
        return False
    if existing is Existing.OVERWRITE:
        return state.run == going_on
    return state.job == job
