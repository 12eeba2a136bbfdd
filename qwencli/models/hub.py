"""Models of the hub: in its cache on this machine, or downloaded into it.

Layout of the cache (huggingface_hub's "Manage your cache" guide): `models--OWNER--NAME/refs/main`
names a commit, `snapshots/COMMIT/` holds its files; a file appears there only once it is whole.

Only files that loading needs are fetched; pickle weights only when asked for and when the
repository has no safetensors; nothing at all of a model that cannot run here. An interrupted
download resumes and never counts as complete.
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
from collections.abc import Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING

from qwencli.errors import DownloadError, ModelFileError
from qwencli.models.config_values import read_json_object
from qwencli.models.folder import check_folder, is_complete

_PREFIX = "models--"
# Lies in a repository's folder from the start of our download to its end; see `download`.
UNFINISHED = ".qwencli-unfinished"


def cache_root() -> Path:
    """The hub cache folder (HF_HUB_CACHE, HF_HOME or the default); may not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE)


def repo_folder(repo_id: str) -> Path:
    """Where the cache keeps a repository; may not exist yet."""
    return cache_root() / (_PREFIX + repo_id.replace("/", "--"))


def find_cached(repo_id: str, *, allow_pickle: bool = False) -> Path | None:
    """The newest complete snapshot of a repository; None when there is none.

    A repository whose download was interrupted has none, even if the weights happen to be whole.
    """
    folder = repo_folder(repo_id)
    try:
        if not folder.is_dir() or (folder / UNFINISHED).exists():
            return None
        complete = (s for s in _snapshots(folder) if is_complete(s, allow_pickle=allow_pickle))
        return next(complete, None)
    except OSError:  # see `unreadable`
        return None


def unreadable() -> bool:
    """Whether the cache is there and this user may not look into it."""
    try:
        next(cache_root().iterdir(), None)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def is_partly_cached(repo_id: str) -> bool:
    """Whether some files of a repository are here (for the error line when the rest cannot be)."""
    return next(iter(_snapshots(repo_folder(repo_id))), None) is not None


def cached_repos() -> Iterator[tuple[str, Path]]:
    """Every complete snapshot of a model of a supported family: (repo id, folder), by name."""
    root = cache_root()
    if unreadable() or not root.is_dir():
        return
    for folder in sorted(root.glob(_PREFIX + "*")):
        # The hub forbids "--" in names, so the first one separates owner and name.
        repo_id = folder.name.removeprefix(_PREFIX).replace("--", "/", 1)
        snapshot = find_cached(repo_id)
        if snapshot is not None:
            yield repo_id, snapshot


def unfinished_downloads() -> Iterator[tuple[str, int, bool]]:
    """Every download that has not ended: (repo id, files begun, whether a process is at it)."""
    root = cache_root()
    for folder in sorted(root.glob(_PREFIX + "*")) if not unreadable() and root.is_dir() else ():
        begun = len(list(folder.glob("blobs/*.incomplete")))
        if begun or (folder / UNFINISHED).exists():
            locks = root.glob(f".locks/{folder.name}/*.lock")
            repo_id = folder.name.removeprefix(_PREFIX).replace("--", "/", 1)
            yield repo_id, begun, any(map(_is_held, locks))


def _is_held(lock: Path) -> bool:
    """Whether a process holds this lock file; the file itself stays behind after every download.

    False where the system does not lock as Unix does.
    """
    if sys.platform == "win32":
        return False
    import fcntl

    try:
        with lock.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # gone meanwhile, or on a filesystem without locks
        return False
    return False


def _snapshots(folder: Path) -> list[Path]:
    snapshots = folder / "snapshots"
    if not snapshots.is_dir():
        return []
    main = folder / "refs" / "main"
    current = main.read_text(encoding="utf-8").strip() if main.is_file() else ""
    found = [path for path in snapshots.iterdir() if path.is_dir()]
    return sorted(found, key=lambda p: (p.name == current, p.stat().st_mtime), reverse=True)


if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo

_PATTERNS = ("*.json", "*.safetensors", "*.jinja", "*.txt", "*.model")
_LOG_IN = "accept the model's terms on its page, then log in with `hf auth login` or set HF_TOKEN"
_LATER = "run the same command again: what has arrived is kept"


def download(repo_id: str, *, offline: bool = False, allow_pickle: bool = False) -> Path:
    """Fetch a repository's model files and return the complete local snapshot.

    Raises:
        DownloadError: offline, no network, access refused, no such repository, no disk space.
        ModelFileError: the repository has only pickle weights, or is no model of a known family.
    """
    from huggingface_hub import HfApi, constants, hf_hub_download, snapshot_download
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's or httpx2's

    from qwencli.models.shape_reader import read_shape

    if offline or constants.HF_HUB_OFFLINE:
        raise _offline(repo_id, "--offline" if offline else "HF_HUB_OFFLINE")
    if not constants.ENDPOINT.startswith(("http://", "https://")):
        address = constants.ENDPOINT.rpartition("://")[2]
        raise DownloadError(
            f"{repo_id}: HF_ENDPOINT is {constants.ENDPOINT!r}, which is not a web address",
            f"set HF_ENDPOINT=https://{address}",
        )
    # RuntimeError is what the hub's transfer backend (hf_xet) raises; ValueError an invalid id.
    try:
        info = HfApi().model_info(repo_id, files_metadata=True)
        sizes = _files_to_download(info, allow_pickle)
        _check_space(repo_id, sizes, info.sha or "")
        marker = repo_folder(repo_id) / UNFINISHED
        marker.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        # Gigabytes of a model we cannot run are not worth the wait: its configuration comes first.
        config = hf_hub_download(repo_id, "config.json", revision=info.sha)
        read_shape(read_json_object(Path(config)), f"{repo_id}: config.json")
        snapshot = Path(snapshot_download(repo_id, revision=info.sha, allow_patterns=list(sizes)))
        _point_main(repo_id, info.sha or "")
        marker.unlink()
    except (HTTPError, ImportError, OSError, RuntimeError, ValueError) as error:
        raise _explained(repo_id, error) from error
    check_folder(snapshot, allow_pickle=allow_pickle)
    return snapshot


