"""The list of models knows the sizes of pre-quantized checkpoints, and of kept weights."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from qwencli.config import Quantization
from qwencli.models.listing import list_models
from qwencli.models.memory import estimate
from qwencli.models.quantized_cache import cache_file
from qwencli.models.shape_reader import read_shape
from tests.engine.quant.packed_formats import FORMATS
from tests.engine.quant.test_prequantized import TEXT, tensors_of, write

MATRICES = 2 * (512 * 128 + 128 * 256 + 3 * 128 * 256)


@pytest.mark.parametrize(
    ("name", "column", "value_bytes"),
    [("awq g128", "4bit", 0.5 + 4 / 128), ("fp8 blocks", "fp8", 1 + 4 / 128)],
)
def test_a_prequantized_checkpoint_has_one_size(search_paths, name, column, value_bytes):
    config, writer, arguments, _ = FORMATS[name]
    packed, _ = tensors_of(TEXT, writer, arguments)
    folder = write(search_paths.working_folder / "mine", packed)
    written = TEXT | {"quantization_config": config}
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    rows = {row.name: row for row in list_models(search_paths.custom_models(None), search_paths)}
    whole = estimate(read_shape(TEXT))
    saved = MATRICES * (2 - value_bytes)
    wanted = replace(whole, weights=round(whole.weights - saved)).total
    assert rows["./mine"].vram_gb == {column: round(wanted / 1e9, 2)}


def test_an_unknown_format_has_no_size(search_paths):
    folder = search_paths.working_folder / "mine"
    packed, _ = tensors_of(TEXT, FORMATS["gptq"][1], {})
    write(folder, packed)
    written = TEXT | {"quantization_config": {"quant_method": "quip"}}
    (folder / "config.json").write_text(json.dumps(written), encoding="utf-8")
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    rows = {row.name: row for row in list_models(search_paths.custom_models(None), search_paths)}
    assert rows["./mine"].vram_gb == {}


def test_kept_weights_are_counted(search_paths):
    kept = cache_file(search_paths.bundled, Quantization.INT4, "float32")
    kept.parent.mkdir(parents=True)
    kept.write_bytes(bytes(1234))
    rows = {row.name: row for row in list_models(search_paths.custom_models(None), search_paths)}
    assert rows["scenes"].kept_bytes == 1234
    assert rows["qwen3-vl-4b"].kept_bytes == 0
