"""Finds the files with a model's weights, and reads the headers of safetensors files.

Never reads a weight: the data goes later straight to where it belongs (`engine.loading.weights`);
a memory map would count every weight twice in the process's resident memory.

Which files: the order of transformers' `from_pretrained`: one safetensors file, a sharded index,
then pickle files, which are only accepted when asked for because loading one can run code.

The format (github.com/huggingface/safetensors, "Format"): 8 bytes little-endian header length,
that many bytes of JSON {name: {dtype, shape, data_offsets}}, then the data. Offsets count from
the end of the header, cover the data without holes and end where the file ends.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from qwencli.errors import ModelFileError
from qwencli.models.config_values import read_json_object

_DTYPE_BITS: Mapping[str, int] = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16, "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8, "F8_E4M3": 8, "F8_E5M2": 8,
    "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
    "C64": 64,
}  # fmt: skip
# The reference implementation refuses longer headers.
_MAX_HEADER_BYTES = 100_000_000


@dataclass(frozen=True)
class TensorInfo:
    """One tensor: dtype as the format names it ("BF16"), shape, size in bytes, and the place of its
    first byte, counted from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int


@dataclass(frozen=True)
class SafetensorsHeader:
    """What a file holds. `data_bytes` is the size of all tensors, `file_bytes` of the file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]
    data_bytes: int
    file_bytes: int

    @property
    def data_start(self) -> int:
        """Place in the file where the tensors' bytes begin."""
        return self.file_bytes - self.data_bytes

    @property
    def num_parameters(self) -> int:
        """Elements of all tensors; for packed (quantized) tensors, elements as stored."""
        return sum(prod(tensor.shape) for tensor in self.tensors.values())


@dataclass(frozen=True)
class StoredTensor:
    """One tensor of a checkpoint and where it lies: `start` is its first byte in `file`."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    start: int

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * _DTYPE_BITS[self.dtype] // 8


def stored_tensors(files: Iterable[Path]) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint's safetensors files, by name.

    Raises:
        ModelFileError: see `read_header`; also for a tensor that stands in two of the files.
    """
    found: dict[str, StoredTensor] = {}
    for file in files:
        header = read_header(file)
        for name, info in header.tensors.items():
            if name in found:
                # Which of them is meant nobody can tell: shards of two savings, most likely.
                raise ModelFileError(
                    f"{file.parent}: tensor {name!r:.200} stands in both {found[name].file.name} "
                    f"and {file.name}",
                    "the weight files are of different savings of the model; download them again",
                )
            start = header.data_start + info.start
            found[name] = StoredTensor(name, file, info.dtype, info.shape, start)
    return found


def read_header(path: Path) -> SafetensorsHeader:
    """Read and validate the header, and the file's length against it.

    Raises:
        ModelFileError: the file cannot be read, is no safetensors file, contradicts itself, or is
            shorter or longer than its header says (both figures are named).
    """
    try:
        file_bytes = path.stat().st_size
        if file_bytes < 8:  # and no pipe, which may never say a word
            raise _broken(path, f"is not a safetensors file ({file_bytes} bytes)")
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= _MAX_HEADER_BYTES:
                raise _broken(path, f"is not a safetensors file ({file_bytes} bytes)")
            if file_bytes < 8 + length:
                raise _length_error(path, file_bytes, 8 + length, "at least ")
            raw = file.read(length)
    except OSError as error:
        raise ModelFileError(
            f"{path}: cannot be read ({error.strerror or error})", "check the file's permissions"
        ) from error
    entries = _parse(path, raw)
    metadata = _metadata(path, entries.pop("__metadata__", {}))
    tensors = {name: _tensor(path, name, entry) for name, entry in entries.items()}
    data_bytes = _contiguous_bytes(path, tensors)
    if file_bytes != 8 + length + data_bytes:
        raise _length_error(path, file_bytes, 8 + length + data_bytes, "")
    return SafetensorsHeader(tensors, metadata, data_bytes, file_bytes)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    # RecursionError: thousands of nested brackets are valid JSON to the parser until it gives up.
    try:
        entries = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise _broken(path, "has a header that is not JSON") from error
    if not isinstance(entries, dict):
        raise _broken(path, "has a header that is not a JSON object")
    return entries


def _metadata(path: Path, value: object) -> dict[str, str]:
    if not isinstance(value, dict) or not all(isinstance(item, str) for item in value.values()):
        raise _broken(path, "has __metadata__ that is not an object of strings")
    return value


def _tensor(path: Path, name: str, entry: object) -> TensorInfo:
    def broken(what: str) -> ModelFileError:
        return _broken(path, f"has a broken header: tensor {name!r} {what}")

    if not isinstance(entry, dict):
        raise broken("is not an object")
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in _DTYPE_BITS:
        raise broken(f"has dtype {dtype!r}")
    sizes, span = _sizes(shape), _sizes(offsets)
    if sizes is None:
        raise broken(f"has shape {shape!r}")
    if span is None or len(span) != 2:
        raise broken(f"has data_offsets {offsets!r}")
    start, end = span
    bits = prod(sizes) * _DTYPE_BITS[dtype]
    if bits >= 2**63:
        raise broken(f"has impossible shape {shape!r}")
    if end - start != bits / 8:
        raise broken(f"occupies {end - start} bytes, {dtype} {shape} needs {bits / 8:g}")
    return TensorInfo(dtype, sizes, start, end - start)


def _sizes(value: object) -> tuple[int, ...] | None:
    # `type(...) is int`: True and False are integers to isinstance.
    if not isinstance(value, list):
        return None
    fit = all(type(item) is int and 0 <= item < 2**63 for item in value)
    return tuple(value) if fit else None


