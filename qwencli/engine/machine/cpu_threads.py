"""How many threads compute where the CPU is the device: no more than pay on a quiet machine.

All threads of a product wait for the slowest. Where another program has a core, the thread that
shares it is late by a time slice, a hundred times what a small product takes: on two cores one busy
neighbour took the bundled model from 3,515 to 210 tok/s with two threads and to 1,864 with one,
which on a quiet machine costs 1 % (3,483). So a thread more is only taken where matrices are large
enough to pay for it, and none spins while it waits (`cli.run`), which would burn what the late one
needs.

The number depends on the model and the machine alone, never on how busy it is: attention sums in
another order with other threads, and the same request must give the same text again.

A limit of the process's control groups counts too (Linux): `/proc/self/cgroup` names the group of
each hierarchy, `/proc/self/mountinfo` where a hierarchy is
mounted and from which group on: a container's mount begins at its own.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Generator, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext, suppress
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from qwencli.engine.machine.host import usable_cores
from qwencli.errors import ModelFileError
from qwencli.models.shape_reader import read_shape

T = TypeVar("T")
PROC = Path("/proc")


def cpu_groups(proc: Path = PROC) -> Iterator[Path]:
    """Folders of the groups with a processor limit that this process is in, its own first."""
    try:
        memberships = (proc / "self" / "cgroup").read_text(encoding="utf-8").splitlines()
        mounts = (proc / "self" / "mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return
    # Hierarchy, controllers, path: version 2 has no controllers.
    groups = {c: path for _, c, path in (line.split(":", 2) for line in memberships)}
    for line in mounts:
        fields, _, kind = line.partition(" - ")
        root, point = fields.split()[3:5]
        name, _, options = kind.split()[:3]
        if name == "cgroup2":
            path = groups.get("")
        elif name == "cgroup" and "cpu" in options.split(","):
            path = next((p for c, p in groups.items() if "cpu" in c.split(",")), None)
        else:
            continue
        if path is None:
            continue
        # A container's mount begins at its own group.
        inside = PurePosixPath(path)
        below = inside.relative_to(root) if inside.is_relative_to(root) else PurePosixPath()
        for part in (below, *below.parents) if below.parts else (below,):
            yield Path(point) / part


# Values of the largest matrix for each thread. A row times a matrix of 2^20 float32 values takes
# 0.14 ms on one or on two cores of an EPYC, twice as large ones 0.27 and 0.20 ms, four times as
# large ones 1.14 and 0.61 ms (least of 60, two cores, 2026-11-29).
VALUES_A_THREAD = 2**20


def threads_for(hub_config: Mapping[str, Any], wanted: int | None) -> int:
    """What the user wants, else what pays for this model, at most what this process may use.

    Args:
        hub_config: the model's config.json; one whose shape is not known gets all.
    """
    if wanted is not None:
        return wanted
    try:
        text = read_shape(hub_config).text
    except ModelFileError:
        return _usable()
    largest = text.hidden_size * max(2 * text.intermediate_size, text.vocab_size)
    return max(1, min(_usable(), largest // VALUES_A_THREAD))


class _OfThread(threading.local):
    """The blocks that run in this thread, as they began: torch has a number for each thread, and
    that which was set last for those that begin to compute."""

    def __init__(self) -> None:
        self.blocks: dict[_Block, int] = {}


_of_thread, _lock = _OfThread(), threading.RLock()
# Blocks of all threads, and what there was before the first of them.
_num_blocks = _before = 0


class _Block:
    """No generator: the step of a small model is one, of 300 us, and that takes 10."""

    def __init__(self, threads: int) -> None:
        import torch

        self._threads, self._torch = threads, torch

    def __enter__(self) -> None:
        global _num_blocks, _before
        self._blocks = _of_thread.blocks
        with _lock:
            if not _num_blocks:
                _before = self._torch.get_num_threads()
            _num_blocks += 1
            self._blocks[self] = self._threads
            self._torch.set_num_threads(self._threads)

    def __exit__(self, *exc: object) -> None:
        global _num_blocks
        with _lock:
            del self._blocks[self]
            self._torch.set_num_threads(next(reversed(self._blocks.values()), _before))
            # Last: a generator that is collected meanwhile is a block of its own.
            _num_blocks -= 1


def computing_with(threads: int | None) -> AbstractContextManager[None]:
    """Let torch's operators use so many inside the block, in this thread; None changes nothing.

    Blocks may end in any order: of those that run in a thread the one that began last has its
    number, and behind them there is what was there before.
    """
    return nullcontext() if threads is None else _Block(threads)


def each_with(threads: int | None, items: Generator[T, None, None]) -> Iterator[T]:
    """What a generator gives, each made by so many threads. Whoever takes it computes with torch's
    own number meanwhile, or with that of another generator."""
    block = computing_with(threads)
    try:
        while True:
            with block:
                try:
                    item = next(items)
                except StopIteration:
                    return
            yield item
    finally:
        with block:
            items.close()


@functools.cache
def _usable() -> int:
    """Cores that this process may use, by its affinity, its control group and torch's own limit
    (`OMP_NUM_THREADS`)."""
    import torch

    with _lock:
        own = _before if _num_blocks else torch.get_num_threads()
    return max(1, min(usable_cores(), own, *_quotas()))


def _quotas() -> Iterator[int]:
    """Cores that limits of this process's control groups allow, begun ones included."""
    for group in cpu_groups():
        with suppress(OSError, ValueError):
            quota, period = (group / "cpu.max").read_text(encoding="ascii").split()
            yield math.ceil(int(quota) / int(period))
        with suppress(OSError, ValueError):
            quota, period = (
                (group / f"cpu.cfs_{name}_us").read_text(encoding="ascii")
                for name in ("quota", "period")
            )
            if int(quota) > 0:
                yield math.ceil(int(quota) / int(period))
