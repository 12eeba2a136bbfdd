"""Headers: what is read, and that no bytes at all lead to anything but a ModelFileError."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from qwencli.errors import ModelFileError
from qwencli.models.weight_files import TensorInfo, read_header, stored_tensors


def pack(header, data=b""):
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(raw).to_bytes(8, "little") + raw + data


@pytest.fixture
def write(tmp_path):
    def write(content):
        path = tmp_path / "model.safetensors"
        path.write_bytes(content)
        return path

    return write


GOOD = {"a": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [0, 12]}}


def test_reads_what_the_library_writes(tmp_path):
    path = tmp_path / "model.safetensors"
    tensors = {
        "w": torch.zeros(4, 5, dtype=torch.bfloat16),
        "b": torch.zeros(3),
        "e": torch.ones(0),
    }
    save_file(tensors, path, metadata={"format": "pt"})
    header = read_header(path)
    assert {name: (info.dtype, info.shape) for name, info in header.tensors.items()} == {
        "w": ("BF16", (4, 5)),
        "b": ("F32", (3,)),
        "e": ("F32", (0,)),
    }
    assert header.metadata == {"format": "pt"}
    assert (header.data_bytes, header.num_parameters) == (40 + 12, 23)
    assert header.file_bytes == path.stat().st_size


def test_a_stored_tensor_lies_where_the_library_wrote_it(tmp_path):
    tensor = torch.arange(6, dtype=torch.bfloat16).view(2, 3)
    save_file({"a": tensor}, tmp_path / "1.safetensors", metadata={"by": "us"})
    save_file({"b": torch.ones(1)}, tmp_path / "2.safetensors")
    found = stored_tensors([tmp_path / "1.safetensors", tmp_path / "2.safetensors"])
    assert found.keys() == {"a", "b"}
    assert (found["a"].dtype, found["a"].shape) == ("BF16", (2, 3))
    raw = bytearray(found["a"].file.read_bytes()[found["a"].start :][:12])
    assert torch.equal(torch.frombuffer(raw, dtype=torch.bfloat16).view(2, 3), tensor)


def test_minimal_file(write):
    header = read_header(write(pack(GOOD, bytes(12))))
    assert header.tensors == {"a": TensorInfo("BF16", (2, 3), 0, 12)}


def test_truncated_names_both_figures(write):
    whole = pack(GOOD, bytes(12))
    with pytest.raises(ModelFileError, match=rf"truncated: {len(whole) - 5} .* says {len(whole)}"):
        read_header(write(whole[:-5]))


def test_cut_inside_the_header(write):
    with pytest.raises(ModelFileError, match="truncated: 20 bytes, its header says at least"):
        read_header(write(pack(GOOD)[:20]))


def test_too_long(write):
    with pytest.raises(ModelFileError, match="too long"):
        read_header(write(pack(GOOD, bytes(13))))


def entry(**changes):
    return {"a": {**GOOD["a"], **changes}}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "not a safetensors file"),
        (b"PK\x03\x04 this is a zip archive, as torch.save writes", "not a safetensors file"),
        (pack(b"{]"), "not JSON"),
        (pack(b"[" * 200_000), "not JSON"),
        (pack(b"\xff\xfe"), "not JSON"),
        (pack([1]), "not a JSON object"),
        (pack({"a": 1}), "is not an object"),
        (pack(entry(dtype="F17")), "dtype 'F17'"),
        (pack(entry(dtype=[])), "dtype"),
        (pack(entry(shape=[2, -3])), "shape"),
        (pack(entry(shape=[True, 6])), "shape"),
        (pack(entry(shape=6)), "shape"),
        (pack(entry(data_offsets=[0])), "data_offsets"),
        (pack(entry(data_offsets=[12, 0])), "occupies -12 bytes"),
        (pack(entry(shape=[2**62] * 400)), "impossible shape"),
        (pack(entry(shape=[2, 4]), bytes(12)), "occupies 12 bytes, BF16 .* needs 16"),
        (pack(entry(dtype="F4", shape=[3], data_offsets=[0, 1]), bytes(1)), "occupies"),
        (pack(entry(data_offsets=[4, 16]), bytes(16)), "byte 0 belongs to no tensor"),
        (pack({**GOOD, "__metadata__": {"x": 1}}, bytes(12)), "__metadata__"),
    ],
)
def test_broken(write, content, expected):
    with pytest.raises(ModelFileError, match=expected) as caught:
        read_header(write(content))
    assert caught.value.hint


def test_unreadable(tmp_path):
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_header(tmp_path)
    with pytest.raises(ModelFileError, match="cannot be read"):
        read_header(tmp_path / "missing.safetensors")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)
ENTRY = st.fixed_dictionaries(
    {},
    optional={
        "dtype": st.sampled_from(["BF16", "F32", "F4", "X"]) | JSON,
        "shape": st.lists(st.integers(-1, 2**70), max_size=4) | JSON,
        "data_offsets": st.lists(st.integers(-1, 2**70), max_size=3) | JSON,
    },
)
FILES = st.one_of(
    st.binary(max_size=200),
    st.binary(max_size=200).map(pack),
    JSON.map(pack),
    st.tuples(st.dictionaries(st.text(), ENTRY | JSON, max_size=4), st.binary(max_size=16)).map(
        lambda parts: pack(*parts)
    ),
)


@given(content=FILES)
def test_no_bytes_lead_to_another_error(tmp_path_factory, content):
    path = tmp_path_factory.getbasetemp() / "fuzzed.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ModelFileError as error:
        assert error.hint
        return
    assert header.file_bytes == len(content)
    assert sum(info.size_bytes for info in header.tensors.values()) == header.data_bytes


def test_nobody_is_told_to_delete_what_is_outside_the_model_folder(tmp_path):
    other, folder = tmp_path / "other" / "precious.txt", tmp_path / "model"
    other.parent.mkdir()
    folder.mkdir()
    other.write_text("not weights at all, and not ours", encoding="utf-8")
    link = folder / "model.safetensors"
    link.symlink_to(other)
    with pytest.raises(ModelFileError) as caught:
        stored_tensors([link])
    assert "delete /" not in caught.value.hint and str(other) in caught.value.hint
    link.unlink()
    link.write_text("not weights at all, but here", encoding="utf-8")
    with pytest.raises(ModelFileError) as caught:
        stored_tensors([link])
    assert f"delete {link}" in caught.value.hint


def test_a_tensor_in_two_files_is_refused(tmp_path):
    files = [tmp_path / "model-1.safetensors", tmp_path / "model-2.safetensors"]
    for file in files:
        file.write_bytes(pack(GOOD, bytes(12)))
    with pytest.raises(ModelFileError) as error:
        stored_tensors(files)
    for named in ("'a'", *(file.name for file in files)):
        assert named in str(error.value)
