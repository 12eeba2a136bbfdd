"""Folders that transformers itself writes pass our checks, and name their tensors as we expect."""

from __future__ import annotations

import pytest
import transformers

from qwencli.errors import ModelFileError
from qwencli.models.builtin import hub_config
from qwencli.models.folder import check_folder, read_config
from qwencli.models.shape_reader import read_shape
from qwencli.models.tensors import parameter_count
from qwencli.models.weight_files import read_header

TEXT = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 48,
    "vocab_size": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_window_layers": 2,
}
VISION = {"depth": 2, "num_heads": 2, "deepstack_visual_indexes": [0], "fullatt_block_indexes": [1]}
WIDTHS = {
    "qwen3_5": {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32},
    "qwen3_vl": {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32},
    "qwen2_5_vl": {"hidden_size": 16, "intermediate_size": 24, "out_hidden_size": 32},
    "qwen2_vl": {"embed_dim": 16, "hidden_size": 32},
}


def tiny(alias):
    """The built-in's own config.json with small sizes."""
    config = hub_config(alias)
    text = config.get("text_config", config)
    text |= {key: value for key, value in TEXT.items() if key in text}
    if "head_dim" in text:
        text["head_dim"] = 8
    if "linear_key_head_dim" in text:
        text |= {"num_hidden_layers": 4, "linear_num_key_heads": 1, "linear_num_value_heads": 2}
        text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 4, "head_dim": 16}
        text["rope_parameters"] |= {"mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    if text.get("rope_scaling"):
        text["rope_scaling"] |= {"mrope_section": [2, 1, 1]}
    if "vision_config" in config:
        vision = config["vision_config"]
        vision |= {key: value for key, value in VISION.items() if key in vision}
        vision |= WIDTHS[config["model_type"]]
        config |= {"image_token_id": 60, "video_token_id": 61}
    return config


# A tied and an untied member of each family.
ALIASES = (
    "qwen3.5-4b qwen3.5-9b qwen3-vl-4b qwen3-vl-8b qwen2.5-vl-3b qwen2.5-vl-7b "
    "qwen2-vl-2b qwen2-vl-7b "
    "qwen3-4b qwen3-8b qwen2.5-3b qwen2.5-7b"
)


@pytest.mark.parametrize("alias", ALIASES.split())
def test_saved_folder(tmp_path, alias):
    config = transformers.AutoConfig.for_model(**tiny(alias))
    model = getattr(transformers, config.architectures[0])(config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ModelFileError, match="no tokenizer"):
        check_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}", encoding="utf-8")
    (tmp_path / "preprocessor_config.json").write_text("{}", encoding="utf-8")
    check_folder(tmp_path)
    stored = read_header(tmp_path / "model.safetensors").num_parameters
    assert stored == parameter_count(read_shape(read_config(tmp_path)))
    assert stored == model.num_parameters()
