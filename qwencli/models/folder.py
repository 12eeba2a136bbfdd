"""Checks a model folder before anything is loaded: minutes of loading should not end in a surprise.

Reads config.json, the weight index and the headers of the weight files; no tensor data, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwencli.errors import ModelFileError
from qwencli.models.json_file import read_json_object
from qwencli.models.safetensors_header import StoredTensor, stored_tensors
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import canonical_name, expected_tensors, is_quantizable
from qwencli.models.weights import all_named, find_weights, some

# Each inner tuple is one way to have what is needed; all its files must be there.
_TOKENIZER = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_PROCESSOR = (("preprocessor_config.json",), ("processor_config.json",))
_FLOATS = ("BF16", "F16", "F32")


def read_config(folder: Path) -> dict[str, Any]:
    """Contents of a folder's config.json.

    Raises:
        ModelFileError: no such folder or file, or not a JSON object.
    """
    if not folder.is_dir():
        raise ModelFileError(f"{folder}: no such folder", "check the path")
    path = folder / "config.json"
    if not path.is_file():
        raise ModelFileError(
            f"{folder}: no config.json", "give the folder that holds config.json and the weights"
        )
    return read_json_object(path)


def check_folder(folder: Path, *, allow_pickle: bool = False) -> None:
    """Raise if this folder cannot be loaded as one of our models.

    Pickle weights, when allowed, are only checked for presence: their contents cannot be read
    without running them.

    Raises:
        ModelFileError: naming the file or tensor at fault; see the tests for each case.
    """
    config = read_config(folder)
    shape = read_shape(config, str(folder / "config.json"))
    weights = find_weights(folder, allow_pickle=allow_pickle)
    if not weights.pickled:
        found = stored_tensors(weights.files)
        stored = {canonical_name(name, shape): tensor for name, tensor in found.items()}
        _check_tensors(folder, shape, stored, quantized="quantization_config" in config)
    _require(folder, "tokenizer", _TOKENIZER)
    if shape.vision is not None:
        _require(folder, "image processor", _PROCESSOR)


def is_complete(folder: Path, *, allow_pickle: bool = False) -> bool:
    """Whether every file is there that loading needs, judged by names alone (fast).

    An interrupted download fails this: files appear under their own name only when finished.
    """
    try:
        vision = read_shape(read_config(folder)).vision
        find_weights(folder, allow_pickle=allow_pickle)
        _require(folder, "tokenizer", _TOKENIZER)
        if vision is not None:
            _require(folder, "image processor", _PROCESSOR)
    except ModelFileError:
        return False
    return True


def _check_tensors(
    folder: Path, shape: ModelShape, stored: Mapping[str, StoredTensor], *, quantized: bool
) -> None:
    expected = expected_tensors(shape)
    if quantized:
        # Quantized linear layers are packed under names of their scheme; the rest is as usual.
        expected = {k: v for k, v in expected.items() if not is_quantizable(k, v)}
        if any(name.startswith("lm_head.") for name in stored):
            expected.pop("lm_head.weight", None)
    wrong = [
        f"{name} is {_dims(stored[name].shape)}, config.json asks for {_dims(size)}"
        for name, size in expected.items()
        if name in stored and stored[name].dtype in _FLOATS and stored[name].shape != size
    ]
    if wrong:
        raise ModelFileError(
            f"{folder}: {_count(wrong, 'tensor')} of the wrong shape: {some(wrong, '; ')}",
            "config.json and the weights are of different models; download both again",
        )
    missing = [name for name in expected if name not in stored]
    if missing:
        raise ModelFileError(
            f"{folder}: {_count(missing, 'tensor')} missing from the weights: {all_named(missing)}",
            "the weights are incomplete or of another model; download the model again",
        )


def _require(folder: Path, what: str, ways: Iterable[tuple[str, ...]]) -> None:
    if not any(all((folder / name).is_file() for name in way) for way in ways):
        names = " or ".join(" and ".join(way) for way in ways)
        raise ModelFileError(
            f"{folder}: no {what} ({names})", "copy these files from the original model"
        )


def _dims(shape: tuple[int, ...]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


def _count(items: list[str], noun: str) -> str:
    return f"{len(items)} {noun}" + ("s" if len(items) > 1 else "")
