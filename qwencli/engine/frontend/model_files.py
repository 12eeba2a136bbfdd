"""Opens a model's files once for an engine: configuration, prompt builder, generation defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from qwencli.config import DType, EngineConfig, LoadFormat
from qwencli.engine.frontend.detokenizer import IncrementalDetokenizer
from qwencli.engine.frontend.processor_config import VISION_FAMILIES, ImageProcessorConfig
from qwencli.engine.frontend.prompt import PromptBuilder
from qwencli.engine.frontend.tokenizer import Tokenizer
from qwencli.errors import ModelFileError
from qwencli.models.builtin import bundled_folder
from qwencli.models.config_values import read_json_object
from qwencli.models.folder import check_folder
from qwencli.models.resolve import dummy_config, locate
from qwencli.models.shape_reader import read_shape, stored_dtype
from qwencli.models.shapes import ModelShape, VisionShape
from qwencli.models.weight_files import StoredTensor, find_weights, stored_tensors

# What Qwen's tokenizers end a turn with, and pad with.
END_OF_TURN, PAD = "<|im_end|>", "<|endoftext|>"
# What engines keep room for: the tokens that end an answer (Qwen's models have two), and one that
# ends its thoughts.
MAX_STOP_TOKENS = 8


@dataclass(frozen=True)
class ModelFiles:
    """Everything about a model that an engine needs besides its weights.

    Args:
        folder: None for a dummy load, which reads no weights.
        generation_defaults: the model's generation_config.json, {} without one.
        max_seq_len: longest sequence the model was made for, in tokens.
        vocab_size: rows of the output head.
    """

    folder: Path | None
    hub_config: Mapping[str, Any]
    prompts: PromptBuilder
    generation_defaults: Mapping[str, Any]
    stop_token_ids: tuple[int, ...]
    pad_token_id: int
    max_seq_len: int
    vocab_size: int

    def prepared_on(self, device: str, dtype: DType) -> ModelFiles:
        """The same, preparing pictures on `device` in a concrete `dtype` where that is a GPU."""
        if not device.startswith("cuda"):
            return self
        from qwencli.engine.frontend.device_patches import DevicePatches

        return replace(self, prompts=replace(self.prompts, patchify=DevicePatches(device, dtype)))

    def detokenizer(self) -> IncrementalDetokenizer:
        return IncrementalDetokenizer(self.prompts.tokenizer)


@dataclass(frozen=True)
class FoundModel:
    """A model's folder, checked, and what its configuration says. Its tokenizer, which takes longer
    to read than all of that, is read by `open`.

    Args:
        folder: None for a dummy load.
        processor: how the model wants pictures; None for a text model.
    """

    folder: Path | None
    hub_config: Mapping[str, Any]
    shape: ModelShape
    processor: ImageProcessorConfig | None

    @property
    def checkpoint_dtype(self) -> str | None:
        """The dtype that config.json states."""
        return stored_dtype(self.hub_config)

    @property
    def max_seq_len(self) -> int:
        """Longest sequence the model was made for, in tokens."""
        return self.shape.text.max_position_embeddings

    @property
    def max_pixels(self) -> int:
        """Height x width of a picture at most; 0 for a text model."""
        return 0 if self.processor is None else self.processor.max_pixels

    @cached_property
    def stored(self) -> Mapping[str, StoredTensor]:
        """The tensors in the folder's safetensors files; none for a dummy load."""
        return {} if self.folder is None else stored_tensors(find_weights(self.folder).files)

    def open(self) -> ModelFiles:
        """Read the tokenizer, the chat template and the generation defaults.

        Raises:
            ModelFileError: they are missing or broken, or belong to another model.
        """
        if self.folder is None:  # the text side of the bundled model
            prompts = PromptBuilder.dummy(bundled_folder(), self.processor, self.hub_config)
            return self._files(prompts, {})
        prompts = PromptBuilder.from_folder(self.folder, self.processor)
        if self.shape.vision is not None:
            _check_token_ids(self.folder, prompts.tokenizer, self.shape)
        generation = self.folder / "generation_config.json"
        defaults = read_json_object(generation) if generation.is_file() else {}
        return self._files(prompts, defaults)

    def _files(self, prompts: PromptBuilder, defaults: Mapping[str, Any]) -> ModelFiles:
        pads = _token_ids(defaults, "pad_token_id", self.folder)
        vocab_size = self.shape.text.vocab_size
        return ModelFiles(
            folder=self.folder,
            hub_config=self.hub_config,
            prompts=prompts,
            generation_defaults=defaults,
            stop_token_ids=_stop_ids(self.folder, self.hub_config, prompts, defaults, vocab_size),
            pad_token_id=pads[0] if pads else prompts.tokenizer.token_id(PAD),
            max_seq_len=self.max_seq_len,
            vocab_size=vocab_size,
        )


