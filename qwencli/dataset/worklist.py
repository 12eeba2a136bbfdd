"""Which captions of a set are to be made: listed, counted and checked before a model is loaded."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from qwencli.config import Existing
from qwencli.dataset.manifest import KnownSlot, State
from qwencli.dataset.pipeline import Failed, Task
from qwencli.dataset.sources import CAPTION, Item, Listing, Slot
from qwencli.engine.machine.python_runtime import gc_paused
from qwencli.errors import InputError, UsageError

if TYPE_CHECKING:
    from qwencli.dataset.manifest import Manifest


# Modes that keep what is there and put the answer beside it.
ADDING = (Existing.APPEND, Existing.PREPEND)
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
        num_added: those of them that have this job's answer already, where answers are added to
            captions: it is not added twice.
        failed_before: slots that failed in an earlier run and are not tried again.
        mended: slots that failed in an earlier run and have a caption now.
        num_changed: captions that stay although their picture has changed since.
    """

    tasks: list[Task] = field(default_factory=list)
    going_on: int | None = None
    refused: list[Failed] = field(default_factory=list)
    num_existing: int = 0
    num_added: int = 0
    failed_before: list[tuple[Slot, str]] = field(default_factory=list)
    mended: list[Slot] = field(default_factory=list)
    num_changed: int = 0


@gc_paused()
def plan_work(
    listing: Listing,
    options: WorklistOptions,
    paths: SinkPaths,
    manifest: Manifest,
    job: str,
) -> Worklist:
    """Decide about every caption of the set.

    Args:
        job: see `manifest.job_hash`.

    Raises:
        UsageError: captions of one picture go to one place.
    """
    states = manifest.states()
    work = Worklist(going_on=manifest.unfinished_run(job))
    for item, error in listing.refused:
        work.refused.append(Failed(Task(item, options.fields[0]), error))
    wanted = _wanted_places(listing, options, paths, states)
    there = paths.existing((name, slot) for _, places in wanted for name, slot, _ in places)
    shared = _shared_places(wanted)
    owners, claims = _known_owners(wanted, there, shared, manifest), dict[str, str]()
    for item, places in wanted:
        # Of most sets no place is contested.
        if shared or owners:
            refusal = _taken_place(listing, item, places, owners, claims)
            if refusal is not None:
                work.refused.append(Failed(Task(item, options.fields[0]), refusal))
                continue
            claims.update((_normcase(name), item.key) for name, _, _ in places)
        for name, slot, state in places:
            changed = state is not None and (
                item.size != state.size or item.mtime_ns != state.mtime_ns
            )
            if slot in options.redo:
                work.tasks.append(Task(item, slot.field, slot.sample))
            elif _stays(state, name in there, options.existing, job, work.going_on):
                work.num_existing += 1
                work.num_added += options.existing in ADDING
                if state is not None and state.status == "failed":
                    work.mended.append(slot)
                else:
                    work.num_changed += changed
            elif state is not None and _is_known_failure(
                state, options, job, work.going_on, changed
            ):
                work.failed_before.append((slot, state.reason or ""))
            else:
                work.tasks.append(Task(item, slot.field, slot.sample))
    return work


# An item, where its captions go, and what became of them before.
_Place = tuple[str, Slot, State | None]
_Wanted = tuple[Item, list[_Place]]


def _wanted_places(
    listing: Listing,
    options: WorklistOptions,
    paths: SinkPaths,
    states: Mapping[KnownSlot, State],
) -> list[_Wanted]:
    kinds = [(name, sample) for name in options.fields for sample in range(options.samples)]
    if len({paths.name(Slot("x", *kind)) for kind in kinds}) < len(kinds):
        raise UsageError(
            "two captions of a picture would go to one place", "give each --field another name"
        )
    wanted: list[_Wanted] = []
    for item in listing.items:
        places: list[_Place] = []
        for field_name, sample in kinds:
            slot = Slot(item.key, field_name, sample)
            name = paths.name(slot)
            places.append((name, slot, states.get((item.key, field_name, sample, name))))
        wanted.append((item, places))
    return wanted


def _shared_places(wanted: Iterable[_Wanted]) -> set[str]:
    """Those that more than one caption would go to."""
    names = [_normcase(name) for _, places in wanted for name, _, _ in places]
    if len(set(names)) == len(names):
        return set()
    return {name for name, count in Counter(names).items() if count > 1}


def _known_owners(
    wanted: Iterable[_Wanted], there: Container[str], shared: Container[str], manifest: Manifest
) -> dict[str, str]:
    """Whose the captions are that are there and may not be of who wants the place, as far as the
    manifest knows: the pictures' keys, or their paths from the manifest's folder where they are
    others'."""
    owners: dict[str, str] = {}
    unknown: list[str] = []
    for item, places in wanted:
        for name, _, state in places:
            if name not in there:
                continue
            if state is not None and state.status != "failed":
                if _normcase(name) in shared:
                    owners[_normcase(name)] = item.key
            else:
                unknown.append(name)
    others = manifest.owners() if unknown else {}
    for name in unknown:
        if name in others:
            owners.setdefault(_normcase(name), others[name])
    return owners


def _taken_place(
    listing: Listing,
    item: Item,
    places: Sequence[_Place],
    owners: Mapping[str, str],
    claims: Mapping[str, str],
) -> InputError | None:
    """Why an item cannot be captioned, where one of its captions would go to another's place.

    Args:
        claims: what goes where in this run.
    """
    for name, _, _ in places:
        place = _normcase(name)
        if owners.get(place, item.key) != item.key:
            said = f"{listing.path(item)}: {name} is the caption of {owners[place]}"
        elif claims.get(place, item.key) != item.key:
            said = f"{listing.path(item)} and {claims[place]} want the same file, {name}"
        else:
            continue
        hint = "rename one of them, or write one file with --output captions.jsonl"
        return InputError(said, hint)
    return None


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
