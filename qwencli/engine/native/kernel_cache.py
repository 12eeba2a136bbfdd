"""Keeps compiled kernels on disk, for the next process.

A folder for each GPU generation and versions of what compiles holds what Triton made, each file
with a checksum beside it; a list (`manifest`) for each model and mode says which kernels it needs,
and one of all kernels by which hash Triton knows them. `kernel_loader` reads them while weights
load. What cannot be kept is compiled for this process alone; what is damaged is compiled again.
Both are said once.
"""

from __future__ import annotations

import atexit
import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from triton.runtime.cache import FileCacheManager

from qwencli import __version__
from qwencli.engine import kernels
from qwencli.engine.kernels.launches import (
    Gpu,
    KernelLaunch,
    TensorArgument,
    gpu_of,
    jit_functions,
)
from qwencli.engine.native import kernel_plan
from qwencli.engine.native.kernel_plan import PlannedModel
from qwencli.models.quantized_cache import cache_root

_SUM, _FUSION = ".sha256", "default_fp_fusion"
_notes: list[str] = []


def note_once(note: str) -> None:
    """Say something of the cache, once a process."""
    if note not in _notes:
        _notes.append(note)


def taken_notes() -> tuple[str, ...]:
    """What there is to say since the last call."""
    found = tuple(note for note in _notes if not note.startswith("\0"))
    _notes[:] = ["\0" + note.removeprefix("\0") for note in _notes]
    return found


def kernel_folder(gpu: Gpu) -> Path:
    """Where kernels for this GPU are kept."""
    made_by = f"triton-{triton.__version__}-torch-{torch.__version__}-qwencli-{__version__}"
    own = os.environ.get("TRITON_CACHE_DIR")
    root = Path(own) if own else cache_root().parent / "kernels"
    return root / f"sm_{gpu.arch}-{made_by}"


class CheckedFiles(FileCacheManager):  # type: ignore[misc]
    """Triton's cache of files, of which only those are read that are as they were written."""

    def __init__(self, key: str, override: bool = False, dump: bool = False) -> None:
        try:
            super().__init__(key, override, dump)
        except OSError as error:
            keep_nothing(error)
            super().__init__(key, override, dump)

    def put(self, data: Any, filename: str, binary: bool = True) -> str:
        raw = data if isinstance(data, bytes) else str(data).encode()
        for last_try in (False, True):
            try:
                path: str = super().put(raw, filename, True)
                super().put(_checksum(raw), filename + _SUM, False)
            except OSError as error:
                if last_try:
                    raise
                keep_nothing(error)
                super().__init__(self.key)
            else:
                return path
        raise AssertionError("the last try returns or raises")

    def get_file(self, filename: str) -> str | None:
        path: str | None = super().get_file(filename)
        return path if path is not None and self._whole(path) else None

    def get_group(self, filename: str) -> dict[str, str] | None:
        if self.has_file(f"__grp__{filename}") and self.get_file(f"__grp__{filename}") is None:
            return None
        group: dict[str, str] | None = super().get_group(filename)
        if group is None:
            return None
        own = all(Path(path).parent == Path(self.cache_dir) for path in group.values())
        return group if own and all(self._whole(path) for path in group.values()) else None

    @staticmethod
    def _whole(path: str) -> bool:
        file = Path(path)
        try:
            wanted = Path(path + _SUM).read_text()
            found = _checksum(file.read_bytes())
        except OSError:
            return False  # its writer was ended before it was done
        if found != wanted:
            note_once(f"compiled kernels in {file.parent.parent} were damaged and are made again")
        return found == wanted


