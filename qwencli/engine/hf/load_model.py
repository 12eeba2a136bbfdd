"""Loads a model through transformers: the only `from_pretrained` call of the project.

Knows the Qwen families that transformers can build, by `model_type` of config.json. For
`--load-format dummy` each random tensor is made when the loader asks for it, on the device it will
live on, so a dummy load holds no second copy. The draw depends on the tensor's name alone: the same
model every time.
"""

from __future__ import annotations

import copy
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from qwencli.config import (
    Attention,
    Cache,
    DType,
    EngineConfig,
    EngineName,
    LoadFormat,
    Quantization,
)
from qwencli.engine.device_memory import is_out_of_memory
from qwencli.engine.frontend.model_files import ModelFiles
from qwencli.engine.hf.generate import NO_OVERRIDES, Overrides
from qwencli.engine.hf.quantization import quantization_config, scheme_of, unfit_for_cpu
from qwencli.engine.loading.reader import check_stored_scales
from qwencli.engine.resolve import (
    check_modes,
    device_lacks,
    resolve_attention,
    resolve_device,
    resolve_dtype,
)
from qwencli.errors import ModelFileError, UnsupportedModeError
from qwencli.models.checkpoint import check_layout, extra_error, is_idle, missing_error
from qwencli.models.quant_formats import (
    UNPACKED,
    PackedFormat,
    format_of,
    quantization_section,
    scheme_named_by,
)
from qwencli.models.shape_reader import read_shape, stored_dtype
from qwencli.models.tensors import renamings
from qwencli.models.weight_files import StoredTensor, all_named, find_weights, some, stored_tensors


@dataclass(frozen=True)
class Family:
    """`model_class` and `config_class` are names in the transformers package."""

    model_class: str
    config_class: str


FAMILIES = {
    "qwen3_5": Family("Qwen3_5ForConditionalGeneration", "Qwen3_5Config"),
    "qwen3_vl": Family("Qwen3VLForConditionalGeneration", "Qwen3VLConfig"),
    "qwen3_vl_moe": Family("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig"),
    "qwen3_5_moe": Family("Qwen3_5MoeForConditionalGeneration", "Qwen3_5MoeConfig"),
    "qwen2_5_vl": Family("Qwen2_5_VLForConditionalGeneration", "Qwen2_5_VLConfig"),
    "qwen2_vl": Family("Qwen2VLForConditionalGeneration", "Qwen2VLConfig"),
    "qwen3": Family("Qwen3ForCausalLM", "Qwen3Config"),
    "qwen3_moe": Family("Qwen3MoeForCausalLM", "Qwen3MoeConfig"),
    "qwen2": Family("Qwen2ForCausalLM", "Qwen2Config"),
}


def family_of(model_type: str) -> Family:
    """Raises ModelFileError for a `model_type` outside the table."""
    try:
        return FAMILIES[model_type]
    except KeyError:
        raise ModelFileError(
            f"model_type {model_type!r} is not a Qwen model this version knows",
            f"known: {', '.join(sorted(FAMILIES))}",
        ) from None


def skeleton(model_class: Any, config: Any) -> Any:
    """The model without its weights, to look at its modules and shapes."""
    import torch

    with torch.device("meta"):
        return model_class(config)


def build_config(hub_config: Mapping[str, Any]) -> Any:
    """The transformers configuration object for the contents of a config.json."""
    import transformers

    family = family_of(hub_config["model_type"])
    try:
        return getattr(transformers, family.config_class).from_dict(copy.deepcopy(dict(hub_config)))
    # Its checks raise what they like, and what has no check raises what happens to come of it.
    except Exception as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise ModelFileError(
            f"config.json cannot be read by transformers: {' '.join(lines)[:300]}",
            "download the model's files again",
        ) from error


INITIALIZER_RANGE = 0.02


class LazyRandomTensor:
    """Stands where the loader expects a safetensors slice: indexing it makes the tensor."""

    def __init__(
        self, name: str, shape: torch.Size, dtype: torch.dtype, device: torch.device
    ) -> None:
        self.name, self.shape, self.dtype, self.device = name, shape, dtype, device

    def __getitem__(self, _: Any) -> torch.Tensor:
        if _is_norm_weight(self.name, self.shape):
            return torch.ones(self.shape, dtype=self.dtype, device=self.device)
        if self.name.endswith("bias"):
            return torch.zeros(self.shape, dtype=self.dtype, device=self.device)
        generator = torch.Generator(self.device).manual_seed(zlib.crc32(self.name.encode()))
        tensor = torch.empty(self.shape, dtype=self.dtype, device=self.device)
        return tensor.normal_(0.0, INITIALIZER_RANGE, generator=generator)

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def is_floating_point(self) -> bool:
        return self.dtype.is_floating_point


def _is_norm_weight(name: str, shape: torch.Size) -> bool:
    return len(shape) == 1 and name.endswith("weight")