def _contiguous_bytes(path: Path, tensors: Mapping[str, TensorInfo]) -> int:
    reached = 0
    for tensor in sorted(tensors.values(), key=lambda item: (item.start, item.size_bytes)):
        if tensor.start != reached:
            raise _broken(path, f"has a broken header: data at byte {reached} belongs to no tensor")
        reached += tensor.size_bytes
    return reached


def _broken(path: Path, what: str) -> ModelFileError:
    return ModelFileError(f"{path} {what}", _again(path))


def _length_error(path: Path, actual: int, expected: int, least: str) -> ModelFileError:
    word = "truncated" if actual < expected else "too long"
    return ModelFileError(
        f"{path} is {word}: {actual} bytes, its header says {least}{expected}", _again(path)
    )


def _again(path: Path) -> str:
    target = path.resolve()
    # In the hub cache `path` is a link; only without the file behind it does a download start anew.
    folder = path.parent.resolve()
    cached = target.parent.name == "blobs" and target.parent.parent in folder.parents
    if target == folder / path.name or cached:
        return f"delete {target} and download or copy the file again"
    # Elsewhere a link may lead to what is somebody else's, or to anything at all.
    return f"{path} is a link to {target}: put the right file in its place"


SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE_SINGLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
PICKLE_SUFFIXES = (".bin", ".pt", ".pth")
_SHARD = re.compile(r"model-\d+-of-\d+\.safetensors")
_AGAIN = "download the model again"
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")
_NAMED = 3
_LONGEST_LINE, _LONGEST_NAME = 700, 100


@dataclass(frozen=True)
class WeightFiles:
    """The files to load, in the index's order; `pickled` when they are not safetensors."""

    files: tuple[Path, ...]
    pickled: bool

    @property
    def size_bytes(self) -> int:
        return sum(file.stat().st_size for file in self.files)


def find_weights(folder: Path, *, allow_pickle: bool = False) -> WeightFiles:
    """The weight files of a model folder; every one of them exists.

    Raises:
        ModelFileError: no weights, a shard missing, a broken index, or only pickle files while
            `allow_pickle` is False.
    """
    if (folder / SINGLE).is_file():
        return WeightFiles((folder / SINGLE,), pickled=False)
    if (folder / INDEX).is_file():
        return WeightFiles(_shards(folder / INDEX), pickled=False)
    pickles = sorted(p.name for p in folder.iterdir() if p.suffix in PICKLE_SUFFIXES)
    if pickles and not allow_pickle:
        raise ModelFileError(
            f"{folder}: the only weights are pickle files ({some(pickles)}), which can run code",
            "use a safetensors version of the model, or pass --allow-pickle if you trust it",
        )
    if (folder / PICKLE_SINGLE).is_file():
        return WeightFiles((folder / PICKLE_SINGLE,), pickled=True)
    if (folder / PICKLE_INDEX).is_file():
        return WeightFiles(_shards(folder / PICKLE_INDEX), pickled=True)
    raise _nothing(folder)


def _shards(index: Path) -> tuple[Path, ...]:
    weight_map = read_json_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelFileError(f"{index}: weight_map is missing or empty", _AGAIN)
    names = list(dict.fromkeys(str(name) for name in weight_map.values()))
    for name in names:
        # A shard is a file beside its index; anything else could point out of the folder.
        if Path(name).name != name or "\\" in name:
            raise ModelFileError(f"{index}: {name!r} is not the name of a file beside it", _AGAIN)
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ModelFileError(
            f"{index.parent}: {len(missing)} of {len(names)} weight files are missing: "
            + some(missing),
            _AGAIN,
        )
    return tuple(index.parent / name for name in names)


def _nothing(folder: Path) -> ModelFileError:
    if any(_SHARD.fullmatch(path.name) for path in folder.iterdir()):
        return ModelFileError(f"{folder}: weight shards without their {INDEX}", _AGAIN)
    if (folder / "adapter_config.json").is_file():
        return ModelFileError(
            f"{folder}: is a LoRA adapter, not a whole model", "merge it into its base model first"
        )
    return ModelFileError(
        f"{folder}: no weights (expected {SINGLE} or {INDEX})",
        f"{_AGAIN}, or use --load-format dummy to measure speed with random weights",
    )


def all_named(names: Sequence[str]) -> str:
    """Every tensor's name, those that differ in one number alone as one: `layers.{0-3,7}.norm`.

    Where that is long still, those of numbered layers are one: `model.layers.{0-3}.* (44)`, and of
    those the first few are named.
    """
    numbers: dict[tuple[str, str], list[int]] = {}
    layers: dict[str, list[int]] = {}
    for name in names:
        found = _NUMBER.search(name)
        place = (name[: found.start()], name[found.end() :]) if found else (name, "")
        numbers.setdefault(place, []).extend([int(found[0])] if found else [])
        layers.setdefault(place[0], []).extend([int(found[0])] if found else [])
    line = ", ".join(before + _ranges(found) + after for (before, after), found in numbers.items())
    if len(line) <= _LONGEST_LINE:
        return line
    return some(
        [
            f"{_cut(before)}{_ranges(found)}.* ({len(found)})" if found else _cut(before)
            for before, found in layers.items()
        ]
    )


def _cut(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 3] + "..."


def _ranges(numbers: list[int]) -> str:
    """ "" for none, "7" for one, "{0-3,7}" for more. Equal numbers count once."""
    if len(set(numbers)) < 2:
        return "".join(map(str, numbers[:1]))
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return "{" + ",".join(f"{a}-{b}" if a < b else str(a) for a, b in runs) + "}"


def some(items: list[str], separator: str = ", ") -> str:
    """The first few items as one phrase that says how many more there are."""
    more = len(items) - _NAMED
    return separator.join(items[:_NAMED]) + (f" and {more} more" if more > 0 else "")
