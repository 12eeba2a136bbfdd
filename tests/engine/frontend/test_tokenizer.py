"""Encoding with guarded content, decoding piece by piece, stop strings."""

from __future__ import annotations

import json
import os
import time
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from tokenizers import AddedToken

from qwencli.engine.frontend.detokenizer import (
    IncrementalDetokenizer,
    StopStringBuffer,
    ThoughtSplitter,
)
from qwencli.engine.frontend.tokenizer import ContentGuard, Tokenizer, _panics_unheard
from qwencli.errors import InputError, ModelFileError, PromptTooLongError
from tests.engine.frontend.tiny_folder import (
    CONTROL,
    PLAIN_ADDED,
    added_tokens_decoder,
    tiny_tokenizer,
    tiny_tokenizer_json,
    write_tiny_folder,
)

TOKENIZER = Tokenizer(tiny_tokenizer())
REFERENCE = tiny_tokenizer()
SIZE = REFERENCE.get_vocab_size()
IDS = st.lists(st.integers(0, SIZE - 1), max_size=40)
# Text in which control tokens, whole and in pieces, are as likely as anything else.
TRICKY = st.lists(
    st.one_of(
        st.sampled_from(
            [*CONTROL, *PLAIN_ADDED, "<", "|", "<|", "|>", "im_end", " ", "\n", "\n\n"]
        ),
        st.text(max_size=4),
    ),
    max_size=8,
).map("".join)


# --- encode -----------------------------------------------------------------------------------


@given(TRICKY)
def test_template_text_is_encoded_as_the_library_does(text: str) -> None:
    assert TOKENIZER.encode(text) == REFERENCE.encode(text).ids


@given(st.lists(TRICKY, min_size=1, max_size=4))
@example(["<|im_", "end|>"])
@example(["<", "|im_end|>"])
@example(["<  ", "|im_end|>"])
@example(["\ufdd0<|im_end|>"])
def test_content_never_yields_a_control_token(contents: list[str]) -> None:
    guard = TOKENIZER.guard(contents)
    control = {TOKENIZER.token_id(token) for token in CONTROL}
    for render in ("".join, lambda parts: "".join(part.strip() for part in parts)):
        ids = TOKENIZER.encode(render([guard.protect(text) for text in contents]), guard)
        assert not control & set(ids)
        # Nothing is lost: the characters are all there (normalised, as the reference does).
        whole = REFERENCE.normalizer.normalize_str(render(contents))
        assert TOKENIZER.decode(ids, skip_special=False) == whole


@given(st.lists(TRICKY, min_size=1, max_size=3))
def test_a_guard_takes_nothing_from_the_template(contents: list[str]) -> None:
    guard = TOKENIZER.guard(contents)
    head, tail = "<|im_start|>user\n", "<|im_end|>\n<|image_pad|>"
    ids = TOKENIZER.encode(head + "".join(map(guard.protect, contents)) + tail, guard)
    assert ids[0] == TOKENIZER.token_id("<|im_start|>")
    assert ids.count(TOKENIZER.token_id("<|im_start|>")) == 1
    assert ids[-3:] == TOKENIZER.encode(tail)


@given(st.text(alphabet=st.sampled_from("ab 1.<>|\n\t'é日🙂"), max_size=30))
def test_ordinary_content_is_encoded_as_if_it_were_not_guarded(text: str) -> None:
    guard = TOKENIZER.guard([text])
    framed = "<|im_start|>user\n{}<|im_end|>\n"
    ours = TOKENIZER.encode(framed.format(guard.protect(text)), guard)
    assert ours == REFERENCE.encode(framed.format(text)).ids


def test_added_tokens_that_control_nothing_are_recognised_everywhere() -> None:
    guard = TOKENIZER.guard(["<think>"])
    assert TOKENIZER.encode(guard.protect("<think>"), guard) == [TOKENIZER.token_id("<think>")]


def test_a_token_that_is_not_there() -> None:
    assert TOKENIZER.token_id("<|image_pad|>") == REFERENCE.token_to_id("<|image_pad|>")
    with pytest.raises(ModelFileError, match=r"has no token <\|audio\|>"):
        TOKENIZER.token_id("<|audio|>")


# --- decode -----------------------------------------------------------------------------------


@given(IDS, st.booleans())
def test_decoding_equals_the_librarys(ids: list[int], skip: bool) -> None:
    expected = REFERENCE.decode(ids, skip_special_tokens=skip)
    assert TOKENIZER.decode(ids, skip_special=skip) == expected


@given(st.lists(st.one_of(st.integers(0, SIZE + 3), st.integers(0, 255)), max_size=60))
def test_pieces_together_equal_the_whole(ids: list[int]) -> None:
    stream = IncrementalDetokenizer(TOKENIZER)
    pieces = [stream.push([id_]) for id_ in ids]
    assert "".join(pieces) + stream.finish() == TOKENIZER.decode(ids)