def random_state_dict(
    model_class: Any, config: Any, dtype: torch.dtype, device: torch.device
) -> dict[str, LazyRandomTensor]:
    """Lazy random tensors for every weight of `model_class(config)`, tied ones once."""
    # named_parameters lists a tied weight once and leaves out computed buffers.
    return {
        name: LazyRandomTensor(name, parameter.shape, dtype, device)
        for name, parameter in skeleton(model_class, config).named_parameters()
    }


@dataclass(frozen=True)
class LoadPlan:
    """Everything the load needs, with no `auto` left.

    `folder` is None for a dummy load of a model whose files are not on this machine.
    """

    hub_config: Mapping[str, Any]
    folder: Path | None
    device: str
    dtype: DType
    attention: Attention


def plan_load(config: EngineConfig, files: ModelFiles) -> LoadPlan:
    """Make device, dtype and attention concrete. Raises as `qwencli.engine.resolve` does."""
    device = resolve_device(config.device)
    check_modes(config, EngineName.TRANSFORMERS, device_lacks(device))
    dtype = resolve_dtype(config.dtype, device, stored_dtype(files.hub_config))
    return LoadPlan(
        hub_config=files.hub_config,
        folder=files.folder,
        device=device,
        dtype=dtype,
        attention=resolve_attention(
            config.attention,
            EngineName.TRANSFORMERS,
            read_shape(files.hub_config),
            dtype,
            device,
        ),
    )


def load_model(config: EngineConfig, plan: LoadPlan, overrides: Overrides = NO_OVERRIDES) -> Any:
    """Weights straight onto the device in their final dtype, ready for `generate`.

    Raises:
        UnsupportedModeError, MissingDependencyError: the mode cannot run here.
        ModelFileError: transformers could not make sense of the files.
    """
    import transformers

    # Our own lines say what matters; progress bars and notices of a library are noise in a pipe.
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    family = family_of(plan.hub_config["model_type"])
    model_class = getattr(transformers, family.model_class)
    torch_dtype = getattr(torch, plan.dtype.value)
    keywords: dict[str, Any] = {
        "dtype": torch_dtype,
        "attn_implementation": plan.attention.value,
        # An explicit map sends each tensor to its device as it is read; "auto" would add hooks
        # to every module even when one GPU holds it all.
        "device_map": {"": plan.device},
        "quantization_config": quantization_config(
            config.quantization,
            torch_dtype,
            _kept_modules(config, plan, model_class),
            overrides.quantization,
        ),
        **overrides.load,
    }
    if overrides.through_host:
        keywords |= {"dtype": torch.float32, "device_map": {"": "cpu"}}
    if config.load_format is not LoadFormat.DUMMY and plan.folder is not None:
        _check_scheme(plan.folder, plan.hub_config)
    try:
        keywords["config"] = build_config(plan.hub_config)
        if config.load_format is LoadFormat.DUMMY:
            keywords["state_dict"] = random_state_dict(
                model_class, keywords["config"], torch_dtype, torch.device(plan.device)
            )
            source = None
        else:
            keywords["local_files_only"] = True
            keywords["use_safetensors"] = None if config.allow_pickle else True
            keywords["key_mapping"] = renamings(read_shape(plan.hub_config))
            # It would raise without naming the tensors; `_check_loaded` names them.
            keywords["ignore_mismatched_sizes"] = True
            source = plan.folder
        model, loaded = model_class.from_pretrained(source, output_loading_info=True, **keywords)
    except (OSError, RuntimeError, ValueError, KeyError, TypeError, ImportError) as error:
        if is_out_of_memory(error):
            raise
        raise _load_error(config, plan, error) from error
    if source is not None:
        _check_loaded(source, loaded)
    if overrides.through_host:
        model = model.to(plan.device, torch_dtype)
    # generate() fills what a request leaves out from here; every request states all it wants.
    model.generation_config = transformers.GenerationConfig()
    return model.eval()


def _kept_modules(config: EngineConfig, plan: LoadPlan, model_class: Any) -> list[str] | None:
    if config.quantization is not Quantization.INT4 or plan.device != "cpu":
        return None
    return unfit_for_cpu(skeleton(model_class, build_config(plan.hub_config)))


def _check_scheme(folder: Path, hub_config: Mapping[str, Any]) -> None:
    """Raise ModelFileError where transformers would read packed weights as if they were plain."""
    weights = find_weights(folder, allow_pickle=True)
    if weights.pickled:
        _check_pickles(weights.files)
    section = quantization_section(hub_config)
    if weights.pickled:
        return
    stored = stored_tensors(weights.files)
    form = _native_format(hub_config, stored)
    if section and _is_known(section):
        if form is not None:
            check_stored_scales(stored, form)
        return
    packed = [name for name, tensor in stored.items() if tensor.dtype not in UNPACKED]
    packed = [name for name in packed if not is_idle(name)]
    if packed:
        method = f"quant_method {section.get('quant_method')!r}, " if section else ""
        scheme = scheme_named_by(stored) or "no scales"
        raise ModelFileError(
            f"{folder}: {method}{scheme}: transformers does not know how to read "
            f"{all_named(packed)}",
            "use --engine native, which reads them"
            if form is not None
            else "use another version of the model",
        )


