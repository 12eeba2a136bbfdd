"""Questions about a scene and their answers. Only unambiguous questions are asked."""

from __future__ import annotations

from collections.abc import Callable
from random import Random

from tools.scenes.captions import kind, place_words, sentence, sized_kind
from tools.scenes.prompts import QUESTION_PROMPTS, vary
from tools.scenes.scene import Scene, SceneObject, cell_of
from tools.scenes.words import COLORS, COUNTS, PLACES, SHAPE_PLURALS, SHAPES, with_article

Turn = tuple[str, str]


def _ask(rng: Random, name: str, **slots: str) -> str:
    return vary(rng, rng.choice(QUESTION_PROMPTS[name]).format(**slots))


def _there_are(count: int, one: str, many: str) -> str:
    return f"There is one {one}." if count == 1 else f"There are {COUNTS[count]} {many}."


def _unique(scene: Scene, key: Callable[[SceneObject], str]) -> list[SceneObject]:
    """Objects that nothing else in the scene shares `key` with."""
    keys = [key(item) for item in scene.objects]
    return [item for item in scene.objects if keys.count(key(item)) == 1]


def count_all(rng: Random, scene: Scene) -> Turn:
    question = _ask(rng, "count_all")
    noun = "shape" if "shape" in question.lower() else "object"
    return question, _there_are(len(scene.objects), noun, f"{noun}s")


def count_shape(rng: Random, scene: Scene) -> Turn:
    shape = rng.choice([item.shape for item in scene.objects] + [rng.choice(SHAPES)])
    count = sum(item.shape == shape for item in scene.objects)
    plural = SHAPE_PLURALS[shape]
    return _ask(rng, "count_shape", plural=plural), _there_are(count, shape, plural)


def count_color(rng: Random, scene: Scene) -> Turn:
    color = rng.choice([item.color for item in scene.objects] + [rng.choice(tuple(COLORS))])
    count = sum(item.color == color for item in scene.objects)
    question = _ask(rng, "count_color", the=color)
    noun = "shape" if "shape" in question.lower() else "object"
    return question, _there_are(count, f"{color} {noun}", f"{color} {noun}s")


def color(rng: Random, scene: Scene) -> Turn | None:
    shape = rng.choice([item.shape for item in scene.objects] + [rng.choice(SHAPES)])
    found = [item for item in scene.objects if item.shape == shape]
    if len(found) > 1:
        return None
    answer = f"The {shape} is {found[0].color}." if found else f"There is no {shape}."
    return _ask(rng, "color", the=shape), answer


def background(rng: Random, scene: Scene) -> Turn:
    return _ask(rng, "background"), f"The background is {scene.background}."


def place(rng: Random, scene: Scene) -> Turn | None:
    if rng.random() < 0.15:
        missing = _missing_kind(rng, scene)
        return _ask(rng, "place", the=missing), f"There is no {missing}."
    unique = _unique(scene, kind)
    if not unique:
        return None
    item = rng.choice(unique)
    words = place_words(scene, item.x, item.y)
    return _ask(rng, "place", the=kind(item)), f"The {kind(item)} is {words}."


def size(rng: Random, scene: Scene) -> Turn | None:
    unique = _unique(scene, kind)
    if not unique:
        return None
    item = rng.choice(unique)
    return _ask(rng, "size", the=kind(item)), f"The {kind(item)} is {item.size}."


def shape(rng: Random, scene: Scene) -> Turn | None:
    unique = _unique(scene, lambda item: item.color)
    if not unique:
        return None
    item = rng.choice(unique)
    question = _ask(rng, "shape", the=item.color)
    return question, f"The {item.color} object is {with_article(item.shape)}."


def what_at(rng: Random, scene: Scene) -> Turn | None:
    cells = [cell_of(scene, item.x, item.y) for item in scene.objects]
    row, column = rng.choice([*cells, (rng.randrange(3), rng.randrange(3))])
    found = [item for item, cell in zip(scene.objects, cells, strict=True) if cell == (row, column)]
    number = scene.number
    printed = number is not None and cell_of(scene, number.x, number.y) == (row, column)
    if len(found) + printed > 1:
        return None
    answer = "Nothing."
    if found:
        answer = sentence(with_article(sized_kind(found[0])))
    elif printed and number:
        answer = f"The number {number.value}."
    return _ask(rng, "what_at", place=PLACES[row][column]), answer


def exists(rng: Random, scene: Scene) -> Turn:
    """Half yes, half no; most wrong kinds mix a shape and a colour that are both in the scene."""
    if rng.random() < 0.5:
        item = rng.choice(scene.objects)
        thing = rng.choice((kind(item), kind(item), item.shape, f"{item.color} object"))
        return _ask(rng, "exists", a=with_article(thing)), "Yes."
    return _ask(rng, "exists", a=with_article(_missing_kind(rng, scene))), "No."


def number(rng: Random, scene: Scene) -> Turn:
    printed = scene.number
    answer = f"The number is {printed.value}." if printed else "There is no number."
    return _ask(rng, "number"), answer


def has_number(rng: Random, scene: Scene) -> Turn:
    return _ask(rng, "has_number"), "Yes." if scene.number else "No."


def follow_up(rng: Random, scene: Scene) -> list[Turn]:
    """Two turns about one object; the second says `it`."""
    unique = _unique(scene, lambda item: item.shape)
    if not unique:
        return []
    item = rng.choice(unique)
    words = place_words(scene, item.x, item.y)
    first = (_ask(rng, "exists", a=with_article(item.shape)), "Yes.")
    second = rng.choice(
        (
            (_ask(rng, "it_place"), f"The {item.shape} is {words}."),
            (_ask(rng, "it_size"), f"The {item.shape} is {item.size}."),
            (_ask(rng, "it_color"), f"The {item.shape} is {item.color}."),
        )
    )
    return [first, second]


def _missing_kind(rng: Random, scene: Scene) -> str:
    present = {kind(item) for item in scene.objects}
    while True:
        item = rng.choice(scene.objects)
        shape = rng.choice((item.shape, rng.choice(SHAPES)))
        near = rng.choice(scene.objects).color if rng.random() < 0.5 else item.color
        color = rng.choice((near, rng.choice(tuple(COLORS))))
        if f"{color} {shape}" not in present:
            return f"{color} {shape}"


QUESTIONS: tuple[Callable[[Random, Scene], Turn | None], ...] = (
    count_all,
    count_shape,
    count_color,
    color,
    background,
    place,
    place,
    size,
    shape,
    what_at,
    exists,
    exists,
    number,
    has_number,
)


def sample_questions(rng: Random, scene: Scene, count: int) -> list[Turn]:
    turns: list[Turn] = []
    while len(turns) < count:
        if rng.random() < 0.1:
            turns += follow_up(rng, scene)
            continue
        turn = rng.choice(QUESTIONS)(rng, scene)
        if turn:
            turns.append(turn)
    return turns
