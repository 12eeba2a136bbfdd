"""When Python looks for garbage: not while something is made whose objects all stay, or is timed.

Reference counting goes on and frees what is dropped; only circles wait.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def gc_paused() -> Iterator[None]:
    """No collection inside the block. A full one walks every object of every library loaded, 100 ms
    and more in the middle of an answer; of a large set's listing collections take a tenth."""
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


@contextmanager
def gc_freeze_loaded() -> Iterator[None]:
    """Take everything that exists behind the block out of later collections: it is here to stay.

    What was there before is not even looked through for garbage, which takes 0.1 to 0.3 s of
    libraries alone. Where the block fails nothing is taken out.
    """
    gc.freeze()
    try:
        yield
        gc.collect()
    except BaseException:
        gc.unfreeze()
        raise
    gc.freeze()
