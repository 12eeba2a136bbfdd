from __future__ import annotations

import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from qwencli.config import Cache, EngineName, Quantization
from qwencli.errors import OutputError, UsageError
from qwencli.models.user_config import (
    CONFIG_FILE,
    changed_config,
    configured_model,
    model_settings,
    write_config,
)

NEW = {"engine": EngineName.NATIVE, "quantization": Quantization.NONE, "max_seq_len": 4096,
       "max_pixels": None}  # fmt: skip
FILE = """# mine
model = "qwen3-vl-2b"  # the small one
other = [1, 2]

[models."qwen3-vl-4b"]
quantization = "4bit"
max_pixels = 500000

# of the next one
[models.x]
cache = "static"
"""


def put(folder, text):
    (folder / CONFIG_FILE).write_text(text, encoding="utf-8")


def test_no_file_is_an_empty_one(tmp_path):
    assert configured_model(tmp_path) is None
    assert model_settings(tmp_path / "none", "x") == {}


def test_settings_are_read_as_what_they_mean(tmp_path):
    put(tmp_path, FILE)
    assert configured_model(tmp_path) == "qwen3-vl-2b"
    assert model_settings(tmp_path, "qwen3-vl-4b") == {
        "quantization": Quantization.INT4,
        "max_pixels": 500000,
    }
    assert model_settings(tmp_path, "x") == {"cache": Cache.STATIC}
    assert model_settings(tmp_path, "y") == {}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("model = 3", "model: expected a text"),
        ("model = ", "cannot be read as TOML"),
        ("models = 3", "models: expected tables"),
        ("[models]\nx = 3", "models: expected tables"),
        ("[models.x]\ncolour = 3", "no setting 'colour'"),
        ('[models.x]\nquantization = "5bit"', "models.x.quantization: '5bit'"),
        ("[models.x]\nmax_pixels = 0", "models.x.max_pixels: 0"),
        ("[models.x]\nmax_seq_len = true", "models.x.max_seq_len: True"),
    ],
)
def test_a_malformed_file_is_named(tmp_path, text, said):
    put(tmp_path, text)
    with pytest.raises(UsageError) as caught:
        configured_model(tmp_path)
        model_settings(tmp_path, "x")
    assert said in caught.value.message
    assert CONFIG_FILE in caught.value.message
    assert caught.value.hint


def test_a_new_file(tmp_path):
    old, new = changed_config(tmp_path, "qwen2.5-vl-7b", NEW, default=True)
    assert old == ""
    assert new == (
        'model = "qwen2.5-vl-7b"\n\n[models."qwen2.5-vl-7b"]\nengine = "native"\n'
        'quantization = "none"\nmax_seq_len = 4096\n'
    )


def test_everything_else_stays_as_it_is(tmp_path):
    put(tmp_path, FILE)
    old, new = changed_config(tmp_path, "qwen3-vl-4b", NEW, default=False)
    assert old == FILE
    assert "# mine\n" in new
    assert 'model = "qwen3-vl-2b"  # the small one\n' in new
    assert "\n\n# of the next one\n[models.x]\n" in new
    parsed = tomllib.loads(new)
    assert parsed["models"]["qwen3-vl-4b"] == {
        "engine": "native", "quantization": "none", "max_seq_len": 4096,
    }  # fmt: skip
    assert parsed["models"]["x"] == {"cache": "static"}
    again = changed_config(tmp_path, "x", {"cache": Cache.STATIC}, default=False)
    assert again[0] == again[1], "what it says already changes nothing"


@pytest.mark.parametrize(
    "text",
    [
        'models = {"m" = {cache = "static"}}',
        '[models]\n"m" = {cache = "static"}',
        '[models.m]\ncache = "static"\n[models.m.deeper]\nx = 1',
        'text = """\n[models.m]\n"""',
    ],
)
def test_what_cannot_be_replaced_safely_is_refused(tmp_path, text):
    put(tmp_path, text)
    with pytest.raises(UsageError):
        changed_config(tmp_path, "m", NEW, default=False)


NAMES = st.text(
    st.characters(codec="utf-8", exclude_characters="\n\r", exclude_categories=("Cc", "Cs")),
    min_size=1,
    max_size=8,
)


@given(
    models=st.dictionaries(NAMES, st.just({"cache": "static"}), max_size=3),
    name=NAMES,
    default=st.booleans(),
)
@settings(max_examples=60)
def test_any_name_and_any_neighbours(tmp_path_factory, models, name, default):
    import json

    folder = tmp_path_factory.mktemp("config")
    text = "".join(
        f'[models.{json.dumps(n, ensure_ascii=False)}]\ncache = "static"\n' for n in models
    )
    put(folder, text)
    try:
        tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        return
    _, new = changed_config(folder, name, NEW, default=default)
    parsed = tomllib.loads(new)
    assert parsed["models"][name]["max_seq_len"] == 4096
    assert {n: s for n, s in parsed["models"].items() if n != name} == {
        n: s for n, s in models.items() if n != name
    }
    assert parsed.get("model") == (name if default else None)


def test_writing(tmp_path):
    folder = tmp_path / "not" / "yet"
    path = write_config(folder, "x = 1\n")
    assert path.read_text(encoding="utf-8") == "x = 1\n"
    path.chmod(0o640)
    write_config(folder, "x = 2\n")
    assert path.stat().st_mode & 0o777 == 0o640
    assert [p.name for p in folder.iterdir()] == [CONFIG_FILE]


def test_a_link_is_written_through(tmp_path):
    real = tmp_path / "dotfiles.toml"
    real.write_text("x = 1\n", encoding="utf-8")
    (tmp_path / CONFIG_FILE).symlink_to(real)
    write_config(tmp_path, "x = 2\n")
    assert (tmp_path / CONFIG_FILE).is_symlink()
    assert real.read_text(encoding="utf-8") == "x = 2\n"


def test_a_folder_that_cannot_be_made(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(OutputError) as caught:
        write_config(tmp_path / "file" / "below", "x = 1\n")
    assert caught.value.hint