def _files_to_download(info: ModelInfo, allow_pickle: bool) -> dict[str, int]:
    """File name -> bytes of what is to be fetched: files at the top of the repository."""
    from qwencli.models.weight_files import PICKLE_SUFFIXES

    sizes = {f.rfilename: f.size or 0 for f in info.siblings or () if "/" not in f.rfilename}
    patterns: tuple[str, ...] = _PATTERNS
    pickles = tuple("*" + suffix for suffix in PICKLE_SUFFIXES)
    if not _matching(sizes, ("*.safetensors",)) and _matching(sizes, pickles):
        if not allow_pickle:
            raise ModelFileError(
                f"{info.id}: has only pickle weights, which can run code",
                "use a safetensors version of the model, or pass --allow-pickle if you trust it",
            )
        patterns = _PATTERNS + pickles
    wanted = {name: sizes[name] for name in _matching(sizes, patterns)}
    if "config.json" not in wanted:
        raise ModelFileError(
            f"{info.id}: the repository has no config.json",
            "give a model in the transformers layout (GGUF files and adapters are not)",
        )
    return wanted


def _matching(names: Iterable[str], patterns: tuple[str, ...]) -> list[str]:
    return [name for name in names if any(fnmatch(name, pattern) for pattern in patterns)]


def _check_space(repo_id: str, sizes: dict[str, int], commit: str) -> None:
    snapshot = repo_folder(repo_id) / "snapshots" / commit
    needed = sum(size for name, size in sizes.items() if not (snapshot / name).exists())
    root = cache_root()
    existing = next(path for path in (root, *root.absolute().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if needed > free:
        raise DownloadError(
            f"{repo_id}: needs {needed / 1e9:.1f} GB in {root}, {free / 1e9:.1f} GB is free",
            "free some space, or put the cache on another disk with HF_HOME",
        )


def _point_main(repo_id: str, commit: str) -> None:
    # A download by commit leaves refs/main alone; other tools look the snapshot up through it.
    main = repo_folder(repo_id) / "refs" / "main"
    main.parent.mkdir(parents=True, exist_ok=True)
    main.write_text(commit, encoding="utf-8")


def _offline(repo_id: str, switch: str) -> DownloadError:
    if unreadable():
        return DownloadError(
            f"{repo_id}: {cache_root()} cannot be read and {switch} is set",
            "make it readable, or name another cache with HF_HOME",
        )
    state = "only partly downloaded" if is_partly_cached(repo_id) else "not on this machine"
    return DownloadError(
        f"{repo_id} is {state} and {switch} is set",
        "run once without it, give a local folder, or use the bundled model: --model scenes",
    )


def _proxy_names() -> str:
    """Variables that name a proxy; not their values, which may hold a password."""
    keys = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY")
    named = [key for key in (*keys, *map(str.lower, keys)) if os.environ.get(key)]
    return ", ".join(named) or "the system"


def _explained(repo_id: str, error: Exception) -> DownloadError:
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return DownloadError(f"{repo_id}: access refused, the model is gated", _LOG_IN)
    if isinstance(error, errors.RepositoryNotFoundError):
        # The hub answers alike for what does not exist and for what is private.
        return DownloadError(
            f"{repo_id}: no such model on the hub, or a private one",
            "check the spelling; for a private model log in with `hf auth login` or set HF_TOKEN",
        )
    if isinstance(error, errors.HfHubHTTPError):
        status = error.response.status_code
        if status in (401, 403):
            return DownloadError(f"{repo_id}: access refused (HTTP {status})", _LOG_IN)
        return DownloadError(f"{repo_id}: the hub answered HTTP {status}", f"wait, then {_LATER}")
    if isinstance(error, errors.HFValidationError):
        return DownloadError(f"{repo_id}: not a valid hub id", "it has the form Owner/Name")
    if isinstance(error, ImportError) and "socks" in str(error).lower():
        return DownloadError(
            f"{repo_id}: {_proxy_names()} names a SOCKS proxy, which needs the package socksio",
            "pip install socksio, or name an http proxy",
        )
    if isinstance(error, ValueError) and "proxy" in str(error).lower():
        return DownloadError(
            f"{repo_id}: the proxy that {_proxy_names()} names cannot be used",
            "give it as http://HOST:PORT",
        )
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return DownloadError(
            f"{repo_id}: the disk became full while downloading",
            "free some space, or put the cache on another disk with HF_HOME",
        )
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return DownloadError(
            f"{repo_id}: cannot write to {error.filename or cache_root()} ({error.strerror})",
            "make it writable, or put the cache elsewhere with HF_HOME",
        )
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return DownloadError(
        f"{repo_id}: the hub cannot be reached ({reason})",
        f"check the network, then {_LATER}; without one use --model scenes or a local folder",
    )