def find_model(config: EngineConfig) -> FoundModel:
    """Find the model and check its folder; downloads what is missing where that is allowed.

    Raises:
        ModelFileError, DownloadError: the files are not usable, or not to be had.
        UsageError: bounds that no picture can meet.
    """
    bounds = config.min_pixels, config.max_pixels
    if config.load_format is LoadFormat.DUMMY:  # weights and pictures as in the model named
        hub_config = dummy_config(config.model)
        processor = None
        if (family := hub_config["model_type"]) in VISION_FAMILIES:
            processor = ImageProcessorConfig.for_family(family).with_pixels(*bounds)
        return FoundModel(None, hub_config, read_shape(hub_config), processor)
    folder = locate(config.model, offline=config.offline, allow_pickle=config.allow_pickle)
    hub_config = check_folder(folder, allow_pickle=config.allow_pickle)
    shape = read_shape(hub_config, str(folder / "config.json"))
    processor = None
    if shape.model_type in VISION_FAMILIES:
        processor = ImageProcessorConfig.from_files(folder, shape.model_type).with_pixels(*bounds)
    _check_patches(folder, processor, shape.vision)
    return FoundModel(folder, hub_config, shape, processor)


def open_model(config: EngineConfig) -> ModelFiles:
    """Everything but the weights: `find_model` and `FoundModel.open`."""
    return find_model(config).open()


def _check_patches(
    folder: Path, processor: ImageProcessorConfig | None, tower: VisionShape | None
) -> None:
    """Raise ModelFileError where pictures are cut into other patches than the model takes."""
    if processor is None or tower is None:
        return
    for key, cut, taken in (
        ("patch_size", processor.patch_size, tower.patch_size),
        ("temporal_patch_size", processor.temporal_patch_size, tower.temporal_patch_size),
        ("merge_size", processor.merge_size, tower.merge_size),
    ):
        if cut != taken:
            raise ModelFileError(
                f"{folder}: {key} is {cut} in preprocessor_config.json and {taken} in config.json",
                "download the model's files again",
            )


def _check_token_ids(folder: Path, tokenizer: Tokenizer, shape: ModelShape) -> None:
    """Raise ModelFileError where the model looks for pictures at other tokens than the prompt's."""
    for key, token, wanted in (
        ("image_token_id", "<|image_pad|>", shape.image_token_id),
        ("video_token_id", "<|video_pad|>", shape.video_token_id),
    ):
        if tokenizer.token_id(token) != wanted:
            raise ModelFileError(
                f"{folder}: {key} is {wanted} in config.json, "
                f"the tokenizer has {tokenizer.token_id(token)} for {token}",
                "download the model's files again",
            )


def _stop_ids(
    folder: Path | None,
    hub_config: Mapping[str, Any],
    prompts: PromptBuilder,
    defaults: Mapping[str, Any],
    vocab_size: int,
) -> tuple[int, ...]:
    """What generation_config.json names, else config.json; and what ends a turn in any case.

    Files of base models and of many fine-tunes name only the end of a text; an answer would run
    on into turns of its own invention.

    Raises:
        ModelFileError: there are none, or too many.
    """
    named = _token_ids(defaults, "eos_token_id", folder)
    if not named and folder is not None:  # the ids of a dummy load are another vocabulary's
        for part in (hub_config, _text_config(hub_config)):
            named = named or _token_ids(part, "eos_token_id", folder, "config.json")
    # A model never answers with an id that it has no row for.
    stop_ids = dict.fromkeys(id_ for id_ in (*named, *prompts.turn_end_ids()) if id_ < vocab_size)
    if not stop_ids or prompts.tokenizer.has_token(END_OF_TURN):
        stop_ids[prompts.tokenizer.token_id(END_OF_TURN)] = None
    if len(stop_ids) >= MAX_STOP_TOKENS:
        raise ModelFileError(
            f"{folder}: {len(stop_ids)} tokens would end an answer, those of eos_token_id in "
            "generation_config.json and the chat template's end of a turn",
            f"at most {MAX_STOP_TOKENS - 1} can be used; shorten eos_token_id",
        )
    return tuple(stop_ids)


def _token_ids(
    defaults: Mapping[str, Any],
    key: str,
    folder: Path | None,
    file: str = "generation_config.json",
) -> tuple[int, ...]:
    """One id or a list of them; none where the key is left out or null.

    Raises:
        ModelFileError: anything else.
    """
    value = defaults.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    # `type`, not isinstance: true and false are no ids. The bound is that of the tokenizers.
    if not all(type(each) is int and 0 <= each < 2**32 for each in ids):
        raise ModelFileError(
            f"{folder}: {file}: {key} is no token id and no list of them",
            "give whole numbers from 0 up, as in the tokenizer's files",
        )
    return tuple(ids)


def _text_config(hub_config: Mapping[str, Any]) -> Mapping[str, Any]:
    text: Mapping[str, Any] = hub_config.get("text_config") or hub_config
    return text