def _checksum(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def keep_nothing(error: OSError | str) -> None:
    """From now on compile for this process alone."""
    knobs = triton.knobs
    why = error if isinstance(error, str) else error.strerror or str(error)
    folder = tempfile.mkdtemp(prefix="qwencli-kernels-")
    atexit.register(shutil.rmtree, folder, True)
    note_once(
        f"compiled kernels could not be kept in {knobs.cache.dir} ({why}); the next process "
        "compiles them again"
    )
    for wanted, used in _used.items():
        if str(used) == knobs.cache.dir:
            _used[wanted] = Path(folder)
    with _of_this_process():
        knobs.cache.dir = folder


def use_folder(folder: Path) -> None:
    """Have Triton keep what it compiles in `folder`, and read from there."""
    knobs = triton.knobs
    with _of_this_process():
        knobs.cache.dir = str(folder)
        knobs.cache.manager_class = CheckedFiles
        # What it makes on the way to a binary is read by nobody, and would be read at each load.
        knobs.compilation.store_binary_only = True
        # From 3.10 on Triton rounds between a product and its sum where nobody says otherwise.
        if "TRITON_DEFAULT_FP_FUSION" not in os.environ and hasattr(knobs.language, _FUSION):
            setattr(knobs.language, _FUSION, True)
    # Its own reads all of Triton, most of a second in each process.
    triton.runtime.cache.triton_key = _compiler


@cache
def _compiler() -> str:
    """What tells one build of Triton from another: its version, and the size of its library."""
    size = Path(triton._C.libtriton.__file__).stat().st_size
    return f"{triton.__version__}-{size}"


@contextmanager
def _of_this_process() -> Iterator[None]:
    """Triton copies its settings to the environment, where they would pass for the user's own."""
    knobs = triton.knobs
    before, knobs.propagate_env = knobs.propagate_env, False
    try:
        yield
    finally:
        knobs.propagate_env = before


@cache
def _sources() -> str:
    """A digest of what decides which kernels there are."""
    digest = hashlib.sha256()
    files = sorted(Path(kernels.__path__[0]).glob("*.py"))
    for file in (*files, Path(kernel_plan.__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()


def manifest_of(planned: PlannedModel, gpu: Gpu, folder: Path) -> Path:
    """The list of a model's kernels; may not exist."""
    said = json.dumps([_sources(), dataclasses.asdict(gpu), described(planned)], sort_keys=True)
    return folder / f"manifest-{hashlib.sha256(said.encode()).hexdigest()[:24]}.json"


def described(planned: PlannedModel) -> dict[str, Any]:
    return json.loads(json.dumps(dataclasses.asdict(planned), default=str))  # type: ignore[no-any-return]


def write_manifest(file: Path, launches: Iterable[KernelLaunch]) -> None:
    """Raises OSError where it cannot be written."""
    _write_checked(file, [[each.module, each.kernel, _written(each)] for each in launches])


def read_manifest(file: Path) -> list[KernelLaunch] | None:
    """The launches of a list; None = there is none, or it is damaged."""
    lines = _read_checked(file)
    try:
        return lines and [
            KernelLaunch(module, kernel, tuple((name, _read(value)) for name, value in arguments))
            for module, kernel, arguments in lines
        ]
    except (ValueError, KeyError, TypeError):
        _damaged(file)
        return None


def settle_cache_keys(folder: Path) -> None:
    """Give every kernel the hash that Triton's cache knows it by, from a list in `folder`.

    To work one out Triton parses the kernel and all that it calls: 0.5 s for all of ours. Before
    3.9 a hash depends on whether the functions it calls were hashed before it, so where there is no
    list all are worked out in one order.
    """
    file = folder / f"keys-{_sources()[:24]}.json"
    functions, kept = jit_functions(), _read_checked(file)
    if isinstance(kept, dict) and kept.keys() == functions.keys():
        for name, function in functions.items():
            function.hash = kept[name]
        return
    keys = {name: function.cache_key for name, function in functions.items()}
    with suppress(OSError):  # the next process works them out again
        _write_checked(file, keys)


def _write_checked(file: Path, content: Any) -> None:
    digest = _checksum(json.dumps(content).encode())
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"content": content, "digest": digest}))
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def _read_checked(file: Path) -> Any:
    """What was written; None = nothing, or it is damaged."""
    try:
        said = json.loads(file.read_text())
        if said["digest"] != _checksum(json.dumps(said["content"]).encode()):
            raise ValueError("not what was written")
    except OSError:
        return None
    except (ValueError, KeyError, TypeError, RecursionError):
        _damaged(file)
        return None
    return said["content"]


def _damaged(file: Path) -> None:
    note_once(f"compiled kernels in {file.parent} were damaged and are made again")


def _written(launch: KernelLaunch) -> list[list[Any]]:
    return [[name, _as_json(value)] for name, value in launch.arguments]


def _as_json(value: Any) -> Any:
    if isinstance(value, TensorArgument):
        return {"tensor": value.dtype, "aligned": value.aligned}
    return {"type": value.name} if isinstance(value, tl.dtype) else value


def _read(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return (
        TensorArgument(value["tensor"], value["aligned"])
        if "tensor" in value
        else tl.dtype(value["type"])
    )


@dataclass(frozen=True)
class CompileJob:
    """What `compile_kernels` is asked to do."""

    planned: PlannedModel
    gpu: Gpu
    folder: str
    manifest: str


_used: dict[Path, Path] = {}


def use_folder_of(device: torch.device) -> Path:
    """Have Triton use the folder of this GPU; a temporary one where that cannot be written."""
    gpu = gpu_of(device)
    assert gpu is not None, "kernels of a GPU"
    folder = kernel_folder(gpu)
    if folder not in _used:
        use_folder(folder)
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            keep_nothing(error)
        _used[folder] = Path(triton.knobs.cache.dir)
    use_folder(_used[folder])
    return _used[folder]


def why_no_launches() -> str | None:
    """What keeps Triton from launching kernels; None = nothing. It builds a module in C once."""
    try:
        triton.runtime.driver.active.utils  # noqa: B018 - what it needs is built here
    except Exception as error:  # noqa: BLE001 - whatever it is, kernels cannot be launched
        lines = str(error).strip().splitlines()
        return lines[0][:200] if lines else type(error).__name__
    return None
