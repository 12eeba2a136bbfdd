"""One writer a folder: a lock that ends with the process, however that ends.

The operating system holds the lock, not the file: what a killed process leaves behind refuses
nobody. Where a file system has no locks (some network shares), there is none.
"""

from __future__ import annotations

import json
import os
import sys
import weakref
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path

from qwencli.errors import OutputError, QwenCliError

LOCK = "writer.lock"
# Windows keeps others from reading what is locked: a byte that the file does not have.
_LOCKED_BYTE = 1 << 30
# A link in its place would have some other file emptied.
_OPEN = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)


class FolderLock:
    """Held from its making until `release`.

    Args:
        in_use: the kind of error where another process has it.
        hint: what to do then.
        elsewhere: the option that names another folder.

    Raises:
        QwenCliError: another process writes to the folder; says which.
        OutputError: the folder cannot be written.
    """

    def __init__(
        self, folder: Path, in_use: type[QwenCliError], hint: str, elsewhere: str = "--out"
    ) -> None:
        self._path = folder / LOCK
        while True:
            try:
                self._file = os.open(self._path, _OPEN, 0o644)
            except OSError as error:
                raise _cannot_write(folder, error, elsewhere) from error
            self._close = weakref.finalize(self, os.close, self._file)
            if not _lock(self._file):
                said = _writer(self._file)
                self._close()
                raise in_use(f"{folder} is being written by {said}", hint)
            if self._is_ours():
                break
            self._close()  # its holder removed it between the opening and the locking
        now = f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S}"
        try:
            os.ftruncate(self._file, 0)
            os.write(self._file, json.dumps({"process": os.getpid(), "since_utc": now}).encode())
        except OSError as error:
            self.release()
            raise _cannot_write(folder, error, elsewhere) from error

    def _is_ours(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self._path.stat())
        except OSError:
            return False

    def release(self) -> None:
        with suppress(OSError):  # Windows removes no file that is open
            if self._is_ours():
                self._path.unlink()
        self._close()
        if sys.platform == "win32":
            with suppress(OSError):
                self._path.unlink()


def _cannot_write(folder: Path, error: OSError, elsewhere: str) -> OutputError:
    return OutputError(
        f"{folder} cannot be written: {error.strerror}",
        f"free space, change its permissions, or choose another {elsewhere}",
    )


def _lock(file: int) -> bool:
    """Whether the lock is had; True where there are no locks."""
    if sys.platform == "win32":
        import msvcrt

        os.lseek(file, _LOCKED_BYTE, os.SEEK_SET)
        try:
            msvcrt.locking(file, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        finally:
            os.lseek(file, 0, os.SEEK_SET)
        return True
    import fcntl

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _writer(file: int) -> str:
    try:
        said = json.loads(os.read(file, 1000))
        return f"process {int(said['process'])}, since {str(said['since_utc'])[:19]} UTC"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):  # it has just begun
        return "another process"
