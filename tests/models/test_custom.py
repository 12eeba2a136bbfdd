"""custom_models.json: what it may say, and that nothing in it leads to another kind of error."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.config import ModelSource
from qwencli.errors import CustomModelsError
from qwencli.models.builtin import hub_config
from qwencli.models.custom import as_folder, load_custom_models, parse_custom_models
from qwencli.models.memory import LISTED, estimate
from qwencli.models.shape_reader import read_shape

FILE = Path("folder/custom_models.json")
ENTRY = {
    "repo_id": "Owner/Some-Model",
    "model_class": "AutoModelForImageTextToText",
    "default": True,
    "quantized": True,
    "vram_requirement": {"4bit": 4.5, "8bit": 7, "full": 12},
}


def parse(value):
    return parse_custom_models(json.dumps(value), FILE)


def test_reads_a_complete_entry():
    spec = parse({"hf_vl_models": {"mine": ENTRY}}).specs["mine"]
    assert (spec.name, spec.source, spec.repo_id) == ("mine", ModelSource.CUSTOM, ENTRY["repo_id"])
    assert spec.vram_requirement == {"4bit": 4.5, "8bit": 7.0, "full": 12.0}
    assert spec.default and spec.quantized
    assert spec.path is None and spec.hub_config is None


def test_repo_id_is_all_that_is_needed():
    models = parse({"hf_models": {"a": {"repo_id": "Owner/A"}}})
    assert not models.specs["a"].default and models.default is None
    assert parse({}).specs == {}


def test_known_repo_brings_its_shape():
    spec = parse({"hf_models": {"a": {"repo_id": "Qwen/Qwen3-4B"}}}).specs["a"]
    assert spec.hub_config == hub_config("qwen3-4b")


@pytest.mark.parametrize("text", ["./model", "../model", "/srv/model", "C:\\models\\x", "a\\b"])
def test_folders(text):
    spec = parse({"hf_models": {"a": {"repo_id": text}}}).specs["a"]
    assert spec.repo_id is None
    assert spec.path == FILE.parent / text


def test_home_folder_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    monkeypatch.setenv("USERPROFILE", "/home/someone")
    assert as_folder("~/models/x") == Path("/home/someone/models/x")
    assert as_folder("Owner/Name") is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"hf_models":\n{,}}', r"line 2, column 2: expected JSON"),
        ("[" * 100_000, "the file: expected JSON of ordinary size"),
        ("[1]", "the file: expected an object, got a list"),
        ("null", "the file: expected an object, got null"),
        ('{"hf_models": []}', "hf_models: expected an object of models, got a list"),
        ('{"hf_models": {"a": 1}}', r"hf_models\.a: expected an object, got 1"),
        ('{"hf_models": {"": {}}}', "expected a printable name"),
        ('{"hf_models": {"a\\nb": {}}}', "expected a printable name"),
        ('{"hf_models": {"a": {}}}', r"hf_models\.a\.repo_id: .* it is missing"),
        ('{"hf_models": {"a": {"repo_id": 3}}}', r"a\.repo_id: expected a hub id .* got 3"),
        ('{"hf_models": {"a": {"repo_id": "word"}}}', r"repo_id: expected a hub id .* \"word\""),
        ('{"hf_models": {"a": {"repo_id": "./a\\u0000"}}}', "repo_id: expected a hub id"),
    ],
)
def test_malformed_file(text, expected):
    with pytest.raises(CustomModelsError, match=expected) as caught:
        parse_custom_models(text, FILE)
    assert caught.value.message.startswith(str(FILE))
    assert caught.value.hint and "\n" not in caught.value.message


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({"default": "yes"}, r"a\.default: expected true or false, got \"yes\""),
        ({"quantized": 1}, r"a\.quantized: expected true or false, got 1"),
        ({"model_class": []}, r"a\.model_class: expected a text, got a list"),
        ({"vram_requirement": 4}, r"a\.vram_requirement: expected an object"),
        ({"vram_requirement": {"4bit": "4GB"}}, r"vram_requirement\.4bit: expected GB .*4GB"),
        ({"vram_requirement": {"4bit": True}}, r"vram_requirement\.4bit: expected GB"),
        ({"vram_requirement": {"full": 0}}, r"vram_requirement\.full: expected GB"),
        ({"vram_requirement": {"full": float("nan")}}, r"vram_requirement\.full: expected GB"),
        ({"vram_requirement": {"full": 10**400}}, r"vram_requirement\.full: expected GB"),
        ({"vram_requirement": {"2bit": 1}}, "expected 4bit, 8bit or full as key, got .2bit."),
    ],
)
def test_malformed_entry(change, expected):
    with pytest.raises(CustomModelsError, match=expected):
        parse({"hf_models": {"a": {"repo_id": "Owner/A", **change}}})


def test_two_defaults_in_a_section():
    entry = {"repo_id": "Owner/A", "default": True}
    with pytest.raises(CustomModelsError, match="hf_models: expected one default at most, 'a'"):
        parse({"hf_models": {"a": entry, "b": entry}})


def test_default_of_the_vision_section_is_the_one():
    entry = {"repo_id": "Owner/A", "default": True}
    models = parse({"hf_models": {"text": entry}, "hf_vl_models": {"vision": entry}})
    assert models.default.name == "vision"
    assert [spec.name for spec in models.specs.values() if spec.default] == ["vision"]


def test_one_name_in_both_sections():
    entry = {"repo_id": "Owner/A"}
    with pytest.raises(CustomModelsError, match=r"hf_models\.a: expected a name that is used once"):
        parse({"hf_models": {"a": entry}, "hf_vl_models": {"a": entry}})


def test_unknown_keys_are_warnings():
    models = parse({"_note": 1, "hf_models": {"a": {"repo_id": "Owner/A", "sampler": 1}}})
    assert models.warnings == (
        f"{FILE}: '_note' is not known",
        f"{FILE}: hf_models.a: 'sampler' is not known",
    )


def write(folder, value):
    folder.mkdir(exist_ok=True)
    path = folder / "custom_models.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_later_files_win(tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    one = {"a": {"repo_id": "One/a", "default": True}, "b": {"repo_id": "One/b"}}
    write(first, {"hf_models": one})
    write(second, {"hf_models": {"b": {"repo_id": "Two/b"}}})
    explicit = write(tmp_path / "third", {"hf_models": {"c": {"repo_id": "3/c", "default": True}}})
    models = load_custom_models((first, second, tmp_path / "absent"), explicit)
    assert {name: spec.repo_id for name, spec in models.specs.items()} == {
        "a": "One/a",
        "b": "Two/b",
        "c": "3/c",
    }
    assert models.default.name == "c"
    assert load_custom_models((first, second)).default.name == "a"


def test_missing_explicit_file(tmp_path):
    with pytest.raises(CustomModelsError, match="no such file"):
        load_custom_models((), tmp_path / "none.json")


def test_file_that_is_not_utf8(tmp_path):
    path = tmp_path / "custom_models.json"
    path.write_bytes(b"\xff\xff")
    with pytest.raises(CustomModelsError, match="not UTF-8"):
        load_custom_models((tmp_path,))
    path.write_bytes(b'\xef\xbb\xbf{"hf_models": {}}')
    assert load_custom_models((tmp_path,)).specs == {}


def test_the_example_in_the_repository_is_true():
    root = Path(__file__).parents[2]
    models = load_custom_models((root,))
    assert models.specs and not models.warnings
    assert models.default is None, "a default would start a download on a fresh machine"
    spec = models.specs["Qwen3-VL-4B-Instruct"]
    shape = read_shape(spec.hub_config)
    for mode, quantization in LISTED.items():
        estimated = estimate(shape, quantization).total / 1e9
        assert spec.vram_requirement[mode] == pytest.approx(estimated, abs=0.1)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
NAMES = st.sampled_from(["a", "b"]) | st.text()
ENTRIES = st.fixed_dictionaries(
    {},
    optional={
        "repo_id": st.sampled_from(["Owner/Name", "./folder", "~/x"]) | JSON,
        "model_class": st.text() | JSON,
        "default": st.booleans() | JSON,
        "quantized": st.booleans() | JSON,
        "vram_requirement": JSON
        | st.dictionaries(st.sampled_from(["4bit", "full"]), st.integers() | st.floats() | JSON),
        "other": JSON,
    },
)
SECTIONS = st.dictionaries(NAMES, ENTRIES | JSON, max_size=3) | JSON
FILES = st.fixed_dictionaries(
    {}, optional={"hf_models": SECTIONS, "hf_vl_models": SECTIONS, "more": JSON}
)


@given(text=(FILES | JSON).map(json.dumps) | st.text())
def test_no_contents_lead_to_another_error(text):
    try:
        models = parse_custom_models(text, FILE)
    except CustomModelsError as error:
        assert error.hint and len(error.message.splitlines()) == 1
        error.message.encode("utf-8")
        return
    for spec in models.specs.values():
        assert (spec.path is None) != (spec.repo_id is None)
    assert sum(spec.default for spec in models.specs.values()) <= 1
