"""What the hub cache on this machine holds. Reads folders, never the network.

Layout (huggingface_hub's "Manage your cache" guide): `models--OWNER--NAME/refs/main` names a
commit, `snapshots/COMMIT/` holds its files; a file appears there only once it is whole.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

from qwencli.models.folder import is_complete

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
