"""What the user said over their config.toml over our own defaults."""

from __future__ import annotations

import pytest

from qwencli.commands.options import RunOptions
from qwencli.config import Attention, Cache, EngineName, Quantization
from qwencli.errors import UsageError
from qwencli.models import user_config
from qwencli.models.resolve import resolve_model

SPEC = resolve_model("qwen3-vl-4b")
CONFIG = """
[models."qwen3-vl-4b"]
engine = "transformers"
quantization = "4bit"
cache = "dynamic"
max_pixels = 262144
"""


@pytest.fixture
def config(monkeypatch, tmp_path):
    def put(text):
        (tmp_path / "config.toml").write_text(text, encoding="utf-8")
        monkeypatch.setattr(user_config, "user_config_folder", lambda: tmp_path)

    return put


def test_without_a_config():
    config = RunOptions().engine_config(SPEC)
    assert (config.quantization, config.attention) == (Quantization.NONE, Attention.AUTO)
    assert (config.engine, config.cache, config.device) == (None, None, "auto")


def test_the_config_gives_what_was_not_said(config):
    config(CONFIG)
    made = RunOptions().engine_config(SPEC)
    assert (made.engine, made.quantization) == (EngineName.TRANSFORMERS, Quantization.INT4)
    assert (made.cache, made.max_pixels) == (Cache.DYNAMIC, 262144)
    assert made.attention is Attention.AUTO


def test_another_model_has_settings_of_its_own(config):
    config(CONFIG)
    made = RunOptions().engine_config(resolve_model("scenes"))
    assert made.quantization is Quantization.NONE


@pytest.mark.parametrize(
    "said",
    [{"quantization": Quantization.NONE}, {"engine": EngineName.NATIVE}, {"device": "cpu"}],
)
def test_a_mode_that_is_said_undoes_all_of_them_but_not_the_sizes(config, said):
    config(CONFIG)
    made = RunOptions(**said).engine_config(SPEC)
    assert made.quantization is Quantization.NONE
    assert made.cache is None
    assert made.max_pixels == 262144


def test_a_size_that_is_said_wins(config):
    config(CONFIG)
    made = RunOptions(max_pixels="1000").engine_config(SPEC)
    assert (made.max_pixels, made.quantization) == (1000, Quantization.INT4)
    assert RunOptions(max_pixels="auto").engine_config(SPEC).max_pixels is None


def test_a_malformed_config_is_named(config):
    config('[models."qwen3-vl-4b"]\nquantization = "2bit"\n')
    with pytest.raises(UsageError, match=r"quantization.*2bit"):
        RunOptions().engine_config(SPEC)
