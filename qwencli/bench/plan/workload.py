"""What every run is asked: a prompt and pictures, by name or from files."""

from __future__ import annotations

from pathlib import Path

from qwencli.errors import InputError, UsageError
from qwencli.presets import DEFAULT_PROMPT, PRESETS

_SHIPPED = Path(__file__).parents[1] / "assets"
# A red circle and a blue square: something to look at for every model there is.
EXAMPLE_IMAGE = _SHIPPED / "scene.png"


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
