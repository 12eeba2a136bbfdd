"""Checks a model folder before anything is loaded: minutes of loading should not end in a surprise.

Reads config.json, the weight index and the headers of the weight files; no tensor data, no torch.
What reads tensors is imported where it is used: a caption by a model that is kept loaded needs
config.json alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qwencli.errors import ModelFileError
from qwencli.models.config_values import read_json_object

if TYPE_CHECKING:
    from qwencli.models.shapes import ModelShape
    from qwencli.models.weight_files import StoredTensor

# Each inner tuple is one way to have what is needed; all its files must be there.
_TOKENIZER = (("tokenizer.json",), ("vocab.json", "merges.txt"))
_GIVE_FOLDER = "give the folder that holds config.json and the weights"
_ORIGINAL = "give the folder or hub id of the original model, with safetensors weights"
_MERGE = "merge it into its model first (PEFT: merge_and_unload, save_pretrained), and give that"
# By the ending of a file that was given as a model: what it is, and what to do.
_FILES: Mapping[str, tuple[str, str]] = {
    ".gguf": ("a GGUF file", _ORIGINAL),
    ".npz": ("a file of MLX weights", _ORIGINAL),
    ".safetensors": ("a file of weights alone", _GIVE_FOLDER),
    ".bin": ("a file of weights alone", _GIVE_FOLDER),
    ".pt": ("a file of weights alone", _GIVE_FOLDER),
    ".pth": ("a file of weights alone", _GIVE_FOLDER),
    ".ckpt": ("a file of weights alone", _GIVE_FOLDER),
}
_POINTER, _POINTER_BYTES = b"version https://git-lfs.github.com/spec/", 1024
_MODEL_SUFFIXES = (".json", ".safetensors", ".bin", ".txt", ".jinja")
_PROCESSOR = (("preprocessor_config.json",), ("processor_config.json",))


def read_config(folder: Path) -> dict[str, Any]:
    """Contents of a folder's config.json.

    Raises:
        ModelFileError: no such folder or file, or not a JSON object; where what is there is known
            for something else, the message says what it is.
    """
    try:
        if not folder.exists():
            raise ModelFileError(f"{folder}: no such folder", "check the path")
        if not folder.is_dir():
            raise _not_a_folder(folder)
        _check_pointers(folder)
        _check_links(folder)
        path = folder / "config.json"
        if not path.is_file():
            raise _something_else(folder) or ModelFileError(
                f"{folder}: no config.json", _GIVE_FOLDER
            )
    except OSError as error:
        raise ModelFileError(
            f"{folder}: cannot be read ({error.strerror or error})",
            "check the permissions of this folder and of those above it",
        ) from error
    return read_json_object(path)


def _not_a_folder(path: Path) -> ModelFileError:
    what, todo = _FILES.get(path.suffix.lower(), ("a file", _GIVE_FOLDER))
    return ModelFileError(f"{path}: is {what}, not a model folder", todo)


def _check_links(folder: Path) -> None:
    """Raise where files of the model are links to nothing, as in a cache that was cleaned."""
    broken = [
        path.name
        for path in sorted(folder.iterdir())
        if path.suffix in _MODEL_SUFFIXES and path.is_symlink() and not path.exists()
    ]
    if broken:
        from qwencli.models.weight_files import some

        raise ModelFileError(
            f"{folder}: links to files that are not there: {some(broken)}",
            "download the model again, or copy the files themselves",
        )


def _check_pointers(folder: Path) -> None:
    """Raise where `git clone` without Git LFS left pointers in the place of files."""
    pointers = []
    for path in sorted(folder.iterdir()):
        if path.is_file() and path.stat().st_size < _POINTER_BYTES:
            with path.open("rb") as file:
                if file.read(len(_POINTER)) == _POINTER:
                    pointers.append(path.name)
    if pointers:
        from qwencli.models.weight_files import some

        raise ModelFileError(
            f"{folder}: Git LFS pointers instead of the files themselves: {some(pointers)}",
            f"run `git lfs pull` in {folder}",
        )


def _something_else(folder: Path) -> ModelFileError | None:
    """What a folder without a model's configuration or weights holds, where that is known."""
    names = {path.name for path in folder.iterdir()}
    if "adapter_config.json" in names:
        base = read_json_object(folder / "adapter_config.json").get("base_model_name_or_path")
        of = f" for {base!r:.80}" if base else ""
        return ModelFileError(f"{folder}: is a LoRA adapter{of}, not a whole model", _MERGE)
    if any(name.lower().endswith(".gguf") for name in names):
        return ModelFileError(f"{folder}: holds a model as GGUF", _FILES[".gguf"][1])
    if any(name.lower().endswith(".npz") for name in names):
        return ModelFileError(f"{folder}: holds a model for MLX", _ORIGINAL)
    if "model_index.json" in names:
        return ModelFileError(
            f"{folder}: is a diffusers pipeline, not a language model", _GIVE_FOLDER
        )
    if {"snapshots", "blobs"} <= names:
        repo_id = folder.name.removeprefix("models--").replace("--", "/", 1)
        return ModelFileError(f"{folder}: is a folder of the hub cache", f"use --model {repo_id}")
    inside = sorted(name for name in names if (folder / name / "config.json").is_file())
    if inside:
        from qwencli.models.weight_files import some

        return ModelFileError(
            f"{folder}: no config.json, but in the folders within it: {some(inside)}",
            f"give one of those, such as {folder / inside[-1]}",
        )
    return None


def _check_mlx(folder: Path, config: Mapping[str, Any]) -> None:
    """Raise for weights that MLX quantized: a layout of its own, which only MLX reads."""
    stated = config.get("quantization")
    if isinstance(stated, Mapping) and "quant_method" not in (
        config.get("quantization_config") or {}
    ):
        bits = f" with {stated['bits']} bits" if isinstance(stated.get("bits"), int) else ""
        raise ModelFileError(f"{folder}: is a model quantized for MLX{bits}", _ORIGINAL)


def check_folder(folder: Path, *, allow_pickle: bool = False) -> dict[str, Any]:
    """Raise if this folder cannot be loaded as one of our models.

    Pickle weights, when allowed, are only checked for presence: their contents cannot be read
    without running them.

    Returns:
        Contents of config.json, with the head tied as the weights have it.

    Raises:
        ModelFileError: naming the file or tensor at fault; see the tests for each case.
    """
    from qwencli.models.shape_reader import read_shape
    from qwencli.models.weight_files import find_weights, stored_tensors

    config = read_config(folder)
    shape = read_shape(config, str(folder / "config.json"))
    _check_mlx(folder, config)
    try:
        weights = find_weights(folder, allow_pickle=allow_pickle)
    except ModelFileError as error:
        raise _something_else(folder) or error from error
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
    from qwencli.models.shape_reader import read_shape
    from qwencli.models.weight_files import find_weights

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
    from qwencli.models.checkpoint import find_sources
    from qwencli.models.quant_formats import format_of

    try:
        packed = format_of(config, stored)
    except ModelFileError:
        return _check_unpacked(folder, shape, stored)
    return find_sources(shape, stored, packed, folder).shape


def _check_unpacked(
    folder: Path, shape: ModelShape, stored: Mapping[str, StoredTensor]
) -> ModelShape:
    """Check a checkpoint of a scheme that is not read here: the tensors that no scheme packs."""
    from qwencli.models.checkpoint import as_stored, check_layout, missing_error
    from qwencli.models.tensors import HEAD, canonical_tensors, expected_tensors, is_quantizable

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
