"""Puts the node pack into a ComfyUI folder, and says whether that ComfyUI can import qwencli."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tempfile
import tomllib
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit
from urllib.request import url2pathname

import qwencli
from qwencli.errors import InputError, OutputError

# The pack's folder in custom_nodes, and the project's name in its pyproject.toml: by that name a
# folder is known to be ours. It is no name that Python could import instead of the package.
PACK_NAME = "qwencli-nodes"
_CUSTOM_NODES = "custom_nodes"
_PACK_IN_CLONE = "comfyui_nodes"
# Where nothing tells what qwencli was installed from.
_SOURCE = "path/to/qwencli"
# A source checkout of ComfyUI has these; its desktop application keeps data and nodes in a folder
# that has only the others.
_PROGRAM = ("main.py", "nodes.py", "comfy")
_DATA = ("models", "input", "output", "user")
# Of virtual environments, in the ComfyUI folder or beside it, and of Windows' portable ComfyUI.
_ENVIRONMENTS = (".venv", "venv", "python_embeded", "python_embedded", "standalone-env")
_PROGRAMS = ("bin/python", "Scripts/python.exe", "python.exe")
# Starting a Python from a slow disk takes seconds; one that hangs is not waited for.
_ASK_TIMEOUT_S = 30
_ASK = """
import json, qwencli, importlib.util as util
print(json.dumps([qwencli.__version__, util.find_spec("qwencli.comfyui") is not None]))
"""


@dataclass(frozen=True)
class Installed:
    """What `install_pack` did.

    Args:
        before: the version of the pack that was there, "" where it says none; None: there was none.
        python: the one that runs ComfyUI, None where it cannot be told.
    """

    folder: Path
    before: str | None
    python: Path | None

    @property
    def said(self) -> str:
        """In words."""
        if self.before is None:
            return "installed"
        if self.before == qwencli.__version__:
            return f"upgraded: its files are as they came, of version {self.before} as before"
        return f"upgraded from {self.before or 'an unknown version'} to {qwencli.__version__}"


def pack_folder() -> Path:
    """The pack that came with this package: inside of it when installed, beside it in a clone.

    Raises:
        InputError: the package is not whole.
    """
    package = Path(qwencli.__file__).parent
    for folder in (package / _PACK_IN_CLONE, package.parent / _PACK_IN_CLONE):
        if (folder / "__init__.py").is_file():
            return folder
    raise InputError(f"{package}: the node pack is missing", "install qwencli again")


def install_pack(path: Path) -> Installed:
    """Copy the pack into the ComfyUI at `path`, as a whole or not at all.

    Args:
        path: a ComfyUI folder, its custom_nodes, or the folder of Windows' portable ComfyUI.

    Raises:
        InputError: no ComfyUI is there, something that is not ours has the pack's name, or the
            pack that is there is newer.
        OutputError: it cannot be written; nothing was changed.
    """
    try:
        comfyui = find_comfyui(path)
        target, before = _target(comfyui / _CUSTOM_NODES)
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read ({error.strerror or error})", "check its permissions"
        ) from error
    try:
        target.parent.mkdir(exist_ok=True)
        _put(pack_folder(), target)
    except OSError as error:
        raise OutputError(
            f"{target} cannot be written: {_reason(error)}",
            "check the permissions of the folder, and that the disk has room",
        ) from error
    return Installed(target, before, find_python(comfyui))


def find_comfyui(path: Path) -> Path:
    """The ComfyUI folder that `path` means.

    Raises:
        InputError: there is none.
    """
    hint = f"give the folder that has ComfyUI's {', '.join(_PROGRAM)} and {_CUSTOM_NODES} in it"
    if not path.exists():
        raise InputError(f"{path}: there is no such folder", hint)
    if not path.is_dir():
        raise InputError(f"{path}: is a file", hint)
    # Not resolved at first: custom_nodes may be a link to another disk.
    full, real = path.absolute(), path.resolve()
    above = [each.parent for each in (full, real) if each.name == _CUSTOM_NODES]
    for folder in (full, *above, full / "ComfyUI"):
        if _is_comfyui(folder):
            nodes = folder / _CUSTOM_NODES
            if not nodes.is_dir() and (nodes.exists() or nodes.is_symlink()):
                found = "a file" if nodes.exists() else "a link to nothing"
                raise InputError(f"{nodes}: {found} is in the way", "move it away")
            return folder
    raise InputError(f"{path}: is no ComfyUI folder", hint)


def find_python(comfyui: Path) -> Path | None:
    """The Python of a virtual environment in or beside the folder; None where there is none."""
    for folder in (comfyui, comfyui.parent):
        for environment in _ENVIRONMENTS:
            for program in _PROGRAMS:
                found = folder / environment / program
                if found.is_file():
                    return found
    return None


def qwencli_in(python: Path) -> str | None:
    """The version of qwencli that this Python imports, with nodes; None: it has none.

    Raises:
        InputError: the Python cannot be run.
    """
    # As ComfyUI runs it, without what this shell adds to the search path.
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    try:
        asked = subprocess.run(
            [python, "-c", _ASK],
            capture_output=True,
            env=environment,
            cwd=python.parent,
            stdin=subprocess.DEVNULL,
            timeout=_ASK_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(f"{python}: cannot be run ({error})", "run it by hand") from error
    try:
        # What its site prints comes first.
        version, has_nodes = json.loads(asked.stdout.splitlines()[-1])
    except (ValueError, LookupError, TypeError, RecursionError):
        return None
    return str(version) if has_nodes else None


def requirement() -> str:
    """What to give pip so that it installs the qwencli that runs here: the folder, file or address
    that it came from. It is in no public registry, so that its name alone says nothing to pip."""
    clone = Path(qwencli.__file__).parent.parent
    if (clone / "pyproject.toml").is_file() and (clone / _PACK_IN_CLONE).is_dir():
        return f'"{clone}"'
    try:
        told = json.loads(metadata.distribution("qwencli").read_text("direct_url.json") or "{}")
        url, commit = told.get("url", ""), told.get("vcs_info", {})
    except (metadata.PackageNotFoundError, ValueError, AttributeError):
        url, commit = "", {}
    source = urlsplit(url)
    if source.scheme == "file":
        path = Path(url2pathname(unquote(source.path)))
        return f'"{path}"' if path.exists() else _SOURCE
    if not source.scheme:
        return _SOURCE
    return f'"{commit["vcs"]}+{url}@{commit["commit_id"]}"' if commit else f'"{url}"'


def _is_comfyui(folder: Path) -> bool:
    if all((folder / name).exists() for name in _PROGRAM):
        return True
    return (folder / _CUSTOM_NODES).is_dir() and all((folder / name).is_dir() for name in _DATA)


def _target(custom_nodes: Path) -> tuple[Path, str | None]:
    """Where the pack goes, and the version of the one that is there, under whatever name.

    Raises:
        InputError: something else, a link, or a newer pack is in the way.
    """
    present = sorted(custom_nodes.iterdir()) if custom_nodes.is_dir() else []
    packs = {
        folder: version
        for folder in present
        if folder.suffix != ".disabled" and (version := _pack_version(folder)) is not None
    }
    if len(packs) > 1:
        names = " and ".join(folder.name for folder in packs)
        raise InputError(f"{custom_nodes}: the pack is there more than once: {names}", "keep one")
    for folder, version in packs.items():
        if folder.is_symlink():
            raise InputError(
                f"{folder}: is a link to {folder.resolve()}, the pack that ComfyUI loads",
                "remove the link to have a copy",
            )
        if _numbers(version) > _numbers(qwencli.__version__):
            raise InputError(
                f"{folder}: version {version} is there, and this qwencli has {qwencli.__version__}",
                "update qwencli, or remove that folder to go back",
            )
        return folder, version
    target = custom_nodes / PACK_NAME
    if target.is_symlink():
        raise InputError(f"{target}: a link is in the way", "remove the link")
    if target.is_dir():
        raise InputError(f"{target}: a folder that is not qwencli's is in the way", "move it away")
    if target.exists():
        raise InputError(f"{target}: a file is in the way", "move it away")
    return target, None


def _pack_version(folder: Path) -> str | None:
    """The version of the pack in a folder, "" where it says none; None: it is not our pack."""
    file = folder / "pyproject.toml"
    try:
        if not file.is_file():  # a pipe would be waited for
            return None
        project = tomllib.loads(file.read_text("utf-8"))["project"]
        if project["name"] != PACK_NAME:
            return None
        version = project.get("version", "")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return version if isinstance(version, str) and _numbers(version) else ""


def _numbers(version: str) -> tuple[int, ...]:
    """The numbers of a version such as "0.1.0"; none where it is no version."""
    found = re.match(r"\d{1,9}(\.\d{1,9}){0,5}", version)
    return tuple(map(int, found[0].split("."))) if found else ()


def _reason(error: OSError) -> str:
    """Why, in a line: a copy of a folder that failed tells of every file, here of the first."""
    if isinstance(error, shutil.Error) and error.args and isinstance(error.args[0], list):
        # Each is two paths and words: [Errno 28] No space left on device: 'a' -> 'b'
        words = re.sub(r"^\[Errno \d+\] ", "", str(error.args[0][0][2]))
        return words.partition(": '")[0]
    return error.strerror or str(error)


def _put(pack: Path, target: Path) -> None:
    """Make `target` a copy of the pack. What a person added to the old one stays.

    Raises:
        OSError: nothing was changed.
    """
    # ComfyUI loads no folder with this ending, should it start meanwhile.
    beside = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{PACK_NAME}-", suffix=".disabled"))
    try:
        new, old = beside / "new", beside / "old"
        ignored = shutil.ignore_patterns("__pycache__")
        if target.exists():
            shutil.copytree(target, new, ignore=ignored, symlinks=True)
        shutil.copytree(pack, new, ignore=ignored, dirs_exist_ok=True)
        if target.exists():
            target.rename(old)
        try:
            new.rename(target)
        except OSError:
            if old.exists():
                old.rename(target)
            raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
