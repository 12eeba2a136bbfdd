"""Every error a user can meet, as one tree.

Each error says what is wrong and where (`message`) and what to do next (`hint`).
`qwencli.cli` is the one boundary that turns them into a line on stderr and an exit code;
nothing else catches them to print.

    QwenCliError                 exit 1
    ├── UsageError               exit 2   an option or a combination of options is wrong
    │   └── UnsupportedModeError          this mode cannot run here; `nearest` can
    ├── InputError                        an image, prompt or file given to us cannot be used
    │   └── PromptTooLongError            prompt and answer are longer than what the model holds
    ├── ModelError
    │   ├── ModelNotFoundError            no such name or folder
    │   ├── ModelFileError                weights or configuration missing, broken or at odds
    │   ├── CustomModelsError             custom_models.json is malformed (file, key, expected)
    │   └── DownloadError                 the hub cannot be reached, or refuses
    ├── DeviceError                       the device asked for is not there or not usable
    ├── OutOfMemoryError                  host or device memory is used up
    ├── EngineError                       the engine is gone, busy, or at fault
    │   └── RequestError                  one request failed in a way that nobody foresaw
    ├── EndpointError                     no server of `--endpoint` can be used
    │   └── AnswerError                   a server gave no usable answer to one request
    ├── MissingDependencyError            an optional package is not installed or does not load
    ├── OutputError                       a result cannot be written (full disk, permissions)
    ├── CaptionError                      no answer about a picture was good enough to keep
    ├── DatasetError                      a set cannot be captioned: another run has it, or its
    │                                     manifest cannot be read
    ├── StoppedError            exit 130  Ctrl-C ended a run: what was done, and how to go on
    └── BenchError                        a campaign cannot be started, resumed or read
"""

from __future__ import annotations

import copyreg
import os
import re
from typing import Any, Self


class QwenCliError(Exception):
    """Base of all expected errors.

    Args:
        message: one line: what is wrong, and where.
        hint: one line: what to do next; empty only where nothing can be done.
    """

    exit_code = 1

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __reduce__(self) -> tuple[Any, ...]:
        # Not through `__init__`, as exceptions are by themselves: some take other arguments.
        return copyreg.__newobj__, (type(self), *self.args), vars(self)  # type: ignore[attr-defined]


class UsageError(QwenCliError):
    exit_code = 2


class UnsupportedModeError(UsageError):
    """A mode that cannot run on this device or with this model.

    `nearest` is the closest mode of the same axis that can, or None.
    """

    def __init__(self, message: str, hint: str = "", nearest: str | None = None) -> None:
        super().__init__(message, hint or (f"use {nearest} instead" if nearest else ""))
        self.nearest = nearest


class InputError(QwenCliError):
    pass


class PromptTooLongError(InputError):
    pass


class ModelError(QwenCliError):
    pass


class ModelNotFoundError(ModelError):
    pass


class ModelFileError(ModelError):
    pass


class CustomModelsError(ModelError):
    pass


class DownloadError(ModelError):
    pass


class DeviceError(QwenCliError):
    pass


class OutOfMemoryError(QwenCliError):
    pass


class EngineError(QwenCliError):
    pass


class LoadStoppedError(EngineError):
    """Whoever waited for the load does so no more."""


class RequestError(EngineError):
    """The error itself is its `__cause__`; other requests go on."""

    @classmethod
    def of(cls, error: Exception, doing: str) -> Self:
        """What went wrong with one request while `doing` something for it."""
        line = (str(error).strip() or "no message").splitlines()[0]
        failure = cls(
            f"a request failed while {doing}: {type(error).__name__}: {line}",
            "other requests go on; this is a fault of qwencli, please report it",
        )
        failure.__cause__ = error
        return failure


class EndpointError(QwenCliError):
    pass


class AnswerError(EndpointError):
    """Other requests go on."""


class MissingDependencyError(QwenCliError):
    pass


class OutputError(QwenCliError):
    pass


class CaptionError(QwenCliError):
    pass


class DatasetError(QwenCliError):
    pass


class StoppedError(QwenCliError):
    exit_code = 130


class BenchError(QwenCliError):
    pass


def system_words(error: BaseException) -> str:
    """What the system says of a failed connection, from whatever it is wrapped in."""
    inner: BaseException | None = error
    while inner is not None:
        if isinstance(inner, OSError) and inner.errno is not None:
            # asyncio has words of its own; those of a name that is not found are below zero, and
            # those of TLS have numbers of their own.
            is_system = inner.errno > 0 and type(inner).__module__ != "ssl"
            said = os.strerror(inner.errno) if is_system else str(inner.strerror)
            return re.sub(r"^\[[^]]*\] | \(_ssl\.c:\d+\)$", "", said).lower()
        inner = inner.__cause__ or inner.__context__
    said = str(getattr(error, "reason", None) or error).strip()  # urllib's has both
    return (said or type(error).__name__).splitlines()[0].lower()
