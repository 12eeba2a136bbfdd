"""What `--preset` asks the model, by name."""

from __future__ import annotations

from qwencli.errors import UsageError

DEFAULT_PROMPT = "Describe this image."

PRESETS = {
    "short": "Write a short caption.",
    "detailed": "Describe this image in detail.",
    "tags": "List tags for this image, separated by commas.",
    "cinematic": "Describe this image as a film still: subject, framing, light, colour and mood.",
    "analysis": "Analyse this image: list the objects, their colours, counts and positions.",
    "prompt-refine": "Write a prompt for an image generator that would recreate this image.",
}


def check_prompt(prompt: str | None) -> None:
    """Raises UsageError for one with nothing in it."""
    if prompt is not None and not prompt.strip():
        raise UsageError("--prompt is empty", "say what to ask, or leave it out")


def prompt_text(prompt: str | None, preset: str | None) -> str:
    """The text to send for `--prompt` and `--preset`, of which at most one is given.

    Raises:
        UsageError: both are given, the prompt is empty, or the preset is unknown.
    """
    check_prompt(prompt)
    if prompt is not None and preset is not None:
        raise UsageError("--prompt and --preset exclude each other", "give one of them")
    if preset is None:
        return DEFAULT_PROMPT if prompt is None else prompt
    if preset not in PRESETS:
        raise UsageError(f"--preset {preset!r} is unknown", f"use one of: {', '.join(PRESETS)}")
    return PRESETS[preset]
