"""Checks a model folder before anything is loaded: minutes of loading should not end in a surprise.

Reads config.json, the weight index and the headers of the weight files; no tensor data, no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from qwencli.errors import ModelFileError
from qwencli.models.checkpoint import as_stored, check_layout, find_sources, missing_error
from qwencli.models.json_file import read_json_object
from qwencli.models.packing import format_of
from qwencli.models.safetensors_header import StoredTensor, stored_tensors
from qwencli.models.shape_reader import read_shape
from qwencli.models.shapes import ModelShape
from qwencli.models.tensors import HEAD, canonical_tensors, expected_tensors, is_quantizable
from qwencli.models.weights import find_weights

# Each inner tuple is one way to have what is needed; all its files must be there.
_TOKENIZER = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_PROCESSOR = (("preprocessor_config.json",), ("processor_config.json",))


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


def check_folder(folder: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Raise if this folder cannot be loaded as one of our models.

    Pickle weights, when allowed, are only checked for presence: their contents cannot be read
    without running them.

    Returns:
        Contents of config.json, with the head tied as the weights have it.

    Raises:
        ModelFileError: naming the file or tensor at fault; see the tests for each case.
    """
    config = read_config(folder)
    shape = read_shape(config, str(folder / "config.json"))
    weights = find_weights(folder, allow_pickle=allow_pickle)
    if not weights.pickled:
        shape = _check_tensors(folder, config, shape, stored_tensors(weights.files))
    _require(folder, "tokenizer", _TOKENIZER)
    if shape.vision is not None:
        _require(folder, "image processor", _PROCESSOR)
    return {**config, "tie_word_embeddings": shape.text.tied_head}


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
    folder: Path, config: Mapping[str, Any], shape: ModelShape, stored: Mapping[str, StoredTensor]
) -> ModelShape:
    try:
        packed = format_of(config, stored)
    except ModelFileError:
        return _check_unpacked(folder, shape, stored)
    return find_sources(shape, stored, packed, folder).shape


def _check_unpacked(
    folder: Path, shape: ModelShape, stored: Mapping[str, StoredTensor]
) -> ModelShape:
    """Of a scheme that is not read here: the tensors that no scheme packs."""
    check_layout(folder, stored)
    found = canonical_tensors(stored, shape)
    shape = as_stored(shape, found)
    expected = {k: v for k, v in expected_tensors(shape).items() if not is_quantizable(k, v)}
    if any(name.startswith("lm_head.") for name in found):
        expected.pop(HEAD, None)
    missing = [name for name in expected if name not in found]
    if missing:
        raise missing_error(folder, missing)
    return shape


def _require(folder: Path, what: str, ways: Iterable[tuple[str, ...]]) -> None:
    if not any(all((folder / name).is_file() for name in way) for way in ways):
        names = " or ".join(" and ".join(way) for way in ways)
        raise ModelFileError(
            f"{folder}: no {what} ({names})", "copy these files from the original model"
        )