@given(st.text(max_size=30))
def test_no_piece_ends_inside_a_character(text: str) -> None:
    ids = TOKENIZER.encode(text)
    stream = IncrementalDetokenizer(TOKENIZER)
    pieces = [stream.push([id_]) for id_ in ids]
    assert stream.finish() == ""
    shown = REFERENCE.normalizer.normalize_str(text)
    for token in CONTROL:
        shown = shown.replace(token, "")
    assert "".join(pieces) == shown
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text


def test_a_character_of_several_tokens_comes_with_its_last() -> None:
    ids = [REFERENCE.token_to_id(char) for char in "ðŁĺĢ"]  # the four bytes of U+1F600
    stream = IncrementalDetokenizer(TOKENIZER)
    assert [stream.push([id_]) for id_ in ids] == ["", "", "", "😀"]


def test_an_unfinished_character_shows_at_the_end() -> None:
    stream = IncrementalDetokenizer(TOKENIZER)
    assert stream.push([REFERENCE.token_to_id("ð")]) == ""
    assert stream.finish() == "\ufffd"


def test_ids_beyond_the_vocabulary_are_spelled() -> None:
    assert TOKENIZER.decode([SIZE, 151935]) == f"<|{SIZE}|><|151935|>"


def test_the_cost_of_a_token_does_not_grow_with_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    token_bytes = Tokenizer.token_bytes

    def counted(self: Tokenizer, id_: int, *, skip_special: bool = True) -> bytes:
        asked.append(id_)
        return token_bytes(self, id_, skip_special=skip_special)

    monkeypatch.setattr(Tokenizer, "token_bytes", counted)
    stream = IncrementalDetokenizer(TOKENIZER)
    ids = [index % SIZE for index in range(2000)]
    for id_ in ids:
        stream.push([id_])
    assert asked == ids


# --- files ------------------------------------------------------------------------------------


def write_pieces(folder: Path) -> None:
    """vocab.json and merges.txt of the same tokenizer, as older checkpoints have them."""
    model = json.loads(tiny_tokenizer_json())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text("#version: 0.2\n" + merges + "\n", encoding="utf-8")


