"""Where a command finds the resident engine: the state file, what must fit, and how one is started.

The file holds a port of this machine and a token that only its user can read. It is believed where
somebody answers there who knows the token; whatever else it says may be stale.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import qwencli
from qwencli.errors import DatasetError, OutputError

STATE_FILE, LOG_FILE = "resident.json", "resident.log"
# How long the new process may take to listen, and another command's start to end.
START_S, LOCK_S = 60.0, 90.0
# Variables that choose devices, kernels or where models are found.
_PREFIXES = ("CUDA_", "HF_", "MKL_", "OMP_", "PYTORCH_", "TORCH", "TRITON_", "LD_LIBRARY_PATH")


def state_folder() -> Path:
    """Of this user on this machine: homes may be shared."""
    from platformdirs import user_state_path

    host = re.sub(r"[^A-Za-z0-9.-]", "_", platform.node()) or "localhost"
    return user_state_path("qwencli", appauthor=False) / f"resident-{host}"


def build() -> str:
    """What tells apart processes that would not do the same: versions, code and environment."""
    package = Path(qwencli.__file__).parent
    newest = max(
        file.stat().st_mtime_ns
        for folder in _folders(package)
        for file in os.scandir(folder)
        if file.name.endswith(".py")  # folders change when Python keeps what it compiled
    )
    variables = sorted(each for each in _environment().items() if each[0].startswith(_PREFIXES))
    said = [qwencli.__version__, sys.executable, str(package), str(newest), repr(variables)]
    return hashlib.sha256("\0".join(said).encode("utf-8", "surrogateescape")).hexdigest()[:16]


def _folders(package: Path) -> Iterator[str]:
    for folder, names, _ in os.walk(package):
        names[:] = [name for name in names if name != "__pycache__"]
        yield folder


@dataclass(frozen=True)
class State:
    """What the state file says.

    Args:
        build: of the process, see `build`.
    """

    pid: int
    port: int
    token: str
    build: str


def read_state(folder: Path) -> State | None:
    """None where there is none, or none that can be believed."""
    path = folder / STATE_FILE
    try:
        if sys.platform != "win32" and path.stat().st_uid != os.getuid():
            return None
        said = json.loads(path.read_bytes())
        state = State(**said)
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    kinds = (type(state.pid), type(state.port), type(state.token), type(state.build))
    return state if kinds == (int, int, str, str) and 0 < state.port < 65536 else None


def is_alive(pid: int) -> bool:
    """Whether there is such a process of this user; True where that cannot be told."""
    if sys.platform == "win32":
        return True
    try:
        os.kill(pid, 0)
    except (OSError, OverflowError):
        return False
    return pid > 0


def write_state(folder: Path, port: int, build_said: str) -> State:
    """Write the file whole, readable by its user alone."""
    import secrets
    import tempfile

    state = State(os.getpid(), port, secrets.token_urlsafe(32), build_said)
    descriptor, beside = tempfile.mkstemp(dir=folder)  # mode 0600
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(asdict(state), file)
        Path(beside).replace(folder / STATE_FILE)
    except OSError:
        Path(beside).unlink(missing_ok=True)
        raise
    return state


def forget_state(folder: Path, state: State) -> None:
    """Remove the file, unless it is another process's."""
    if read_state(folder) == state:
        with suppress(OSError):
            (folder / STATE_FILE).unlink()


def make_folder(folder: Path) -> None:
    """Raises OutputError where it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise OutputError(
            f"{folder} cannot be made: {error.strerror}", "use --keep-loaded 0"
        ) from error


@contextmanager
def starting_alone(folder: Path) -> Iterator[None]:
    """Of commands that would start one, one does at a time; the others wait.

    Raises:
        OutputError: the folder cannot be written, or the others take too long.
    """
    from qwencli.folder_lock import FolderLock

    end_s = time.monotonic() + LOCK_S
    while True:
        try:
            lock = FolderLock(folder, DatasetError, "wait", "--keep-loaded 0")
            break
        except DatasetError as error:
            if time.monotonic() > end_s:
                raise OutputError(
                    f"another command has been starting an engine for {LOCK_S:.0f} s",
                    "use --keep-loaded 0",
                ) from error
            time.sleep(0.05)
    try:
        yield
    finally:
        lock.release()


def start_process(folder: Path) -> State | None:
    """Start a resident process that outlives this one and holds none of its streams; its state once
    it listens, None where it does not."""
    before = read_state(folder)
    command = [sys.executable, "-m", "qwencli.server.resident_process", str(folder), build()]
    flags = 0
    if sys.platform == "win32":
        flags = subprocess.DETACHED_PROCESS | subprocess.CREATE_NEW_PROCESS_GROUP
    with (folder / LOG_FILE).open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            cwd=folder,
            close_fds=True,
            env=_environment(),
            start_new_session=True,  # Windows has other words for it
            creationflags=flags,
        )
    end_s = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < end_s:
        state = read_state(folder)
        if state is not None and state != before and state.pid == process.pid:
            # It outlives this process, which Python would warn of.
            process.returncode = 0
            return state
        time.sleep(0.01)
    process.kill()
    process.wait()
    return None


def _environment() -> dict[str, str]:
    """Ours, with the folder of this package on Python's path, whatever the working folder was, and
    with torch's own allocator: ComfyUI names another in its process, where nothing captures CUDA
    graphs (see `why_no_graphs`)."""
    path = [str(Path(qwencli.__file__).parent.parent)]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        rest = re.sub(r"\bbackend\s*:\s*\w+\s*,?", "", environment.pop(name, "")).strip(" ,")
        if rest:
            environment[name] = rest
    return environment
