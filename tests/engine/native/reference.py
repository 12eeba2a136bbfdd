"""The same tiny model in `transformers`, and the same prompt as its keyword arguments."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qwencli.config import Attention
from qwencli.engine.frontend.preprocess import Visual
from qwencli.engine.layers.vision_tower import join_features
from qwencli.engine.native.model import QwenModel
from qwencli.engine.native.prompt_inputs import ModelPrompt, PromptInputs
from qwencli.models.shape_reader import read_shape
from tests.engine.native.tiny import IMAGE, VIDEO, Row

CPU = torch.device("cpu")
CLASSES = {
    "qwen3_vl": "Qwen3VLForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "qwen2_5_vl": "Qwen2_5_VLForConditionalGeneration",
    "qwen2_vl": "Qwen2VLForConditionalGeneration",
    "qwen3": "Qwen3ForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
}


def reference_model(config: dict[str, Any], seed: int = 0) -> Any:
    """A model with every parameter drawn at random, norms and biases included."""
    import transformers

    torch.manual_seed(seed)
    values = {key: value for key, value in config.items() if key != "model_type"}
    model_class = getattr(transformers, CLASSES[config["model_type"]])
    model = model_class(model_class.config_class(**values)).eval().float()
    for name, parameter in model.named_parameters():
        center = 1.0 if "norm" in name and name.endswith("weight") else 0.0
        parameter.data.normal_(center, 0.08)
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    return model


def native_model(
    reference: Any, folder: Path, max_seq_len: int, attention: Attention = Attention.SDPA
) -> QwenModel:
    """Save `reference` and load it into the native model."""
    reference.save_pretrained(folder)
    return saved_model(reference, folder, max_seq_len, attention)


def saved_model(reference: Any, folder: Path, max_seq_len: int, attention: Attention) -> QwenModel:
    """What `reference` saved to `folder`, as the native model."""
    shape = read_shape(reference.config.to_dict())
    return QwenModel.load(folder, shape, torch.float32, CPU, max_seq_len, attention)


def pixels(rows: list[Row], patch_elements: int) -> list[torch.Tensor]:
    """Random patches of every picture, row by row."""
    generator = torch.Generator().manual_seed(1)
    grids = [picture.grid for row in rows for picture in row.pictures]
    return [torch.randn(t * h * w, patch_elements, generator=generator) for t, h, w in grids]


def native_inputs(model: QwenModel, rows: list[Row], patches: list[torch.Tensor]) -> PromptInputs:
    pictures = [picture for row in rows for picture in row.pictures]
    features = [
        model.encode_images(patch, [picture.grid])
        for patch, picture in zip(patches, pictures, strict=True)
    ]
    prompts = [
        ModelPrompt(
            row.ids(model.shape.split_video_frames),
            [Visual(picture.grid, picture.video, picture.seconds) for picture in row.pictures],
        )
        for row in rows
    ]
    return model.prepare(prompts, join_features(features) if features else None)


def reference_inputs(
    family: str, inputs: PromptInputs, rows: list[Row], patches: list[torch.Tensor]
) -> dict[str, Any]:
    pads = torch.zeros(inputs.batch) if inputs.left_pads is None else inputs.left_pads
    mask = (torch.arange(inputs.length) >= pads[:, None]).long()
    found: dict[str, Any] = {"input_ids": inputs.ids, "attention_mask": mask}
    pictures = [picture for row in rows for picture in row.pictures]
    if not pictures:
        return found
    found["mm_token_type_ids"] = (inputs.ids == IMAGE).int() + 2 * (inputs.ids == VIDEO).int()
    for video, pixel_key, grid_key in (
        (False, "pixel_values", "image_grid_thw"),
        (True, "pixel_values_videos", "video_grid_thw"),
    ):
        chosen = [i for i, picture in enumerate(pictures) if picture.video is video]
        if chosen:
            found[pixel_key] = torch.cat([patches[i] for i in chosen])
            found[grid_key] = torch.tensor([pictures[i].grid for i in chosen])
    if family == "qwen2_5_vl" and any(picture.video for picture in pictures):
        found["second_per_grid_ts"] = [picture.seconds for picture in pictures if picture.video]
    return found
