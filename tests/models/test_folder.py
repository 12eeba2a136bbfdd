"""A folder that cannot be loaded is refused before the load, with the reason that fits."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from qwencli.errors import ModelFileError
from qwencli.models.folder import check_folder, is_complete
from qwencli.models.shape_reader import read_shape
from qwencli.models.tensors import expected_tensors
from qwencli.models.weight_files import all_named, find_weights
from tests.models.tiny import CONFIGS, TEXT, TOKENS, pack_safetensors, write_model


def refused(folder, expected, **options):
    with pytest.raises(ModelFileError, match=expected) as caught:
        check_folder(folder, **options)
    assert "\n" not in caught.value.message
    assert caught.value.hint
    return caught.value


def tensors_of(family="qwen3_vl"):
    return dict(expected_tensors(read_shape(CONFIGS[family])))


def shard(folder, count=2):
    """Split the folder's single weight file into `count` shards with an index."""
    (folder / "model.safetensors").unlink()
    names = list(tensors_of())
    weight_map = {}
    for part in range(count):
        file = f"model-{part + 1:05}-of-{count:05}.safetensors"
        own = {name: tensors_of()[name] for name in names[part::count]}
        (folder / file).write_bytes(pack_safetensors(own))
        weight_map |= dict.fromkeys(own, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return index


@pytest.mark.parametrize("family", CONFIGS)
def test_whole_folder_passes(tmp_path, family):
    check_folder(write_model(tmp_path / "m", family))
    assert is_complete(tmp_path / "m")


def test_text_model_needs_no_image_processor(tmp_path):
    folder = write_model(tmp_path / "m", "qwen3")
    (folder / "preprocessor_config.json").unlink()
    check_folder(folder)


def test_older_hub_layout_passes(tmp_path):
    renamed = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): size
        for name, size in tensors_of("qwen2_5_vl").items()
    }
    assert "visual.merger.ln_q.weight" in renamed
    assert "model.norm.weight" in renamed
    check_folder(write_model(tmp_path / "m", "qwen2_5_vl", tensors=renamed))


def test_flat_and_nested_text_configs_mean_the_same():
    flat = CONFIGS["qwen2_5_vl"]
    top = ("model_type", "vision_config", *TOKENS)
    text = {key: value for key, value in flat.items() if key not in top}
    nested = {key: flat[key] for key in top} | {"text_config": text}
    assert read_shape(nested) == read_shape(flat)


def test_sharded_passes(model_folder):
    shard(model_folder)
    check_folder(model_folder)
    assert len(find_weights(model_folder).files) == 2


def test_missing_shard_is_named(model_folder):
    shard(model_folder, 3)
    (model_folder / "model-00002-of-00003.safetensors").unlink()
    refused(model_folder, r"1 of 3 weight files are missing: model-00002-of-00003\.safetensors")
    assert not is_complete(model_folder)


def test_shards_without_index(model_folder):
    shard(model_folder).unlink()
    refused(model_folder, "shards without their")


@pytest.mark.parametrize("value", [{}, {"weight_map": {}}, {"weight_map": []}])
def test_index_without_a_map(model_folder, value):
    shard(model_folder).write_text(json.dumps(value), encoding="utf-8")
    refused(model_folder, "weight_map is missing or empty")


@pytest.mark.parametrize("name", ["../x.safetensors", "/x.safetensors", "..\\x", 7])
def test_index_must_stay_in_the_folder(model_folder, name):
    index = shard(model_folder)
    index.write_text(json.dumps({"weight_map": {"a": name}}), encoding="utf-8")
    refused(model_folder, "weight files are missing|not the name of a file beside it")


def test_no_folder_and_no_config(tmp_path):
    refused(tmp_path / "absent", "no such folder")
    refused(tmp_path, "no config.json")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"model_type": "qwen3_vl",\n oops}', "line 2: is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[]", "not a JSON object"),
        ("{}", "no model_type"),
        ('{"model_type": "llama"}', "model_type 'llama' is not supported"),
        ('{"model_type": ["qwen3"]}', "is not supported"),
        ('{"model_type": "qwen3"}', "hidden_size is missing"),
        ('{"model_type": "qwen3", "hidden_size": true}', "hidden_size is True"),
        (json.dumps({**CONFIGS["qwen3"], "num_hidden_layers": 10**9}), "from 1 to 1000"),
        (json.dumps({**CONFIGS["qwen2_5_vl"], "vision_config": 3}), "vision_config is missing"),
    ],
)
def test_bad_config(model_folder, text, expected):
    (model_folder / "config.json").write_text(text, encoding="utf-8")
    error = refused(model_folder, expected)
    if "llama" in text:
        assert "qwen3_vl, qwen3_vl_moe, qwen2_5_vl" in error.hint


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=6,
)
VISION_KEYS = st.sampled_from(sorted(CONFIGS["qwen3_vl"]["vision_config"]))
CHANGES = st.dictionaries(st.sampled_from(["model_type", "text_config", *TEXT, "head_dim"]), JSON)


