"""Captions: three styles, each a pure function of the scene."""

from __future__ import annotations

from tools.scenes.scene import Scene, SceneObject, cell_of
from tools.scenes.words import PLACES, with_article


def place_words(scene: Scene, x: float, y: float) -> str:
    row, column = cell_of(scene, x, y)
    return PLACES[row][column]


def kind(item: SceneObject) -> str:
    """`red circle`"""
    return f"{item.color} {item.shape}"


def sized_kind(item: SceneObject) -> str:
    """`large red circle`"""
    return f"{item.size} {item.color} {item.shape}"


def join(parts: list[str]) -> str:
    """`a`, `a and b`, `a, b and c`"""
    if len(parts) == 1:
        return parts[0]
    return f"{', '.join(parts[:-1])} and {parts[-1]}"


def sentence(text: str) -> str:
    return f"{text[0].upper()}{text[1:]}."


def long_caption(scene: Scene) -> str:
    """`A large red circle on the left and the number 42 at the bottom, on a white background.`"""
    parts = [
        f"{with_article(sized_kind(item))} {place_words(scene, item.x, item.y)}"
        for item in scene.objects
    ]
    if scene.number:
        place = place_words(scene, scene.number.x, scene.number.y)
        parts.append(f"the number {scene.number.value} {place}")
    return sentence(f"{join(parts)}, on {with_article(scene.background)} background")


def short_caption(scene: Scene) -> str:
    """`A red circle and the number 42.`"""
    parts = [with_article(kind(item)) for item in scene.objects]
    if scene.number:
        parts.append(f"the number {scene.number.value}")
    return sentence(join(parts))


def tags(scene: Scene) -> str:
    """`large red circle, number 42, white background`; a repeated tag is written once."""
    parts = [sized_kind(item) for item in scene.objects]
    if scene.number:
        parts.append(f"number {scene.number.value}")
    parts.append(f"{scene.background} background")
    return ", ".join(dict.fromkeys(parts))


CAPTIONS = {"long": long_caption, "short": short_caption, "tags": tags}
