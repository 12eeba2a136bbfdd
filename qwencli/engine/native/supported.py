"""What a config.json may ask for that this engine does not have."""

from __future__ import annotations

from qwencli.engine.layers.vision_tower import ACTIVATIONS
from qwencli.errors import ModelFileError
from qwencli.models.shapes import ModelShape


def check_supported(shape: ModelShape) -> None:
    """Raise ModelFileError for the first thing in `shape` that only the other engine can run."""
    text, vision = shape.text, shape.vision
    obstacles = {
        f"{text.rope.scaling!r} rotary scaling": text.rope.scaling not in ("default", "yarn"),
        "a sliding window": text.sliding_window,
        f"hidden_act {text.activation!r} in the text decoder": text.activation != "silu",
    }
    if vision is not None:
        known = vision.activation in ACTIVATIONS
        obstacles[f"hidden_act {vision.activation!r} in the vision tower"] = not known
    for what, there in obstacles.items():
        if there:
            raise ModelFileError(
                f"config.json asks for {what}, which the native engine does not have",
                "try --engine transformers",
            )
