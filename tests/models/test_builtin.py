"""The table of built-ins against transformers and against the published parameter counts."""

from __future__ import annotations

import pytest
import torch
import transformers
from transformers.initialization import no_init_weights

from qwencli.models.builtin import BUILTINS, DECODERS, ENTRIES, TOWERS, find_builtin, hub_config
from qwencli.models.families import FAMILIES, can_see
from qwencli.models.shape_reader import read_shape
from qwencli.models.tensors import expected_tensors, parameter_count

# Billions of parameters as the hub ("Model size") or the model card states them; tied weights once.
PUBLISHED = {
    "qwen3.5-0.8b": 0.853,
    "qwen3.5-2b": 2.21,
    "qwen3.5-4b": 4.54,
    "qwen3.5-9b": 9.41,
    "qwen3.5-27b": 27.4,
    "qwen3.6-27b": 27.4,
    "qwen3.8-27b": 27.4,
    "qwen3-vl-2b": 2.13,
    "qwen3-vl-4b": 4.44,
    "qwen3-vl-8b": 8.77,
    "qwen3-vl-32b": 33.4,
    "qwen3-vl-2b-thinking": 2.13,
    "qwen3-vl-4b-thinking": 4.44,
    "qwen3-vl-8b-thinking": 8.77,
    "qwen3-vl-32b-thinking": 33.4,
    "qwen3-vl-30b-a3b": 31.1,
    "qwen3-vl-30b-a3b-thinking": 31.1,
    "qwen3-30b-a3b": 30.5,
    "qwen3.5-35b-a3b": 35.1,
    "qwen3.6-35b-a3b": 35.1,
    "qwen2.5-vl-3b": 3.75,
    "qwen2.5-vl-7b": 8.29,
    "qwen2.5-vl-32b": 33.5,
    "qwen2.5-vl-72b": 73.4,
    "qwen2-vl-2b": 2.21,
    "qwen2-vl-7b": 8.29,
    "qwen2-vl-72b": 73.4,
    "qwen3-0.6b": 0.596,
    "qwen3-1.7b": 1.72,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-14b": 14.8,
    "qwen3-32b": 32.8,
    "qwen2.5-0.5b": 0.494,
    "qwen2.5-1.5b": 1.54,
    "qwen2.5-3b": 3.09,
    "qwen2.5-7b": 7.62,
    "qwen2.5-14b": 14.8,
    "qwen2.5-32b": 32.8,
}


def build_on_meta(config_dict):
    config = transformers.AutoConfig.for_model(**config_dict)
    model_class = getattr(transformers, config_dict["architectures"][0])
    with torch.device("meta"), no_init_weights():
        return config, model_class(config)


def test_every_alias_is_published():
    assert set(PUBLISHED) == set(BUILTINS)


@pytest.mark.parametrize("alias", PUBLISHED)
def test_parameter_count_is_the_published_one(alias):
    count = parameter_count(read_shape(hub_config(alias)))
    assert count / 1e9 == pytest.approx(PUBLISHED[alias], rel=0.005)


@pytest.mark.parametrize("alias", PUBLISHED)
def test_transformers_builds_exactly_the_expected_tensors(alias):
    config, model = build_on_meta(hub_config(alias))
    built = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        built.pop("lm_head.weight")
    assert built == expected_tensors(read_shape(hub_config(alias)))
    count = sum(tensor.numel() for tensor in model.state_dict().values())
    twice = built_vocab(config) if config.tie_word_embeddings else 0
    assert count - twice == parameter_count(read_shape(hub_config(alias)))


def built_vocab(config):
    text = config.get_text_config()
    return text.vocab_size * text.hidden_size


@pytest.mark.parametrize(
    ("alias", "rope"),
    [
        ("qwen3.5-9b", (1e7, [11, 11, 10])),
        ("qwen3-vl-4b", (5e6, [24, 20, 20])),
        ("qwen2.5-vl-3b", (1e6, [16, 24, 24])),
        ("qwen2-vl-2b", (1e6, [16, 24, 24])),
        ("qwen3-4b", (1e6, None)),
        ("qwen2.5-7b", (1e6, None)),
    ],
)
def test_config_class_of_each_family_takes_the_rope_and_norm(alias, rope):
    config = transformers.AutoConfig.for_model(**hub_config(alias))
    text = config.get_text_config()
    assert text.rope_parameters["rope_theta"] == rope[0]
    assert text.rope_parameters.get("mrope_section") == rope[1]
    assert text.rms_norm_eps == 1e-6
    shape = read_shape(hub_config(alias)).text
    for layer, kind in enumerate(getattr(text, "layer_types", None) or []):
        assert kind == ("linear_attention" if shape.mixer(layer) == "delta" else "full_attention")
    assert (text.rope_parameters.get("partial_rotary_factor") or 1) * shape.head_dim == (
        shape.rotary_dim
    )
    assert (config.dtype or text.dtype) == torch.bfloat16


def test_vision_towers_reach_the_config_class():
    config = transformers.AutoConfig.for_model(**hub_config("qwen3-vl-8b"))
    vision = config.vision_config
    assert (vision.depth, vision.hidden_size, vision.patch_size) == (27, 1152, 16)
    assert list(vision.deepstack_visual_indexes) == [8, 16, 24]
    windowed = transformers.AutoConfig.for_model(**hub_config("qwen2.5-vl-72b")).vision_config
    assert (windowed.window_size, windowed.intermediate_size) == (112, 3456)
    assert list(windowed.fullatt_block_indexes) == [7, 15, 23, 31]


def test_names_are_found_by_alias_and_hub_id_in_any_case():
    assert find_builtin("QWEN3-VL-4B").repo_id == "Qwen/Qwen3-VL-4B-Instruct"
    assert find_builtin("qwen/qwen3-vl-4b-instruct").alias == "qwen3-vl-4b"
    assert find_builtin("qwen9") is None


def test_table_has_no_dangling_or_unused_rows():
    assert {entry.decoder for entry in ENTRIES} == set(DECODERS)
    assert {entry.tower for entry in ENTRIES if entry.tower} == set(TOWERS)
    assert {entry.model_type for entry in ENTRIES} == set(FAMILIES)


def test_models_that_look_at_pictures_are_those_whose_pictures_are_prepared():
    from qwencli.engine.frontend.processor_config import VISION_FAMILIES

    assert {family for family in FAMILIES if can_see(family)} == VISION_FAMILIES
    assert can_see("something_else") is can_see(None) is None


def test_hub_config_is_a_fresh_copy():
    hub_config("qwen3-vl-2b")["text_config"]["rope_scaling"]["mrope_section"].append(1)
    assert hub_config("qwen3-vl-2b")["text_config"]["rope_scaling"]["mrope_section"] == [24, 20, 20]