def _check_pickles(files: Iterable[Path]) -> None:
    """Raise ModelFileError for a pickle that is no checkpoint: no mapping of names to tensors.

    Only tensors are unpickled, here and by transformers: what a file would run is refused.
    """
    for path in files:
        try:
            kept = torch.load(path, "meta", weights_only=True, mmap=zipfile.is_zipfile(path))
        except MemoryError:
            raise
        except Exception as error:
            runs = re.search("Unsupported (global|class)", str(error))
            why = "it holds more than tensors" if runs else "it is damaged"
            raise ModelFileError(
                f"{path} is not a checkpoint: {why} ({type(error).__name__})",
                "use a safetensors version of the model",
            ) from error
        if not isinstance(kept, Mapping) or not kept:
            raise ModelFileError(
                f"{path} is not a checkpoint: it holds {type(kept).__name__}, not tensors by name",
                "use a safetensors version of the model",
            )
        other = [name for name, value in kept.items() if not isinstance(value, torch.Tensor)]
        if other or not all(isinstance(name, str) for name in kept):
            raise ModelFileError(
                f"{path} is not a checkpoint: {some([str(name) for name in other or kept])} "
                "are no tensors by name",
                "save the model's state_dict alone, or use a safetensors version of the model",
            )


def _native_format(
    hub_config: Mapping[str, Any], stored: Mapping[str, StoredTensor]
) -> PackedFormat | None:
    """How the native engine reads these weights; None where it does not, or they are plain."""
    try:
        return format_of(hub_config, stored)
    except ModelFileError:
        return None


def _is_known(section: Mapping[str, Any]) -> bool:
    from transformers.quantizers.auto import AutoHfQuantizer

    try:
        return bool(AutoHfQuantizer.supports_quant_method(dict(section)))
    except (ValueError, TypeError):
        return False  # no method, or one that is no name


def _check_loaded(folder: Path, info: Mapping[str, Any]) -> None:
    """Raise ModelFileError where not every tensor went where it belongs.

    Args:
        info: what `from_pretrained` says it could not place.
    """
    misfits = sorted(info["mismatched_keys"])
    if misfits:
        shown = [f"{name} is {list(is_)}, not {list(wanted)}" for name, is_, wanted in misfits]
        raise ModelFileError(
            f"{folder}: {len(misfits)} of the tensors have the wrong shape: {some(shown, '; ')}",
            "config.json and the weights are of different models; download both again",
        )
    extra = sorted(name for name in info["unexpected_keys"] if not is_idle(name))
    check_layout(folder, extra)
    if info["missing_keys"]:
        raise missing_error(folder, sorted(info["missing_keys"]), extra)
    if extra:
        raise extra_error(folder, extra)


def _load_error(config: EngineConfig, plan: LoadPlan, error: Exception) -> ModelFileError:
    detail = (str(error).strip() or type(error).__name__).splitlines()[0]
    where = plan.folder or config.model.name
    return ModelFileError(
        f"{where}: transformers cannot load this model: {detail}",
        "install the package it asks for, or use another version of the model"
        if isinstance(error, ImportError)
        else "check the folder's config.json and weights, or download the model again",
    )


def effective_attention(model: Any) -> str:
    """The attention implementation of the loaded model, its text and vision parts included.

    The parts are named one by one where they differ, e.g. "sdpa+eager".
    """
    parts = [model.config]
    for name in ("text_config", "vision_config"):
        part = getattr(model.config, name, None)
        if part is not None:
            parts.append(part)
    found = [getattr(part, "_attn_implementation", None) for part in parts]
    return "+".join(dict.fromkeys(name for name in found if name))


def effective_dtype(model: Any) -> str:
    """The dtype of the token embedding, which no quantization scheme touches."""
    return str(model.get_input_embeddings().weight.dtype).removeprefix("torch.")


def check_effective(config: EngineConfig, plan: LoadPlan, model: Any) -> None:
    """Raise UnsupportedModeError where the loaded model is not what was asked for."""
    attention = effective_attention(model)
    if attention != plan.attention.value:
        raise UnsupportedModeError(
            f"--attention {plan.attention.value}: the loaded model runs {attention} instead",
            nearest=attention,
        )
    quantizer = getattr(model, "hf_quantizer", None)
    if config.cache is Cache.STATIC_COMPILE and quantizer and not quantizer.is_compileable:
        raise UnsupportedModeError(
            f"--cache {config.cache}: transformers does not compile {scheme_of(model)} models",
            nearest=Cache.STATIC.value,
        )
    asked, scheme = config.quantization.value, scheme_of(model)
    if asked != "none" and scheme == "none":
        raise UnsupportedModeError(
            f"--quantization {asked}: the loaded model has no quantized layer", nearest="none"
        )