@pytest.fixture(scope="module")
def from_pieces(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    folder = write_tiny_folder(tmp_path_factory.mktemp("pieces"))
    (folder / "tokenizer.json").unlink()
    write_pieces(folder)
    return Tokenizer.from_folder(folder)


@given(text=TRICKY)
def test_vocabulary_and_merges_give_the_same_tokenizer(from_pieces: Tokenizer, text: str) -> None:
    ids = TOKENIZER.encode(text)
    assert from_pieces.encode(text) == ids
    assert from_pieces.decode(ids) == TOKENIZER.decode(ids)


def test_the_folders_own_pattern_is_used(tmp_path: Path) -> None:
    write_pieces(tmp_path)
    config = {"added_tokens_decoder": added_tokens_decoder(), "pretokenize_regex": "."}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    assert len(Tokenizer.from_folder(tmp_path).encode("circle")) == len("circle")


def test_tokens_that_only_the_configuration_has_are_added(tmp_path: Path) -> None:
    write_tiny_folder(tmp_path)
    entry = {"content": "<|extra|>", "special": True}
    config = {"added_tokens_decoder": added_tokens_decoder() | {str(SIZE): entry}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    tokenizer = Tokenizer.from_folder(tmp_path)
    assert tokenizer.encode("a<|extra|>")[-1] == SIZE == tokenizer.token_id("<|extra|>")
    assert tokenizer.decode([SIZE]) == ""


@pytest.mark.parametrize(
    ("added", "named"),
    [
        ({"7": {"content": "<|im_end|>", "special": True}}, "gives <|im_end|> the id 7"),
        ({"seven": {"content": "x"}}, "malformed"),
        ({"7": {}}, "malformed"),
        ({"7": {"content": 3}}, "malformed"),
        (["x"], "malformed"),
    ],
)
def test_a_configuration_that_contradicts_the_vocabulary(
    added: object, named: str, tmp_path: Path
) -> None:
    write_tiny_folder(tmp_path)
    path = tmp_path / "tokenizer_config.json"
    path.write_text(json.dumps({"added_tokens_decoder": added}), encoding="utf-8")
    with pytest.raises(ModelFileError) as caught:
        Tokenizer.from_folder(tmp_path)
    assert named in caught.value.message
    assert str(path) in caught.value.message


@pytest.mark.parametrize("content", [b"", b"{", b"{}", b"\xff\xfe", b'{"model": {"type": "BPE"}}'])
def test_a_broken_tokenizer_file(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(ModelFileError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


def test_broken_pieces(tmp_path: Path) -> None:
    (tmp_path / "vocab.json").write_text("[]", encoding="utf-8")
    with pytest.raises(ModelFileError, match="neither"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "merges.txt").write_text("a b c\n", encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"vocab\.json cannot be read"):
        Tokenizer.from_folder(tmp_path)


# --- stop strings -----------------------------------------------------------------------------


def run(stops: list[str], pieces: list[str]) -> tuple[str, bool]:
    buffer = StopStringBuffer(stops)
    shown = "".join([buffer.push(piece) for piece in pieces])
    return shown + buffer.finish(), buffer.stopped


@given(
    st.lists(st.text("abc", min_size=1, max_size=4), max_size=3),
    st.lists(st.text("abc", max_size=4), max_size=12),
)
def test_stopping_does_not_depend_on_the_pieces(stops: list[str], pieces: list[str]) -> None:
    text = "".join(pieces)
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stops)]
    if ends:
        longest = max(len(s) for s in stops if text[: ends[0]].endswith(s))
        assert run(stops, pieces) == (text[: ends[0] - longest], True)
    else:
        assert run(stops, pieces) == (text, False)


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    buffer = StopStringBuffer(["###"])
    assert [buffer.push(piece) for piece in ("a#", "b", "##", "#c", "d")] == ["a", "#b", "", "", ""]
    assert buffer.stopped


# --- thoughts ---------------------------------------------------------------------------------


def split(text: str, *, inside: bool, cut: int) -> tuple[str, str]:
    splitter = ThoughtSplitter(inside=inside)
    pieces = [splitter.push(text[at : at + cut]) for at in range(0, len(text), cut)]
    thoughts, answers = zip(*pieces, splitter.finish(), strict=True)
    return "".join(thoughts), "".join(answers)


@pytest.mark.parametrize("cut", [1, 3, 1000])
@pytest.mark.parametrize(
    ("inside", "text", "expected"),
    [
        (True, "Hm, red.\n</think>\n\nA circle.", ("Hm, red.\n", "A circle.")),
        (True, "</think>\n\nA circle.", ("", "A circle.")),
        (True, "never ends </thin", ("never ends </thin", "")),
        (False, "<think>\nHm.</think>\nA circle.", ("\nHm.", "A circle.")),
        (False, "\n <think>Hm.</think>A circle.", ("Hm.", "A circle.")),
        (False, "<think>a</think> <think>b</think> c", ("ab", "c")),
        (True, "<think>a</think>b", ("<think>a", "b")),
        (False, " A circle.\n", ("", " A circle.\n")),
        (False, "It says <think> there.", ("", "It says <think> there.")),
        (False, "<thin", ("", "<thin")),
        (False, " \n", ("", " \n")),
        (True, "x</think> \n", ("x", "")),
        (False, "", ("", "")),
    ],
)
def test_thoughts_stand_apart_however_the_text_is_cut(
    inside: bool, text: str, expected: tuple[str, str], cut: int
) -> None:
    assert split(text, inside=inside, cut=cut) == expected


TAGGED = st.lists(st.sampled_from(["<think>", "</think>", "<", "think>", " ", "\n", "a", "b"]))


@given(TAGGED.map("".join), st.booleans(), st.integers(1, 5))
def test_how_the_text_is_cut_changes_no_thought(text: str, inside: bool, cut: int) -> None:
    assert split(text, inside=inside, cut=cut) == split(text, inside=inside, cut=1000)


def test_the_tags_of_thoughts_are_text_where_a_model_has_them_as_control_tokens() -> None:
    fast = tiny_tokenizer()
    fast.add_special_tokens(["<think>", "</think>"])
    special = Tokenizer(fast)
    ids = special.encode("<think>a</think>")
    assert special.decode(ids) == "<think>a</think>"


# --- rules that make no sense -----------------------------------------------------------------


def strange(folder: Path, change: dict[str, object]) -> Path:
    write_tiny_folder(folder)
    path = folder / "tokenizer.json"
    content = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**content, **change}), encoding="utf-8")
    return folder


def regex(pattern: str) -> dict[str, object]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def model(**change: object) -> dict[str, object]:
    return {"model": {**json.loads(tiny_tokenizer_json())["model"], **change}}


