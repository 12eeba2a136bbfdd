"""Reads a matrix: one of the built-in ones by name, or a TOML file.

[axes]                       # model, engine, quantization, attention, cache, load_mode, kernels,
                             # kv_dtype, speculate
attention = ["sdpa", "eager"]

[[exclude]]                  # drops the cells that match every line of the entry
attention = "eager"
cache = ["static", "static-compile"]

[run]                        # optional, and so is every line of it
runs = 5                     # or max_noise (percent), min_runs, max_runs, max_time (seconds)
processes = 1
max_new_tokens = 128
prompt = "Describe it."      # or preset = "short", or prompt_file = "prompt.txt"
images = ["scene", "my.png"] # shipped ones by name; files are looked for beside the matrix
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from qwencli.bench.plan.matrix import AXES, Matrix, check_values
from qwencli.bench.plan.stopping import RepetitionOptions
from qwencli.config import SAMPLING_BOUNDS
from qwencli.errors import BenchError, InputError, UsageError
from qwencli.messages import DEFAULT_PROMPT, PRESETS

BUILT_IN = Path(__file__).parent / "matrices"
# The built-in matrix whose reports have the columns of the notes that this project came from.
ORIGIN = "origin"
_COUNTS = {
    "runs": 10_000,
    "min_runs": 10_000,
    "max_runs": 10_000,
    "processes": 100,
    "max_new_tokens": int(SAMPLING_BOUNDS["max_new_tokens"].high),
}
_AMOUNTS = ("max_noise", "max_time")
_PROMPTS = ("prompt", "preset", "prompt_file")
_RUN_KEYS = (*_COUNTS, *_AMOUNTS, *_PROMPTS, "images")
# Keys of [run] that are fields of `RepetitionOptions`, one of them under another name.
_REPETITION = (*(key for key in _COUNTS if key != "max_new_tokens"), *_AMOUNTS)
_FIELDS = {"max_time": "max_time_s"}
_SHIPPED = Path(__file__).parents[1] / "assets"
# A red circle and a blue square: something to look at for every model there is.
EXAMPLE_IMAGE = _SHIPPED / "scene.png"


def names() -> list[str]:
    """Names of the built-in matrices."""
    return sorted(path.stem for path in BUILT_IN.glob("*.toml"))


def load_matrix(name_or_file: str) -> Matrix:
    """Read the matrix of this name, or of this file.

    Raises:
        UsageError: no such name.
        BenchError: the file cannot be read or is malformed; names the file and the key.
    """
    if name_or_file in names():
        return _parse(BUILT_IN / f"{name_or_file}.toml", name_or_file)
    path = Path(name_or_file)
    if path.suffix != ".toml" and not path.is_file():
        raise UsageError(
            f"--matrix has no built-in named {name_or_file!r}",
            f"give one of {', '.join(names())}, or a .toml file",
        )
    return _parse(path, str(path))


def _parse(path: Path, name: str) -> Matrix:
    try:
        document = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BenchError(f"matrix {name}: {error.strerror}", "check the path") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BenchError(f"matrix {name} is not valid TOML: {error}", "correct the file") from error
    _check_keys(name, "", document, ("axes", "exclude", "run"))
    run = _table(name, "run", document.get("run", {}))
    _check_keys(name, "run.", run, _RUN_KEYS)
    exclude = document.get("exclude", [])
    if not isinstance(exclude, list) or not all(exclude):
        raise BenchError(f"matrix {name}: exclude must be [[exclude]] tables that name an axis")
    return Matrix(
        name=name,
        axes=_axes(name, "axes", document.get("axes", {})),
        exclude=tuple(_axes(name, f"exclude[{i}]", entry) for i, entry in enumerate(exclude)),
        **_run(path, name, run),
    )


def _run(path: Path, name: str, run: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of `Matrix` that [run] sets."""
    said: dict[str, Any] = {key: read(name, key, run[key]) for key, read in _RUN if key in run}
    fields = {key: said[key] for key in ("max_new_tokens",) if key in said}
    repetition = {_FIELDS.get(key, key): said[key] for key in _REPETITION if key in said}
    prompt = {key: said[key] for key in _PROMPTS if key in said}
    if "prompt_file" in prompt:
        prompt["prompt_file"] = path.parent / prompt["prompt_file"]
    images = run.get("images", [])
    if not isinstance(images, list):
        raise BenchError(f"matrix {name}: run.images must be a list of names or files")
    texts = [_text(name, "images", image) for image in images]
    try:
        fields["prompt"] = read_prompt(**prompt)
        fields["images"] = tuple(find_image(text, path.parent) for text in texts)
    except (UsageError, InputError) as error:
        raise BenchError(f"matrix {name}: run: {error.message}", error.hint) from error
    return {**fields, "repetition": RepetitionOptions(**repetition)}


