"""How this program starts further processes of itself, and how these end with it."""

from __future__ import annotations

import os
import signal
import sys
import threading
from pathlib import Path

# What the parent may say to a child while it runs.
PAUSE, RESUME = b"-", b"+"


def python_command(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` with the same interpreter and import path as this process.

    `-P` keeps files of the working folder from shadowing modules, unless this process itself
    was started with the working folder on its path.
    """
    here = Path.cwd()
    on_path = any(Path(entry or ".").resolve() == here for entry in sys.path)
    return [sys.executable, *(() if on_path else ("-P",)), "-m", module, *arguments]


def end_with_parent(going: threading.Event | None = None) -> None:
    """Body of a thread in each child: end the process when the parent's end of stdin closes.

    A parent that is killed cannot say goodbye; without this its children would go on holding
    the GPU.

    Args:
        going: cleared by PAUSE and set by RESUME.
    """
    while said := os.read(0, 1):
        if going is not None:
            (going.clear if said == PAUSE else going.set)()
    os._exit(3)


class no_interrupt:
    """A process that is started here never sees Ctrl-C, which is for the one that started it."""

    def __enter__(self) -> None:
        if sys.platform != "win32":
            from multiprocessing import resource_tracker

            resource_tracker.ensure_running()  # it would unblock signals in passing
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def __exit__(self, *exc: object) -> None:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
