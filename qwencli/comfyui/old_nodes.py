"""Nodes of other Qwen packs as a table: what their saved graphs hold, and which inputs of ours
take it. `convert` reads it; a test holds every name of ours against `schemas`.

A saved graph holds a node's values as a list without names, in the order of the node's widgets, and
packs have changed that order. So each node has a layout for each order it ever had. An INT called
`seed` is followed by one more value, which the editor adds ("randomize"); layouts leave it out.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from qwencli.comfyui.schemas import CAPTION, CHAT, NO_PRESET, BatchMode, Node


@dataclass(frozen=True)
class OldNode:
    """One node of another pack. It has one output, the text, which is our first one, too.

    Args:
        node: ours, which takes its place.
        layouts: every order that its widgets have had, the newest first.
        pictures: its inputs of pictures, in the order in which the model is shown them.
        frames: its input of a video as a batch of pictures.
        video: its input of ComfyUI's own VIDEO.
        settings: what it does without having an input for it, as values of our inputs.
        names: inputs whose name means something else here than in `SAME`.
    """

    node: Node
    layouts: tuple[tuple[str, ...], ...]
    pictures: tuple[str, ...] = ()
    frames: str = ""
    video: str = ""
    settings: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)


def _layouts(*orders: str) -> tuple[tuple[str, ...], ...]:
    return tuple(tuple(order.split()) for order in orders)


# The pack of this project's origin, from its first version on; image1 came when it took several.
_ORIGIN_SAMPLING = "do_sample temperature top_p top_k min_p repetition_penalty max_new_tokens seed"
_ORIGIN_VL = "quantization attention_mode keep_model_loaded bypass"
_ORIGIN_PICTURES = OldNode(
    CAPTION,
    _layouts(
        f"system text model {_ORIGIN_VL} {_ORIGIN_SAMPLING} image_resolution thread_count "
        "video_path",
        f"system text model {_ORIGIN_VL} {_ORIGIN_SAMPLING} image_resolution video_path",
        f"system text model {_ORIGIN_VL} {_ORIGIN_SAMPLING} video_path",
        "system text model quantization keep_model_loaded bypass temperature max_new_tokens "
        "repetition_penalty seed video_path",
        f"system text model quantization keep_model_loaded bypass {_ORIGIN_SAMPLING} video_path",
        "system text model quantization keep_model_loaded bypass temperature max_new_tokens seed "
        "video_path",
        "text model quantization keep_model_loaded temperature max_new_tokens seed video_path",
        "text model quantization keep_model_loaded temperature max_new_tokens seed",
        "device text model quantization keep_model_loaded temperature max_new_tokens seed",
    ),
    ("image", "image1", "image2", "image3", "image4"),
)
_ORIGIN_TEXT = OldNode(
    CHAT,
    _layouts(
        f"system prompt model {_ORIGIN_VL} {_ORIGIN_SAMPLING}",
        "system prompt model quantization keep_model_loaded bypass temperature max_new_tokens "
        "repetition_penalty seed",
        f"system prompt model quantization keep_model_loaded bypass {_ORIGIN_SAMPLING}",
        "system prompt model quantization keep_model_loaded bypass temperature max_new_tokens seed",
        "system prompt model quantization keep_model_loaded temperature max_new_tokens seed",
        "device system prompt model quantization keep_model_loaded temperature max_new_tokens seed",
    ),
)

# 1038lab's ComfyUI-QwenVL and forks that kept its names. Its plain nodes sample by fixed values.
_LAB_SAMPLING = {"temperature": 0.6, "top_p": 0.9, "repetition_penalty": 1.2}
_LAB_ASKED = "preset_prompt custom_prompt max_tokens"
_LAB_END = "keep_model_loaded seed"
_LAB_KEPT = ("", " keep_last_prompt", " bypass_mode", " unload_after_run",
             " keep_last_prompt unload_after_run")  # fmt: skip


def _lab(*orders: str) -> tuple[tuple[str, ...], ...]:
    return _layouts(*(order + end for order in orders for end in _LAB_KEPT))


_LAB_MODE = "model_name quantization attention_mode"
_LAB_ADVANCED = "temperature top_p num_beams repetition_penalty frame_count keep_model_loaded seed"
_LAB_GGUF = (
    "temperature top_p repetition_penalty frame_count ctx n_batch gpu_layers image_max_tokens "
    "top_k pool_size keep_model_loaded seed"
)
_LAB_PICTURES = ("image", "image2")
_LAB_WRITER = "max_tokens temperature top_p repetition_penalty"

# IuvenisSapiens' ComfyUI_Qwen2-VL-Instruct and ComfyUI_Qwen3-VL-Instruct.
_VQA = (
    "text model quantization keep_model_loaded temperature max_new_tokens min_pixels max_pixels "
    "seed"
)
_MULTI = "model_name system_prompt user_prompt quantization"
_MULTI_END = "num_beams keep_model_loaded seed device"
_TOGETHER = {"batch_mode": BatchMode.TOGETHER.value}

OLD_NODES: Mapping[str, OldNode] = {
    "QwenVL": _ORIGIN_PICTURES,
    "Qwen2.5VL": _ORIGIN_PICTURES,
    "Qwen2VL": _ORIGIN_PICTURES,
    "Qwen": _ORIGIN_TEXT,
    "Qwen2.5": _ORIGIN_TEXT,
    "AILab_QwenVL": OldNode(
        CAPTION,
        _lab(
            f"{_LAB_MODE} {_LAB_ASKED} {_LAB_END}",
            f"model_name quantization {_LAB_ASKED} {_LAB_END}",
            f"model_name attention_mode {_LAB_ASKED} {_LAB_END}",
            f"{_LAB_MODE} preset_prompt lora_trigger custom_prompt max_tokens {_LAB_END}",
        ),
        _LAB_PICTURES,
        frames="video",
        settings=_LAB_SAMPLING,
    ),
    "AILab_QwenVL_Advanced": OldNode(
        CAPTION,
        _lab(
            f"{_LAB_MODE} use_torch_compile device {_LAB_ASKED} {_LAB_ADVANCED}",
            f"model_name quantization {_LAB_ASKED} temperature top_p num_beams repetition_penalty "
            f"frame_count device {_LAB_END}",
            f"model_name attention_mode use_torch_compile device {_LAB_ASKED} {_LAB_ADVANCED}",
            f"{_LAB_MODE} use_torch_compile device preset_prompt lora_trigger custom_prompt "
            f"max_tokens {_LAB_ADVANCED}",
        ),
        _LAB_PICTURES,
        frames="video",
    ),
    "AILab_QwenVL_GGUF": OldNode(
        CAPTION,
        _lab(f"model_name {_LAB_ASKED} {_LAB_END}"),
        _LAB_PICTURES,
        frames="video",
        settings=_LAB_SAMPLING,
    ),
    "AILab_QwenVL_GGUF_Advanced": OldNode(
        CAPTION,
        _lab(f"model_name device {_LAB_ASKED} {_LAB_GGUF}"),
        _LAB_PICTURES,
        frames="video",
    ),
    "AILab_QwenVL_PromptEnhancer": OldNode(
        CHAT,
        _lab(
            f"{_LAB_MODE} use_torch_compile device prompt_text enhancement_style "
            f"custom_system_prompt {_LAB_WRITER} {_LAB_END}"
        ),
    ),
    "AILab_QwenVL_GGUF_PromptEnhancer": OldNode(
        CHAT,
        _lab(
            f"model_name prompt_text preset_system_prompt custom_system_prompt {_LAB_WRITER} "
            "english_output device seed",
            f"model_name prompt_text preset_system_prompt custom_system_prompt {_LAB_WRITER} "
            "english_output device keep_model_loaded seed",
        ),
    ),
    "Qwen2_VQA": OldNode(CAPTION, _layouts(_VQA)),
    "Qwen3_VQA": OldNode(CAPTION, _layouts(f"{_VQA} attention", _VQA), ("image",)),
    # jorismak's ComfyUI-QwenVL-MultiImage.
    "QwenVL_MultiImage": OldNode(
        CAPTION,
        _layouts(
            f"{_MULTI} offload_mode gpu_memory_limit_gb max_tokens {_LAB_END}",
            f"{_MULTI} max_tokens {_LAB_END}",
        ),
        ("images", "images_batch_2", "images_batch_3"),
        settings=_TOGETHER,
    ),
    "QwenVL_MultiImage_Advanced": OldNode(
        CAPTION,
        _layouts(
            f"{_MULTI} offload_mode gpu_memory_limit_gb max_tokens temperature top_p top_k "
            f"repetition_penalty {_MULTI_END}",
            f"{_MULTI} max_tokens temperature top_p top_k repetition_penalty {_MULTI_END}",
        ),
        ("images", "images_batch_2", "images_batch_3"),
        settings=_TOGETHER,
    ),
    # AkihaTatsu's ComfyUI-QwenVL-Utils.
    "QwenVL_Basic": OldNode(
        CAPTION,
        _layouts(
            f"model_name enable_thinking quantization attention_mode {_LAB_ASKED} {_LAB_END}",
            f"{_LAB_MODE} {_LAB_ASKED} {_LAB_END}",
        ),
        ("image",),
        frames="video",
        settings=_LAB_SAMPLING,
    ),
    "QwenVL_Advanced": OldNode(
        CAPTION,
        _layouts(
            *(
                f"{mode} use_torch_compile device {_LAB_ASKED} {_LAB_ADVANCED} min_pixels "
                f"max_pixels ctx n_batch gpu_layers image_max_tokens top_k{more} pool_size"
                for mode in ("model_name enable_thinking quantization attention_mode", _LAB_MODE)
                for more in (" min_p top_k_sampling", "")
            )
        ),
        ("image",),
        frames="video",
        names={"top_k": "", "top_k_sampling": "top_k"},
    ),
    # SXQBW's ComfyUI-Qwen-VL and ComfyUI-Qwen.
    "QwenVisionParser": OldNode(
        CAPTION,
        _layouts(
            "model_name quantization prompt max_tokens temperature top_p repetition_penalty "
            "unload_after_generation",
            "model_name quantization prompt max_tokens temperature top_p repetition_penalty",
        ),
        ("image",),
    ),
    "QwenSingleTurnGeneration": OldNode(
        CHAT,
        _layouts(
            "model_name quantization enable_thinking prompt max_new_tokens unload_after_generation"
        ),
    ),
    # xuchenxu168's ComfyUI_Qwen3-VL.
    "Qwen3VLProcessor": OldNode(
        CAPTION,
        _layouts(
            "text_prompt model_name temperature top_p max_new_tokens min_pixels max_pixels "
            "quantization attention_type seed max_image_dimension keep_model_loaded"
        ),
        ("image",),
        video="video",
    ),
}

# Old inputs that mean what an input of ours means: a value, or a link, is taken as it is.
SAME: Mapping[str, str] = {
    "system": "system",
    "system_prompt": "system",
    "custom_system_prompt": "system",
    "text": "prompt",
    "prompt": "prompt",
    "user_prompt": "prompt",
    "text_prompt": "prompt",
    "custom_prompt": "prompt",
    "prompt_text": "prompt",
    "do_sample": "do_sample",
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "min_p": "min_p",
    "repetition_penalty": "repetition_penalty",
    "max_new_tokens": "max_new_tokens",
    "max_tokens": "max_new_tokens",
    "frame_count": "frames",
    "seed": "seed",
    "enable_thinking": "think",
}

# Old inputs that `convert` translates: their values are other words for what an input of ours says.
MODEL_INPUTS = frozenset({"model", "model_name"})
QUANTIZATION_INPUTS = frozenset({"quantization"})
ATTENTION_INPUTS = frozenset({"attention", "attention_mode", "attention_type"})
KEEP_INPUTS = frozenset({"keep_model_loaded"})
UNLOAD_INPUTS = frozenset({"unload_after_generation", "unload_after_run"})
FILE_INPUTS = frozenset({"video_path", "source_path"})
PRESET_INPUTS = frozenset({"preset_prompt"})
STYLE_INPUTS = frozenset({"enhancement_style", "preset_system_prompt"})
# Where each of them goes.
TRANSLATED: Mapping[str, str] = {
    name: place
    for place, names in {
        "model": MODEL_INPUTS,
        "quantization": QUANTIZATION_INPUTS,
        "attention": ATTENTION_INPUTS,
        "keep_loaded": KEEP_INPUTS | UNLOAD_INPUTS,
        "preset": PRESET_INPUTS,
        "system": STYLE_INPUTS,
    }.items()
    for name in names
}

# Old inputs without an equal here, each with the value at which it does nothing worth a word, and
# with what to do instead; a value of None never stands for nothing.
NO_EQUAL: Mapping[str, tuple[Any, str]] = {
    "bypass": (False, "to send the text past the node, connect it past the node"),
    "bypass_mode": (False, "to keep a text, connect a text node in its place"),
    "keep_last_prompt": (False, "to keep a text, connect a text node in its place"),
    "lora_trigger": ("", "put the words in front with a text node"),
    "num_beams": (1, "answers are sampled, without beams"),
    "use_torch_compile": (False, "cache is auto: steps are fast without it"),
    "device": ("auto", "connect a Qwen Engine node and name it there"),
    "min_pixels": (200704, "pictures are as large as the model takes and as fit"),
    "max_pixels": (1003520, "connect a Qwen Engine node and set max_pixels there"),
    "max_image_dimension": (2048, "connect a Qwen Engine node and set max_pixels there"),
    "image_resolution": (
        "medium (512x28x28)",
        "connect a Qwen Engine node and set max_pixels there",
    ),
    "thread_count": ("8", "threads are chosen by what the machine has"),
    "video_path": ("", "load the file with Load Video and connect it to video"),
    "source_path": (None, "load the files with Load Image or Load Video and connect them"),
    "ctx": (8192, "memory is kept for what a request needs; Qwen Engine has max_seq_len"),
    "n_batch": (512, "it is chosen by what the machine has"),
    "gpu_layers": (-1, "all layers run on the GPU"),
    "image_max_tokens": (4096, "connect a Qwen Engine node and set max_pixels there"),
    "pool_size": (4194304, "it has no meaning here"),
    "top_k": (0, "top_k_sampling is the one that is taken"),
    "english_output": (False, "say so in system"),
    "offload_mode": ("Disabled", "the model stays on the GPU; choose fewer bits where it is small"),
    "gpu_memory_limit_gb": (0, "the model stays on the GPU; choose fewer bits where it is small"),
}

# Inputs that are switches or numbers, for telling one layout from another; others hold text.
SWITCHES = (
    KEEP_INPUTS
    | UNLOAD_INPUTS
    | {"bypass", "bypass_mode", "do_sample", "enable_thinking", "english_output"}
    | {"keep_last_prompt", "use_torch_compile"}
)
NUMBERS = frozenset(
    {"temperature", "top_p", "top_k", "top_k_sampling", "min_p", "repetition_penalty"}
    | {"max_new_tokens", "max_tokens", "frame_count", "num_beams", "seed", "min_pixels"}
    | {"max_pixels", "max_image_dimension", "ctx", "n_batch", "gpu_layers", "image_max_tokens"}
    | {"pool_size", "gpu_memory_limit_gb"}
)

# Presets of 1038lab's pack by the letters of their names, as our preset and prompt.
_TAGS, _SHORT, _DETAILED = ("tags", ""), ("short", ""), ("detailed", "")
_ALL_DETAILS = (NO_PRESET, "Describe this image with every detail that can be seen.")
_FILM, _ANALYSIS, _REFINE = ("cinematic", ""), ("analysis", ""), ("prompt-refine", "")
_VIDEO = (NO_PRESET, "Summarize what happens in this video.")
_STORY = (NO_PRESET, "Write a short story that this could be a picture of.")
OLD_PRESETS: Mapping[str, tuple[str, str]] = {
    "tags": _TAGS,
    "simple description": _SHORT,
    "detailed description": _DETAILED,
    "ultra detailed description": _ALL_DETAILS,
    "cinematic description": _FILM,
    "detailed analysis": _ANALYSIS,
    "video summary": _VIDEO,
    "short story": _STORY,
    "prompt refine expand": _REFINE,
    "prompt style tags": _TAGS,
    "prompt style simple": _SHORT,
    "prompt style detailed": _DETAILED,
    "prompt style extreme detailed": _ALL_DETAILS,
    "prompt style cinematic": _FILM,
    "creative detailed analysis": _ANALYSIS,
    "creative summarize video": _VIDEO,
    "creative short story": _STORY,
    "creative refine expand prompt": _REFINE,
}
_WRITER = "Turn the user's text into a prompt for an image generator. Answer with the prompt alone."
# Styles of its prompt enhancers, as our system prompt.
OLD_STYLES: Mapping[str, str] = {
    "enhance": f"{_WRITER} Add light, camera and mood.",
    "refine": f"{_WRITER} Keep its meaning and keep it short.",
    "creative rewrite": f"{_WRITER} Be inventive.",
    "detailed visual": f"{_WRITER} Describe every detail that can be seen.",
    "artistic style": f"{_WRITER} Name the style, the medium and the palette.",
    "technical specs": f"{_WRITER} Name camera, lens, aperture, light and resolution.",
}
# Names of models in old lists that are not the hub's.
OLD_MODELS: Mapping[str, str] = {
    "SkyCaptioner-V1": "Skywork/SkyCaptioner-V1",
    "qwen3-4b-Z-Image-Engineer": "BennyDaBall/qwen3-4b-Z-Image-Engineer",
}
