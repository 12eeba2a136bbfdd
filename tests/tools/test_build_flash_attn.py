"""The build of flash-attn, without a compiler: each kernel is made or refused; a wheel is made."""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import re
import zipfile
from itertools import product
from pathlib import Path

import pytest

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def build(monkeypatch):
    monkeypatch.syspath_prepend(TOOLS)
    import build_flash_attn

    return build_flash_attn


def test_every_kernel_that_its_interface_names_is_compiled_or_refused(build):
    heads, types = (64, 128), ("bf16",)
    text = build.refusals(heads, types)
    refused = set(re.findall(r"void (\w+)<cutlass::(\w+), (\d+), (\w+)>", text))
    for name in ("run_mha_fwd_", "run_mha_fwd_splitkv_dispatch", "run_mha_bwd_"):
        for kind, head, causal in product(("bfloat16_t", "half_t"), build.CLASSES, (True, False)):
            made = kind == "bfloat16_t" and head in heads and "fwd" in name
            assert ((name, kind, str(head), str(causal).lower()) in refused) is not made
    files = build.kernel_files(heads, types)
    assert len(files) == len(set(files)) == 8
    assert "flash_fwd_split_hdim128_bf16_causal_sm80.cu" in files


def test_the_wheel_records_what_is_in_it(build, tmp_path):
    source, torch = tmp_path / "source", tmp_path / "torch"
    for path, text in {
        "flash_attn/__init__.py": '__version__ = "2.8.3"\n',
        "flash_attn/cute/__init__.py": "",
        "PKG-INFO": "Metadata-Version: 2.1\nName: flash_attn\nVersion: 2.8.3\nSummary: fast\n",
        "LICENSE": "BSD",
    }.items():
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(text)
    torch.mkdir()
    (torch / "version.py").write_text("__version__ = '2.11.0+cu130'\ncuda: str = '13.0'\n")
    library = tmp_path / "flash_attn_2_cuda.cpython-312-x86_64-linux-gnu.so"
    library.write_bytes(b"code")
    setup = build.Setup(
        source, torch, tmp_path, tmp_path, tmp_path, tmp_path, "90", (64, 128), ("bf16",)
    )
    wheel = build.write_wheel(setup, library, "cp312", "2.8.3", tmp_path / "out")
    label = "2.8.3+inference.sm90.cu130torch2.11"
    assert wheel.name == f"flash_attn-{label}-cp312-cp312-linux_x86_64.whl"
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        record = archive.read(f"flash_attn-{label}.dist-info/RECORD").decode()
        rows = {row[0]: row[1] for row in csv.reader(io.StringIO(record))}
        assert set(rows) == names
        assert {"flash_attn/__init__.py", library.name} < names
        assert not any("cute" in name for name in names), "a package of its own"
        assert (
            f"Version: {label}\n" in archive.read(f"flash_attn-{label}.dist-info/METADATA").decode()
        )
        for name, said in rows.items():
            digest = base64.urlsafe_b64encode(hashlib.sha256(archive.read(name)).digest())
            assert not said or said == f"sha256={digest.rstrip(b'=').decode()}"
