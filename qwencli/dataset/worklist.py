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
from qwencli.errors import InputError, UsageError
from qwencli.garbage import gc_paused

if TYPE_CHECKING:
    from qwencli.dataset.manifest import Manifest


# Elsewhere it only costs time.
_normcase = os.path.normcase if os.name == "nt" else str


class SinkPaths(Protocol):
    """What a sink knows of where captions go."""

    def name(self, slot: Slot) -> str: ...

    def existing(self, places: Iterable[tuple[str, Slot]]) -> set[str]: ...


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


@gc_paused()
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

    Raises:
        UsageError: captions of one picture go to one place.
    """
    states = manifest.states() if manifest else {}
    work = Worklist(going_on=manifest.unfinished_run(job) if manifest else None)
    places = _with_a_place_of_their_own(listing, options, paths, work)
    there = paths.existing((name, slot) for name, _, slot in places)
    for name, item, slot in places:
        state = states.get(slot)
        changed = state is not None and (item.size != state.size or item.mtime_ns != state.mtime_ns)
        if slot in options.redo:
            work.tasks.append(Task(item, slot.field, slot.sample))
        elif state is not None and _is_known_failure(state, options, job, work.going_on, changed):
            work.failed_before.append((slot, state.reason or ""))
        elif _stays(state, name in there, options.existing, job, work.going_on):
            work.num_existing += 1
            work.num_changed += changed
        else:
            work.tasks.append(Task(item, slot.field, slot.sample))
    return work


def _with_a_place_of_their_own(
    listing: Listing, options: WorklistOptions, paths: SinkPaths, work: Worklist
) -> list[tuple[str, Item, Slot]]:
    """What can be captioned, and the names of the places that captions have; of items that want one
    place the first is among them."""
    for item, error in listing.refused:
        work.refused.append(Failed(Task(item, options.fields[0]), error))
    owners: dict[str, Item] = {}
    places: list[tuple[str, Item, Slot]] = []
    kinds = [(name, sample) for name in options.fields for sample in range(options.samples)]
    if len({paths.name(Slot("x", *kind)) for kind in kinds}) < len(kinds):
        raise UsageError(
            "two captions of a picture would go to one place", "give each --field another name"
        )
    for item in listing.items:
        own: list[tuple[str, Item, Slot]] = []
        for kind, sample in kinds:
            slot = Slot(item.key, kind, sample)
            name = paths.name(slot)
            owner = owners.setdefault(_normcase(name), item)
            if owner is not item:
                error = InputError(
                    f"{listing.path(item)} and {owner.key} want the same file, {name}",
                    "rename one of them, or write one file with --output captions.jsonl",
                )
                work.refused.append(Failed(Task(item, options.fields[0]), error))
                for free, _, _ in own:
                    del owners[_normcase(free)]
                break
            own.append((name, item, slot))
        else:
            places += own
    return places


def _is_known_failure(
    state: State, options: WorklistOptions, job: str, going_on: int | None, changed: bool
) -> bool:
    """Whether trying again would fail again, as far as one can tell. What was refused is looked at
    anew: what stood in its way may be gone."""
    if (
        state.status != "failed"
        or not state.attempts
        or options.retry_failed
        or changed
        or state.job != job
    ):
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