def _axes(name: str, key: str, value: Any) -> dict[str, tuple[str, ...]]:
    table = _table(name, key, value)
    _check_keys(name, f"{key}.", table, tuple(AXES))
    axes = {}
    for axis, said in table.items():
        values = [said] if isinstance(said, str) else said
        if not isinstance(values, list) or not all(isinstance(item, str) for item in values):
            raise BenchError(f"matrix {name}: {key}.{axis} must be a string or a list of strings")
        try:
            axes[axis] = check_values(axis, tuple(values))
        except UsageError as error:
            raise BenchError(f"matrix {name}: {key}.{axis}: {error.message}", error.hint) from error
    return axes


def _table(name: str, key: str, value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise BenchError(f"matrix {name}: {key} must be a table", f"write it as [{key}]")
    return value


def _check_keys(name: str, prefix: str, table: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    for key in table:
        if key not in keys:
            raise BenchError(
                f"matrix {name}: unknown key {prefix}{key}", f"known: {', '.join(keys)}"
            )


def _count(name: str, key: str, value: Any) -> int:
    high = _COUNTS[key]
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= high:
        raise BenchError(f"matrix {name}: run.{key} must be a whole number from 1 to {high}")
    return value


def _amount(name: str, key: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise BenchError(f"matrix {name}: run.{key} must be a number above zero")
    return float(value)


def _text(name: str, key: str, value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise BenchError(f"matrix {name}: run.{key} must be text")
    return value


_RUN: tuple[tuple[str, Callable[[str, str, Any], Any]], ...] = (
    *((key, _count) for key in _COUNTS),
    *((key, _amount) for key in _AMOUNTS),
    *((key, _text) for key in _PROMPTS),
)


def shipped_images() -> dict[str, Path]:
    """The pictures that have a name."""
    return {path.stem: path for path in sorted(_SHIPPED.glob("*.png"))}


def find_image(name_or_file: str, folder: Path) -> Path:
    """A file (relative ones lie in `folder`), or a shipped picture of this name.

    Raises:
        InputError: neither.
    """
    path = folder / name_or_file
    if path.is_file():
        return path.resolve()
    shipped = shipped_images()
    if name_or_file not in shipped:
        raise InputError(
            f"{name_or_file}: no such file",
            f"check the path given to --image; shipped pictures: {', '.join(shipped)}",
        )
    return shipped[name_or_file]


def read_prompt(
    *, prompt: str | None = None, preset: str | None = None, prompt_file: Path | None = None
) -> str | None:
    """The text of the one that is given; None when none is.

    Raises:
        UsageError: several are given, the preset is unknown, or the text is empty.
        InputError: the file cannot be read.
    """
    said = {"--prompt": prompt, "--preset": preset, "--prompt-file": prompt_file}
    given = [flag for flag, value in said.items() if value is not None]
    if len(given) > 1:
        raise UsageError(f"{' and '.join(given)} exclude each other", "give one of them")
    if not given:
        return None
    if preset is not None:
        if preset not in PRESETS:
            raise UsageError(f"--preset {preset!r} is unknown", f"use one of: {', '.join(PRESETS)}")
        return PRESETS[preset]
    text = prompt if prompt_file is None else _read(prompt_file)
    if text is None or not text.strip():
        raise UsageError(f"{given[0]} is empty", "say what the model is to do")
    return text.strip()


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise InputError(
            f"{path}: cannot be read: {error.strerror}", "check --prompt-file"
        ) from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: is not UTF-8 text", "save it as UTF-8") from error


def prompt_or_default(*prompts: str | None) -> str:
    """The first that is given, or the tool's own."""
    return next((prompt for prompt in prompts if prompt is not None), DEFAULT_PROMPT)