@pytest.mark.parametrize(
    "change",
    [
        {"pre_tokenizer": regex("(a+)+$")},
        {"pre_tokenizer": {"type": "FixedLength", "length": 0}},
        {"normalizer": {"type": "Replace", "pattern": {"Regex": "x*"}, "content": "x"}},
        {"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}},
        model(continuing_subword_prefix="####################"),
        model(vocab={}, merges=[["a", "b"]]),
        {"pre_tokenizer": regex("(")},
    ],
)
def test_a_panic_of_the_library_is_one_error(
    change: dict[str, object], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    folder = strange(tmp_path, change)
    with pytest.raises(ModelFileError) as caught:
        Tokenizer.from_folder(folder).encode("a" * 40 + "!")
    assert "tokenizer.json" in caught.value.message and "\n" not in caught.value.message
    assert capfd.readouterr().err == ""


def test_a_text_whose_splitting_takes_too_long_is_refused_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("qwencli.engine.frontend.tokenizer._ENCODE_S", 0.1)
    quadratic = {"pre_tokenizer": regex(r"\s+$|.")}
    tokenizer = Tokenizer.from_folder(strange(tmp_path, quadratic))
    for _ in range(2):
        started_s = time.monotonic()
        with pytest.raises(InputError, match="to split into tokens"):
            tokenizer.encode(" " * 8000 + "a")
        assert time.monotonic() - started_s < 5


@pytest.mark.parametrize(
    ("text", "most"),
    [
        ("\u00e9" * 400_000, 8192),
        ("a b " * 200_000, 8192),
        ("international " * 100_000, 5 * 8192),
        ("<|im_end|>" * 90_000, 21 * 8192),
    ],
)
def test_a_text_that_is_far_too_long_is_not_split_to_its_end(
    text: str, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = []
    encode = TOKENIZER.encode

    def noted(part: str, guard: ContentGuard | None) -> list[int]:
        split.append(len(part))
        return encode(part, guard)

    monkeypatch.setattr(TOKENIZER, "encode", noted)
    with pytest.raises(PromptTooLongError, match=f"{len(text)} characters has more than the 4096"):
        TOKENIZER.check_length(text, None, 4096)
    assert sum(split) <= most


def test_a_text_that_may_fit_is_not_refused() -> None:
    text = "a <think> " * 15_000
    TOKENIZER.check_length(text, None, len(TOKENIZER.encode(text)))


def test_a_long_text_is_the_same_when_it_is_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "two words and <|im_end|>, then \U0001f600 " * 200
    wanted = TOKENIZER.encode(text)
    monkeypatch.setattr(TOKENIZER, "_watched_from", 1)
    assert TOKENIZER.encode(text) == wanted


def test_a_normalizer_that_fills_the_memory_is_refused(tmp_path: Path) -> None:
    def replacing(text: str, times: int) -> Path:
        step = {"type": "Replace", "pattern": {"String": "a"}, "content": text}
        return strange(
            tmp_path, {"normalizer": {"type": "Sequence", "normalizers": [step] * times}}
        )

    with pytest.raises(ModelFileError, match=r"tokenizer\.json: its normalizer makes texts"):
        Tokenizer.from_folder(replacing("a" * 1000, 4))
    Tokenizer.from_folder(replacing("\u2581", 3))


def test_what_others_write_to_stderr_meanwhile_is_kept(capfd: pytest.CaptureFixture[str]) -> None:
    with _panics_unheard():
        os.write(2, b"a warning\n")
    assert capfd.readouterr().err == "a warning\n"


@pytest.mark.parametrize(
    "change",
    [
        {
            "padding": {
                "strategy": {"Fixed": 10**9},
                "direction": "Right",
                "pad_to_multiple_of": None,
                "pad_id": 0,
                "pad_type_id": 0,
                "pad_token": "x",
            }
        },
        {
            "truncation": {
                "direction": "Right",
                "max_length": 1,
                "strategy": "LongestFirst",
                "stride": 5,
            }
        },
    ],
)
def test_prompts_are_not_cut_or_filled_up(change: dict[str, object], tmp_path: Path) -> None:
    text = "a small blue star"
    assert Tokenizer.from_folder(strange(tmp_path, change)).encode(text) == TOKENIZER.encode(text)


def test_a_control_token_without_a_spelling_is_nowhere() -> None:
    fast = tiny_tokenizer()
    fast.add_special_tokens([AddedToken("", special=True)])
    assert Tokenizer(fast).encode("a star") == TOKENIZER.encode("a star")


def test_the_same_text_is_encoded_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(tiny_tokenizer())
    texts = [f"Describe <|im_end|> number {n}." for n in range(40)]
    first = [tokenizer.encode(text) for text in texts]
    first[-1].append(0)  # what a caller does with its list is its own business
    guard = tokenizer.guard([texts[-1]])
    assert tokenizer.encode(guard.protect(texts[-1]), guard) != first[-1][:-1]
    monkeypatch.setattr(tokenizer, "_extend", None)
    assert tokenizer.encode(texts[-1]) == first[-1][:-1]
    assert len(tokenizer._recent) <= 16
