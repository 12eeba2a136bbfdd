"""How this program starts further processes of itself, and how these end with it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from multiprocessing.process import BaseProcess

_SAFE_PATH = "PYTHONSAFEPATH"
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


def start_process(
    target: Callable[..., None], args: tuple[Any, ...], name: str, *, daemon: bool = False
) -> BaseProcess:
    """Start a process of this program that calls `target`. It never sees Ctrl-C, which is for the
    one that started it, and no file of the working folder shadows a module there."""
    process = multiprocessing.get_context("spawn").Process(
        target=_call, args=(target, args), name=name, daemon=daemon
    )
    said = os.environ.get(_SAFE_PATH)
    # Its import path is this process's, but it imports some modules before it is told.
    os.environ[_SAFE_PATH] = "1"
    try:
        with _no_interrupt():
            process.start()
    finally:
        _set_safe_path(said)
    return process


def _call(target: Callable[..., None], args: tuple[Any, ...]) -> None:
    # It is not for what is started here: `python_command` says it where it is to be so.
    _set_safe_path(None)
    target(*args)


def _set_safe_path(value: str | None) -> None:
    if value is None:
        os.environ.pop(_SAFE_PATH, None)
    else:
        os.environ[_SAFE_PATH] = value


class _no_interrupt:
    """A process that is started here never sees Ctrl-C."""

    def __enter__(self) -> None:
        if sys.platform != "win32":
            from multiprocessing import resource_tracker

            resource_tracker.ensure_running()  # it would unblock signals in passing
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})

    def __exit__(self, *exc: object) -> None:
        if sys.platform != "win32":
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
