"""`--profile FILE`: what a command does, as a Chrome trace."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from qwencli import __version__
from qwencli.errors import OutputError
from qwencli.output import Output
from qwencli.tracing import Trace, TraceFile, tracing

Profile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        metavar="FILE",
        help="Write a Chrome trace of all phases, host and GPU; open it with ui.perfetto.dev.",
    ),
]


@contextmanager
def profiled(path: Path | None, output: Output) -> Iterator[None]:
    """Trace the block into a new file, however it ends; nothing without a path.

    Raises:
        UsageError: the file is there already, or cannot be made.
        OutputError: it cannot be written.
    """
    if path is None:
        yield
        return
    file = TraceFile(path)
    file.check()
    # Its options may hold a key.
    about = {"command": sys.argv[1:2], "qwencli": __version__}
    ended: BaseException | None = None
    with tracing() as trace:
        _add_start(trace)
        try:
            yield
        except BaseException as failure:  # noqa: BLE001 - raised again below
            ended = failure
    try:
        file.write(trace, about)
    except OutputError as error:
        if ended is None:
            raise
        output.error(error)
    else:
        output.notice(f"trace in {path}: open it with ui.perfetto.dev or chrome://tracing")
    if trace.num_dropped:
        output.notice(f"the trace lacks the last {trace.num_dropped} events: it is full")
    for note in trace.notes:
        output.notice(f"note: the trace has {note}")
    if ended is not None:
        raise ended


def _add_start(trace: Trace) -> None:
    """From the process's start to here."""
    import psutil

    to_perf_s = time.perf_counter() - time.time()
    began_s = psutil.Process().create_time() + to_perf_s
    trace.add_here("python and the command line", began_s, max(time.perf_counter(), began_s))
