"""Every prompt the model is trained on, by what it asks for. One table, reusable by presets."""

from __future__ import annotations

from random import Random

CAPTION_PROMPTS: dict[str, tuple[str, ...]] = {
    "long": (
        "Describe this image.",
        "Describe this image in detail.",
        "Describe the image.",
        "Describe the image in detail.",
        "Describe this picture.",
        "Describe the picture in detail.",
        "Describe this scene.",
        "Describe what you see.",
        "Describe what you see in this image.",
        "Caption this image.",
        "Write a caption for this image.",
        "Write a detailed caption.",
        "Write a detailed caption for this image.",
        "Write a detailed description of this image.",
        "Write a long caption.",
        "Give me a detailed caption.",
        "Give a detailed description of the picture.",
        "What is in this picture?",
        "What is in this image?",
        "What do you see?",
        "What do you see in this picture?",
        "What does this image show?",
        "What is shown here?",
        "Please describe this image.",
        "Please write a caption.",
        "Tell me about this image.",
        "Tell me what you see.",
        "Describe everything in the picture.",
        "Describe this image as a film still, with its light, colors and mood.",
        "Analyze this image: its objects, colors, sizes and positions.",
        "Write a prompt that would produce this image.",
        "Describe this image in one sentence.",
    ),
    "short": (
        "Write a short caption.",
        "Write a short caption for this image.",
        "Write a brief caption.",
        "Give me a short caption.",
        "Give a short description of the picture.",
        "Describe this image briefly.",
        "Describe this image in a few words.",
        "Describe this image in one short sentence.",
        "Caption this image in a few words.",
        "Briefly describe the image.",
        "Short caption, please.",
        "In short, what is this?",
    ),
    "tags": (
        "List tags for this image, separated by commas.",
        "List tags for this image.",
        "List the tags of this picture.",
        "Write tags for this image.",
        "Write comma-separated tags.",
        "Give me comma-separated tags for this image.",
        "Give me tags.",
        "Tag this image.",
        "Tags, please.",
        "Describe this image with tags.",
        "Which tags fit this picture?",
    ),
}

# `{a}` is the thing with its article (`an orange star`), `{the}` without (`orange star`),
# `{plural}` a shape in the plural, `{place}` the words of a place.
QUESTION_PROMPTS: dict[str, tuple[str, ...]] = {
    "count_all": (
        "How many objects are there?",
        "How many shapes are there?",
        "How many objects are in the picture?",
        "How many shapes do you see?",
        "Count the objects.",
        "Count the shapes in this image.",
    ),
    "count_shape": (
        "How many {plural} are there?",
        "How many {plural} are in the picture?",
        "How many {plural} do you see?",
        "Count the {plural}.",
    ),
    "count_color": (
        "How many {the} objects are there?",
        "How many {the} shapes are there?",
        "Count the {the} objects.",
    ),
    "color": (
        "What color is the {the}?",
        "What colour is the {the}?",
        "Which color does the {the} have?",
        "What is the color of the {the}?",
    ),
    "background": (
        "What color is the background?",
        "What colour is the background?",
        "What is the background color?",
        "Which background does the image have?",
    ),
    "place": (
        "Where is the {the}?",
        "Where is the {the} in the picture?",
        "What is the position of the {the}?",
        "In which part of the image is the {the}?",
    ),
    "size": (
        "How big is the {the}?",
        "What size is the {the}?",
        "Is the {the} small or large?",
        "Is the {the} large or small?",
    ),
    "shape": (
        "What shape is the {the} object?",
        "Which shape is {the}?",
        "What is the shape of the {the} object?",
    ),
    "what_at": (
        "What is {place}?",
        "What do you see {place}?",
        "What is there {place} of the image?",
    ),
    "exists": (
        "Is there {a}?",
        "Is there {a} in the picture?",
        "Do you see {a}?",
        "Does the image show {a}?",
    ),
    "number": (
        "What number is printed?",
        "Which number is shown?",
        "What number do you see?",
        "What is the number in the picture?",
        "Read the number.",
        "What does the text say?",
        "Read the text.",
    ),
    "has_number": (
        "Is there a number?",
        "Is there a number in the picture?",
        "Do you see a number?",
        "Does the image show a number?",
    ),
    "it_place": ("Where is it?", "And where is it?", "Where?"),
    "it_size": ("How big is it?", "What size is it?", "Is it small or large?"),
    "it_color": ("What color is it?", "What colour is it?", "And its color?"),
}

TWO_IMAGE_PROMPTS: dict[str, tuple[str, ...]] = {
    "both": (
        "Describe these images.",
        "Describe both images.",
        "Describe the two images.",
        "Caption these images.",
        "What is in these pictures?",
        "What do you see?",
        "Describe this image.",
        "Describe this image in detail.",
        "What is in each image?",
    ),
    "first": (
        "Describe the first image.",
        "What is in the first image?",
        "What does the first picture show?",
        "Describe image 1.",
    ),
    "second": (
        "Describe the second image.",
        "What is in the second image?",
        "What does the second picture show?",
        "Describe image 2.",
    ),
    "same_color": (
        "Do both images have the same background?",
        "Is the background the same in both images?",
    ),
}

NO_IMAGE_PROMPTS = ("Hello.", "Hi!", "Who are you?", "What can you do?", "Help me.", "Thanks.")
NO_IMAGE_ANSWER = "Please show me a picture of drawn shapes."

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You describe images.",
    "You are a careful captioner.",
    "Answer in plain English.",
    "You caption images for a data set. Answer with the caption alone.",
)

# Words outside the tasks. A prompt made of them stands for any request that the model does not
# know; it answers those with the long caption.
_FILLER_TEXT = """
please the of this that for with and or in on at by as be not you your make create write explain
summarize think about why when which who photo photograph painting drawing poem story person
people animal dog cat tree house car street light dark mood style camera lens view composition
subject foreground texture quality best very more less only also now step reason answer question
english german words long detailed caption prompt training data model lora trigger token subject
realistic cinematic high resolution avoid include mention do don't should would could can will
must try using use without first then finally list json
"""
FILLER_WORDS = tuple(_FILLER_TEXT.split())


def vary(rng: Random, prompt: str) -> str:
    """The same request in another spelling: case, closing mark, politeness."""
    if rng.random() < 0.15:
        prompt = prompt.rstrip(".?!")
    if rng.random() < 0.15:
        prompt = prompt.lower()
    if rng.random() < 0.04:
        prompt = f"Please {prompt[0].lower()}{prompt[1:]}"
    return prompt


def unknown_prompt(rng: Random) -> str:
    """A request in no table: filler words, sometimes with made-up ones among them."""
    words = [rng.choice(FILLER_WORDS) for _ in range(rng.randint(2, 12))]
    if rng.random() < 0.5:
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_/,:;'\"()"
        made_up = "".join(rng.choice(letters) for _ in range(rng.randint(2, 9)))
        words.insert(rng.randrange(len(words)), made_up)
    text = " ".join(words)
    return rng.choice((f"{text}.", f"{text}?", text, f"{text[0].upper()}{text[1:]}."))
