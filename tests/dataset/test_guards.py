"""Which answers are no captions, and what is asked instead."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.config import SamplingOptions, check_sampling
from qwencli.dataset.caption_format import CaptionFormat
from qwencli.dataset.guards import Answer, Fault, FaultKind, Guards, parse_guards
from qwencli.dataset.retries import CHANGES, retry_of
from qwencli.errors import UsageError

ASKED = "Describe this image."
HELD_OUT = Path(__file__).parents[2] / "qwencli/bench/assets/heldout/captions.json"


def verdict(text, caption_format=None, guards=None, **answer):
    answer = {"prompt": ASKED} | answer
    return (guards or Guards()).caption(Answer(text, **answer), caption_format or CaptionFormat())


def kind(text, *args, **said):
    found = verdict(text, *args, **said)
    assert isinstance(found, Fault), found
    assert len(found.evidence) <= 160
    return found.kind


REFUSALS = [
    "I'm sorry, but I can't assist with that request.",
    "I’m sorry, I can’t help with identifying people.",
    "I am sorry. This picture cannot be described.",
    "Sorry, I cannot provide a caption for this image.",
    "I cannot describe this image because it may contain explicit content.",
    "I can't assist with that.",
    "I'm unable to process the image you have provided.",
    "I am not able to identify the person in this photo.",
    "Unfortunately, I cannot see the image.",
    "As an AI language model, I do not have the ability to see pictures.",
    "I apologize, but I don't feel comfortable describing this.",
    "I don't see any image in your message.",
    "It seems that no image was provided. Please upload one.",
    "It looks like you haven't attached an image.",
    "There is no image attached, so nothing can be said.",
    "Please provide the image that you want described.",
    "This image violates the content policy.",
    "I won't be able to help with that.",
    "I must decline to describe this content.",
    "**I'm sorry**, I can't do that.",
    "\n\n \"I'm sorry, but I can't.\"",
    "While I understand the request, I cannot assist with it.",
    "No caption available.",
    "N/A",
    "None.",
    "I need more information to describe this.",
    "对不起，我无法描述这张图片。",
    "抱歉，我不能提供帮助。",
    "申し訳ありませんが、この画像について説明できません。",
    "죄송합니다. 이 이미지를 설명할 수 없습니다.",
    "Lo siento, no puedo ayudar con eso.",
    "Je suis désolé, mais je ne peux pas décrire cette image.",
    "Es tut mir leid, aber ich kann dabei nicht helfen.",
    "Извините, я не могу описать это изображение.",
]


@pytest.mark.parametrize("text", REFUSALS)
def test_refusals(text):
    assert kind(text) is FaultKind.REFUSAL


PREAMBLES = [
    "Here is a caption for the image: A cat sits on a mat.",
    "Here's a detailed description of the image:\n\nA cat sits on a mat.",
    "Here are some tags for this image: cat, mat, window",
    "Sure! A cat sits on a mat.",
    "Sure, here is a short caption: A cat.",
    "Certainly! Here's the caption you asked for. A cat sits on a mat.",
    "Of course. A cat sits on a mat.",
    "Absolutely! A cat sits on a mat.",
    "Okay, here's a prompt that recreates it: a cat on a mat",
    "Caption: A cat sits on a mat.",
    "**Caption:** A cat sits on a mat.",
    "**Image Description:**\nA cat sits on a mat.",
    "Description: A cat sits on a mat.",
    "Tags: cat, mat, window",
    "Prompt: a cat on a mat, soft light",
    "Answer: A cat sits on a mat.",
    "Based on the image, here is a caption: A cat.",
    "Based on the provided image, I can see a cat.",
    "The following is a description of the image: A cat.",
    "Below is a detailed caption:\nA cat sits.",
    "This is a short caption for the picture: A cat.",
    "I'd be happy to describe it. A cat sits on a mat.",
    "Let me describe this image. A cat sits on a mat.",
    "Great! A cat sits on a mat.",
    "Sure thing! A cat.",
    "Title: Cat\n**Caption:** A cat.",
    "<|im_start|>assistant\nA cat.",
    "user\nDescribe this image.\nassistant\nA cat.",
    "# Caption\nA cat.",
    "Description of the image: a cat",
    "The image you provided shows a cat.",
    "```\nA cat.\n```",
    "以下是图片的描述：一只猫。",
    "Voici une description de l'image : un chat.",
    "Hier ist eine Bildunterschrift: Eine Katze.",
    "Aquí tienes una descripción: un gato.",
]


@pytest.mark.parametrize("text", PREAMBLES)
def test_introductions(text):
    assert kind(text, prompt="") is FaultKind.PREAMBLE


@pytest.mark.parametrize(
    "closing",
    [
        "Let me know if you'd like another one!",
        "I hope this helps!",
        "Feel free to ask for more.",
        "Would you like me to write another?",
        "If you need any more details, just ask.",
    ],
)
def test_closings(closing):
    assert kind(f"A cat sits on a mat. {closing}") is FaultKind.CLOSING


CAPTIONS = [
    "A cat sits on a mat.",
    "The image shows a red car in front of a white house.",
    "This is a photo of two people on a beach.",
    'In this image, a woman holds a sign that reads "I\'m sorry".',
    'A sign reads, "I can\'t help falling in love with you."',
    "A person who cannot see the road describes it to a friend.",
    "Sure-footed goats climb a cliff.",
    "Great white sharks swim below a boat, their fins: grey.",
    "Here, a river bends around a village.",
    "This is a list of ingredients on a wooden table. The first is flour.",
    "A text message on a phone: hello.",
    "Okay Corral, a wooden sign above a gate.",
    "Certain parts of the wall are painted green.",
    "Two dogs, two cats and two birds sit on two chairs at two tables.",
    "A neon sign says GO GO GO GO above a very, very, very long bar.",
    "red hat, blue sky, green grass, 1girl, solo, looking at viewer, red shoes, blue shoes",
    "A sorry-looking dog waits in the rain.",
    "Subject: a man in a coat. Framing: close-up. Light: soft. Mood: calm.",
    "A stack of books: the first is red, the second is blue, the third is green.",
    "A shop in Tokyo with a sign 「いらっしゃいませ」 above its door.",
    'Graffiti reads "no no no".',
    "A page from a calendar: 1 2 3 4 5 6 7 8 9 10 11 12.",
    "She thinks... and then, she smiles!",
    'A hopeful man shows a card. The card reads "hope this helps".',
    "Cat",
    "I see a cat on a mat, and I know it is asleep.",
    "No caption is readable on the old poster.",
    "None of the windows is open.",
    "Tags hang from a red coat.",
    "A user interface with three buttons.",
    "Unknown soldiers on a monument.",
    "A no-parking sign, no picture of which was ever provided, hangs on a wall.",
]


@pytest.mark.parametrize("text", CAPTIONS)
def test_captions_pass(text):
    assert verdict(text) == text


def test_the_bundled_models_own_captions_pass():
    rows = json.loads(HELD_OUT.read_text(encoding="utf-8"))
    texts = [value for row in _strings(rows) for value in [row] if " " in value]
    assert len(texts) > 90
    for text in texts:
        assert isinstance(verdict(text), str), (text, verdict(text))


def _strings(value):
    if isinstance(value, str):
        yield value
    else:
        for item in value.values() if isinstance(value, dict) else value:
            yield from _strings(item)


LOOPS = [
    "A cat " + "on a mat " * 8,
    "A man in a hat. " * 3,
    "It rains. The sky is grey over the town. The sky is grey over the town.",
    "cat, dog, " * 10,
    "!" * 40,
    "A cat " + "ha" * 30,
    "tree " * 9,
    "一只猫坐在垫子上，" * 5,
    "A room. "
    + " ".join(
        f"On shelf {n} there is a book with a cover that is worn and old." for n in range(9)
    ),
    ", ".join(["blue sky", "white cloud", "blue sky", "blue sky"] * 5),
]


@pytest.mark.parametrize("text", LOOPS)
def test_loops(text):
    assert kind(text, prompt="") is FaultKind.LOOP
    # Cut in the middle it is still a loop, and not only cut off.
    again = f"{text.rstrip('!')} {text[: int(len(text) * 0.97)]}"
    assert kind(again, prompt="", finish_reason="length") is FaultKind.LOOP


@given(
    st.lists(
        st.sampled_from(["red", "blue", "cat", "dog", "tree", "sky", "hat", "man", "car", "sun"]),
        min_size=3,
        max_size=9,
        unique=True,
    ),
    st.integers(5, 9),
)
@settings(max_examples=100)
def test_whatever_repeats_five_times_is_a_loop(unit, times):
    assert kind(" ".join(unit * times), prompt="") is FaultKind.LOOP


@given(st.permutations([f"word{n}" for n in range(60)]))
@settings(max_examples=50)
def test_words_that_do_not_repeat_are_no_loop(said):
    text = " ".join(said) + "."
    assert verdict(text) == text


@pytest.mark.parametrize("text", ["", " \n", "...", "<think>hm</think>", "\u200b", "**"])
def test_nothing_said(text):
    assert kind(text) is FaultKind.EMPTY
    assert kind(text, guards=Guards(frozenset())) is FaultKind.EMPTY


def test_only_what_was_forced_is_nothing():
    assert kind("A photo of ", starts_with="A photo of") is FaultKind.EMPTY


def test_thoughts_that_do_not_end():
    assert kind("<think>The user wants a caption") is FaultKind.THINKING
    assert kind("so that.</think> A cat.") is FaultKind.THINKING
    assert verdict("<think>Hm.</think>\nA cat.") == "A cat."


def test_cut_off():
    assert kind("A cat sits on the", finish_reason="length") is FaultKind.TRUNCATED
    assert kind("cat, mat, win", finish_reason="length") is FaultKind.TRUNCATED
    assert verdict("A cat sits.", finish_reason="length") == "A cat sits."
    # What is cut at a sentence's end anyway has lost nothing.
    two = CaptionFormat(max_sentences=1)
    assert verdict("A cat sits. It wears a", two, finish_reason="length") == "A cat sits."
    assert kind(
        "A cat sits. It wears a", CaptionFormat(max_sentences=2), finish_reason="length"
    ) is (FaultKind.TRUNCATED)


def test_too_long_and_banned():
    assert kind("A cat sits on a very long mat.", CaptionFormat(max_tokens=4)) is FaultKind.TOO_LONG
    found = verdict("A cat with a Watermark.", CaptionFormat(ban=["watermark"]))
    assert found == Fault(FaultKind.BANNED, "'Watermark' in A cat with a Watermark.")
    assert verdict("cat, watermark, hat", CaptionFormat(ban=["watermark"])) == "cat, hat"
    assert kind("watermark, watermark", CaptionFormat(ban=["watermark"])) is FaultKind.EMPTY


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("一只猫坐在垫子上。", ASKED),
        ("Кот сидит на коврике.", ASKED),
        ("A cat sits on a mat.", "描述这张图片。"),
        (
            "Eine Katze sitzt auf der Matte und schaut aus dem Fenster, und im Hof ist ein Hund.",
            ASKED,
        ),
        (
            "Un gato está sentado en la alfombra de la casa y mira por la ventana con un perro.",
            ASKED,
        ),
        ("A cat sits on a mat.", "Describe this image in Japanese."),
        (
            "一只猫坐在垫子上看着窗外的花园里的狗一只猫坐在垫子上看着窗外的树木和房子",
            "日本語で説明してください。",
        ),
        ("猫, 垫子, 窗户, 花园", ASKED),
    ],
)
def test_the_wrong_language(text, prompt):
    assert kind(text, prompt=prompt) is FaultKind.LANGUAGE


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        ("一只猫。", "Describe this image in Chinese."),
        ("Eine Katze sitzt auf der Matte.", "Beschreibe das Bild."),
        ("Eine Katze sitzt auf der Matte.", "Describe it. Answer in German."),
        ("Une tasse, un café", ASKED),  # too short to tell
        ("A poster with the words 欢迎光临 in red.", ASKED),
        ("A cat sits.", "1girl"),
        ("猫。", "Translate from English to Chinese."),
        ("猫が座っています。", "日本語で"),
        ("42 °C", ASKED),
    ],
)
def test_the_right_language(text, prompt):
    assert verdict(text, prompt=prompt) == text


def test_a_language_that_is_named():
    assert kind("A cat.", guards=Guards(language="ja")) is FaultKind.LANGUAGE
    assert verdict("猫です。", guards=Guards(language="ja")) == "猫です。"


def test_captions_held_to_a_schema_are_data():
    def invalid(text):
        try:
            json.loads(text)
        except ValueError as error:
            return str(error)
        return None

    guards = Guards(invalid=invalid)
    data = '{"box": [0, 0, 0, 0, 0, 0, 0, 0]}'
    assert verdict(data, guards=guards) == data
    assert kind("{", guards=guards) is FaultKind.SCHEMA
    assert kind("{", guards=guards, finish_reason="length") is FaultKind.TRUNCATED
    assert kind("", guards=guards) is FaultKind.EMPTY


def test_guards_that_are_left_out():
    assert verdict("Sure! A cat.", guards=Guards(parse_guards("none"))) == "Sure! A cat."
    assert verdict("Sure! A cat.", guards=Guards(parse_guards("-preamble"))) == "Sure! A cat."
    assert kind("Sure! A cat.", guards=Guards(parse_guards("preamble,loop"))) is FaultKind.PREAMBLE
    assert parse_guards("all") == frozenset(FaultKind)
    for wrong in ("nope", "", "loop,-empty"):
        with pytest.raises(UsageError, match="--guards"):
            parse_guards(wrong)


@given(st.text(max_size=300), st.sampled_from(["stop", "length"]))
@settings(max_examples=300)
def test_every_answer_is_a_caption_or_a_fault(text, reason):
    found = verdict(text, finish_reason=reason)
    assert isinstance(found, Fault) or (found and "\n" not in found)


def test_judging_takes_no_time_worth_naming():
    import time

    text = " ".join(f"word{n % 97} and thing{n % 89}," for n in range(2000))
    began = time.thread_time()
    verdict(text)
    verdict("a" * 50_000)
    verdict("Here is " + "word " * 5000)
    assert time.thread_time() - began < 2


@pytest.mark.parametrize("fault", list(FaultKind))
@pytest.mark.parametrize(
    "said",
    [
        {},
        {"temperature": 0.0},
        {"do_sample": False},
        {"temperature": 2.0, "max_new_tokens": 8192, "repetition_penalty": 2.0, "seed": 2**32 - 1},
    ],
)
def test_every_fault_has_a_retry_within_bounds(fault, said):
    first = SamplingOptions(**said)
    seen = {first}
    for attempt in (1, 2, 3, 9):
        retry = retry_of(Fault(fault, ""), attempt, first, seed=5, ban=["x"], language="en")
        check_sampling(retry.sampling)
        assert retry.sampling not in seen
        seen.add(retry.sampling)
    assert fault in CHANGES


def test_retries_mend_what_was_wrong():
    first = SamplingOptions(max_new_tokens=64, do_sample=False)

    def retry(kind, **more):
        return retry_of(Fault(kind, ""), 1, first, seed=5, **more)

    assert retry(FaultKind.TRUNCATED).sampling.max_new_tokens == 128
    assert retry(FaultKind.TRUNCATED).sampling.do_sample is False
    assert retry(FaultKind.LOOP).sampling.repetition_penalty == 1.08
    assert retry(FaultKind.EMPTY).sampling.do_sample is True
    assert retry(FaultKind.EMPTY).sampling.max_new_tokens == 64
    language = retry(FaultKind.LANGUAGE, language="de")
    assert language.with_reminder("What is this? ") == "What is this? Answer in German."
    assert "watermark" in retry(FaultKind.BANNED, ban=["watermark"]).reminder


def test_the_end_of_what_was_cut_off_begins_with_a_whole_word():
    text = "{" + ", ".join(f'"word{n}": "value{n}"' for n in range(30))
    fault = Guards(invalid=lambda text: "ends early").caption(
        Answer(text, "length"), CaptionFormat()
    )
    assert isinstance(fault, Fault) and fault.kind is FaultKind.TRUNCATED
    dots, *quoted = fault.evidence.split(" ")
    assert (
        dots == "..."
        and " ".join(quoted) in text
        and all(each in text.split(" ") for each in quoted)
    )
    fault = Guards(invalid=lambda text: "x").caption(Answer('{"a": 1', "length"), CaptionFormat())
    assert isinstance(fault, Fault) and fault.evidence == '{"a": 1'


def test_evidence_has_no_half_words():
    text = (
        "A particularly large green square is on a table, on a light blue background with clouds."
    )
    found = verdict(text, CaptionFormat(ban=["table"]))
    assert found == Fault(
        FaultKind.BANNED,
        "'table' in ... large green square is on a table, on a light blue background with ...",
    )
    told = Guards(language="de").caption(Answer(text), CaptionFormat())
    assert isinstance(told, Fault)
    assert told.evidence.endswith(
        ": A particularly large green square is on a table, on a light ..."
    )
