"""The user's config.toml: which model is the default, and the settings of single models.

    model = "qwen3-vl-4b"
    keep_loaded = "5m"

    [models."qwen3-vl-4b"]
    quantization = "4bit"
    max_pixels = 524288

The one place that reads and writes it. Writing keeps everything else in the file as it is,
comments included.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwencli.config import Attention, Cache, EngineName, Kernels, KVDType, Quantization
from qwencli.errors import OutputError, UsageError

CONFIG_FILE = "config.toml"
# Setting -> how its value is read; ValueError for a wrong one.
SETTINGS: Mapping[str, Callable[[Any], Any]] = {
    "engine": EngineName,
    "quantization": Quantization,
    "attention": Attention,
    "cache": Cache,
    "kernels": Kernels,
    "kv_dtype": KVDType,
    "max_seq_len": lambda value: _positive(value),
    "max_pixels": lambda value: _positive(value),
}


def user_config_folder() -> Path:
    """The user's configuration folder as the platform has it; may not exist."""
    from platformdirs import user_config_path

    return user_config_path("qwencli", appauthor=False)


def configured_model(folder: Path) -> str | None:
    """`model` of the config in `folder`; None where it names none.

    Raises:
        UsageError: the file is malformed.
    """
    path = folder / CONFIG_FILE
    model = _parse(path, _read(path)).get("model")
    if model is not None and not isinstance(model, str):
        raise UsageError(f"{path}: model: expected a text, got {model!r}", "correct the file")
    return model


def configured_keep_loaded(folder: Path) -> str | None:
    """`keep_loaded` of the config in `folder`; None where it says nothing.

    Raises:
        UsageError: the file is malformed.
    """
    path = folder / CONFIG_FILE
    said = _parse(path, _read(path)).get("keep_loaded")
    if said is None or (type(said) in (str, int) and not isinstance(said, bool)):
        return None if said is None else str(said)
    raise UsageError(
        f"{path}: keep_loaded: expected a time such as '5m', got {said!r}", "correct it"
    )


def model_settings(folder: Path, name: str) -> dict[str, Any]:
    """Settings of the model of this name by the names of EngineConfig; {} where it has none.

    Raises:
        UsageError: the file is malformed, or a setting or its value is unknown.
    """
    path = folder / CONFIG_FILE
    models = _parse(path, _read(path)).get("models", {})
    section = models.get(name, {}) if isinstance(models, dict) else None
    if not isinstance(section, dict):
        raise UsageError(f"{path}: models: expected tables", "correct the file")
    settings = {}
    for key, value in section.items():
        if key not in SETTINGS:
            raise UsageError(
                f"{path}: models.{name}: there is no setting {key!r}",
                f"known: {', '.join(SETTINGS)}",
            )
        try:
            settings[key] = SETTINGS[key](value)
        except ValueError as error:
            raise UsageError(
                f"{path}: models.{name}.{key}: {value!r} is not possible", "correct the file"
            ) from error
    return settings


def _positive(value: Any) -> int:
    if type(value) is not int or value < 1:
        raise ValueError(value)
    return value


def changed_config(
    folder: Path, name: str, settings: Mapping[str, Any], *, default: bool
) -> tuple[str, str]:
    """(the file's text, the text with `settings` as the section of model `name`).

    Args:
        default: also make it the default model.

    Raises:
        UsageError: the file is malformed, or written in a way that cannot be changed safely.
    """
    path = folder / CONFIG_FILE
    old = _read(path)
    wanted = _parse(path, old)
    plain = {key: value for key, value in settings.items() if value is not None}
    new = _with_section(old, name, plain)
    if plain:
        models = wanted.get("models", {})
        wanted["models"] = {**(models if isinstance(models, dict) else {}), name: plain}
    if default:
        new = _with_model(new, name)
        wanted["model"] = name
    if _parse(path, new) != json.loads(json.dumps(wanted)):
        raise UsageError(
            f"{path}: the settings of {name} are written in a way that cannot be replaced safely",
            "change the file by hand",
        )
    return old, new


def write_config(folder: Path, text: str) -> Path:
    """Put `text` into the config as a whole: it is the old one or the new one, never half of one.

    Raises:
        OutputError: it cannot be written; the old file is untouched.
    """
    path = (folder / CONFIG_FILE).resolve()
    beside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(dir=path.parent, prefix=".config-", suffix=".toml")
        with os.fdopen(descriptor, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if path.exists():
            Path(beside).chmod(path.stat().st_mode & 0o777)
        Path(beside).replace(path)
    except OSError as error:
        if beside is not None:
            Path(beside).unlink(missing_ok=True)
        raise OutputError(
            f"{path} cannot be written: {error.strerror or error}", "check the folder's permissions"
        ) from error
    return path


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8")
    except FileNotFoundError:
        return ""
    except OSError as error:
        raise UsageError(
            f"{path}: cannot be read ({error.strerror or error})",
            "check the permissions of the file and its folder",
        ) from error
    except ValueError as error:
        raise UsageError(f"{path}: cannot be read ({error})", "correct the file") from error


def _parse(path: Path, text: str) -> dict[str, Any]:
    if not text:
        return {}
    import tomllib

    try:
        return tomllib.loads(text)
    except (ValueError, RecursionError) as error:
        raise UsageError(f"{path}: cannot be read as TOML ({error})", "correct the file") from error


def _with_section(text: str, name: str, settings: Mapping[str, Any]) -> str:
    """The text with the section of `name` replaced, or appended."""
    body = [f"{key} = {_quoted(value)}" for key, value in settings.items()]
    lines = _lines(text)
    heads = [at for at, line in enumerate(lines) if line.lstrip().startswith("[")]
    names = {f"[models.{_quoted(name)}]", f"[models.{name}]", f"[models.'{name}']"}
    start = next((at for at in heads if lines[at].partition("#")[0].strip() in names), None)
    if start is None:
        gap = [""] if lines and lines[-1].strip() else []
        return _joined([*lines, *gap, f"[models.{_quoted(name)}]", *body])
    end = next((at for at in heads if at > start), len(lines))
    while end > start + 1 and (not lines[end - 1].strip() or lines[end - 1].lstrip()[0] == "#"):
        end -= 1  # what stands before the next section belongs to that one
    return _joined([*lines[: start + 1], *body, *lines[end:]])


def _with_model(text: str, name: str) -> str:
    """The text with `model` at the top level set to `name`."""
    lines = _lines(text)
    first_section = next(
        (at for at, line in enumerate(lines) if line.lstrip().startswith("[")), len(lines)
    )
    entry = f"model = {_quoted(name)}"
    for at in range(first_section):
        if lines[at].partition("=")[0].strip() == "model":
            return _joined([*lines[:at], entry, *lines[at + 1 :]])
    gap = [""] if lines and lines[0].strip() else []
    return _joined([entry, *gap, *lines])


def _quoted(value: Any) -> str:
    """A text or a number as TOML; JSON writes them alike as long as it escapes nothing else."""
    return json.dumps(value, ensure_ascii=False)


def _lines(text: str) -> list[str]:
    # Not splitlines: it also splits at characters that TOML does not.
    return text.removesuffix("\n").split("\n") if text else []


def _joined(lines: list[str]) -> str:
    return "\n".join(lines) + "\n"