@given(CHANGES, st.dictionaries(VISION_KEYS, JSON, max_size=3), st.sampled_from(list(CONFIGS)))
def test_no_config_leads_to_another_error(changes, vision, family):
    config = {**CONFIGS[family], **changes}
    if "vision_config" in config:
        config["vision_config"] = {**config["vision_config"], **vision}
    try:
        expected_tensors(read_shape(config))
    except ModelFileError as error:
        assert error.hint and len(error.message.splitlines()) == 1


def test_bad_indexes(model_folder):
    config = json.loads((model_folder / "config.json").read_text(encoding="utf-8"))
    config["vision_config"]["deepstack_visual_indexes"] = ["one"]
    (model_folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    refused(model_folder, "deepstack_visual_indexes is .*expected a list of whole numbers")


def test_config_that_is_not_text(model_folder):
    (model_folder / "config.json").write_bytes(b"\xff\xfe\x00")
    refused(model_folder, "is not JSON")


def test_truncated_weights(model_folder):
    path = model_folder / "model.safetensors"
    whole = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    error = refused(model_folder, f"truncated: {whole - 100} bytes, its header says {whole}")
    assert "again" in error.hint


def test_wrong_shapes_are_named_with_both(tmp_path):
    tensors = tensors_of()
    tensors["model.language_model.layers.0.self_attn.q_proj.weight"] = (16, 16)
    tensors["model.visual.blocks.1.attn.qkv.weight"] = (24, 9)
    error = refused(write_model(tmp_path / "m", tensors=tensors), "2 tensors of the wrong shape")
    assert "qkv.weight is [24, 9], config.json asks for [24, 8]" in error.message
    assert "q_proj.weight is [16, 16], config.json asks for [32, 16]" in error.message


def test_missing_tensors_are_counted_and_all_named(tmp_path):
    gone = [name for name in tensors_of() if "layers.1." in name]
    kept = {name: size for name, size in tensors_of().items() if name not in gone}
    error = refused(write_model(tmp_path / "m", tensors=kept), "11 tensors missing")
    assert all(name in error.message for name in gone)


def test_names_that_differ_in_a_number_are_one():
    names = [f"layers.{n}.up" for n in (0, 1, 2, 7, 9, 10)] + ["norm", "layers.3.down"]
    assert all_named(names) == "layers.{0-2,7,9-10}.up, norm, layers.3.down"


def test_untied_model_needs_its_head(tmp_path):
    kept = {name: size for name, size in tensors_of("qwen3").items() if name != "lm_head.weight"}
    refused(
        write_model(tmp_path / "m", "qwen3", tensors=kept), r"1 tensor missing.*lm_head\.weight"
    )


def test_quantized_checkpoint_is_checked_where_it_can_be(tmp_path):
    """Of a scheme that is read here every tensor is; `tests/models/test_checkpoint.py`."""
    config = {**CONFIGS["qwen3"], "quantization_config": {"quant_method": "hqq"}}
    packed = {
        name.replace(".weight", ".packed") if len(size) == 2 and "proj" in name else name: size
        for name, size in tensors_of("qwen3").items()
    }
    check_folder(write_model(tmp_path / "m", "qwen3", config, packed))
    del packed["model.norm.weight"]
    refused(write_model(tmp_path / "n", "qwen3", config, packed), "model.norm.weight")


def test_no_weights(model_folder):
    (model_folder / "model.safetensors").unlink()
    assert "--load-format dummy" in refused(model_folder, "no weights").hint


def test_lora_adapter(model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "adapter_model.safetensors")
    (model_folder / "adapter_config.json").write_text("{}", encoding="utf-8")
    refused(model_folder, "LoRA adapter")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "weights.pt", "weights.pth"])
def test_pickle_is_refused(model_folder, name):
    (model_folder / "model.safetensors").rename(model_folder / name)
    assert "--allow-pickle" in refused(model_folder, f"pickle files .{name}").hint


def test_pickle_when_asked_for(model_folder):
    (model_folder / "model.safetensors").rename(model_folder / "pytorch_model.bin")
    check_folder(model_folder, allow_pickle=True)
    assert find_weights(model_folder, allow_pickle=True).pickled
    (model_folder / "pytorch_model.bin").rename(model_folder / "odd.bin")
    refused(model_folder, "no weights", allow_pickle=True)


@pytest.mark.parametrize(
    ("name", "what"),
    [("tokenizer.json", "no tokenizer"), ("preprocessor_config.json", "no image processor")],
)
def test_missing_side_files(model_folder, name, what):
    (model_folder / name).unlink()
    refused(model_folder, what)
    assert not is_complete(model_folder)


def test_other_tokenizer_layout(model_folder):
    (model_folder / "tokenizer.json").unlink()
    (model_folder / "vocab.json").write_text("{}", encoding="utf-8")
    refused(model_folder, "no tokenizer")
    (model_folder / "merges.txt").write_text("", encoding="utf-8")
    check_folder(model_folder)
