"""Reads custom_models.json, the user's own models, in the format the ComfyUI node packs use.

    {"hf_models":    {NAME: {"repo_id": "Owner/Name or folder", "model_class": "...",
                             "default": false, "quantized": false,
                             "vram_requirement": {"4bit": 4.5, "8bit": 7, "full": 12}}},
     "hf_vl_models": {...the same...}}

Only `repo_id` is required. `model_class` is accepted and not needed: the class follows from the
model's own config.json. A file is refused only where it cannot be used; keys nobody knows become
warnings.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PureWindowsPath
from typing import Any, NoReturn

from qwencli.config import ModelSource, ModelSpec
from qwencli.errors import CustomModelsError
from qwencli.models.builtin import find_builtin, hub_config

FILE_NAME = "custom_models.json"
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*", re.ASCII)

# Vision models first: when both sections mark a default, it is the one that can caption.
_SECTIONS = ("hf_vl_models", "hf_models")
_KEYS = ("repo_id", "model_class", "default", "quantized", "vram_requirement")
_KINDS: Mapping[type, str] = {dict: "an object", list: "a list"}
_NOTHING = object()
_MODES = ("4bit", "8bit", "full")


@dataclass(frozen=True)
class CustomModels:
    """Entries of one or more files by name, and what in them was not understood."""

    specs: Mapping[str, ModelSpec]
    warnings: tuple[str, ...] = ()

    @property
    def default(self) -> ModelSpec | None:
        return next((spec for spec in self.specs.values() if spec.default), None)

    def updated(self, later: CustomModels) -> CustomModels:
        """These entries overlaid with those of a later file, whose default replaces ours."""
        ours = dict(self.specs)
        if later.default is not None:
            ours = {name: replace(spec, default=False) for name, spec in ours.items()}
        return CustomModels({**ours, **later.specs}, self.warnings + later.warnings)


def load_custom_models(folders: tuple[Path, ...], models_file: Path | None = None) -> CustomModels:
    """Read the file in each folder that has one, then `models_file`; later ones win.

    Raises:
        CustomModelsError: a file that cannot be used, or `models_file` does not exist.
    """
    # `os.path`: pathlib's raises for a folder that nobody may enter, where there is nothing for us.
    if models_file is not None and not os.path.isfile(models_file):  # noqa: PTH113
        raise CustomModelsError(
            f"{models_file}: no such file, or in a folder that cannot be read",
            "check the path of --models-file",
        )
    paths = [folder / FILE_NAME for folder in folders]
    found = [path for path in paths if os.path.isfile(path)]  # noqa: PTH113
    models = CustomModels({})
    for path in [*found, models_file] if models_file else found:
        models = models.updated(_read(path))
    return models


def parse_custom_models(text: str, path: Path) -> CustomModels:
    """Parse the contents of one file; `path` names it and is where relative folders start.

    Raises:
        CustomModelsError: with the file, the key path and what was expected there.
    """
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        _refuse(path, f"line {error.lineno}, column {error.colno}", f"JSON ({error.msg})")
    except (ValueError, RecursionError):
        _refuse(path, "the file", "JSON of ordinary size and depth")
    if not isinstance(value, dict):
        _refuse(path, "the file", "an object", value)
    warnings = [f"{path}: {key!r} is not known" for key in value if key not in _SECTIONS]
    specs: dict[str, ModelSpec] = {}
    for section in _SECTIONS:
        entries = value.get(section, {})
        if not isinstance(entries, dict):
            _refuse(path, section, "an object of models", entries)
        read = {name: _entry(path, section, name, entry) for name, entry in entries.items()}
        defaults = [name for name, spec in read.items() if spec.default]
        if len(defaults) > 1:
            _refuse(path, section, f"one default at most, {defaults[0]!r} and {defaults[1]!r} are")
        if any(spec.default for spec in specs.values()):
            read = {name: replace(spec, default=False) for name, spec in read.items()}
        for name in read.keys() & specs.keys():
            _refuse(path, f"{section}.{name}", "a name that is used once")
        warnings += [
            f"{path}: {section}.{name}: {key!r} is not known"
            for name, entry in entries.items()
            for key in entry
            if key not in _KEYS
        ]
        specs |= read
    return CustomModels(specs, tuple(warnings))


def as_folder(text: str) -> Path | None:
    """The folder a user means when `text` looks like a path; None when it does not.

    `~` is the home folder; "a/b" is no path here but a hub id, "./a/b" is one.
    """
    if text == "~" or text.startswith(("~/", "~\\")):
        return Path(os.path.expanduser(text))  # noqa: PTH111  (Path.expanduser raises, this does not)
    looks = text.startswith((".", "/")) or "\\" in text or PureWindowsPath(text).drive
    return Path(text) if looks else None


def _read(path: Path) -> CustomModels:
    try:
        # utf-8-sig: editors on Windows put a byte order mark in front.
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise CustomModelsError(
            f"{path}: cannot be read ({error.strerror or error})", "check the file's permissions"
        ) from error
    except UnicodeDecodeError as error:
        raise CustomModelsError(
            f"{path}: is not UTF-8 text (byte {error.start})", "save the file as UTF-8"
        ) from error
    return parse_custom_models(text, path)


def _entry(path: Path, section: str, name: str, entry: object) -> ModelSpec:
    at = f"{section}.{name}"
    if not name.strip() or not name.isprintable():
        _refuse(path, section, "a printable name for each model", name)
    if not isinstance(entry, dict):
        _refuse(path, at, "an object", entry)
    if "repo_id" not in entry:
        _refuse(path, f"{at}.repo_id", "a hub id or a folder, it is missing")
    folder, repo_id = _source(path, f"{at}.repo_id", entry["repo_id"])
    for key, kind, said in (
        ("model_class", str, "a text"),
        ("default", bool, "true or false"),
        ("quantized", bool, "true or false"),
    ):
        if key in entry and not isinstance(entry[key], kind):
            _refuse(path, f"{at}.{key}", said, entry[key])
    builtin = find_builtin(repo_id) if repo_id else None
    return ModelSpec(
        name=name,
        source=ModelSource.CUSTOM,
        repo_id=repo_id,
        path=folder,
        hub_config=hub_config(builtin.alias) if builtin else None,
        vram_requirement=_vram(path, f"{at}.vram_requirement", entry.get("vram_requirement", {})),
        default=entry.get("default", False),
        quantized=entry.get("quantized", False),
    )


def _source(path: Path, at: str, value: object) -> tuple[Path | None, str | None]:
    if not isinstance(value, str) or not value.isprintable():
        _refuse(path, at, "a hub id (Owner/Name) or a folder", value)
    folder = as_folder(value)
    if folder is not None:
        return path.parent / folder, None
    if not HUB_ID.fullmatch(value):
        _refuse(path, at, "a hub id (Owner/Name) or a folder (./name)", value)
    return None, value


def _vram(path: Path, at: str, value: object) -> dict[str, float]:
    if not isinstance(value, dict):
        _refuse(path, at, 'an object like {"4bit": 5, "full": 10}', value)
    for mode, figure in value.items():
        if mode not in _MODES:
            _refuse(path, at, "4bit, 8bit or full as key", mode)
        number = isinstance(figure, int | float) and not isinstance(figure, bool)
        if not number or not 0 < figure < 1e6:
            _refuse(path, f"{at}.{mode}", "GB as a number above 0", figure)
    return {mode: float(figure) for mode, figure in value.items()}


def _refuse(path: Path, at: str, expected: str, value: Any = _NOTHING) -> NoReturn:
    got = "" if value is _NOTHING else f", got {_KINDS.get(type(value)) or json.dumps(value)[:60]}"
    raise CustomModelsError(
        f"{path}: {at}: expected {expected}{got}",
        "correct this place in the file; the README shows a complete entry",
    )
