"""Which files of a model folder hold the weights. Looks at names and the index, opens no weights.

Follows the order of transformers' `from_pretrained`: one safetensors file, a sharded index, then
pickle files, which are only accepted when asked for because loading one can run code.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from qwencli.errors import ModelFileError
from qwencli.models.json_file import read_json_object

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
